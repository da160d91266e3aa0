//! What agents reached, written down every `log.access`: taken from the kernel once a second, summed
//! up here, and told in a line for each agent and destination.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs, mem,
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{self, Access};
use tracing::{debug, warn};

use super::{
    core::{Core, boot_now},
    time::wall_millis,
};
use crate::{
    audit::{Endpoint, EntryRef, Limits, Log, LogError, LogName, Reached, Subject},
    kernel::add_access,
    policy::{self, UnixMillis},
};

/// Destinations taken from the kernel at a time: whoever gives an order waits for it.
const TURN: usize = 4096;
/// Records in the kernel's ring that are no reason to look again before the second is over.
const FEW: usize = 64;
/// Destinations of one agent that are told one by one each time; the others in one line.
const EACH: usize = 1000;
/// A day's worth of lines is counted anew after this.
const DAY: Duration = Duration::from_secs(86_400);
/// The file in the folder of what lives as long as the boot.
const BESIDE: &str = "access.json";
/// Of the room for logs, what rotated files of this one may take.
const SHARE: u64 = 8;

/// Destinations of one agent that are told apart between two writings.
const APART: usize = 16_384;

/// Address, protocol and port, as the kernel writes the latter two.
type Destination = (IpAddr, u32);
/// By agent: what it sent to where.
type Sums = BTreeMap<String, BTreeMap<Destination, Access>>;

