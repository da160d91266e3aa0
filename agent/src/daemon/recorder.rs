//! From the kernel's records to lines in the log. The ledger decides how many attempts a line
//! stands for; this module only looks up who and where, and writes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Addr, Cause, Event, Fold, NO_ENTRY, RING_BYTES, UNREGISTERED};
use tracing::warn;

use super::{
    advice,
    lookups::Refused,
    time::{Offset, wall_millis},
};
use crate::{
    audit::{
        Allowance, Context, Dropped, Exports, Key, Ledger, Log, LogError, Lost, Mask, Owed,
        ProcessInfo, Processes, Subject, Violation, human, ocsf::Host,
    },
    cgroup::Hierarchy,
    control::protocol::{Denial, LastViolation},
    kernel::Enforcer,
    policy::{AgentTables, Entry, UnixMillis},
};

/// Policies whose entries are remembered after they have left force: records may lag behind, by
/// milliseconds as a rule.
const POLICIES: usize = 4096;
/// Entries and places that these may have in all. Past it the oldest go: a registry of 100,000
/// prefixes that changes every minute must not fill the memory with what it was.
const REMEMBERED: usize = 250_000;
/// Denials kept for each agent to be told of.
const DENIALS: usize = 16;
/// Cgroup paths remembered, so that a burst of records costs one look-up.
const PATHS: usize = 4096;

/// How long a turn writes lines: whoever gives an order waits for it.
const TURN: Duration = Duration::from_millis(20);
/// Records taken from the ring at a time.
const CHUNK: usize = 64;
/// Lines that each agent may have in a turn that is over its time, so that a flood of others costs
/// nobody its first ones.
const FIRST: u32 = 8;
/// How often old files are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3_600);

/// An agent as it was under one policy.
#[derive(Clone)]
struct Known {
    subject: Subject,
    entries: Arc<AgentTables>,
}

/// A cgroup that records name by its id.
#[derive(Clone)]
struct Whereabouts {
    path: String,
    invocation: Option<String>,
}

/// Where the lines go.
pub enum Sink {
    /// The violation log.
    Log(Box<Log>),
    /// Memory, for `remit run` without a daemon.
    Memory(Vec<serde_json::Value>),
}

/// The name that each address of an agent was last an answer to.
#[derive(Default)]
struct Hostnames {
    names: HashMap<IpAddr, Arc<str>>,
    order: VecDeque<IpAddr>,
}

/// Addresses of one agent whose names are remembered.
const HOSTNAMES: usize = 8192;

impl Hostnames {
    fn learn(&mut self, addr: IpAddr, name: &Arc<str>) {
        if self.names.insert(addr, Arc::clone(name)).is_none() {
            self.order.push_back(addr);
        }
        if self.order.len() > HOSTNAMES
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
    }
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

