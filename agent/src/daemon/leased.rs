//! What is said of leases and of the guard in `status` and `explain`.

use std::{collections::BTreeMap, net::IpAddr};

use agent_ebpf::abi::{Addr, RULE_LEASED, Rule};

use super::core::Core;
use crate::control::protocol::{GuardState, Lease};

/// Leases of an agent that `status` shows: those that end first.
const SHOWN: usize = 256;

/// When the last lease among these rules ends, in boot time.
fn ends(rules: &[Rule]) -> u64 {
    let leased = rules.iter().filter(|rule| rule.flags & RULE_LEASED != 0);
    leased.map(|rule| rule.deadline).max().unwrap_or(0)
}

impl Core {
    /// Whether lookups are turned and answered: read back from the kernel.
    pub(super) fn dns_guard(&self) -> (GuardState, String) {
        let missing: Vec<String> = self
            .enforcer
            .fences()
            .filter(|(_, fence)| fence.stands() && !fence.turns_lookups())
            .map(|(root, _)| root.to_owned())
            .collect();
        if !missing.is_empty() {
            let why = format!(
                "lookups are not turned to the guard on {}: no name resolves there",
                missing.join(", ")
            );
            return (GuardState::Absent, why);
        }
        let (agents, without) = self.served();
        let dropped = self
            .names
            .server()
            .map(crate::dns::server::Server::unanswered);
        let busy = dropped.map_or(0, |dropped| dropped.busy);
        if let Some(agent) = without {
            let why = format!("agent `{agent}` has no endpoint: none of its names resolves");
            return (GuardState::Degraded, why);
        }
        if let Some(silent) = self.names.asked.silent().first() {
            let id = self.enforcer.id_of(silent.agent).unwrap_or("?");
            return (
                GuardState::Absent,
                format!("of agent `{id}`: {}", silent.said()),
            );
        }
        let asked = match self.names.asked.oldest() {
            Some(age) => format!("each answered within the last {} ms", age.as_millis()),
            None => "not all were asked yet".to_owned(),
        };
        let said = format!(
            "{} endpoints for {agents} agents; {asked}; {busy} questions over their number of open \
             ones were dropped",
            self.names.endpoints()
        );
        (GuardState::Live, said)
    }

    /// How many agents use names, and one of them that has no endpoint.
    fn served(&self) -> (usize, Option<String>) {
        let named = self.named();
        let without = named
            .iter()
            .find(|(agent, _)| !self.names.serves(*agent))
            .map(|(_, id)| id.clone());
        (named.len(), without)
    }

    /// How many leases each agent that uses names has in force.
    pub(super) fn live_leases(&self) -> Vec<(String, u64)> {
        let now = crate::kernel::boot_nanos();
        let count = |(agent, id)| {
            let leases = self.enforcer.leases_of(agent);
            let live = leases.iter().filter(|(_, rules)| ends(rules) > now);
            (id, live.count() as u64)
        };
        self.named().into_iter().map(count).collect()
    }

    /// The leases of an agent that have not ended: the first, and how many there are.
    pub(super) fn leases_of(&self, id: &str, agent: u32) -> (Vec<Lease>, u64) {
        let now = crate::kernel::boot_nanos();
        let mut leases: Vec<Lease> = Vec::new();
        let mut unnamed: BTreeMap<IpAddr, u64> = self
            .enforcer
            .leases_of(agent)
            .into_iter()
            .map(|(addr, rules)| (IpAddr::from(addr), ends(&rules)))
            .filter(|(_, ends)| *ends > now)
            .collect();
        let known = self.names.server().map(|server| server.leases(id));
        for lease in known.into_iter().flatten() {
            // What is not in the kernel is no lease, whatever the guard remembers.
            let in_kernel = self.enforcer.leased_at(agent, Addr::from(lease.addr));
            unnamed.remove(&lease.addr);
            if let Some(rules) = in_kernel {
                let until = lease.deadline.min(ends(&rules));
                leases.push(Lease {
                    name: Some(lease.name.to_string()),
                    addr: lease.addr,
                    until_ms: self.offset.wall(until),
                });
            }
        }
        leases.extend(unnamed.into_iter().map(|(addr, ends)| Lease {
            name: None,
            addr,
            until_ms: self.offset.wall(ends),
        }));
        let count = leases.len() as u64;
        leases.sort_by_key(|lease| lease.until_ms);
        leases.truncate(SHOWN);
        leases.sort_by(|left, right| (&left.name, left.addr).cmp(&(&right.name, right.addr)));
        (leases, count)
    }

    /// The lease that a verdict about `addr` by `entry` hangs on.
    pub(super) fn lease_at(&self, agent: u32, addr: IpAddr, entry: u32) -> Option<Lease> {
        let rules = self
            .enforcer
            .leased_at(agent, Addr::from(addr).effective())?;
        let by_lease = rules
            .iter()
            .find(|rule| rule.entry == entry && rule.flags & RULE_LEASED != 0)?;
        Some(Lease {
            name: self.recorder.name_of(agent, addr).map(str::to_owned),
            addr,
            until_ms: self.offset.wall(by_lease.deadline),
        })
    }
}
