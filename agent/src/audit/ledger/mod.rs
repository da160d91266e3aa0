//! How many attempts each line stands for, so that for each agent, verdict and reason the counts
//! of all lines add up to the kernel's counter: exactly, and at no time to more. Pure; the clock
//! is an argument.
//!
//! What the kernel side does, and this relies on:
//! - a refusal finds its fold slot: of the same kind it adds one to `seen`, else it takes the slot
//!   over (`generation` goes up, `seen` is 1); within a generation only `seen` and `emitted` change;
//! - it submits a record that carries `seen`, unless the slot's last one is younger than a second,
//!   or the agent's event budget is spent, or the ring is full;
//! - then it adds one to the agent's counter.
//!
//! So an attempt reaches us in one of three ways, tried in this order:
//!
//! | way | for | line |
//! |---|---|---|
//! | a record of its fold slot, then or later | most | what happened, with a count |
//! | a look at the fold slots | the repeats after a slot's last record | what happened, with a count |
//! | the counter | a slot taken over, a ring or budget exceeded, a line over the allowance or not written | [`Owed`]: a count without details |
//!
//! The counter pays only what nothing else can pay later: what it said a tick ago (every record
//! submitted before has been read meanwhile), less what was written, less what still waits in fold
//! slots. Each tick is a second, and everything is written within five.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use agent_ebpf::abi::{Counters, Event, FOLD_NANOS, Fold, Reason, Verdict};

use super::record::Lost;

/// Shortest time between two readings of the counters, in nanoseconds: a record submitted before
/// the one has been read before the other.
const SETTLE_NANOS: u64 = 500_000_000;
/// Repeats wait no longer than this for a record of their own slot, in nanoseconds.
const WAIT_NANOS: u64 = 2 * FOLD_NANOS;

/// A day, in nanoseconds.
const DAY_NANOS: u64 = 86_400 * 1_000_000_000;

/// What one agent may write, so that none pushes out the others' evidence. What is over it is
/// counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Lines a second.
    pub lines: u32,
    /// Bytes a day.
    pub bytes: u64,
}

/// Books of all agents.
#[derive(Debug)]
pub struct Ledger {
    allowance: Allowance,
    accounts: HashMap<Key, Account>,
    slots: HashMap<u32, SlotState>,
    budgets: HashMap<u32, Budget>,
    /// When the counters were read last, in nanoseconds.
    read: Option<u64>,
}

/// What is counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The agent, by the kernel's number.
    pub agent: u32,
    /// What came of the attempts.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

/// Repeats that a fold slot counted after its last record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residual {
    /// The slot's number, CPU in the upper half.
    pub id: u32,
    /// The slot: what happened, and to whom.
    pub fold: Fold,
    /// Attempts to write.
    pub count: u64,
}

/// Attempts whose details are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// Whose, and of which kind.
    pub key: Key,
    /// How many, by where the details went.
    pub lost: Lost,
}

/// The books of one agent, verdict and reason.
#[derive(Debug, Default)]
struct Account {
    /// Attempts in lines.
    written: u64,
    /// The counter at the last tick.
    counted: u64,
    /// Attempts in fold slots that no line stands for, at the last look.
    waiting: u64,
    /// Of what is owed: kept back by the allowance.
    rate: u64,
    /// Of what is owed: not written for an error.
    disk: u64,
}

/// What is known of a fold slot's tenant.
#[derive(Clone, Copy, Debug)]
struct SlotState {
    generation: u32,
    /// How much of `seen` has been dealt with.
    settled: u64,
    /// What the last look saw.
    looked: Option<Fold>,
    /// Since when repeats wait, in nanoseconds.
    waiting_since: Option<u64>,
}

/// What an agent may still write: a token bucket of one second's worth of lines, and the bytes of
/// the day.
#[derive(Clone, Copy, Debug)]
struct Budget {
    /// In billionths of a line.
    tokens: u64,
    filled: u64,
    bytes: u64,
    day_began: u64,
}

// === impl Ledger ===

impl Ledger {
    /// Empty books, right when the kernel's counters are all zero.
    pub fn new(allowance: Allowance) -> Self {
        Self {
            allowance,
            accounts: HashMap::new(),
            slots: HashMap::new(),
            budgets: HashMap::new(),
            read: None,
        }
    }

    /// Takes over counters and fold slots that were there before us: `written` is what an earlier
    /// daemon wrote (see [`Self::written`]); what the slots hold is left to the counters.
    pub fn resume(
        &mut self,
        written: impl IntoIterator<Item = (Key, u64)>,
        folds: impl IntoIterator<Item = (u32, Fold)>,
    ) {
        for (key, count) in written {
            self.accounts.entry(key).or_default().written = count;
        }
        for (id, fold) in folds {
            self.slots.insert(
                id,
                SlotState {
                    settled: fold.seen,
                    ..SlotState::new(fold.generation)
                },
            );
        }
    }

