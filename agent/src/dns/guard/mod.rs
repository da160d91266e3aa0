//! What becomes of a question and of its answer. Pure: the clock is an argument, nothing is sent.
//!
//! A question meets, first match wins:
//!
//! | # | it                                                     | comes of it |
//! |---|--------------------------------------------------------|-------------|
//! | 1 | is of a class other than IN, or names no host          | REFUSED |
//! | 2 | is a reverse lookup of an address in scope or leased   | asked upstream |
//! | 3 | is about a name that [`policy::resolve`] refuses       | REFUSED, or NXDOMAIN below a search domain |
//! | 4 | is of a type that leads to no address ([`KINDS`])      | REFUSED |
//! | 5 | is one too many below a wildcard                       | REFUSED |
//! | 6 | anything else                                          | asked upstream |
//!
//! Below a search domain the answer is NXDOMAIN, because resolvers try these in turn and give up
//! for good at a REFUSED: glibc and musl would not come to the name as it was written.
//!
//! Of an answer only the CNAME chain and the records that were asked for are kept, and of these
//! only addresses that the agent may reach: leased, or in scope by themselves. The name that was
//! asked decides, whatever the chain leads over. TXT, MX, ANY and the like are not asked upstream at
//! all: nothing that connects needs them, and they are what tunnels live on.

mod sieve;
#[cfg(test)]
mod tests;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::RandomState},
    net::IpAddr,
};

use agent_ebpf::abi::Reason;
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType},
};

use self::{
    sieve::{Sieve, follow},
    words::{exceeded, refusal, refuse, refused, report},
};
use super::{
    budget::{Budget, Exhausted, Limit},
    lease::{Bounds, Leases, Shown},
    message::{Asked, ErrorCode, Reply},
    name::{is_searched, reversed, wire},
};
use crate::policy::{self, AgentTables, Allowance, Clock, LeasedRule, Resolution};

/// Types that are asked upstream: addresses, what leads to them, and reverse names.
pub const KINDS: [RecordType; 6] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::CNAME,
    RecordType::HTTPS,
    RecordType::SVCB,
    RecordType::SRV,
];
/// The longest that a record may be kept, in seconds: longer TTLs are mistakes or worse (RFC 8767,
/// section 4).
const MAX_TTL: u32 = 86_400;
/// A lease ends this much after the TTL, in nanoseconds: TTLs are whole seconds, and the answer
/// reaches the agent after the lease was written.
const GRACE: u64 = 1_000_000_000;
const SECOND: u64 = 1_000_000_000;

/// Limits from the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The shortest lease, in nanoseconds.
    pub min_lease: u64,
    /// What an open TCP connection may outlive its lease by, in nanoseconds.
    pub max_lease: u64,
    /// Of one wildcard grant.
    pub budget: Limit,
    /// Of leases.
    pub bounds: Bounds,
}

/// The guard's memory of all agents.
#[derive(Debug)]
pub struct Guard {
    limits: Limits,
    hasher: RandomState,
    agents: HashMap<String, State>,
}

/// The memory of one agent.
#[derive(Debug, Default)]
struct State {
    leases: Leases,
    /// By pattern.
    budgets: HashMap<String, Budget>,
}

/// What becomes of a question.
#[derive(Clone, Debug)]
pub enum Action {
    /// It is answered at once.
    Reply(Reply, Option<Report>),
    /// It is asked upstream.
    Forward(Forward, Option<Report>),
}

/// A question for an upstream.
#[derive(Clone, Debug)]
pub struct Forward {
    /// As the agent asked.
    pub asked: Asked,
    /// The name to ask for: rebuilt, lower case.
    pub name: Name,
    /// The name as the scope knows it.
    host: String,
    /// Whether it is a reverse lookup that is allowed by its address.
    reverse: bool,
}

/// What came of asking upstream.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// An answer to the question.
    Answered(Box<Message>),
    /// None, for this reason.
    Failed(String),
}

