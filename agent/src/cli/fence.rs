//! `remit fence`: what the unit remit-fence.service runs. 0 only when the fence was read back on
//! every root.

use std::io::IsTerminal as _;

use serde::Serialize;
use tracing_subscriber::EnvFilter;

use super::{
    Global,
    format::count,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain, talk},
};
use crate::daemon::{
    Options,
    fence::{self, Stood},
};

/// Arguments of `remit fence`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only make the roots and the folder of the pins where they are missing. The units do this with
    /// more rights than they leave to what follows.
    #[arg(long, conflicts_with = "pins")]
    prepare: bool,
    /// Only print the folder that the fence is pinned in: removing it lifts the fence.
    #[arg(long)]
    pins: bool,
}

/// The fence as JSON.
#[derive(Debug, Serialize)]
struct Report<'f> {
    roots: &'f [String],
    /// `found`, `daemon` or `raised`.
    how: &'static str,
    /// Agents in force, where it was raised.
    agents: Option<usize>,
    /// Why the registry in force is not the one on disk.
    fell_back: Option<&'f str>,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let settings = global.settings()?;
    if arguments.pins {
        output.line(settings.paths.bpffs.display())?;
        return Ok(Outcome::Yes);
    }
    if arguments.prepare {
        fence::prepare(&settings)?;
        return Ok(Outcome::Yes);
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("REMIT_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let fenced = fence::raise(&settings, &Options::default())?;
    let (how, agents, fell_back) = match &fenced.stood {
        Stood::Found => ("found", None, None),
        Stood::Daemon => ("daemon", None, None),
        Stood::Raised { agents, fell_back } => ("raised", Some(*agents), fell_back.as_deref()),
    };
    if output.wants_json() {
        output.json(&Report {
            roots: &fenced.roots,
            how,
            agents,
            fell_back,
        })?;
        return Ok(Outcome::Yes);
    }
    if let Some(why) = fell_back {
        talk(plain(why));
    }
    let words = match &fenced.stood {
        Stood::Found => "it stood already".to_owned(),
        Stood::Daemon => "a daemon looks after it".to_owned(),
        Stood::Raised { agents, .. } => {
            format!("raised, {} in force", count(*agents as u64, "agent"))
        }
    };
    output.line(format_args!(
        "{} {}: {words}",
        output.paint(Tone::Good, "fenced"),
        plain(&fenced.roots.join(", ")),
    ))?;
    Ok(Outcome::Yes)
}
