//! From a decision to what a hook does. No `_` arm: a new word must be handled here.

use agent_ebpf::{
    abi::{Cause, Event, NO_ENTRY, Reason, Verdict},
    decide::Decision,
};

/// What the hook does.
pub enum Outcome {
    /// Let it through.
    Pass { until: u64, cacheable: bool },
    /// Let it through, and report it.
    PassReported,
    /// Refuse it, and report it.
    Refuse,
}

/// Writes the decision into the event and says what to do.
#[inline(always)]
pub fn settle(decision: Decision, event: &mut Event) -> Outcome {
    match decision {
        Decision::Allow {
            until, cacheable, ..
        } => Outcome::Pass { until, cacheable },
        Decision::Monitor { reason, entry } => {
            event.verdict = Verdict::Monitored as u8;
            event.reason = reason as u8;
            event.entry = entry;
            Outcome::PassReported
        }
        Decision::Deny { reason, entry } => {
            event.verdict = Verdict::Denied as u8;
            event.reason = reason as u8;
            event.entry = entry;
            Outcome::Refuse
        }
        Decision::Fault(cause) => {
            event.verdict = Verdict::Denied as u8;
            event.reason = Reason::Fault as u8;
            event.entry = NO_ENTRY;
            event.cause = cause as u8;
            Outcome::Refuse
        }
    }
}

/// The decision on an agent without a row, and the policy id to report it with.
#[inline(always)]
pub fn no_row() -> (Decision, u64) {
    (Decision::Fault(Cause::NoRow), 0)
}