    /// Attempts in lines so far, for the next daemon.
    pub fn written(&self) -> impl Iterator<Item = (Key, u64)> {
        self.accounts
            .iter()
            .map(|(key, account)| (*key, account.written))
    }

    /// Books the bytes of a line that was written. `now` is boot time in nanoseconds.
    pub fn spend(&mut self, now: u64, agent: u32, bytes: usize) {
        self.budget(now, agent).bytes += bytes as u64;
    }

    /// The attempts that the line of this record stands for; none means that no line is due. A
    /// line that then cannot be written goes to [`Self::unwritten`]. `now` is boot time in
    /// nanoseconds.
    pub fn record(&mut self, now: u64, event: &Event) -> Option<u64> {
        let key = Key::new(event.agent, event.verdict, event.reason)?;
        let slot = self
            .slots
            .entry(event.fold)
            .or_insert(SlotState::new(event.generation));
        if slot.generation != event.generation {
            if is_older(event.generation, slot.generation) {
                // The slot has a new tenant since; what was settled of this one is forgotten.
                return None;
            }
            *slot = SlotState::new(event.generation);
        }
        let count = event
            .seen
            .checked_sub(slot.settled)
            .filter(|count| *count > 0)?;
        slot.settled = event.seen;
        slot.waiting_since = None;
        self.post(now, key, count)
    }

    /// Looks at all fold slots in use, by their number (CPU in the upper half): once a tick, after
    /// the ring was drained and before [`Self::tick`]. Returns the repeats that no record will
    /// stand for soon. `now` is boot time in nanoseconds, read before the slots.
    ///
    /// A slot is not copied in one piece, so what a look sees counts only when the next one finds
    /// the same tenant with as many attempts or more.
    pub fn folds(
        &mut self,
        now: u64,
        folds: impl IntoIterator<Item = (u32, Fold)>,
    ) -> Vec<Residual> {
        for account in self.accounts.values_mut() {
            account.waiting = 0;
        }
        let mut residuals = Vec::new();
        for (id, fold) in folds {
            let Some(key) = Key::new(fold.agent, fold.verdict, fold.reason) else {
                continue;
            };
            let known = self.slots.get(&id).copied();
            let mut slot = match known {
                Some(slot) if slot.generation == fold.generation => slot,
                // The drain went on past this look.
                Some(slot) if is_older(fold.generation, slot.generation) => continue,
                Some(_) | None => SlotState::new(fold.generation),
            };
            // A tenant seen for the first time, or a torn copy: nothing is certain yet.
            let certain = match &slot.looked {
                Some(looked) if is_same_tenant(looked, &fold) => looked.seen.min(fold.seen),
                Some(_) | None => 0,
            };
            let due = certain.saturating_sub(slot.settled);
            let idle = now.saturating_sub(fold.emitted) > FOLD_NANOS;
            let overdue = slot
                .waiting_since
                .is_some_and(|since| now.saturating_sub(since) >= WAIT_NANOS);
            slot.looked = Some(fold);
            if due > 0 && (idle || overdue) {
                slot.settled = certain;
                slot.waiting_since = None;
                if let Some(count) = self.post(now, key, due) {
                    residuals.push(Residual { id, fold, count });
                }
            }
            let waiting = fold.seen.saturating_sub(slot.settled);
            if waiting > 0 {
                slot.waiting_since.get_or_insert(now);
                self.accounts.entry(key).or_default().waiting += waiting;
            } else {
                slot.waiting_since = None;
            }
            self.slots.insert(id, slot);
        }
        residuals
    }

