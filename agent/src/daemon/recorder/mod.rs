//! From the kernel's records to lines in the log. The ledger decides how many attempts a line
//! stands for; this module only looks up who and where, and writes.

mod known;
mod lines;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Cause, Event, Fold, RING_BYTES};
use tracing::warn;

use self::known::{Hostnames, Known, Tenant, Whereabouts};
use super::time::{Offset, wall_millis};
use crate::{
    audit::{Allowance, Exports, Ledger, Log, Lost, Mask, Processes, ocsf::Host},
    cgroup::Hierarchy,
    control::protocol::{Denial, LastViolation},
    kernel::Enforcer,
    policy::UnixMillis,
};

/// How long a turn writes lines: whoever gives an order waits for it.
const TURN: Duration = Duration::from_millis(20);
/// How long settling may be put off for a backlog of records: lines are to be there within five
/// seconds, and what the folds owe takes two looks.
const BACKLOG: Duration = Duration::from_secs(3);
/// Turns for a backlog when somebody asks how things stand.
const ASKED_TURNS: usize = 10;
/// Records taken from the ring at a time.
const CHUNK: usize = 64;
/// Lines that each agent may have in a turn that is over its time, so that a flood of others costs
/// nobody its first ones.
const FIRST: u32 = 8;
/// How often old files are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3_600);

/// Where the lines go.
pub enum Sink {
    /// The violation log.
    Log(Box<Log>),
    /// Memory, for `remit run` without a daemon.
    Memory(Vec<serde_json::Value>),
}

/// Everything that a line needs.
pub struct Recorder {
    sink: Sink,
    host: Host,
    ledger: Ledger,
    processes: Processes,
    hierarchy: Hierarchy,
    policies: HashMap<u64, Known>,
    order: VecDeque<u64>,
    present: HashMap<u32, (u64, Known)>,
    /// Agents that have a number in the kernel and are not in force any more.
    former: HashMap<u32, Known>,
    /// By the fold's number.
    tenants: HashMap<u32, Tenant>,
    paths: HashMap<u64, Option<Whereabouts>>,
    exports: Exports,
    /// When old files were looked for last.
    pruned: Option<Instant>,
    denials: BTreeMap<String, VecDeque<Denial>>,
    lost: Lost,
    last: BTreeMap<String, LastViolation>,
    revision: u64,
    offset: Offset,
    hostnames: HashMap<u32, Hostnames>,
    /// Agents whose lookups were refused for want of a guard.
    unguarded: BTreeSet<u32>,
    /// When the ring last had a record.
    heard: Option<Instant>,
    health: Health,
    /// Since when settling is put off.
    put_off: Option<Instant>,
    watch: Option<Watch>,
}

/// The cgroup of a probe's helper: lines about it are marked.
#[derive(Clone, Debug)]
struct Watch {
    cgroup: u64,
    run: String,
    unwritten: Option<String>,
}

/// How reading and writing go, for `remit status`.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// When the ring was last looked into.
    pub drained: Option<Instant>,
    /// When everything was last squared with the kernel's counters.
    pub settled: Option<Instant>,
    /// When the last line was written.
    pub written: Option<UnixMillis>,
    /// Since when lines cannot be written, and why; none while they can.
    pub broken: Option<(UnixMillis, String)>,
    /// When records were last lost in the kernel or to the disk, and how many then.
    pub lost: Option<(Instant, u64)>,
}

impl Recorder {
    /// A recorder without agents yet.
    pub fn new(sink: Sink, allowance: Allowance, hierarchy: Hierarchy, offset: Offset) -> Self {
        Self {
            sink,
            host: Host::read(),
            ledger: Ledger::new(allowance),
            processes: Processes::default(),
            hierarchy,
            policies: HashMap::new(),
            order: VecDeque::new(),
            present: HashMap::new(),
            former: HashMap::new(),
            tenants: HashMap::new(),
            paths: HashMap::new(),
            exports: Exports::default(),
            pruned: None,
            denials: BTreeMap::new(),
            lost: Lost::default(),
            last: BTreeMap::new(),
            revision: 0,
            offset,
            hostnames: HashMap::new(),
            unguarded: BTreeSet::new(),
            heard: None,
            health: Health::default(),
            put_off: None,
            watch: None,
        }
    }

