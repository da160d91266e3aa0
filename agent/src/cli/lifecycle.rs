//! `remit suspend`, `remit resume`, `remit revoke`: what an agent is from now on, whatever its file
//! says. 0 when it is so, also when it was so before; 1 when the daemon knows why not.

use super::{
    Global,
    agents::segment,
    format,
    outcome::{Failure, Outcome, Result},
    output::{Output, Tone, plain, warning},
};
use crate::control::{
    client::ClientError,
    protocol::{Code, Held, HoldReason, HoldRequest},
};

/// Arguments of `remit suspend` and `remit revoke`.
#[derive(Debug, clap::Args)]
pub(super) struct Hold {
    #[command(flatten)]
    resume: Resume,
    /// Kill all its processes as well.
    #[arg(long, conflicts_with = "freeze")]
    kill: bool,
    /// Freeze all its processes as well, until it is resumed.
    #[arg(long)]
    freeze: bool,
}

/// Arguments of `remit resume`.
#[derive(Debug, clap::Args)]
pub(super) struct Resume {
    /// The agent.
    #[arg(value_name = "ID")]
    id: String,
    /// Why: for the audit log, and for whoever asks later. 1024 bytes at most.
    #[arg(long, value_name = "TEXT")]
    reason: HoldReason,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Suspend,
    Resume,
    Revoke,
}

pub(super) fn suspend(global: &Global, arguments: Hold, output: &Output) -> Result {
    arguments.ask(global, Change::Suspend, output)
}

pub(super) fn revoke(global: &Global, arguments: Hold, output: &Output) -> Result {
    arguments.ask(global, Change::Revoke, output)
}

pub(super) fn resume(global: &Global, arguments: Resume, output: &Output) -> Result {
    let body = HoldRequest {
        reason: arguments.reason,
        kill: false,
        freeze: false,
    };
    ask(global, Change::Resume, &arguments.id, &body, output)
}

fn ask(global: &Global, change: Change, id: &str, body: &HoldRequest, output: &Output) -> Result {
    let path = format!("/agents/{}/{}", segment(id), change.path());
    let held: Held = global.client()?.post_json(&path, body).map_err(refused)?;
    if output.wants_json() {
        output.json(&held)?;
    } else {
        print(change, body, &held, output)?;
    }
    Ok(Outcome::of(change.came_to(&held.after)))
}

/// What the state of things forbids is a no: a revoked agent is not resumed.
fn refused(error: ClientError) -> Failure {
    let conflict =
        matches!(&error, ClientError::Refused(refusal) if refusal.code == Code::Conflict);
    let mut failure = Failure::from(error);
    if conflict {
        failure.outcome = Outcome::No;
    }
    failure
}

fn print(change: Change, asked: &HoldRequest, held: &Held, output: &Output) -> Result<()> {
    let id = output.paint(Tone::Strong, &plain(&held.id));
    let (before, after) = (plain(&held.before), plain(&held.after));
    let came = if before == after {
        format!("{after} as before")
    } else {
        format!("{before} before, {after} now")
    };
    output.line(format_args!("{id}: {came}, revision {}", held.revision))?;
    output.line(format_args!("  reason {}", plain(&held.reason)))?;
    output.line(format_args!("  connections closed: {}", held.closed))?;
    if asked.kill || held.killed > 0 {
        output.line(format_args!("  processes killed: {}", held.killed))?;
    }
    if asked.freeze || held.frozen > 0 {
        let what = match change {
            Change::Suspend | Change::Revoke => "frozen",
            Change::Resume => "thawed",
        };
        output.line(format_args!("  processes {what}: {}", held.frozen))?;
    }
    if held.durable {
        output.line("  on disk: it survives a restart")?;
    } else {
        warning("not on disk: it is in force, but a restart of the daemon would undo it");
    }
    for text in &held.warnings {
        warning(plain(text));
    }
    if !change.came_to(&held.after) {
        warning(format_args!("{} is {after} all the same", plain(&held.id)));
    }
    Ok(())
}

// === impl Hold ===

impl Hold {
    fn ask(self, global: &Global, change: Change, output: &Output) -> Result {
        let body = HoldRequest {
            reason: self.resume.reason,
            kill: self.kill,
            freeze: self.freeze,
        };
        ask(global, change, &self.resume.id, &body, output)
    }
}

// === impl Change ===

impl Change {
    const fn path(self) -> &'static str {
        match self {
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Revoke => "revoke",
        }
    }

    /// Whether a state is what was asked for. To be revoked is to be suspended and more.
    fn came_to(self, state: &str) -> bool {
        match self {
            Self::Suspend => matches!(state, "suspended" | "revoked"),
            Self::Resume => !matches!(state, "suspended" | "revoked"),
            Self::Revoke => state == "revoked",
        }
    }
}

/// Who holds an agent, since when and why, on one line.
pub(super) fn hold_line(hold: &crate::control::protocol::HoldInfo) -> String {
    let frozen = if hold.frozen {
        ", processes frozen"
    } else {
        ""
    };
    format!(
        "{} since {} by {}{frozen}: {}",
        plain(&hold.state),
        format::time(hold.since_ms),
        plain(&hold.by),
        plain(&hold.reason)
    )
}
