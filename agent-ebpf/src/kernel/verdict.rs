//! From a decision to what a hook does, as plain numbers: the functions that call [`rule`] are
//! never inlined, so that what the verifier learned inside them does not multiply with what the
//! hook does next.

use agent_ebpf::{
    abi::{AgentRow, Cause, Event, NO_ENTRY, Reason, Verdict},
    decide::{Attempt, Decision, decide},
    verifier::{hide, hide8, hide32},
};

use super::maps::{FindPeer, Tables};

/// A decision, flat.
pub struct Ruling {
    /// See [`Decision::Allow`].
    pub until: u64,
    /// The entry that decided.
    pub entry: u32,
    /// 0 allow, or a [`Verdict`].
    pub verdict: u8,
    /// A [`Reason`], or 0.
    pub reason: u8,
    /// A [`Cause`].
    pub cause: u8,
    /// 1 if it may be cached.
    pub cacheable: u8,
}

/// [`Ruling::verdict`] of an allow.
pub const ALLOW: u8 = 0;

impl Ruling {
    /// Nothing known yet, which denies.
    pub const fn fault(cause: Cause) -> Self {
        Self {
            until: 0,
            entry: NO_ENTRY,
            verdict: Verdict::Denied as u8,
            reason: Reason::Fault as u8,
            cause: cause as u8,
            cacheable: 0,
        }
    }

    /// A refusal.
    pub const fn deny(reason: Reason) -> Self {
        Self {
            until: 0,
            entry: NO_ENTRY,
            verdict: Verdict::Denied as u8,
            reason: reason as u8,
            cause: 0,
            cacheable: 0,
        }
    }

    /// Writes the ruling into an event.
    #[inline(always)]
    pub fn fill(&self, event: &mut Event) {
        event.verdict = self.verdict;
        event.reason = self.reason;
        event.cause = self.cause;
        event.entry = self.entry;
    }
}

/// Asks [`decide`]. No `_` arm: a new word must be handled here.
#[inline(always)]
pub fn rule<P: FindPeer>(
    tables: &Tables<P>,
    row: &AgentRow,
    attempt: &Attempt,
    ruling: &mut Ruling,
) {
    let (verdict, reason, cause, entry, until, cacheable) = match decide(tables, row, attempt) {
        Decision::Allow {
            entry,
            until,
            cacheable,
        } => (ALLOW, 0, 0, entry, until, cacheable as u8),
        Decision::Monitor { reason, entry } => {
            (Verdict::Monitored as u8, reason as u8, 0, entry, 0, 0)
        }
        Decision::Deny { reason, entry } => (Verdict::Denied as u8, reason as u8, 0, entry, 0, 0),
        Decision::Fault(cause) => (
            Verdict::Denied as u8,
            Reason::Fault as u8,
            cause as u8,
            NO_ENTRY,
            0,
            0,
        ),
    };
    ruling.verdict = hide8(verdict);
    ruling.reason = hide8(reason);
    ruling.cause = hide8(cause);
    ruling.entry = hide32(entry);
    ruling.until = hide(until);
    ruling.cacheable = hide8(cacheable);
}
