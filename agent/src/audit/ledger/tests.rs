//! The ledger against a kernel in memory that folds, drops, delays and hands out torn copies.

use std::collections::{BTreeMap, VecDeque};

use agent_ebpf::abi::REASONS;
use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;
const CPUS: usize = 2;
/// Few, so that tenants drive each other out.
const SLOTS: usize = 3;

fn lines(lines: u32) -> Allowance {
    Allowance {
        lines,
        bytes: u64::MAX,
    }
}

type Sums = BTreeMap<Key, u64>;

/// What tells attempts apart, for folding.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kind {
    key: Key,
    port: u16,
}

struct Kernel {
    now: u64,
    slots: Vec<[Fold; SLOTS]>,
    ring: VecDeque<Event>,
    counters: BTreeMap<u32, Counters>,
    /// Submitted, and not counted yet.
    in_flight: Vec<Key>,
    /// How many of these, from the first, were so at the last tick.
    lagging: usize,
    attempts: Sums,
    /// Whether a slot remembers a record that was not submitted as one.
    marks_lost: bool,
}

impl Kernel {
    fn new(marks_lost: bool) -> Self {
        Self {
            now: 1_000 * SECOND,
            slots: vec![[Fold::zeroed(); SLOTS]; CPUS],
            ring: VecDeque::new(),
            counters: BTreeMap::new(),
            in_flight: Vec::new(),
            lagging: 0,
            attempts: Sums::new(),
            marks_lost,
        }
    }

    fn attempt(&mut self, cpu: usize, kind: Kind, lost: bool) {
        let index = (usize::from(kind.port) + kind.key.agent as usize) % SLOTS;
        let slot = &mut self.slots[cpu][index];
        let tenant = Fold {
            agent: kind.key.agent,
            verdict: kind.key.verdict as u8,
            reason: kind.key.reason as u8,
            port: kind.port,
            generation: slot.generation,
            ..Fold::zeroed()
        };
        if slot.seen > 0 && is_same_tenant(slot, &tenant) {
            slot.seen += 1;
        } else {
            *slot = Fold {
                generation: slot.generation.wrapping_add(1),
                seen: 1,
                ..tenant
            };
        }
        let young = slot.emitted != 0 && self.now - slot.emitted < FOLD_NANOS;
        if !young {
            if !lost {
                self.ring.push_back(Event {
                    seen: slot.seen,
                    agent: slot.agent,
                    verdict: slot.verdict,
                    reason: slot.reason,
                    fold: ((cpu as u32) << 16) | index as u32,
                    generation: slot.generation,
                    port: slot.port,
                    ..Event::zeroed()
                });
            }
            if !lost || self.marks_lost {
                slot.emitted = self.now;
            }
        }
        self.in_flight.push(kind.key);
        *self.attempts.entry(kind.key).or_default() += 1;
    }

    /// The counters catch up with all but the last `but` attempts. An attempt is in flight for
    /// nanoseconds, so that one tick may find it so, and no two.
    fn count(&mut self, but: usize) {
        let ready = self.in_flight.len().saturating_sub(but);
        let ready = ready.max(std::mem::take(&mut self.lagging));
        for key in self.in_flight.drain(..ready) {
            let counters = self.counters.entry(key.agent).or_insert(Counters::zeroed());
            let counts: &mut [u64; REASONS] = match key.verdict {
                Verdict::Denied => &mut counters.denied,
                Verdict::Monitored => &mut counters.monitored,
            };
            counts[key.reason as usize] += 1;
        }
    }

    /// Copies the slots; while one is copied, its tenant may be driven out, and each field is the
    /// old one or the new one as `torn` has it.
    fn copy(&mut self, torn: Option<(usize, usize, Kind, u8)>) -> Vec<(u32, Fold)> {
        let mut copies = Vec::new();
        for cpu in 0..CPUS {
            for index in 0..SLOTS {
                let old = self.slots[cpu][index];
                let mut copy = old;
                if let Some((at_cpu, at, kind, mix)) = torn
                    && (at_cpu, at) == (cpu, index)
                {
                    self.attempt(cpu, kind, false);
                    let new = self.slots[cpu][index];
                    let pick = |bit: u8| if mix & (1 << bit) == 0 { &old } else { &new };
                    copy = Fold {
                        seen: pick(0).seen,
                        emitted: pick(1).emitted,
                        agent: pick(2).agent,
                        generation: pick(3).generation,
                        port: pick(4).port,
                        verdict: pick(5).verdict,
                        reason: pick(6).reason,
                        ..old
                    };
                }
                if copy.seen > 0 {
                    copies.push((((cpu as u32) << 16) | index as u32, copy));
                }
            }
        }
        copies
    }
}

