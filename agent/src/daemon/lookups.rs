//! Lookups that the guard refused, or that monitor mode let through, as lines of the log. Repeats
//! within a second fold into a count, and what is over an agent's allowance of lines is told in one
//! line a second, so that a flood of questions costs no more than one of connections.

use std::collections::HashMap;

use agent_ebpf::abi::{Asked, Verdict, Witness};

use super::recorder::Recorder;
use crate::{
    audit::{Endpoint, Lookup, ProcessInfo},
    dns::{
        guard::Report,
        server::{Client, Transport},
    },
    kernel::boot_nanos,
};

/// Different lookups of one agent that are told apart within a second.
const APART: usize = 128;

/// What was told within this second.
#[derive(Default)]
pub struct Lookups {
    told: HashMap<(u32, Kind), Told>,
    /// Of each agent.
    apart: HashMap<u32, usize>,
    /// Of each agent and verdict, those without a line: how many, and one of them.
    over: HashMap<(u32, bool), (u64, Refused)>,
}

/// What makes two lookups the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    name: String,
    kind: String,
    why: &'static str,
    monitored: bool,
    pid: u32,
}

struct Told {
    refused: Refused,
    /// Lookups since the line.
    more: u64,
}

/// One lookup, as it came.
#[derive(Clone, Debug)]
pub struct Refused {
    /// The agent, by the kernel's number.
    pub agent: u32,
    /// What the guard says.
    pub report: Report,
    /// Who asked.
    pub client: Client,
    /// What its socket had asked.
    pub asked: Asked,
}

impl Refused {
    /// The line, for so many of them. `with` is the rest.
    pub fn lookup(&self, count: u64, process: ProcessInfo) -> Lookup {
        let Report {
            name,
            kind,
            why,
            reason,
            monitored,
            text,
            ..
        } = &self.report;
        let resolver = std::net::IpAddr::from(self.asked.addr);
        Lookup {
            time: 0,
            agent: crate::audit::Subject::unregistered(String::new()),
            verdict: if *monitored {
                Verdict::Monitored
            } else {
                Verdict::Denied
            },
            reason: *reason,
            name: name.clone(),
            kind: kind.clone(),
            why: why.word(),
            text: text.clone(),
            resolver: Some(Endpoint {
                ip: resolver,
                port: Some(self.asked.port),
            }),
            src: Endpoint {
                ip: self.client.from.ip(),
                port: Some(self.client.from.port()),
            },
            protocol: match self.client.transport {
                Transport::Udp => 17,
                Transport::Tcp => 6,
            },
            process,
            cgroup_id: self.asked.cgroup,
            cgroup: None,
            entry: None,
            revision: 0,
            count,
        }
    }

    /// The process that asked.
    pub fn process(&self) -> ProcessInfo {
        ProcessInfo::from_record(
            self.asked.pid,
            &self.asked.comm,
            Some(self.asked.uid),
            Witness::Owner,
        )
    }
}

impl Lookups {
    /// Whether a line is due for this one; otherwise it counts for a later one.
    fn take(&mut self, refused: &Refused) -> bool {
        let agent = refused.agent;
        let kind = Kind {
            name: refused.report.name.clone(),
            kind: refused.report.kind.clone(),
            why: refused.report.why.word(),
            monitored: refused.report.monitored,
            pid: refused.asked.pid,
        };
        if let Some(told) = self.told.get_mut(&(agent, kind.clone())) {
            told.more += 1;
            return false;
        }
        let apart = self.apart.entry(agent).or_default();
        if *apart >= APART {
            self.add_over(refused.clone(), 1);
            return false;
        }
        *apart += 1;
        let told = Told {
            refused: refused.clone(),
            more: 0,
        };
        self.told.insert((agent, kind), told);
        true
    }

    /// Has `count` of these told in one line for all.
    fn add_over(&mut self, refused: Refused, count: u64) {
        let key = (refused.agent, refused.report.monitored);
        self.over.entry(key).or_insert((0, refused)).0 += count;
    }
}

impl Lookups {
    /// Tells of a lookup.
    pub fn tell(&mut self, recorder: &mut Recorder, refused: Refused) {
        if self.take(&refused) && !recorder.write_lookup(boot_nanos(), &refused, 1) {
            self.add_over(refused, 1);
        }
    }

    /// Once a second: what was folded, and what is over the allowance.
    pub fn settle(&mut self, recorder: &mut Recorder) {
        let now = boot_nanos();
        let mut lookups = std::mem::take(self);
        for (_, told) in std::mem::take(&mut lookups.told) {
            if told.more > 0 && !recorder.write_lookup(now, &told.refused, told.more) {
                lookups.add_over(told.refused, told.more);
            }
        }
        for (_, (count, refused)) in lookups.over {
            recorder.write_lookups_over(now, &refused, count);
        }
    }
}