    /// Marks lines about this cgroup as those of a probe.
    pub fn watch(&mut self, cgroup: u64, run: String) {
        self.watch = Some(Watch {
            cgroup,
            run,
            unwritten: None,
        });
    }

    /// Marks nothing any more.
    pub fn watch_no_more(&mut self) {
        self.watch = None;
    }

    /// Why a line of the probe could not be written, if one could not.
    pub fn unwritten(&self) -> Option<String> {
        self.watch.as_ref()?.unwritten.clone()
    }

    /// How reading and writing go.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// What speaks against the log's file, as it is on the disk now.
    pub fn log_fault(&self) -> Option<String> {
        let Sink::Log(log) = &self.sink else {
            return None;
        };
        if let Some((since, why)) = &self.health.broken {
            let since = wall_millis().saturating_sub(*since) / 1_000;
            return Some(format!("no line could be written for {since} s: {why}"));
        }
        match std::fs::symlink_metadata(log.path()) {
            Ok(meta) if meta.is_file() => None,
            Ok(_) => Some("its path names no file".to_owned()),
            Err(error) => Some(format!("its file is not there: {error}")),
        }
    }

    /// Whether the ring had a record within this time.
    pub fn heard_within(&self, time: Duration) -> bool {
        self.heard.is_some_and(|heard| heard.elapsed() <= time)
    }

    /// Masks secrets in command lines with this from now on.
    pub fn set_mask(&mut self, mask: Mask) {
        self.processes = std::mem::take(&mut self.processes).with_mask(mask);
    }

    /// Writes events to these as well from now on.
    pub fn set_exports(&mut self, exports: Exports) {
        self.exports = exports;
    }

    /// Where events go to beside their log.
    pub fn exports(&mut self) -> &mut Exports {
        &mut self.exports
    }

    /// The host that lines name.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The ledger, to start from what an earlier daemon wrote.
    pub fn ledger(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// The clocks have stepped.
    pub fn set_offset(&mut self, offset: Offset) {
        self.offset = offset;
    }

    /// The agents whose lookups were refused for want of a guard, since this was asked last.
    pub fn take_unguarded(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.unguarded)
    }

    /// Takes in what the ring has, for a turn at most; what is left stays there. Whether nothing was.
    pub fn drain(&mut self, enforcer: &mut Enforcer) -> bool {
        let turn = Instant::now();
        self.health.drained = Some(turn);
        loop {
            let events = enforcer.drain(CHUNK);
            if !events.is_empty() {
                self.heard = Some(turn);
            }
            let now = crate::kernel::boot_nanos();
            for event in &events {
                if event.cause == Cause::NoGuard as u8 {
                    self.unguarded.insert(event.agent);
                }
                self.note(event);
                if let Some(count) = self.ledger.record(now, event) {
                    self.write_event(now, event, count);
                }
            }
            if events.len() < CHUNK {
                return true;
            }
            if turn.elapsed() >= TURN {
                return false;
            }
        }
    }

    /// Takes in all that the ring has. Agents can fill it faster than lines can be written, and
    /// nobody else is served meanwhile: after a turn records are booked and not written, but for
    /// the first of each agent. What is booked so is owed, and told in one line for each kind. The
    /// first chunk is written whatever the time: so much gathers while this process waits for a
    /// processor, without any flood.
    fn empty(&mut self, enforcer: &mut Enforcer) {
        let turn = Instant::now();
        let mut lines: HashMap<u32, u32> = HashMap::new();
        // What is in the ring now is in it once at most.
        for round in 0..RING_BYTES as usize / size_of::<Event>() / CHUNK {
            let events = enforcer.drain(CHUNK);
            let now = crate::kernel::boot_nanos();
            for event in &events {
                self.note(event);
                let Some(count) = self.ledger.record(now, event) else {
                    continue;
                };
                let of_agent = lines.entry(event.agent).or_default();
                if round == 0 || *of_agent < FIRST || turn.elapsed() < TURN {
                    *of_agent += 1;
                    self.write_event(now, event, count);
                } else {
                    self.ledger.skipped(event, count);
                }
            }
            if events.len() < CHUNK {
                return;
            }
        }
    }