/// The daemon's part: what was written, as the log would have it.
struct Daemon {
    ledger: Ledger,
    lines: Sums,
    /// Lines fail while this is set.
    disk_full: bool,
    /// Attempts at the last ticks, oldest first.
    past: VecDeque<Sums>,
}

impl Daemon {
    fn new(rate: u32) -> Self {
        Self {
            ledger: Ledger::new(lines(rate)),
            lines: Sums::new(),
            disk_full: false,
            past: VecDeque::new(),
        }
    }

    fn write(&mut self, key: Key, count: u64) {
        assert!(count > 0, "a line for nothing");
        if self.disk_full {
            self.ledger.unwritten(key, count);
        } else {
            *self.lines.entry(key).or_default() += count;
        }
    }

    fn drain(&mut self, kernel: &mut Kernel, most: usize) {
        for _ in 0..most {
            let Some(event) = kernel.ring.pop_front() else {
                break;
            };
            if let Some(count) = self.ledger.record(kernel.now, &event) {
                let key = Key::new(event.agent, event.verdict, event.reason).unwrap();
                self.write(key, count);
            }
        }
        self.never_more(kernel);
    }

    fn tick(&mut self, kernel: &mut Kernel, torn: Option<(usize, usize, Kind, u8)>, but: usize) {
        self.drain(kernel, usize::MAX);
        let now = kernel.now;
        for residual in self.ledger.folds(now, kernel.copy(torn)) {
            let fold = residual.fold;
            let key = Key::new(fold.agent, fold.verdict, fold.reason).unwrap();
            self.write(key, residual.count);
        }
        self.never_more(kernel);
        kernel.count(but);
        kernel.lagging = kernel.in_flight.len();
        for owed in self.ledger.tick(now, kernel.counters.clone()) {
            self.write(owed.key, owed.lost.sum());
        }
        self.never_more(kernel);
        self.past.push_back(kernel.attempts.clone());
    }

    /// No line stands for an attempt that never was.
    fn never_more(&self, kernel: &Kernel) {
        for (key, lines) in &self.lines {
            let attempts = kernel.attempts.get(key).copied().unwrap_or(0);
            assert!(
                *lines <= attempts,
                "{key:?}: {lines} in lines, {attempts} attempts"
            );
        }
    }

