//! `remit daemon`: enforces, or with `--detach-all` stops enforcing.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use super::{
    Global,
    outcome::{Failure, Outcome, Result},
    output,
};
use crate::daemon::{self, DaemonError, Options};

/// Arguments of `remit daemon`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Have the kernel programs say what they do, for debugging: off, error, warn, info, debug or
    /// trace.
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = KernelLog::Off)]
    kernel_log: KernelLog,
    /// Lift the fence that a stopped daemon left in force: the only way to stop enforcing. For root
    /// alone; asks twice, and is written to the audit log.
    #[arg(long)]
    detach_all: bool,
    /// Don't ask.
    #[arg(long, requires = "detach_all")]
    yes: bool,
}

/// Levels of aya-log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum KernelLog {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl KernelLog {
    const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> Result {
    let settings = global.settings()?;
    if arguments.detach_all {
        if !nix::unistd::geteuid().is_root() {
            return Err(Failure::no("only root may lift the fence").help("try sudo"));
        }
        if !arguments.yes && !confirmed()? {
            return Err(Failure::no("nothing was lifted"));
        }
        let removed = daemon::detach_all(&settings)?;
        for path in &removed {
            output::talk(format!("removed {}", path.display()));
        }
        if removed.is_empty() {
            output::talk("there was no fence to lift");
        }
        return Ok(Outcome::Yes);
    }
    let filter = EnvFilter::try_from_env("REMIT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // The programs' lines come under the name of their crate.
    let filter = match arguments.kernel_log {
        KernelLog::Off => filter,
        level => filter.add_directive(
            format!("agent_ebpf={}", level.name())
                .parse()
                .context("cannot filter the programs' log")?,
        ),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let options = Options {
        kernel_log: arguments.kernel_log as u8,
        ..Options::default()
    };
    daemon::run(settings, options)?;
    Ok(Outcome::Yes)
}

/// Asks twice, on a terminal only.
fn confirmed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "lifting the fence needs `--yes` where nobody can be asked",
        ));
    }
    let mut lines = std::io::stdin().lock().lines();
    for question in [
        "Every agent on this host will be able to reach everything. Lift the fence? [yes/no] ",
        "Really? Type `lift` to go on: ",
    ] {
        let mut terminal = std::io::stderr();
        write!(terminal, "{question}").map_err(anyhow::Error::from)?;
        terminal.flush().map_err(anyhow::Error::from)?;
        let answer = lines
            .next()
            .transpose()
            .map_err(anyhow::Error::from)?
            .unwrap_or_default();
        let wanted = if question.starts_with("Really") {
            "lift"
        } else {
            "yes"
        };
        if answer.trim() != wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Invalid input is a no; whatever else keeps the daemon from starting, it could not be told.
impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        let outcome = match error {
            DaemonError::Registry(_) | DaemonError::SelfTest(_) => Outcome::No,
            _ => Outcome::Unknown,
        };
        Self {
            outcome,
            error: error.into(),
            help: None,
        }
    }
}
