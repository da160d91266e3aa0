//! `remit run`: starts a command as an agent, and exits as the command does.

use std::ffi::OsString;

use anyhow::Context as _;

use super::{
    Global, client,
    outcome::{Failure, Outcome, Result},
};
use crate::{
    cgroup::Hierarchy,
    control::protocol::{RunGrant, RunRequest},
    daemon::settings::{CgroupMount, Settings},
    launch::{self, Launch, Options, Signals},
};

/// Arguments of `remit run`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Run it in a cgroup of this agent, whatever its lifecycle state.
    #[arg(long, value_name = "ID", required = true)]
    agent: String,
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
    as_agent(&settings, arguments.agent, &launch)
}

/// In a cgroup that the daemon makes and claims for the agent.
fn as_agent(settings: &Settings, agent: String, launch: &Launch) -> Result {
    let hierarchy = hierarchy(settings)?;
    let mut signals = Signals::catch()?;
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
    let exit = child.wait()?;
    // What the command left running stays fenced, and keeps its cgroup; then the daemon removes it
    // when it is empty.
    drop(hierarchy.remove(&cgroup));
    Ok(Outcome::Child(exit.code))
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
