//! `remit run`: starts a command as an agent, and exits as the command does.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Context as _;

use super::{
    Global, client, compiled,
    outcome::{Failure, Outcome, Result},
    output,
};
use crate::{
    audit::human,
    cgroup::Hierarchy,
    control::protocol::{RunGrant, RunRequest},
    daemon::{
        settings::{CgroupMount, Settings},
        standalone::Standalone,
    },
    launch::{self, Child, Launch, Options, Scope, Signals},
};

/// Arguments of `remit run`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Run it in a cgroup of this agent, whatever its lifecycle state; the daemon enforces.
    #[arg(
        long,
        value_name = "ID",
        conflicts_with = "policy",
        required_unless_present = "policy"
    )]
    agent: Option<String>,
    /// Enforce this registry entry for as long as it runs, its names too; no daemon is needed.
    /// Prints the violations afterwards.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Run it as root although sudo says who is behind.
    #[arg(long)]
    as_root: bool,
    /// The command and its arguments, after `--`.
    #[arg(
        value_name = "CMD",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<OsString>,
}

pub(super) fn run(global: &Global, arguments: Arguments) -> Result {
    let settings = global.settings()?;
    let options = Options {
        as_root: arguments.as_root,
        ..Options::default()
    };
    // First what leaves no trace: a command that is not there needs no cgroup.
    let launch = Launch::prepare(arguments.command, options)?;
    match (arguments.agent, arguments.policy) {
        (Some(agent), _) => as_agent(&settings, agent, &launch),
        (None, Some(policy)) => alone(&settings, policy, &launch),
        (None, None) => Err(Failure::usage("give `--agent ID` or `--policy FILE`")),
    }
}

/// Under a fence of its own, which lives as long as the command.
fn alone(settings: &Settings, policy: PathBuf, launch: &Launch) -> Result {
    let compiled = compiled::compile(settings, std::slice::from_ref(&policy));
    for finding in &compiled.compilation.findings {
        output::talk(finding);
    }
    for unread in &compiled.unread {
        output::talk(format!("error: {unread}"));
    }
    if !compiled.is_good() {
        return Err(
            Failure::no(format!("`{}` cannot be enforced", policy.display()))
                .help("nothing was started"),
        );
    }
    let Some(tables) = compiled.compilation.agents.first() else {
        return Err(Failure::no(format!(
            "`{}` holds no agent",
            policy.display()
        )));
    };

    let mut signals = Signals::catch()?;
    let description = format!("Agent {}, by remit run", tables.id);
    let fence = Standalone::raise(settings, &compiled.compilation, tables)?;
    if let Some(signal) = signals.interrupted() {
        fence.end()?;
        return Ok(Outcome::Child(
            u8::try_from(128 + signal).unwrap_or(u8::MAX),
        ));
    }
    let ended = launch
        .spawn(fence.hierarchy(), fence.cgroup())
        .and_then(|mut child| {
            signals.forward_to(&child)?;
            if let Some(scope) = fence.scope() {
                adopt(&mut child, &scope, &description)?;
            }
            child.wait()
        });
    // Whatever became of the command, nothing in its cgroup outlives the fence.
    let lines = fence.end()?;
    for line in &lines {
        output::talk(human(line, false));
    }
    Ok(Outcome::Child(ended?.code))
}

/// In a cgroup that the daemon makes and claims for the agent.
fn as_agent(settings: &Settings, agent: String, launch: &Launch) -> Result {
    let hierarchy = hierarchy(settings)?;
    let mut signals = Signals::catch()?;
    let description = format!("Agent {agent}, by remit run");
    let grant: RunGrant = client(settings)?.post_json("/run", &RunRequest { agent })?;
    let cgroup = hierarchy.path_below(&grant.cgroup).with_context(|| {
        let (cgroup, mount) = (grant.cgroup.display(), hierarchy.mount().display());
        format!("the daemon's cgroup `{cgroup}` is not below `{mount}`")
    })?;
    if let Some(signal) = signals.interrupted() {
        return Ok(Outcome::Child(
            u8::try_from(128 + signal).unwrap_or(u8::MAX),
        ));
    }
    let mut child = launch.spawn(&hierarchy, &cgroup)?;
    signals.forward_to(&child)?;
    // Where the agent's selector leads to a place where a scope can be.
    let scope = match Scope::at(&cgroup).filter(|_| launch::is_managed()) {
        Some(scope) => adopt(&mut child, &scope, &description)?.then_some(scope),
        None => None,
    };
    let exit = child.wait()?;
    // What the command left running stays fenced, and keeps its cgroup.
    match scope {
        // Systemd's to clear away: one whose cgroup goes before systemd has seen it empty is waited
        // for until its time to stop is over, a minute and a half. It may be gone already.
        Some(scope) => {
            let left = hierarchy.processes(&cgroup, true);
            if left.is_ok_and(|left| left.is_empty()) {
                drop(scope.end());
            }
        }
        None => drop(hierarchy.remove(&cgroup)),
    }
    Ok(Outcome::Child(exit.code))
}

/// Has systemd make a scope of the command's cgroup, and says whether it did. It is fenced either way.
fn adopt(
    child: &mut Child,
    scope: &Scope,
    description: &str,
) -> std::result::Result<bool, launch::Error> {
    let Err(error) = scope.adopt(child.pid(), description) else {
        return Ok(true);
    };
    // One that has ended needs none.
    if child.try_wait()?.is_none() {
        let why = format!("{:#}", anyhow::Error::from(error));
        output::talk(format_args!(
            "note: the command runs in a cgroup that systemd does not know: {}",
            output::plain(&why)
        ));
    }
    Ok(false)
}

fn hierarchy(settings: &Settings) -> Result<Hierarchy> {
    let mount = match &settings.paths.cgroup {
        CgroupMount::Auto => None,
        CgroupMount::At(path) => Some(path.as_path()),
    };
    Ok(Hierarchy::find(mount).context("cannot find cgroup v2")?)
}

/// A command that is not there or not executable exits as a shell would have it.
impl From<launch::Error> for Failure {
    fn from(error: launch::Error) -> Self {
        Self {
            outcome: error.exit_code().map_or(Outcome::Unknown, Outcome::Child),
            error: error.into(),
            help: None,
        }
    }
}