/// An answer to release once its leases are in force.
#[derive(Clone, Debug)]
pub struct Release {
    /// What the agent gets.
    pub reply: Reply,
    /// What has to be in the kernel before.
    pub leases: Vec<AddressLease>,
    /// The name, for naming these addresses in logs.
    pub host: String,
    /// The addresses that it led to, leased or not.
    pub addresses: Vec<IpAddr>,
    /// What there is to say about it.
    pub report: Option<Report>,
}

/// All rules of one address with the leases of an agent worked in. Without any that is `leased` the
/// address has no lease left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressLease {
    /// The address.
    pub addr: IpAddr,
    /// Its rules.
    pub rules: Vec<LeasedRule>,
}

/// Something that an agent tried and did not get, or in monitor mode would not have got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The agent.
    pub agent: String,
    /// The name, printable.
    pub name: String,
    /// The record type.
    pub kind: String,
    /// What was wrong.
    pub why: Why,
    /// The verdict's reason.
    pub reason: Reason,
    /// The entry that decided, by index.
    pub entry: Option<u32>,
    /// Whether monitor mode let it through.
    pub monitored: bool,
    /// In words; the agent got the same.
    pub text: String,
}

/// What was wrong with a question or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The name.
    Name,
    /// The name, which a resolver made by appending a search domain.
    Search,
    /// The record type or class.
    Kind,
    /// Too many names below a wildcard.
    Budget,
    /// An address in the answer.
    Address(IpAddr),
    /// No room for another lease.
    Full,
}

// === impl Why ===

impl Why {
    /// A word for logs and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Search => "search",
            Self::Kind => "kind",
            Self::Budget => "budget",
            Self::Address(_) => "address",
            Self::Full => "full",
        }
    }
}

// === impl Action ===

impl Action {
    /// Whether it is refused for nothing but its name: below a search domain it would be answered
    /// otherwise.
    pub fn is_about_the_name(&self) -> bool {
        matches!(self, Self::Reply(_, Some(report))
            if report.why == Why::Name && report.reason == Reason::NameNotInScope)
    }
}

/// The next whole second: leases that end alike share their rules in the kernel.
fn whole_second(nanos: u64) -> u64 {
    nanos.div_ceil(SECOND).saturating_mul(SECOND)
}

// === impl Guard ===