    /// Learns which agents and policies the kernel's numbers mean from now on.
    pub fn learn<'a>(
        &mut self,
        enforcer: &Enforcer,
        revision: u64,
        tables: impl IntoIterator<Item = &'a Arc<AgentTables>>,
    ) {
        self.revision = revision;
        self.present.clear();
        for tables in tables {
            let Some(index) = enforcer.index_of(&tables.id) else {
                continue;
            };
            let Some(policy) = enforcer.policy_of(index) else {
                continue;
            };
            let subject = if index == UNREGISTERED {
                Subject::unregistered(tables.hash.clone())
            } else {
                Subject::from(tables.as_ref())
            };
            let known = Known {
                subject,
                entries: Arc::clone(tables),
            };
            if self.policies.insert(policy, known.clone()).is_none() {
                self.order.push_back(policy);
            }
            self.present.insert(index, (policy, known));
        }
        self.forget();
        // Cgroups come and go with the registry's changes as well.
        self.paths.clear();
    }

    /// Learns which name led to these addresses.
    pub fn learn_name(&mut self, agent: u32, name: &str, addresses: &[IpAddr]) {
        let name: Arc<str> = name.into();
        let known = self.hostnames.entry(agent).or_default();
        for addr in addresses {
            known.learn(addr.to_canonical(), &name);
        }
    }

    /// Forgets what names an agent had.
    pub fn forget_names(&mut self, agent: u32) {
        self.hostnames.remove(&agent);
    }

    /// The name that led the agent to an address, if it is remembered.
    pub fn name_of(&self, agent: u32, addr: IpAddr) -> Option<&str> {
        let known = self.hostnames.get(&agent)?;
        known.names.get(&addr.to_canonical()).map(|name| &**name)
    }

    /// The agents whose lookups were refused for want of a guard, since this was asked last.
    pub fn take_unguarded(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.unguarded)
    }

    /// Writes a lookup, which stands for `count`. False if the agent's allowance has no room, or it
    /// could not be written.
    pub fn write_lookup(&mut self, now: u64, refused: &Refused, count: u64) -> bool {
        self.ledger.admits(now, refused.agent) && self.put_lookup(now, refused, count, false)
    }

    /// Writes the one line of an agent for lookups that have none of their own.
    pub fn write_lookups_over(&mut self, now: u64, refused: &Refused, count: u64) {
        self.put_lookup(now, refused, count, true);
    }

    fn put_lookup(&mut self, now: u64, refused: &Refused, count: u64, over: bool) -> bool {
        let known = self.known(refused.agent, 0);
        let entry = refused.report.entry.unwrap_or(NO_ENTRY);
        let process = refused.process();
        let cgroup = refused.asked.cgroup;
        let context = self.context(&known, process, cgroup, entry, now, count);
        let mut lookup = refused.lookup(count, context.process);
        lookup.time = context.time;
        lookup.agent = context.agent;
        lookup.cgroup = context.cgroup;
        lookup.entry = context.entry;
        lookup.revision = context.revision;
        if over {
            lookup.text = format!(
                "{count} more lookups of {} without lines of their own; one of them: {}",
                known.subject.id, lookup.text
            );
            lookup.name.clear();
        }
        let host = self.host.clone();
        self.put_line(now, refused.agent, |sequence| {
            lookup.to_ocsf(&host, sequence)
        })
        .is_ok()
    }

    /// Forgets the oldest policies that are out of force, past the bounds.
    fn forget(&mut self) {
        let mut present = HashSet::new();
        let mut seen = HashSet::new();
        for (policy, known) in self.present.values() {
            present.insert(*policy);
            seen.insert(Arc::as_ptr(&known.entries));
        }
        let (mut count, mut weight) = (0, 0);
        let policies = &mut self.policies;
        let mut kept: VecDeque<u64> = VecDeque::with_capacity(self.order.len());
        for policy in self.order.drain(..).rev() {
            let Some(known) = policies.get(&policy) else {
                continue;
            };
            if !present.contains(&policy) {
                // The same tables under another policy weigh nothing.
                if seen.insert(Arc::as_ptr(&known.entries)) {
                    weight += known.entries.entries.len() + known.entries.scope.reach.len();
                }
                count += 1;
                // The latest stays, whatever it weighs.
                if count > 1 && (weight > REMEMBERED || count > POLICIES) {
                    policies.remove(&policy);
                    continue;
                }
            }
            kept.push_front(policy);
        }
        self.order = kept;
    }

    /// Takes in what the ring has, for a turn at most; what is left stays there.
    pub fn drain(&mut self, enforcer: &mut Enforcer) {
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
                if let Some(count) = self.ledger.record(now, event) {
                    self.write_event(now, event, count);
                }
            }
            if events.len() < CHUNK || turn.elapsed() >= TURN {
                return;
            }
        }
    }

    /// Takes in all that the ring has. Agents can fill it faster than lines can be written, and
    /// nobody else is served meanwhile: after a turn records are booked and not written, but for
    /// the first of each agent. What is booked so is owed, and told in one line for each kind.
    fn empty(&mut self, enforcer: &mut Enforcer) {
        let turn = Instant::now();
        let mut lines: HashMap<u32, u32> = HashMap::new();
        // What is in the ring now is in it once at most.
        for _ in 0..RING_BYTES as usize / size_of::<Event>() / CHUNK {
            let events = enforcer.drain(CHUNK);
            let now = crate::kernel::boot_nanos();
            for event in &events {
                let Some(count) = self.ledger.record(now, event) else {
                    continue;
                };
                let of_agent = lines.entry(event.agent).or_default();
                if *of_agent < FIRST || turn.elapsed() < TURN {
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

    /// Once a second: what the ring has, then what folds and losses still owe.
    pub fn settle(&mut self, enforcer: &mut Enforcer) {
        self.empty(enforcer);
        self.health.drained = Some(Instant::now());
        self.prune();
        let now = crate::kernel::boot_nanos();
        let folds: Vec<(u32, Fold)> = enforcer
            .folds()
            .into_iter()
            .map(|(cpu, slot, fold)| (cpu << 16 | slot, fold))
            .collect();
        for residual in self.ledger.folds(now, folds) {
            self.write_fold(now, &residual.fold, residual.count);
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

    fn known(&self, agent: u32, policy: u64) -> Known {
        self.policies
            .get(&policy)
            .or_else(|| self.present.get(&agent).map(|(_, known)| known))
            .cloned()
            .unwrap_or_else(|| Known {
                subject: Subject::unregistered(String::new()),
                entries: Arc::new(AgentTables::nobody()),
            })
    }

    fn whereabouts(&mut self, cgroup: u64) -> Option<Whereabouts> {
        if self.paths.len() > PATHS {
            self.paths.clear();
        }
        let hierarchy = &self.hierarchy;
        self.paths
            .entry(cgroup)
            .or_insert_with(|| {
                let path = hierarchy.path_of(cgroup).ok().flatten()?;
                Some(Whereabouts {
                    invocation: hierarchy.invocation(&path),
                    path: path.to_string(),
                })
            })
            .clone()
    }

    fn context(
        &mut self,
        known: &Known,
        process: ProcessInfo,
        cgroup: u64,
        entry: u32,
        time: u64,
        count: u64,
    ) -> Context {
        let entry: Option<&Entry> = (entry != NO_ENTRY)
            .then(|| {
                usize::try_from(entry)
                    .ok()
                    .and_then(|at| known.entries.entries.get(at))
            })
            .flatten();
        let (path, invocation) = match self.whereabouts(cgroup) {
            Some(place) => (Some(place.path), place.invocation),
            None => (None, None),
        };
        Context {
            time: self.offset.wall(time),
            agent: known.subject.clone(),
            process: self.processes.enrich(process),
            cgroup: path,
            invocation,
            entry: entry.map(Into::into),
            dst_name: None,
            revision: self.revision,
            count,
        }
    }

    fn write_event(&mut self, now: u64, event: &Event, count: u64) {
        let known = self.known(event.agent, event.policy);
        let process = ProcessInfo::from_event(event);
        let mut context = self.context(
            &known,
            process,
            event.cgroup,
            event.entry,
            event.time,
            count,
        );
        context.dst_name = self.hostname(event.agent, event.addr);
        if let Some(violation) = Violation::from_event(event, context) {
            self.write(now, event.agent, &violation, count);
        }
    }

    fn write_fold(&mut self, now: u64, fold: &Fold, count: u64) {
        let known = self.known(fold.agent, 0);
        let process = ProcessInfo::from_fold(fold);
        let mut context = self.context(&known, process, fold.cgroup, fold.entry, now, count);
        context.dst_name = self.hostname(fold.agent, fold.addr);
        if let Some(violation) = Violation::from_fold(fold, context) {
            self.write(now, fold.agent, &violation, count);
        }
    }

    fn hostname(&self, agent: u32, addr: Addr) -> Option<String> {
        self.name_of(agent, addr.into()).map(str::to_owned)
    }

    fn write(&mut self, now: u64, agent: u32, violation: &Violation, count: u64) {
        let key = Key {
            agent,
            verdict: violation.verdict,
            reason: violation.reason,
        };
        let host = self.host.clone();
        let watched = |watch: &&Watch| watch.cgroup == violation.cgroup_id;
        let run = self.watch.as_ref().filter(watched);
        let run = run.map(|watch| watch.run.clone());
        let line = self.append(now, key, count, |sequence| {
            let mut line = violation.to_ocsf(&host, sequence);
            if let Some(run) = &run
                && let Some(unmapped) = line.pointer_mut("/unmapped")
                && let Some(unmapped) = unmapped.as_object_mut()
            {
                unmapped.insert("probe".to_owned(), run.as_str().into());
            }
            line
        });
        let Some(text) = line else {
            if run.is_some()
                && let Some(watch) = &mut self.watch
            {
                let why = self.health.broken.as_ref().map(|(_, why)| why.clone());
                watch.unwritten = Some(why.unwrap_or_else(|| "the log cannot be written".into()));
            }
            return;
        };
        // What a probe provoked is no violation of the agent's own.
        if run.is_some() {
            return;
        }
        let id = violation.agent.id.clone();
        self.last.insert(
            id.clone(),
            LastViolation {
                time_ms: violation.time,
                text: text.clone(),
            },
        );
        let destination = violation
            .dst
            .map_or_else(String::new, |dst| match dst.port {
                Some(port) => std::net::SocketAddr::new(dst.ip, port).to_string(),
                None => dst.ip.to_string(),
            });
        let denials = self.denials.entry(id).or_default();
        denials.push_front(Denial {
            time_ms: violation.time,
            destination,
            reason: violation.reason.name().to_owned(),
            text,
            advice: advice::on(violation),
        });
        denials.truncate(DENIALS);
    }

    fn write_owed(&mut self, now: u64, owed: &Owed) {
        let known = self.known(owed.key.agent, 0);
        let dropped = Dropped {
            time: self.offset.wall(now),
            agent: known.subject,
            verdict: owed.key.verdict,
            reason: owed.key.reason,
            lost: owed.lost,
            cgroup: None,
            revision: self.revision,
        };
        let host = self.host.clone();
        let count = owed.lost.sum();
        // What an agent loses by its own rate is no fault of the reader's.
        if owed.lost.disk > 0 {
            self.health.lost = Some((Instant::now(), owed.lost.disk));
        }
        self.lost = self.lost + owed.lost;
        self.append(now, owed.key, count, |sequence| {
            dropped.to_ocsf(&host, sequence)
        });
    }

    /// Appends a line; returns its text for people, or none where it could not be written, which
    /// the ledger is told.
    fn append(
        &mut self,
        now: u64,
        key: Key,
        count: u64,
        build: impl Fn(u64) -> serde_json::Value,
    ) -> Option<String> {
        match self.put_line(now, key.agent, build) {
            Ok(text) => Some(text),
            Err(error) => {
                warn!(message = "A violation could not be written; it is counted.", %error);
                self.ledger.unwritten(key, count);
                None
            }
        }
    }

    /// Appends a line; returns its text for people.
    fn put_line(
        &mut self,
        now: u64,
        agent: u32,
        build: impl Fn(u64) -> serde_json::Value,
    ) -> Result<String, LogError> {
        match &mut self.sink {
            Sink::Memory(lines) => {
                let value = build(lines.len() as u64 + 1);
                let text = human(&value, false);
                lines.push(value);
                Ok(text)
            }
            Sink::Log(log) => {
                let mut text = String::new();
                let mut exported = None;
                let exports = &mut self.exports;
                let appended = log.append(|sequence| {
                    let value = build(sequence);
                    text = human(&value, false);
                    if !exports.is_empty() {
                        exported = Some(value.clone());
                    }
                    value
                });
                let bytes = match appended {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        let since = self
                            .health
                            .broken
                            .take()
                            .map_or_else(wall_millis, |(at, _)| at);
                        self.health.broken = Some((since, error.to_string()));
                        return Err(error);
                    }
                };
                self.health.written = Some(wall_millis());
                self.health.broken = None;
                if let Some(event) = exported {
                    exports.write(&event);
                }
                self.ledger.spend(now, agent, bytes);
                Ok(text)
            }
        }
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
