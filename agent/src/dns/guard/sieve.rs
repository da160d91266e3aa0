//! An answer, record by record: what of it the agent gets, and what it leases. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use agent_ebpf::abi::Reason;
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{
            A, AAAA,
            svcb::{SVCB, SvcParamKey, SvcParamValue},
        },
    },
};

use super::{
    super::{
        lease::{Full, Leases},
        message::{ErrorCode, Reply},
    },
    AddressLease, Forward, Limits, MAX_TTL, Release, Report, SECOND, Why, words,
};
use crate::policy::{self, AgentTables, Allowance, Clock, Unleasable};

/// Names that a chain of CNAMEs may have; resolvers give up at about as many.
const MAX_CHAIN: usize = 16;

/// An address that is left out of an answer.
pub(super) struct Refused {
    why: Why,
    reason: Reason,
    entry: Option<u32>,
    text: String,
}

/// An answer's addresses under way.
pub(super) struct Sieve<'a> {
    pub(super) agent: &'a AgentTables,
    pub(super) clock: &'a Clock,
    pub(super) limits: Limits,
    pub(super) host: &'a str,
    /// None in monitor mode, where every address passes and none is leased.
    pub(super) allowances: Option<&'a [Allowance]>,
    pub(super) leases: &'a mut Leases,
    /// Boot time in nanoseconds at which a lease of this answer ends.
    pub(super) deadline: u64,
    /// Addresses that were looked at, and whether the agent gets to know them.
    pub(super) seen: BTreeMap<IpAddr, bool>,
    pub(super) leased: BTreeSet<IpAddr>,
    pub(super) refused: Option<Refused>,
}

// === impl Sieve ===

