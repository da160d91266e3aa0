//! `remit discover`: processes outside every root that look like AI agents, with the TOML that
//! would register each. 1 when there are any.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{
    Global,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain, plain_lines, talk},
};
use crate::{
    cgroup::CgroupPath,
    daemon,
    doctor::{Known, discover},
};

/// Arguments of `remit discover`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Names and command lines to look for, in place of the built-in list.
    #[arg(long, value_name = "FILE")]
    known: Option<PathBuf>,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let settings = global.settings()?;
    let known =
        Known::load(arguments.known.as_deref()).context("cannot read the list of agents")?;
    let hierarchy = daemon::hierarchy(&settings).map_err(anyhow::Error::from)?;
    let roots: Vec<CgroupPath> = settings
        .enforcement
        .roots
        .iter()
        .filter_map(|root| CgroupPath::new(root).ok())
        .collect();
    let found = discover(&hierarchy, &roots, &known);
    if output.wants_json() {
        output.json(&found)?;
        return Ok(Outcome::of(found.is_empty()));
    }
    for stray in &found {
        output.line(format_args!(
            "{} pid {} of user {} in {}: {}",
            output.paint(Tone::Doubtful, &plain(&stray.looks_like)),
            stray.pid,
            stray.uid,
            plain(&stray.cgroup),
            plain(&stray.command)
        ))?;
        output.line(plain_lines(&stray.toml))?;
        output.line("")?;
    }
    if found.is_empty() {
        talk("no process outside the roots looks like an agent that is known here");
    }
    Ok(Outcome::of(found.is_empty()))
}
