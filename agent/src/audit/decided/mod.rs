//! What was decided about agents and by the daemon: the events of `audit.jsonl`. Pure.

mod actor;
mod daemon;
mod finding;
mod lifecycle;
mod probe;
mod registry;

use serde_json::Value;

pub use self::{
    actor::Actor,
    daemon::{FenceLifted, Refenced, Succession, Tables},
    finding::{ClockBehind, Damaged, Difference, Drifted, Mending},
    lifecycle::{Change, Lifecycle},
    probe::{ProbeResult, ProbeRun},
    registry::{ClockAccepted, ClockStepped},
};
use super::{
    ocsf::Host,
    text::{NAME_BYTES, clean},
};
use crate::policy::tables::UnixMillis;

/// Longest text kept of one finding or reason, in bytes. Escapes can make a text longer than it
/// came, so a reason of the greatest length may be cut.
const TEXT_BYTES: usize = 1_024;
/// Texts kept in one list; the rest is counted.
const TEXTS: usize = 50;

/// An event of `audit.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// When.
    pub time: UnixMillis,
    /// What.
    pub what: Decision,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The daemon enforces: programs are attached, maps filled and read back.
    Started {
        /// Its process id.
        pid: u32,
        /// The roots that it governs.
        roots: Vec<String>,
        /// The revision in force.
        revision: u64,
        /// Whether it found the fence standing and took it over.
        adopted: bool,
    },
    /// The daemon ends. The fence stays.
    Stopped {
        /// Its process id.
        pid: u32,
        /// Why: `SIGTERM`, or an error.
        reason: String,
        /// The revision that stays in force.
        revision: u64,
    },
    /// A registry is in force.
    Loaded {
        /// Its revision.
        revision: u64,
        /// Agents in it.
        agents: usize,
        /// Warnings, one message each.
        warnings: Vec<String>,
        /// TCP connections closed because no grant is left for them.
        closed: u64,
    },
    /// A registry was refused, all of it or some files.
    Refused {
        /// The revision in force now.
        revision: u64,
        /// Agents that keep their last good entry, or are denied, for their files are bad.
        agents: Vec<String>,
        /// Errors, one message each.
        errors: Vec<String>,
        /// TCP connections closed because no grant is left for them.
        closed: u64,
    },
    /// An agent was suspended, resumed or revoked, or that was refused.
    Lifecycle(Box<Lifecycle>),
    /// Registry and kernel differ, or do no more.
    Drifted(Box<Drifted>),
    /// An agent's fence was tried from inside.
    Probed(Box<ProbeRun>),
    /// A state file cannot be trusted.
    Damaged(Damaged),
    /// The wall clock is behind the latest time ever seen.
    ClockBehind(ClockBehind),
    /// The wall clock was set.
    ClockStepped(ClockStepped),
    /// A wall clock that is behind was accepted.
    ClockAccepted(ClockAccepted),
    /// A standing fence was taken over.
    Succession(Succession),
    /// A root was fenced again, or could not be.
    Refenced(Refenced),
    /// The fence was taken down.
    FenceLifted(FenceLifted),
}

impl Decided {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let time = self.time;
        let (envelope, fields) = match &self.what {
            Decision::Started {
                pid,
                roots,
                revision,
                adopted,
            } => daemon::started(*pid, roots, *revision, *adopted, time),
            Decision::Stopped {
                pid,
                reason,
                revision,
            } => daemon::stopped(*pid, reason, *revision, time),
            Decision::Loaded {
                revision,
                agents,
                warnings,
                closed,
            } => registry::loaded(*revision, *agents, warnings, *closed, time),
            Decision::Refused {
                revision,
                agents,
                errors,
                closed,
            } => registry::refused(*revision, agents, errors, *closed, time),
            Decision::Lifecycle(lifecycle) => lifecycle.event(time),
            Decision::Drifted(drifted) => drifted.event(time),
            Decision::Probed(probe) => probe.event(time),
            Decision::Damaged(damaged) => damaged.event(time),
            Decision::ClockBehind(behind) => behind.event(time),
            Decision::ClockStepped(stepped) => stepped.event(time),
            Decision::ClockAccepted(accepted) => accepted.event(time),
            Decision::Succession(succession) => succession.event(time),
            Decision::Refenced(refenced) => refenced.event(time),
            Decision::FenceLifted(lifted) => lifted.event(time),
        };
        let mut event = envelope.build(host, sequence);
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        Value::Object(event)
    }
}

fn cleaned(text: &str) -> String {
    clean(text.as_bytes(), TEXT_BYTES)
}

fn bounded(texts: &[String]) -> Vec<String> {
    texts.iter().take(TEXTS).map(|text| cleaned(text)).collect()
}

fn names(agents: &[String]) -> Vec<String> {
    agents
        .iter()
        .map(|agent| clean(agent.as_bytes(), NAME_BYTES))
        .collect()
}

/// A span of milliseconds as people say it, in its two largest units: `1 d 2 h`, `90 ms`.
fn span(millis: i64) -> String {
    const UNITS: [(i64, &str); 5] = [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "min"),
        (1_000, "s"),
        (1, "ms"),
    ];
    let mut rest = millis.max(0);
    let mut words = Vec::new();
    for (length, unit) in UNITS {
        let (count, left) = (rest / length, rest % length);
        if count > 0 {
            words.push(format!("{count} {unit}"));
            rest = left;
        }
        // Two units that follow each other, and no more.
        if words.len() == 2 || (count == 0 && !words.is_empty()) {
            break;
        }
    }
    if words.is_empty() {
        return "0 ms".to_owned();
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_in_their_two_largest_units() {
        for (millis, text) in [
            (-5, "0 ms"),
            (0, "0 ms"),
            (90, "90 ms"),
            (61_500, "1 min 1 s"),
            (3_600_500, "1 h"),
            (86_400_000, "1 d"),
            (93_784_000, "1 d 2 h"),
        ] {
            assert_eq!(span(millis), text);
        }
    }
}