    /// Once a second: settles, unless the ring has more than can be written in a turn. The counters
    /// pay for what is in the ring, so it has to be emptied before they are asked, and what is not
    /// written then has lost its details: a backlog is given time to be written first.
    pub fn settle_in_time(&mut self, enforcer: &mut Enforcer) {
        let drained = self.drain(enforcer);
        // From now on, not from the last time: a daemon that was held up has the more to write.
        let put_off = *self.put_off.get_or_insert_with(Instant::now);
        if drained || put_off.elapsed() >= BACKLOG {
            self.settle(enforcer);
        }
    }

    /// Settles for somebody who asks: a backlog is given a few turns to be written.
    pub fn settle_now(&mut self, enforcer: &mut Enforcer) {
        for _ in 0..ASKED_TURNS {
            if self.drain(enforcer) {
                break;
            }
        }
        self.settle(enforcer);
    }

    /// Takes in what the ring has, then what folds and losses still owe.
    pub fn settle(&mut self, enforcer: &mut Enforcer) {
        self.empty(enforcer);
        self.put_off = None;
        self.health.drained = Some(Instant::now());
        self.prune();
        let now = crate::kernel::boot_nanos();
        let folds: Vec<(u32, Fold)> = enforcer
            .folds()
            .into_iter()
            .map(|(cpu, slot, fold)| (cpu << 16 | slot, fold))
            .collect();
        for residual in self.ledger.folds(now, folds) {
            self.write_fold(now, residual.id, &residual.fold, residual.count);
        }
        let counters: Vec<_> = enforcer
            .indices()
            .into_iter()
            .filter_map(|(_, index)| enforcer.counters(index).map(|counters| (index, counters)))
            .collect();
        for owed in self.ledger.tick(now, counters) {
            self.write_owed(now, &owed);
        }
        self.health.settled = Some(Instant::now());
    }

    /// Whether some attempt that the kernel counted has no line yet.
    pub fn owes(&self, enforcer: &Enforcer) -> bool {
        let written: u64 = self.ledger.written().map(|(_, count)| count).sum();
        let counted: u64 = enforcer
            .indices()
            .into_iter()
            .filter_map(|(_, index)| enforcer.counters(index))
            .map(|counters| {
                counters.denied.iter().sum::<u64>() + counters.monitored.iter().sum::<u64>()
            })
            .sum();
        written < counted
    }

    /// Attempts whose details were lost since the start, by where.
    pub fn lost(&self) -> Lost {
        self.lost
    }

    /// The newest violation of an agent.
    pub fn last(&self, id: &str) -> Option<&LastViolation> {
        self.last.get(id)
    }

    /// The last denials of an agent, newest first.
    pub fn denials(&self, id: &str) -> Vec<Denial> {
        self.denials
            .get(id)
            .map(|denials| denials.iter().cloned().collect())
            .unwrap_or_default()
    }

    /// Opens the log anew, after something rotated it.
    pub fn reopen(&mut self) {
        if let Sink::Log(log) = &mut self.sink
            && let Err(error) = log.reopen()
        {
            warn!(message = "The violation log could not be reopened.", %error);
        }
        if let Err(error) = self.exports.reopen() {
            warn!(message = "An export could not be reopened.", %error);
        }
    }

    /// Removes files that are too old or too many, which no line may have done for long.
    fn prune(&mut self) {
        let due = self.pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY);
        if !due {
            return;
        }
        self.pruned = Some(Instant::now());
        let mut pruned = Ok(());
        if let Sink::Log(log) = &mut self.sink {
            pruned = log.prune();
        }
        if let Err(error) = pruned.and_then(|()| self.exports.prune()) {
            warn!(message = "Old log files could not be removed.", %error);
        }
    }

    /// What was written to memory.
    pub fn lines(self) -> Vec<serde_json::Value> {
        match self.sink {
            Sink::Memory(lines) => lines,
            Sink::Log(_) => Vec::new(),
        }
    }
}