    /// What was attempted five ticks ago is in lines.
    fn never_late(&mut self) {
        if self.past.len() > 5
            && let Some(then) = self.past.pop_front()
        {
            for (key, attempts) in then {
                let lines = self.lines.get(&key).copied().unwrap_or(0);
                assert!(
                    lines >= attempts,
                    "{key:?}: {lines} in lines, {attempts} attempts 5 s ago"
                );
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Attempts {
        cpu: usize,
        kind: Kind,
        times: u16,
        lost: bool,
    },
    Drain(usize),
    Wait(u64),
    Disk(bool),
    Torn {
        cpu: usize,
        slot: usize,
        kind: Kind,
        mix: u8,
    },
    Lag(usize),
}

fn kind() -> impl Strategy<Value = Kind> {
    let agent = 0_u32..4;
    let verdict = proptest::sample::select(Verdict::ALL);
    let reason = proptest::sample::select(&[Reason::OutOfScope, Reason::Denied][..]);
    (agent, verdict, reason, 0_u16..4).prop_map(|(agent, verdict, reason, port)| Kind {
        key: Key {
            agent,
            verdict,
            reason,
        },
        port,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..CPUS, kind(), 1_u16..40, any::<bool>()).prop_map(|(cpu, kind, times, lost)| {
            Step::Attempts { cpu, kind, times, lost }
        }),
        2 => (0_usize..5).prop_map(Step::Drain),
        4 => (1_u64..700).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Disk),
        1 => (0..CPUS, 0..SLOTS, kind(), any::<u8>())
            .prop_map(|(cpu, slot, kind, mix)| Step::Torn { cpu, slot, kind, mix }),
        1 => (0_usize..4).prop_map(Step::Lag),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn counts_of_lines_add_up_to_the_attempts(
        steps in proptest::collection::vec(step(), 1..80),
        rate in 1_u32..20,
        marks_lost in any::<bool>(),
    ) {
        let mut kernel = Kernel::new(marks_lost);
        let mut daemon = Daemon::new(rate);
        let mut next = kernel.now + SECOND;
        let (mut torn, mut lag) = (None, 0);
        let mut disk_ever_full = false;
        for step in steps {
            match step {
                Step::Attempts { cpu, kind, times, lost } => {
                    for _ in 0..times {
                        kernel.attempt(cpu, kind, lost);
                        kernel.now += 1_000;
                    }
                }
                Step::Drain(most) => daemon.drain(&mut kernel, most),
                Step::Wait(millis) => kernel.now += millis * 1_000_000,
                Step::Disk(full) => {
                    daemon.disk_full = full;
                    disk_ever_full |= full;
                }
                Step::Torn { cpu, slot, kind, mix } => torn = Some((cpu, slot, kind, mix)),
                Step::Lag(but) => lag = but,
            }
            while kernel.now >= next {
                next += SECOND;
                kernel.count(lag);
                daemon.tick(&mut kernel, torn.take(), lag);
                if !disk_ever_full {
                    daemon.never_late();
                }
            }
        }
        daemon.disk_full = false;
        for _ in 0..5 {
            kernel.now += SECOND;
            daemon.tick(&mut kernel, None, 0);
        }
        prop_assert_eq!(&daemon.lines, &kernel.attempts);
    }
}

fn denied(port: u16) -> Kind {
    Kind {
        key: Key {
            agent: 1,
            verdict: Verdict::Denied,
            reason: Reason::OutOfScope,
        },
        port,
    }
}

#[test]
fn repeats_are_written_with_their_own_destination() {
    let mut kernel = Kernel::new(true);
    let mut daemon = Daemon::new(200);
    for _ in 0..10 {
        kernel.attempt(0, denied(443), false);
    }
    daemon.tick(&mut kernel, None, 0);
    assert_eq!(daemon.lines.values().sum::<u64>(), 1);
    let mut residuals = Vec::new();
    for _ in 0..4 {
        kernel.now += SECOND;
        residuals.extend(daemon.ledger.folds(kernel.now, kernel.copy(None)));
        assert_eq!(daemon.ledger.tick(kernel.now, kernel.counters.clone()), []);
    }
    let told: Vec<_> = residuals.iter().map(|r| (r.fold.port, r.count)).collect();
    assert_eq!(told, [(443, 9)]);
}

#[test]
fn what_is_over_the_rate_is_owed_and_told_as_such() {
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(lines(2));
    let mut lines = 0;
    for port in 0..5 {
        kernel.attempt(0, denied(port), false);
        let event = kernel.ring.pop_front().unwrap();
        lines += ledger.record(kernel.now, &event).unwrap_or(0);
    }
    assert_eq!(lines, 2);
    kernel.count(0);
    let mut owed = Vec::new();
    for _ in 0..3 {
        kernel.now += SECOND;
        assert_eq!(ledger.folds(kernel.now, kernel.copy(None)), []);
        owed.extend(ledger.tick(kernel.now, kernel.counters.clone()));
    }
    let lost = Lost {
        rate: 3,
        ..Lost::default()
    };
    let key = denied(0).key;
    assert_eq!(owed, [Owed { key, lost }]);
}

#[test]
fn a_line_that_was_not_written_is_owed_for_the_disk() {
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(lines(200));
    kernel.attempt(0, denied(443), false);
    let count = ledger.record(kernel.now, &kernel.ring[0]).unwrap();
    ledger.unwritten(denied(443).key, count);
    kernel.count(0);
    let mut owed = Vec::new();
    for _ in 0..3 {
        kernel.now += SECOND;
        owed.extend(
            ledger
                .folds(kernel.now, kernel.copy(None))
                .iter()
                .map(|r| r.count),
        );
        owed.extend(
            ledger
                .tick(kernel.now, kernel.counters.clone())
                .iter()
                .map(|o| o.lost.disk),
        );
    }
    assert_eq!(owed, [1]);
}

#[test]
fn a_skipped_record_is_owed_as_rate() {
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(lines(200));
    kernel.attempt(0, denied(443), false);
    let event = kernel.ring[0];
    let count = ledger.record(kernel.now, &event).unwrap();
    ledger.skipped(&event, count);
    kernel.count(0);
    let mut owed = Vec::new();
    for _ in 0..3 {
        kernel.now += SECOND;
        assert!(ledger.folds(kernel.now, kernel.copy(None)).is_empty());
        owed.extend(
            ledger
                .tick(kernel.now, kernel.counters.clone())
                .iter()
                .map(|o| o.lost.rate),
        );
    }
    assert_eq!(owed, [1]);
}

#[test]
fn the_next_daemon_owes_what_the_last_one_left() {
    let mut kernel = Kernel::new(true);
    let mut first = Daemon::new(200);
    for _ in 0..10 {
        kernel.attempt(0, denied(443), false);
    }
    first.drain(&mut kernel, usize::MAX);
    let written: Vec<_> = first.ledger.written().collect();
    kernel.attempt(0, denied(443), false);
    kernel.now += 2 * SECOND;
    // One record waits in the ring when the next daemon comes.
    kernel.attempt(0, denied(443), false);
    kernel.count(0);
    let mut second = Daemon::new(200);
    second.lines = first.lines;
    second.ledger.resume(written, kernel.copy(None));
    for _ in 0..3 {
        kernel.now += SECOND;
        second.tick(&mut kernel, None, 0);
    }
    assert_eq!(second.lines, kernel.attempts);
}

#[test]
fn readings_too_close_together_settle_nothing() {
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(lines(200));
    kernel.attempt(0, denied(443), true);
    kernel.count(0);
    assert_eq!(ledger.tick(kernel.now, kernel.counters.clone()), []);
    assert_eq!(
        ledger.tick(kernel.now + SETTLE_NANOS / 2, kernel.counters.clone()),
        []
    );
    assert_eq!(
        ledger
            .tick(kernel.now + SETTLE_NANOS, kernel.counters.clone())
            .len(),
        1
    );
}

#[test]
fn the_rate_is_per_agent() {
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(lines(1));
    for agent in 1..4 {
        let mut kind = denied(443);
        kind.key.agent = agent;
        kernel.attempt(0, kind, false);
    }
    let lines = kernel
        .ring
        .iter()
        .filter(|event| ledger.record(kernel.now, event).is_some());
    assert_eq!(lines.count(), 3);
}

#[test]
fn a_slot_whose_records_are_all_lost_is_written_with_details_in_time() {
    let mut kernel = Kernel::new(true);
    let mut daemon = Daemon::new(200);
    let mut details = 0;
    for _ in 0..80 {
        kernel.attempt(0, denied(443), true);
        kernel.now += SECOND / 10;
        if kernel.now.is_multiple_of(SECOND) {
            kernel.count(0);
            let residuals = daemon.ledger.folds(kernel.now, kernel.copy(None));
            details += residuals.iter().map(|residual| residual.count).sum::<u64>();
            let owed = daemon.ledger.tick(kernel.now, kernel.counters.clone());
            assert_eq!(owed, [], "the slot knows the details");
        }
    }
    assert!(details >= 30, "{details} of 80");
}

#[test]
fn a_record_overtaken_by_the_next_tenants_upsets_nothing() {
    let event = |generation, seen| Event {
        agent: 1,
        verdict: Verdict::Denied as u8,
        reason: Reason::OutOfScope as u8,
        generation,
        seen,
        ..Event::zeroed()
    };
    let mut ledger = Ledger::new(lines(200));
    // An interrupt between reserve and submit lets the later one go first.
    assert_eq!(ledger.record(0, &event(u32::MAX, 1)), Some(1));
    assert_eq!(ledger.record(0, &event(0, 1)), Some(1));
    assert_eq!(ledger.record(0, &event(u32::MAX, 2)), None);
    assert_eq!(ledger.record(0, &event(0, 1)), None);
    assert_eq!(ledger.record(0, &event(0, 3)), Some(2));
}

#[test]
fn the_bytes_of_a_day_are_bounded_and_the_rest_is_counted() {
    let allowance = Allowance {
        lines: 200,
        bytes: 1_000,
    };
    let mut kernel = Kernel::new(true);
    let mut ledger = Ledger::new(allowance);
    let mut line = |kernel: &mut Kernel, port| {
        kernel.attempt(0, denied(port), false);
        let count = ledger.record(kernel.now, &kernel.ring.pop_front().unwrap());
        if count.is_some() {
            ledger.spend(kernel.now, 1, 600);
        }
        count
    };
    let first: Vec<_> = (0..3).map(|port| line(&mut kernel, port)).collect();
    assert_eq!(first, [Some(1), Some(1), None]);
    kernel.now += DAY_NANOS;
    assert_eq!(line(&mut kernel, 9), Some(1));
}