    /// Settles with the counters, which the caller has just read, each summed over CPUs: once a
    /// second, after the ring was drained and the fold slots were looked at. Returns what is owed
    /// and nothing else can pay; each is to be written as a line. `now` is boot time in
    /// nanoseconds.
    pub fn tick(
        &mut self,
        now: u64,
        counters: impl IntoIterator<Item = (u32, Counters)>,
    ) -> Vec<Owed> {
        let settled = self
            .read
            .is_none_or(|read| now.saturating_sub(read) >= SETTLE_NANOS);
        if !settled {
            return Vec::new();
        }
        self.read = Some(now);
        let mut owed = Vec::new();
        for (key, account) in &mut self.accounts {
            let unpaid = account
                .counted
                .saturating_sub(account.written)
                .saturating_sub(account.waiting);
            if unpaid == 0 {
                continue;
            }
            account.written += unpaid;
            let rate = account.rate.min(unpaid);
            let disk = account.disk.min(unpaid - rate);
            account.rate -= rate;
            account.disk -= disk;
            let lost = Lost {
                kernel: unpaid - rate - disk,
                rate,
                disk,
            };
            owed.push(Owed { key: *key, lost });
        }
        owed.sort_unstable_by_key(|owed| owed.key);
        for (agent, counters) in counters {
            let verdicts = [
                (Verdict::Denied, &counters.denied),
                (Verdict::Monitored, &counters.monitored),
            ];
            for (verdict, counts) in verdicts {
                for reason in Reason::ALL {
                    let count = counts.get(usize::from(*reason as u8)).copied().unwrap_or(0);
                    let key = Key {
                        agent,
                        verdict,
                        reason: *reason,
                    };
                    // Most are zero for ever; they need no account.
                    if count > 0 || self.accounts.contains_key(&key) {
                        self.accounts.entry(key).or_default().counted = count;
                    }
                }
            }
        }
        owed
    }

    /// Takes back a line that could not be written: its attempts are owed again. The count of a
    /// record, a residual or an [`Owed`].
    pub fn unwritten(&mut self, key: Key, count: u64) {
        let account = self.accounts.entry(key).or_default();
        account.written = account.written.saturating_sub(count);
        account.disk += count;
    }

    /// Takes back the line of a record that there is no time for: its attempts are owed again, like
    /// those that the allowance keeps back. `count` is what [`Self::record`] said.
    pub fn skipped(&mut self, event: &Event, count: u64) {
        let Some(key) = Key::new(event.agent, event.verdict, event.reason) else {
            return;
        };
        let account = self.accounts.entry(key).or_default();
        account.written = account.written.saturating_sub(count);
        account.rate += count;
    }

    /// Whether the agent's allowance has room for a line that stands for no attempt in the kernel's
    /// counters; it is taken.
    pub fn admits(&mut self, now: u64, agent: u32) -> bool {
        let allowance = self.allowance;
        self.budget(now, agent).take(allowance)
    }

    /// Closes the books of an agent whose number and counters the kernel has given up.
    pub fn forget(&mut self, agent: u32) {
        self.accounts.retain(|key, _| key.agent != agent);
        self.budgets.remove(&agent);
    }

    /// Books a line if the agent's allowance has room for it.
    fn post(&mut self, now: u64, key: Key, count: u64) -> Option<u64> {
        let allowance = self.allowance;
        let granted = self.budget(now, key.agent).take(allowance);
        let account = self.accounts.entry(key).or_default();
        if granted {
            account.written += count;
            Some(count)
        } else {
            account.rate += count;
            None
        }
    }

    /// The agent's budget as it is now.
    fn budget(&mut self, now: u64, agent: u32) -> &mut Budget {
        let full = u64::from(self.allowance.lines) * Budget::LINE;
        let budget = self.budgets.entry(agent).or_insert(Budget {
            tokens: full,
            filled: now,
            bytes: 0,
            day_began: now,
        });
        let elapsed = now.saturating_sub(budget.filled);
        let gained = elapsed.saturating_mul(u64::from(self.allowance.lines));
        budget.tokens = budget.tokens.saturating_add(gained).min(full);
        budget.filled = budget.filled.max(now);
        if now.saturating_sub(budget.day_began) >= DAY_NANOS {
            budget.bytes = 0;
            budget.day_began = now;
        }
        budget
    }
}

// === impl Key ===

impl Key {
    fn new(agent: u32, verdict: u8, reason: u8) -> Option<Self> {
        Some(Self {
            agent,
            verdict: Verdict::from_byte(verdict)?,
            reason: Reason::from_byte(reason)?,
        })
    }
}

// === impl SlotState ===

impl SlotState {
    const fn new(generation: u32) -> Self {
        Self {
            generation,
            settled: 0,
            looked: None,
            waiting_since: None,
        }
    }
}

// === impl Budget ===

impl Budget {
    const LINE: u64 = 1_000_000_000;

    fn take(&mut self, allowance: Allowance) -> bool {
        if self.tokens < Self::LINE || self.bytes >= allowance.bytes {
            return false;
        }
        self.tokens -= Self::LINE;
        true
    }
}

/// Whether two looks at a slot saw the same tenant, in all that tells tenants apart.
fn is_same_tenant(a: &Fold, b: &Fold) -> bool {
    let counts_aside = |fold: &Fold| Fold {
        seen: 0,
        emitted: 0,
        ..*fold
    };
    counts_aside(a) == counts_aside(b)
}

/// Whether generation `a` came before `b`; they wrap.
const fn is_older(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > u32::MAX / 2
}