/// All destinations that are not told apart.
const OTHERS: Destination = (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// What was taken and is not written yet.
pub struct AccessBook {
    log: Option<Log>,
    every: Duration,
    sums: Sums,
    /// Whether the ring had more than a few records when it was looked at last.
    is_busy: bool,
    since: UnixMillis,
    written: Instant,
    /// Bytes of each agent's lines since the day began.
    spent: BTreeMap<String, u64>,
    day: Instant,
    daily: u64,
    /// Where the next daemon finds what was told already. It lives as long as the kernel's maps.
    beside: PathBuf,
}

impl AccessBook {
    /// A book that writes to the folder every so often; without that, one that takes nothing.
    pub fn open(settings: &super::settings::Settings, limits: Limits) -> Result<Self, LogError> {
        let log = &settings.log;
        let limits = Limits {
            max_total: limits.max_total / SHARE,
            ..limits
        };
        let opened = match log.access {
            Some(_) => Some(Log::open(&settings.paths.log, LogName::Access, limits)?),
            None => None,
        };
        Ok(Self {
            log: opened,
            every: log.access.unwrap_or(Duration::MAX),
            sums: Sums::new(),
            is_busy: false,
            since: wall_millis(),
            written: Instant::now(),
            spent: BTreeMap::new(),
            day: Instant::now(),
            daily: log.per_agent_daily,
            beside: settings.paths.run.join(BESIDE),
        })
    }

    /// Opens the log anew.
    pub fn reopen(&mut self) -> Result<(), LogError> {
        self.log.as_mut().map_or(Ok(()), Log::reopen)
    }

    /// Whether the kernel's ring fills faster than once a second empties it.
    pub fn is_busy(&self) -> bool {
        self.is_busy
    }

    fn put(&mut self, agent: &str, to: Destination, access: Access) {
        let sums = self.sums.entry(agent.to_owned()).or_default();
        let is_apart = sums.len() < APART || sums.contains_key(&to);
        let sum = sums
            .entry(if is_apart { to } else { OTHERS })
            .or_insert(Access::zeroed());
        *sum = add_access(*sum, access);
    }
}

impl Core {
    /// Goes on where an earlier daemon ended. Without its word what lies in the kernel's cache, a
    /// second of each flow, is told once more.
    pub(super) fn resume_access(&mut self) {
        let text = fs::read(&self.access.beside).unwrap_or_default();
        if let Ok(remembered) = serde_json::from_slice(&text) {
            self.enforcer.accesses().recall(remembered);
        }
    }

    /// Leaves word for the next daemon.
    fn remember_access(&mut self) {
        let remembered = self.enforcer.accesses().remembered();
        let path = &self.access.beside;
        let beside = path.with_extension("new");
        let written = serde_json::to_vec(&remembered)
            .map_err(std::io::Error::from)
            .and_then(|text| fs::write(&beside, text))
            .and_then(|()| fs::rename(&beside, path));
        if let Err(error) = written {
            debug!(message = "What was told of the cache could not be kept.", %error);
        }
    }

    /// Once a second: takes what the kernel has, and writes it down when it is time.
    pub(super) fn tend_access(&mut self) {
        if self.access.log.is_none() {
            return;
        }
        let due = self.access.written.elapsed() >= self.access.every;
        self.take_access(due);
        if due {
            self.write_access();
        }
    }

    /// Takes what the kernel has, also what lies in the cache. For the end, and before agents
    /// change: the kernel knows them by numbers.
    pub(super) fn settle_access(&mut self) {
        if self.access.log.is_some() {
            self.take_access(true);
        }
    }

    /// Empties the kernel's ring.
    pub(super) fn drain_access(&mut self) {
        if self.access.log.is_some() {
            self.access.is_busy = self.enforcer.accesses().drain() > FEW;
        }
    }

    fn take_access(&mut self, all: bool) {
        let ids: BTreeMap<u32, String> = self
            .enforcer
            .indices()
            .into_iter()
            .map(|(id, index)| (index, id))
            .collect();
        self.drain_access();
        let accesses = self.enforcer.accesses();
        let mut looks = vec![accesses.carried(TURN)];
        if all {
            looks.push(accesses.lying());
        }
        self.problems.remove("access");
        for look in looks {
            match look {
                Ok(taken) => {
                    for (key, access) in taken {
                        let id = ids.get(&key.agent).map_or("unknown", String::as_str);
                        let id = if id == policy::UNREGISTERED_ID {
                            "unregistered"
                        } else {
                            id
                        };
                        self.access
                            .put(id, (IpAddr::from(key.addr), key.flow), access);
                    }
                }
                Err(error) => {
                    let problem = format!("what agents reached cannot be read: {error}");
                    self.problems.insert("access", problem);
                }
            }
        }
    }

    /// A line for each agent and destination. What cannot be written stays in the book.
    pub(super) fn write_access(&mut self) {
        let until = wall_millis();
        if self.access.day.elapsed() >= DAY {
            self.access.day = Instant::now();
            self.access.spent.clear();
        }
        let since = mem::replace(&mut self.access.since, until);
        self.access.written = Instant::now();
        if self.access.log.is_some() {
            self.remember_access();
        }
        let sums = mem::take(&mut self.access.sums);
        for (agent, destinations) in sums {
            let mut one_by_one: Vec<_> = destinations.into_iter().collect();
            // The most first: what is told together is what matters least.
            one_by_one.sort_by_key(|(to, access)| (*to == OTHERS, Reverse(access.bytes)));
            let over = self.access.spent.get(&agent).copied().unwrap_or_default();
            let apart = one_by_one.iter().filter(|(to, _)| *to != OTHERS).count();
            let each = if over < self.access.daily { EACH } else { 0 };
            let rest = one_by_one.split_off(apart.min(each));
            for (to, access) in one_by_one {
                let (ip, flow) = to;
                let dst = Some(Endpoint {
                    ip,
                    port: u16::try_from(flow & 0xffff).ok(),
                });
                let [_, protocol, ..] = flow.to_be_bytes();
                if !self.write_reached(&agent, (since, until, protocol, dst, 1), access) {
                    self.access.put(&agent, to, access);
                }
            }
            if !rest.is_empty() {
                let number = rest.len() as u64;
                let sum = rest.iter().fold(Access::zeroed(), |sum, (_, access)| {
                    add_access(sum, *access)
                });
                if !self.write_reached(&agent, (since, until, 0, None, number), sum) {
                    for (to, access) in rest {
                        self.access.put(&agent, to, access);
                    }
                }
            }
        }
    }

    /// The entry by which the kernel would let this through now, uncounted.
    fn granted_by(&mut self, agent: &str, dst: Endpoint, protocol: u8) -> Option<EntryRef> {
        let tables = Arc::clone(&self.force.agents.get(agent)?.tables);
        let asked = policy::Question::to(dst.ip, dst.port.unwrap_or(0), protocol);
        let question = abi::Question {
            now: boot_now(),
            addr: abi::Addr::from(dst.ip),
            agent: self.enforcer.index_of(agent)?,
            port: dst.port.unwrap_or(0),
            protocol,
            hook: asked.hook as u8,
            tcp_flags: if asked.opening { 2 } else { 0 },
            peer: 2,
            ..abi::Question::zeroed()
        };
        let said = self.enforcer.judge(question).ok()?;
        let entry = usize::try_from(said.entry).ok()?;
        tables.entries.get(entry).map(EntryRef::from)
    }

    /// Whether the line is in the log.
    fn write_reached(
        &mut self,
        agent: &str,
        (since, until, protocol, dst, destinations): (
            UnixMillis,
            UnixMillis,
            u8,
            Option<Endpoint>,
            u64,
        ),
        access: Access,
    ) -> bool {
        let subject = match self.force.agents.get(agent) {
            Some(known) => Subject::from(known.tables.as_ref()),
            // It reached that before it left the registry.
            None => Subject {
                id: agent.to_owned(),
                name: agent.to_owned(),
                ..Subject::unregistered(String::new())
            },
        };
        let entry = dst.and_then(|dst| self.granted_by(agent, dst, protocol));
        let index = self.enforcer.index_of(agent);
        let name = index
            .zip(dst)
            .and_then(|(index, dst)| self.recorder.name_of(index, dst.ip));
        let dst_name = name.map(str::to_owned);
        let reached = Reached {
            since,
            until,
            agent: subject,
            protocol,
            dst,
            destinations,
            dst_name,
            entry,
            bytes: access.bytes,
            packets: access.packets,
            connections: access.connections,
            revision: self.force.revision,
        };
        let host = self.recorder.host().clone();
        let Some(log) = &mut self.access.log else {
            return true;
        };
        let mut event = None;
        let appended = log.append(|sequence| {
            let value = reached.to_ocsf(&host, sequence);
            event = Some(value.clone());
            value
        });
        match appended {
            Ok(bytes) => {
                *self.access.spent.entry(agent.to_owned()).or_default() += bytes as u64;
                let exports = self.recorder.exports();
                if let Some(event) = event.filter(|_| !exports.is_empty()) {
                    exports.write(&event);
                }
                self.problems.remove("access-log");
                true
            }
            Err(error) => {
                warn!(message = "What agents reached could not be written.", %error);
                let problem = format!("what agents reached is not written: {error}");
                self.problems.insert("access-log", problem);
                false
            }
        }
    }
}
