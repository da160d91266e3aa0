//! Leases that an earlier daemon wrote: which of them this one may let stand. The names are not
//! known any more, so each lease is held against the entry that it says it is of, and all of an
//! agent's go if its names are not those that were in force then.

use std::collections::BTreeMap;

use agent_ebpf::abi::{Addr, Class, Effect, RULE_LEASED, Rule};
use tracing::{info, warn};

use super::core::Core;
use crate::{
    kernel::DEADLINE_SLACK,
    policy::{self, AgentTables, Allowance, Clock, LeasedPorts, PortSpec, Ports},
    state::LastGood,
};

const SECOND: u64 = 1_000_000_000;
/// No lease is longer than the longest TTL that counts, and what is added to it.
const LONGEST: u64 = 86_402 * SECOND;

/// Whether `rules` are what a daemon would have written at `addr` for leases of the agent's names.
fn is_sound(tables: &AgentTables, addr: Addr, rules: &[Rule], clock: &Clock) -> bool {
    let mut leases = Vec::new();
    for rule in rules.iter().filter(|rule| rule.flags & RULE_LEASED != 0) {
        let granted = tables
            .names
            .iter()
            .find(|name| name.entry == rule.entry && name.effect == Effect::Allow);
        let Some(granted) = granted else {
            return false;
        };
        let ends = clock
            .deadline(granted.expires)
            .min(clock.deadline(tables.expires));
        let open_until = rule
            .deadline
            .saturating_add(u64::from(rule.tail).saturating_mul(SECOND));
        let allowance = Allowance {
            ports: granted.ports.clone(),
            within: granted.within.clone(),
            deadline: ends,
            entry: granted.entry,
            wildcard: None,
        };
        let class = match rule.class {
            0 => None,
            byte => match Class::from_byte(byte) {
                Some(class) => Some(class),
                None => return false,
            },
        };
        let ports: Ports = [PortSpec::interval(class, rule.low, rule.high)]
            .into_iter()
            .collect();
        let open = policy::leasable(tables, addr.into(), &allowance);
        let covered = open.is_ok_and(|open| ports.without(&open).is_empty());
        if rule.low > rule.high
            || !covered
            || open_until > ends.saturating_add(DEADLINE_SLACK)
            || rule.deadline > clock.boot_now_ns.saturating_add(LONGEST)
        {
            return false;
        }
        leases.push(LeasedPorts {
            ports,
            deadline: rule.deadline,
            open_until,
            entry: rule.entry,
        });
    }
    let wanted = policy::leased_rules(tables, addr.into(), &leases, clock);
    wanted.is_ok_and(|wanted| {
        wanted.len() == rules.len()
            && wanted.iter().zip(rules).all(|(wanted, found)| {
                let wanted = wanted.rule();
                let deadline = wanted.deadline;
                found.deadline.abs_diff(deadline) < DEADLINE_SLACK
                    && Rule { deadline, ..*found } == wanted
            })
    })
}

impl Core {
    /// Lets those leases stand that were in force before and may be still; all others go, and what
    /// was remembered of them with their policy.
    pub(super) fn check_leases(&mut self, before: Option<&LastGood>) {
        let clock = self.offset.clock_now();
        let mut kept = 0_usize;
        let mut by_agent: BTreeMap<u32, Vec<(Addr, Vec<Rule>)>> = BTreeMap::new();
        for (agent, addr, rules) in self.enforcer.leases() {
            by_agent.entry(agent).or_default().push((addr, rules));
        }
        for (agent, leases) in by_agent {
            let Some(id) = self.enforcer.id_of(agent).map(str::to_owned) else {
                continue;
            };
            let Some(in_force) = self.force.agents.get(&id) else {
                continue;
            };
            let tables = in_force.tables.clone();
            let stored = before.and_then(|before| before.agents.get(&id));
            let same = stored.is_some_and(|stored| stored.tables.names == tables.names);
            let all = leases.len();
            let sound: Vec<(Addr, Vec<Rule>)> = leases
                .into_iter()
                .filter(|(addr, rules)| same && is_sound(&tables, *addr, rules, &clock))
                .collect();
            kept += sound.len();
            if sound.len() == all {
                continue;
            }
            info!(
                message = "Leases of before do not fit the registry; they are gone.",
                agent = id,
                gone = all - sound.len()
            );
            let mut image = self.image(&tables);
            image.leases = sound;
            image.fresh = true;
            if let Err(error) = self.enforcer.apply_one(image) {
                let why = format!("{:#}", anyhow::Error::from(error));
                warn!(
                    message = "Leases of before could not be removed.",
                    agent = id,
                    why
                );
                self.problems.insert("leases", why);
            }
        }
        if kept > 0 {
            info!(message = "Leases of before stand.", kept);
        }
    }
}