impl Guard {
    /// A guard that remembers nothing yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            hasher: RandomState::new(),
            agents: HashMap::new(),
        }
    }

    /// What becomes of what `agent` asked. `search` are the search domains of its resolver.
    pub fn ask(
        &mut self,
        agent: &AgentTables,
        search: &[String],
        asked: Asked,
        clock: &Clock,
    ) -> Action {
        let refuse = |why, reason, entry| refuse(agent, &asked, why, reason, entry);
        if asked.class != DNSClass::IN {
            return refuse(Why::Kind, Reason::NameNotInScope, None);
        }
        let Some(host) = asked.host.clone() else {
            return refuse(Why::Name, Reason::NameNotInScope, None);
        };
        let resolution = policy::resolve(agent, &host, clock);
        if asked.kind == RecordType::PTR {
            return self.ask_reverse(agent, asked, host, resolution, clock);
        }
        let (allowances, monitored) = match resolution {
            Resolution::Granted(allowances) => (allowances, None),
            Resolution::Monitored { reason, entry } => (Vec::new(), Some((reason, entry))),
            Resolution::Refused { reason, entry } => {
                let searched = reason == Reason::NameNotInScope && is_searched(&host, search);
                let why = if searched { Why::Search } else { Why::Name };
                return refuse(why, reason, entry);
            }
        };
        if !KINDS.contains(&asked.kind) {
            return refuse(Why::Kind, Reason::NameNotInScope, None);
        }
        let Some(name) = wire(&host) else {
            return refuse(Why::Name, Reason::NameNotInScope, None);
        };
        if monitored.is_none()
            && let Some((exhausted, entry)) = self.spend(agent, &host, &allowances, clock)
        {
            let text = exceeded(agent, &host, exhausted);
            return refused(
                agent,
                &asked,
                Why::Budget,
                Reason::NameNotInScope,
                Some(entry),
                text,
            );
        }
        let report = monitored.map(|(reason, entry)| Report {
            monitored: true,
            ..report(agent, &asked, Why::Name, reason, entry)
        });
        let forward = Forward {
            asked,
            name,
            host,
            reverse: false,
        };
        Action::Forward(forward, report)
    }

    /// A reverse lookup: allowed for the addresses that the agent may reach, and asked with a name
    /// made of the address alone.
    fn ask_reverse(
        &self,
        agent: &AgentTables,
        asked: Asked,
        host: String,
        resolution: Resolution,
        clock: &Clock,
    ) -> Action {
        let refuse = |why, reason, entry| refuse(agent, &asked, why, reason, entry);
        let addr = reversed(&asked.name);
        let (reason, entry, lifted) = match resolution {
            // No grant of a name is about names that point back.
            Resolution::Granted(_) => (Reason::NameNotInScope, None, false),
            Resolution::Monitored { reason, entry } => (reason, entry, true),
            Resolution::Refused { reason, entry } => (reason, entry, false),
        };
        if !matches!(reason, Reason::NameNotInScope) && !lifted {
            return refuse(Why::Name, reason, entry);
        }
        let Some(addr) = addr else {
            return refuse(Why::Kind, Reason::NameNotInScope, None);
        };
        let leased = self
            .agents
            .get(&agent.id)
            .is_some_and(|state| state.leases.holds(addr, clock.boot_now_ns));
        let reached = leased || policy::reaches(agent, addr, clock);
        if !reached && !lifted {
            return refuse(Why::Name, reason, entry);
        }
        let report = (!reached).then(|| Report {
            monitored: true,
            ..report(agent, &asked, Why::Name, reason, entry)
        });
        let forward = Forward {
            asked,
            name: Name::from(addr),
            host,
            reverse: true,
        };
        Action::Forward(forward, report)
    }

    /// Takes `host` from the budget of the wildcards that grant it, if nothing but wildcards does:
    /// from the first that has something left.
    fn spend(
        &mut self,
        agent: &AgentTables,
        host: &str,
        allowances: &[Allowance],
        clock: &Clock,
    ) -> Option<(Exhausted, u32)> {
        let state = self.agents.entry(agent.id.clone()).or_default();
        let mut exhausted = None;
        for allowance in allowances {
            let pattern = allowance.wildcard.as_ref()?;
            let below = host.strip_suffix(pattern.base()).unwrap_or(host);
            let budget = state.budgets.entry(pattern.to_string()).or_default();
            let limit = self.limits.budget;
            match budget.spend(&self.hasher, host, below, limit, clock.boot_now_ns) {
                Ok(()) => return None,
                Err(which) => exhausted = exhausted.or(Some((which, allowance.entry))),
            }
        }
        exhausted
    }

    /// What becomes of the answer to `forward`. The leases that it makes are remembered; they are
    /// in force once the caller has written them, and only then may the reply leave.
    pub fn judge(
        &mut self,
        agent: &AgentTables,
        forward: &Forward,
        outcome: Outcome,
        clock: &Clock,
    ) -> Release {
        let asked = &forward.asked;
        let failed = |code, text: &str| Release {
            reply: Reply::to(asked, ResponseCode::ServFail).because(code, text),
            leases: Vec::new(),
            host: forward.host.clone(),
            addresses: Vec::new(),
            report: None,
        };
        let message = match outcome {
            Outcome::Answered(message) => *message,
            Outcome::Failed(why) => {
                let text = format!("no answer from upstream: {why}");
                return failed(ErrorCode::NoReachableAuthority, &text);
            }
        };
        let code = message.metadata.response_code;
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            let text = format!("upstream says {}", code.to_str());
            return failed(ErrorCode::NoReachableAuthority, &text);
        }
        let Some((chain, end)) = follow(forward, &message) else {
            return failed(ErrorCode::InvalidData, "a chain of aliases without an end");
        };
        let wanted: Vec<&Record> = message
            .answers
            .iter()
            .filter(|record| {
                record.record_type() == asked.kind
                    && record.dns_class == DNSClass::IN
                    && record.name.eq_ignore_root(&end)
            })
            .collect();

        // The scope may have changed since the question.
        let resolution = policy::resolve(agent, &forward.host, clock);
        let allowances = match (&resolution, forward.reverse) {
            (_, true) | (Resolution::Monitored { .. }, _) => None,
            (Resolution::Granted(allowances), _) => Some(allowances.as_slice()),
            (Resolution::Refused { reason, entry }, _) => {
                let (reply, report) = refusal(agent, asked, Why::Name, *reason, *entry);
                return Release {
                    reply,
                    leases: Vec::new(),
                    host: forward.host.clone(),
                    addresses: Vec::new(),
                    report: Some(report),
                };
            }
        };
        let ttls = chain
            .iter()
            .map(|record| record.ttl)
            .chain(wanted.iter().map(|record| record.ttl));
        let ttl = u64::from(ttls.min().unwrap_or(0).min(MAX_TTL));
        let span = (ttl * SECOND).max(self.limits.min_lease) + GRACE;
        let state = self.agents.entry(agent.id.clone()).or_default();
        let mut sieve = Sieve {
            agent,
            clock,
            limits: self.limits,
            host: &forward.host,
            allowances,
            leases: &mut state.leases,
            deadline: whole_second(clock.boot_now_ns.saturating_add(span)),
            seen: BTreeMap::new(),
            leased: BTreeSet::new(),
            refused: None,
        };
        let had = !wanted.is_empty();
        let kept: Vec<Record> = wanted
            .into_iter()
            .filter_map(|record| sieve.keep(record))
            .collect();
        sieve.finish(forward, &message, chain, kept, had, &end)
    }

    /// All leases of `agent` anew, after its scope or the clocks have changed.
    pub fn renew(&mut self, agent: &AgentTables, clock: &Clock) -> Vec<AddressLease> {
        let Some(state) = self.agents.get_mut(&agent.id) else {
            return Vec::new();
        };
        state.leases.drop_ended(clock.boot_now_ns);
        let leases = &state.leases;
        let max_lease = self.limits.max_lease;
        let patterns: BTreeSet<String> = agent
            .names
            .iter()
            .map(|rule| rule.pattern.to_string())
            .collect();
        state
            .budgets
            .retain(|pattern, _| patterns.contains(pattern));
        let lease = |addr| {
            let ports = leases.ports(agent, addr, max_lease, clock);
            // More rules than fit: then the scope's own stand, and the leases are not in force.
            let rules = policy::leased_rules(agent, addr, &ports, clock)
                .or_else(|_too_many| policy::leased_rules(agent, addr, &[], clock))
                .unwrap_or_default();
            AddressLease { addr, rules }
        };
        leases.addresses().map(lease).collect()
    }

    /// Forgets an agent that is no more.
    pub fn forget(&mut self, agent: &str) {
        self.agents.remove(agent);
    }

    /// The leases of an agent, for `status` and `explain`.
    pub fn leases(&self, agent: &str, now: u64) -> Vec<Shown> {
        let state = self.agents.get(agent);
        state.map_or_else(Vec::new, |state| state.leases.shown(now).collect())
    }

    /// Drops what has ended, of all agents.
    pub fn sweep(&mut self, now: u64) {
        for state in self.agents.values_mut() {
            state.leases.drop_ended(now);
        }
    }
}
