//! The command line: what can be asked, and nothing of how it is done. The doc comments are the
//! help texts. Each command has a file of its own, and only [`output`] prints.

mod agents;
mod check;
mod compiled;
mod daemon;
mod destination;
mod discover;
mod doctor;
mod explain;
mod explain_ask;
mod explain_last;
mod explain_name;
mod explain_way;
mod fence;
mod format;
mod guard;
mod init;
mod lifecycle;
mod log;
mod outcome;
mod output;
mod probe;
mod reconcile;
mod reload;
mod run;
mod status;
mod support;
mod tail;
mod top;

use std::{ffi::OsString, path::Path, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};

use outcome::Result;
use output::Output;

use crate::{
    control::client::Client,
    daemon::settings::{Settings, SettingsError},
};

/// Makes an AI agent's registry entry what the kernel enforces.
///
/// Exit codes: 0 done, allowed, valid, healthy; 1 the answer is no (denied, invalid, drift, not
/// enforcing); 2 wrong usage; 3 it could not be told (no daemon, for example).
#[derive(Debug, Parser)]
#[command(name = "remit", version, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// Settings to use instead of /etc/remit/remit.toml.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "REMIT_CONFIG",
        hide_env_values = true
    )]
    config: Option<OsString>,
    /// Print stable JSON on stdout.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enforce the registry: load the fence, keep it true, write down what it refuses.
    Daemon(daemon::Arguments),
    /// See to it that the fence stands, and end: for the boot, before the daemon.
    Fence(fence::Arguments),
    /// Run a command as an agent, and exit as it does.
    Run(run::Arguments),
    /// Compile the registry offline and print the findings.
    Check(check::Arguments),
    /// Say whether an agent may reach a destination, by which entry and why.
    Explain(explain::Arguments),
    /// Say whether this host enforces: each guard and each agent, read back from the kernel.
    Status(status::Arguments),
    /// Say whether a unit's or any other cgroup is fenced and its agent active.
    Guard(guard::Arguments),
    /// Print the registry as it is in force.
    Agents(agents::Arguments),
    /// Print violations, one line each.
    Tail(tail::Arguments),
    /// Show agents, rates and violations live, in the terminal.
    Top(top::Arguments),
    /// Check the audit trail, or search the logs.
    #[command(subcommand)]
    Log(log::Command),
    /// Take everything from an agent, at once, until it is resumed.
    Suspend(lifecycle::Hold),
    /// End a suspension.
    Resume(lifecycle::Resume),
    /// Take everything from an agent until its file is changed and approved anew.
    Revoke(lifecycle::Hold),
    /// Compile the registry and swap it in.
    Reload(reload::Arguments),
    /// Compare the registry with what the kernel has, and list each difference.
    Reconcile(reconcile::Arguments),
    /// Say whether this host can enforce, what is missing, and how an agent could get out.
    Doctor,
    /// Take the first steps on a host: look at it, and write the entry of a first agent.
    Init(init::Arguments),
    /// List processes outside every root that look like AI agents.
    ///
    /// By what they execute; and where `discover.traffic` is on in the settings, by the model APIs that
    /// the daemon saw them reach, also those that have ended.
    Discover(discover::Arguments),
    /// Try the fence from inside an agent's cgroup.
    Probe(probe::Arguments),
    /// What a probe starts inside the fence; orders come on standard input.
    #[command(hide = true)]
    ProbeHelper,
    /// Print a completion script for a shell.
    Completions(support::Completions),
    /// Print the manual page.
    Man(support::Man),
}

/// Runs the command that `arguments` (the program's name first) ask for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return output::parser(&error).into(),
    };
    let outcome = arguments.global.run(arguments.command);
    outcome
        .unwrap_or_else(|failure| {
            output::failure(&failure);
            failure.outcome
        })
        .into()
}

// === impl Global ===

impl Global {
    fn run(&self, command: Command) -> Result {
        if matches!(command, Command::ProbeHelper) {
            return probe::help();
        }
        let output = Output::new(self.json);
        // What a `remit run` that was killed left behind, once nothing runs in it any more.
        if let Ok(settings) = self.load_settings() {
            for name in crate::daemon::standalone::sweep(&settings) {
                output::talk(format!("swept the fence that run {name} left behind"));
            }
        }
        match command {
            Command::Daemon(arguments) => daemon::run(self, &arguments),
            Command::Fence(arguments) => fence::run(self, &arguments, &output),
            Command::Run(arguments) => run::run(self, arguments),
            Command::Check(arguments) => check::run(self, &arguments, &output),
            Command::Explain(arguments) => explain::run(self, &arguments, &output),
            Command::Status(arguments) => status::run(self, &arguments, &output),
            Command::Guard(arguments) => guard::run(self, &arguments, &output),
            Command::Agents(arguments) => agents::run(self, &arguments, &output),
            Command::Tail(arguments) => tail::run(self, &arguments, &output),
            Command::Top(arguments) => top::run(self, &arguments, &output),
            Command::Log(command) => log::run(self, &command, &output),
            Command::Suspend(arguments) => lifecycle::suspend(self, arguments, &output),
            Command::Resume(arguments) => lifecycle::resume(self, arguments, &output),
            Command::Revoke(arguments) => lifecycle::revoke(self, arguments, &output),
            Command::Reload(arguments) => reload::run(self, &arguments, &output),
            Command::Reconcile(arguments) => reconcile::run(self, &arguments, &output),
            Command::Doctor => doctor::run(self, &output),
            Command::Init(arguments) => init::run(self, arguments, &output),
            Command::Discover(arguments) => discover::run(self, &arguments, &output),
            Command::Probe(arguments) => probe::run(self, &arguments, &output),
            Command::ProbeHelper => probe::help(),
            Command::Completions(arguments) => support::completions(&arguments, &output),
            Command::Man(arguments) => support::man(&arguments, &output),
        }
    }

    /// The settings in force for this command.
    fn settings(&self) -> Result<Settings> {
        Ok(self.load_settings()?)
    }

    fn load_settings(&self) -> std::result::Result<Settings, SettingsError> {
        // An empty variable is one that is not set.
        let config = self.config.as_deref().filter(|path| !path.is_empty());
        Settings::load(config.map(Path::new))
    }

    /// A client for the daemon that the settings name.
    fn client(&self) -> Result<Client> {
        client(&self.settings()?)
    }
}

fn client(settings: &Settings) -> Result<Client> {
    use anyhow::Context as _;
    let socket = settings.socket();
    Ok(Client::new(&socket).context("cannot start a runtime for the control socket")?)
}

/// The definitions, for what is made out of them.
fn definitions() -> clap::Command {
    Arguments::command()
}
