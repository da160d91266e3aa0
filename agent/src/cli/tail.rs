//! `remit tail`: violations out of the log, which needs no daemon. The line for people is derived
//! from the line in the file.

use std::{thread, time::Duration};

use anyhow::Context as _;

use super::{
    Global, format,
    outcome::{Failure, Outcome, Result},
    output::{self, Output},
};
use crate::audit::{
    LogName, human,
    tail::{self, Filter, Tail},
};

/// How soon a new line is seen: soon enough for a person, rare enough for a laptop.
const PAUSE: Duration = Duration::from_millis(200);

/// Arguments of `remit tail`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Go on, and print new lines as they come.
    #[arg(short, long)]
    follow: bool,
    /// Those of this agent alone; `unregistered` for processes that no agent claims.
    #[arg(long, value_name = "ID")]
    agent: Option<String>,
    /// Those from a time on: a duration such as 10m, or 2026-11-24T18:00:00Z. Rotated files are
    /// read too; without this only the current one is.
    #[arg(long, value_name = "T")]
    since: Option<String>,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let since = match &arguments.since {
        None => None,
        Some(text) => {
            let now = jiff::Timestamp::now().as_millisecond();
            let since = tail::since(text, now);
            Some(since.map_err(|error| Failure::usage(error.to_string()))?)
        }
    };
    let path = global
        .settings()?
        .paths
        .log
        .join(LogName::Violations.file());
    let filter = Filter {
        agent: arguments.agent.clone(),
        since,
    };
    let mut tail = Tail::open(&path, filter).context("cannot read the violations")?;
    loop {
        let lines = tail.read().context("cannot read the violations")?;
        let end = lines.is_empty();
        for line in lines {
            if output.wants_json() {
                output.line(line.raw)?;
            } else {
                output.line(human(&line.event, output.colour()))?;
            }
        }
        if output.is_closed() || (end && !arguments.follow) {
            break;
        }
        if end {
            thread::sleep(PAUSE);
        }
    }
    match tail.take_skipped() {
        0 => {}
        skipped => output::talk(format_args!(
            "{} in `{}` could not be read as JSON",
            format::count(skipped, "line"),
            path.display()
        )),
    }
    Ok(Outcome::Yes)
}