impl Sieve<'_> {
    /// The record as the agent gets it, if it does.
    pub(super) fn keep(&mut self, record: &Record) -> Option<Record> {
        let data = match &record.data {
            RData::A(A(addr)) => self.admits((*addr).into()).then(|| record.data.clone())?,
            RData::AAAA(AAAA(addr)) => self.admits((*addr).into()).then(|| record.data.clone())?,
            RData::HTTPS(https) => {
                let mut https = https.clone();
                self.hints(&mut https.0)?;
                RData::HTTPS(https)
            }
            RData::SVCB(svcb) => {
                let mut svcb = svcb.clone();
                self.hints(&mut svcb)?;
                RData::SVCB(svcb)
            }
            RData::CNAME(_) | RData::SRV(_) | RData::PTR(_) => record.data.clone(),
            // Of another type than its number says: it was asked for none of these.
            _ => return None,
        };
        let ttl = record.ttl.min(MAX_TTL);
        Some(Record::from_rdata(record.name.clone(), ttl, data))
    }

    /// Leaves in a service's record the address hints that the agent may use, and no parameter that
    /// nobody knows. None when the record needs what is left out.
    fn hints(&mut self, svcb: &mut SVCB) -> Option<()> {
        let mut left_out = Vec::new();
        svcb.svc_params.retain_mut(|(key, value)| {
            let keep = match value {
                SvcParamValue::Ipv4Hint(hint) => {
                    hint.0.retain(|A(addr)| self.admits((*addr).into()));
                    !hint.0.is_empty()
                }
                SvcParamValue::Ipv6Hint(hint) => {
                    hint.0.retain(|AAAA(addr)| self.admits((*addr).into()));
                    !hint.0.is_empty()
                }
                SvcParamValue::Mandatory(_)
                | SvcParamValue::Alpn(_)
                | SvcParamValue::NoDefaultAlpn
                | SvcParamValue::Port(_)
                | SvcParamValue::EchConfigList(_) => true,
                SvcParamValue::Unknown(_) => false,
            };
            if !keep {
                left_out.push(*key);
            }
            keep
        });
        let needs = |key: &SvcParamKey| {
            svcb.svc_params.iter().any(|(_, value)| {
                matches!(value, SvcParamValue::Mandatory(list) if list.0.contains(key))
            })
        };
        (!left_out.iter().any(needs)).then_some(())
    }

    /// Whether the agent gets to know `addr`: it is leased to it now, or in its scope anyway.
    fn admits(&mut self, addr: IpAddr) -> bool {
        if let Some(admitted) = self.seen.get(&addr) {
            return *admitted;
        }
        let admitted = match self.allowances {
            None => true,
            Some(allowances) => match self.lease(addr, allowances) {
                Ok(()) => true,
                Err(_) if policy::reaches(self.agent, addr, self.clock) => true,
                Err(refused) => {
                    self.refused.get_or_insert(refused);
                    false
                }
            },
        };
        self.seen.insert(addr, admitted);
        admitted
    }

    fn lease(&mut self, addr: IpAddr, allowances: &[Allowance]) -> Result<(), Refused> {
        let mut unleasable = None;
        let mut any = false;
        for allowance in allowances {
            match policy::leasable(self.agent, addr, allowance) {
                Ok(_) => any = true,
                Err(why) => unleasable = unleasable.or(Some(why)),
            }
        }
        if let Some(why) = unleasable.filter(|_| !any) {
            return Err(self.rebound(addr, why));
        }
        let full = |text: String| Refused {
            why: Why::Full,
            reason: Reason::NameNotInScope,
            entry: None,
            text,
        };
        let now = self.clock.boot_now_ns;
        let added = self
            .leases
            .add(self.host, addr, self.deadline, self.limits.bounds, now);
        if let Err(which) = added {
            return Err(full(self.overfull(which)));
        }
        let max_lease = self.limits.max_lease;
        let ports = self.leases.ports(self.agent, addr, max_lease, self.clock);
        if let Err(many) = policy::leased_rules(self.agent, addr, &ports, self.clock) {
            return Err(full(format!("{}: {many}", self.host)));
        }
        self.leased.insert(addr);
        Ok(())
    }

    fn rebound(&self, addr: IpAddr, why: Unleasable) -> Refused {
        let (agent, host) = (&self.agent.id, self.host);
        let place = match (why.reason, why.entry) {
            (_, Some(entry)) => {
                let entry = self.agent.entries.get(entry as usize);
                let name = entry.map_or("an entry", |entry| entry.name.as_str());
                format!("which {name} denies")
            }
            (_, None) => "which no `within` of the name allows".to_owned(),
        };
        Refused {
            why: Why::Address(addr),
            reason: why.reason,
            entry: why.entry,
            text: format!(
                "{host} leads agent {agent} to {addr}, {place}; ask {}",
                self.agent.owner
            ),
        }
    }

    fn overfull(&self, which: Full) -> String {
        let (agent, host) = (&self.agent.id, self.host);
        let bounds = self.limits.bounds;
        let wait = |until: u64| {
            until
                .saturating_sub(self.clock.boot_now_ns)
                .div_ceil(SECOND)
        };
        match which {
            Full::Name(until) => format!(
                "agent {agent} holds {} addresses of {host} already, as many as it may; the first \
                 ends in {} s",
                bounds.per_name,
                wait(until)
            ),
            Full::Agent(until) => format!(
                "agent {agent} holds {} addresses already, as many as it may; the first ends in {} s",
                bounds.per_agent,
                wait(until)
            ),
        }
    }

    /// The answer put together.
    pub(super) fn finish(
        self,
        forward: &Forward,
        message: &Message,
        chain: Vec<Record>,
        kept: Vec<Record>,
        had: bool,
        end: &Name,
    ) -> Release {
        let asked = &forward.asked;
        let refused = self.refused.as_ref();
        let report = refused.map(|refused| Report {
            text: refused.text.clone(),
            ..words::report(
                self.agent,
                asked,
                refused.why,
                refused.reason,
                refused.entry,
            )
        });
        let reply = match refused.filter(|_| had && kept.is_empty()) {
            Some(refused) => {
                Reply::to(asked, ResponseCode::Refused).because(ErrorCode::Blocked, &refused.text)
            }
            None => {
                let soa = message.authorities.iter().find(|record| {
                    record.record_type() == RecordType::SOA
                        && record.dns_class == DNSClass::IN
                        && record.name.zone_of(end)
                });
                let soa = soa.filter(|_| kept.is_empty()).map(|soa| {
                    let ttl = soa.ttl.min(MAX_TTL);
                    Record::from_rdata(soa.name.clone(), ttl, soa.data.clone())
                });
                let mut answers = chain;
                answers.extend(kept);
                // Upstream was asked with letters of another case.
                for record in &mut answers {
                    if record.name.eq_ignore_root(&asked.name) {
                        record.name = asked.name.clone();
                    }
                }
                let mut reply = Reply::to(asked, message.metadata.response_code);
                if let Some(refused) = refused {
                    reply = reply.because(ErrorCode::Blocked, &refused.text);
                }
                reply.answers(answers).authority(soa)
            }
        };
        let leases = self.leased.iter().filter_map(|addr| {
            let max_lease = self.limits.max_lease;
            let ports = self.leases.ports(self.agent, *addr, max_lease, self.clock);
            let rules = policy::leased_rules(self.agent, *addr, &ports, self.clock).ok()?;
            Some(AddressLease { addr: *addr, rules })
        });
        Release {
            reply,
            leases: leases.collect(),
            host: forward.host.clone(),
            addresses: self.seen.into_keys().collect(),
            report,
        }
    }
}

/// The CNAMEs from the name that was asked to where they end, and that end. None when they go on
/// for too long, or in a circle.
pub(super) fn follow(forward: &Forward, message: &Message) -> Option<(Vec<Record>, Name)> {
    let mut end = forward.name.clone();
    let mut chain = Vec::new();
    // Who asks for the alias itself gets it as the answer.
    if forward.asked.kind == RecordType::CNAME {
        return Some((chain, end));
    }
    loop {
        let next = message
            .answers
            .iter()
            .find_map(|record| match &record.data {
                RData::CNAME(target)
                    if record.dns_class == DNSClass::IN && record.name.eq_ignore_root(&end) =>
                {
                    Some((record, target.0.clone()))
                }
                _ => None,
            });
        let Some((record, target)) = next else {
            return Some((chain, end));
        };
        if chain.len() >= MAX_CHAIN {
            return None;
        }
        let ttl = record.ttl.min(MAX_TTL);
        chain.push(Record::from_rdata(
            record.name.clone(),
            ttl,
            record.data.clone(),
        ));
        end = target;
    }
}
