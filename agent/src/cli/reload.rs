//! `remit reload`: has the daemon compile the registry and swap it in. 1 when a file was bad.

use super::{
    Global, format,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain, plain_lines},
};
use crate::control::protocol::{Reload, ReloadRequest};

/// Arguments of `remit reload`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Take the wall clock as it is now, although it is behind the latest time ever seen. Grants
    /// that had expired could come back.
    #[arg(long)]
    accept_clock: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let request = ReloadRequest {
        accept_clock: arguments.accept_clock,
    };
    let reload: Reload = global.client()?.post_json("/reload", &request)?;
    let outcome = Outcome::of(reload.ok);
    if output.wants_json() {
        output.json(&reload)?;
        return Ok(outcome);
    }
    for finding in &reload.findings {
        output.line(format_args!("{}\n", plain_lines(finding)))?;
    }
    let changed = match reload.changed.len() as u64 {
        0 => "nothing changed".to_owned(),
        number => format!(
            "{} changed: {}",
            format::count(number, "agent"),
            names(&reload.changed)
        ),
    };
    let revision = output.paint(Tone::Strong, &format!("revision {}", reload.revision));
    output.line(format_args!("{revision} in force, {changed}"))?;
    if !reload.kept.is_empty() {
        let kept = output.paint(Tone::Bad, "last good entry kept");
        output.line(format_args!("{kept}: {}", names(&reload.kept)))?;
    }
    if reload.closed > 0 {
        let closed = format::count(reload.closed, "connection");
        output.line(format_args!("{closed} closed, no grant is left for them"))?;
    }
    Ok(outcome)
}

fn names(ids: &[String]) -> String {
    plain(&ids.join(", "))
}
