//! Leases: exact addresses of a policy in force, which come and go without a new policy. Where the
//! scope has rules for the same address they are worked into the lease's, whose key stands before
//! theirs; they are in force again when the lease is gone.

use std::time::Instant;

use agent_ebpf::abi::{Addr, RULE_LEASED, Rule, SERVE};

use super::{ApplyError, Image, Installed, Leased, Place, Tables};
use crate::policy::tables::Prefix;

/// Whether rules of an address have a lease among them.
pub(super) fn is_leased(rules: &[Rule]) -> bool {
    rules.iter().any(|rule| rule.flags & RULE_LEASED != 0)
}

/// When the last of the leases among these rules is over, open connections included.
fn over(rules: &[Rule]) -> u64 {
    let leased = rules.iter().filter(|rule| rule.flags & RULE_LEASED != 0);
    let each = leased.map(|rule| {
        let tail = u64::from(rule.tail) * 1_000_000_000;
        rule.deadline.saturating_add(tail)
    });
    each.max().unwrap_or(0)
}

fn place(policy: u64, addr: Addr) -> Place {
    Place::new(policy, Prefix { addr, len: 128 })
}

impl Tables {
    /// Writes leases of an agent in force, or ends them, and reads them back: see
    /// [`crate::kernel::Enforcer::lease`].
    pub fn lease(&mut self, agent: u32, leases: &[(Addr, Vec<Rule>)]) -> Result<(), ApplyError> {
        // Out of the way, so that the maps can be written meanwhile.
        let Some(mut installed) = self.in_force.remove(&agent) else {
            return Ok(());
        };
        let mut done = Ok(());
        for (addr, rules) in leases {
            let at = place(installed.content.policy, *addr);
            done = if is_leased(rules) {
                self.put_lease(&mut installed, at, rules)
            } else {
                self.end_lease(&mut installed, at)
            };
            if done.is_err() {
                break;
            }
        }
        self.in_force.insert(agent, installed);
        done
    }

    /// Writes the leases of `image` under a policy that is being staged.
    pub(super) fn stage_leases(
        &mut self,
        image: &Image,
        installed: &mut Installed,
    ) -> Result<(), ApplyError> {
        for (addr, rules) in image.leases.iter().filter(|(_, rules)| is_leased(rules)) {
            let at = place(installed.content.policy, *addr);
            self.put_lease(installed, at, rules)?;
        }
        Ok(())
    }

    fn put_lease(
        &mut self,
        installed: &mut Installed,
        at: Place,
        rules: &[Rule],
    ) -> Result<(), ApplyError> {
        let held = installed.leases.get(&at).copied();
        let base = match held {
            Some(held) => held.base,
            None => installed.base_of(at, &self.exacts),
        };
        if held.is_none() && base.is_none() {
            self.check_room(at)?;
        }
        let set = self.write_rules(rules)?;
        if held.is_some_and(|held| held.set == set) {
            self.sets.release(set);
            return Ok(());
        }
        // Noted first, so that whatever comes of the write is removed again.
        installed.leases.insert(at, Leased { set, base });
        match held {
            Some(held) => self.retired_sets.push((Instant::now(), held.set)),
            None if base.is_none() => self.count(at, 1),
            None => {}
        }
        self.insert(at, set)
    }

    fn end_lease(&mut self, installed: &mut Installed, at: Place) -> Result<(), ApplyError> {
        let Some(held) = installed.leases.get(&at).copied() else {
            return Ok(());
        };
        match held.base {
            Some(base) => self.insert(at, base)?,
            None => {
                self.delete(at).map_err(|source| ApplyError::Write {
                    map: at.map(),
                    key: at.to_string(),
                    source: Box::new(source),
                })?;
                self.count(at, -1);
            }
        }
        installed.leases.remove(&at);
        self.retired_sets.push((Instant::now(), held.set));
        Ok(())
    }

    /// Every lease in the kernel: agent, address, all rules of the address.
    pub fn leases(&self) -> Vec<(u32, Addr, Vec<Rule>)> {
        let each = self.in_force.iter().flat_map(|(agent, installed)| {
            let leased = self.leased_in(installed);
            leased
                .into_iter()
                .map(|(addr, rules)| (*agent, addr, rules))
        });
        each.collect()
    }

    /// The leases of one agent.
    pub fn leases_of(&self, agent: u32) -> Vec<(Addr, Vec<Rule>)> {
        let installed = self.in_force.get(&agent);
        installed.map_or_else(Vec::new, |installed| self.leased_in(installed))
    }

    /// All rules of an address with a lease of this agent.
    pub fn leased_at(&self, agent: u32, addr: Addr) -> Option<Vec<Rule>> {
        let installed = self.in_force.get(&agent)?;
        let held = installed
            .leases
            .get(&place(installed.content.policy, addr))?;
        self.sets.rules(held.set).map(<[Rule]>::to_vec)
    }

    /// The leases of a policy.
    pub(super) fn leased_in(&self, installed: &Installed) -> Vec<(Addr, Vec<Rule>)> {
        let each = installed.leases.iter().filter_map(|(at, held)| {
            let rules = self.sets.rules(held.set)?;
            Some((at.key.addr, rules.to_vec()))
        });
        each.collect()
    }

    /// The agents with a lease that was over after `since`, up to `now`.
    pub fn leases_over(&self, since: u64, now: u64) -> Vec<u32> {
        let is_over = |held: &Leased| {
            let rules = self.sets.rules(held.set).unwrap_or_default();
            let over = over(rules);
            since < over && over <= now
        };
        let agents = self.in_force.iter();
        agents
            .filter(|(_, installed)| installed.leases.values().any(is_over))
            .map(|(agent, _)| *agent)
            .collect()
    }

    /// Removes leases that were over `kept` before `now`.
    pub fn drop_leases(&mut self, now: u64, kept: u64) {
        let agents: Vec<u32> = self.in_force.keys().copied().collect();
        for agent in agents {
            let Some(installed) = self.in_force.get(&agent) else {
                continue;
            };
            let is_over = |set: u32| {
                let rules = self.sets.rules(set);
                rules.is_none_or(|rules| over(rules).saturating_add(kept) <= now)
            };
            let ended: Vec<(Addr, Vec<Rule>)> = installed
                .leases
                .iter()
                .filter(|(_, held)| is_over(held.set))
                .map(|(at, _)| (at.key.addr, Vec::new()))
                .collect();
            if let Err(error) = self.lease(agent, &ended) {
                tracing::warn!(message = "Leases that are over could not be removed.", %error);
            }
        }
    }
}

impl Installed {
    /// The scope's own rule set at an exact address.
    fn base_of(
        &self,
        at: Place,
        exacts: &aya::maps::HashMap<aya::maps::MapData, agent_ebpf::abi::ScopeKey, u32>,
    ) -> Option<u32> {
        debug_assert!(at.key.space & SERVE == 0 && at.bits.is_none());
        // Asking the kernel first: few addresses have one, and a scope may have very many.
        exacts.get(&at.key, 0).ok()?;
        let own = self.entries.iter().find(|(place, _)| *place == at);
        own.map(|(_, set)| *set)
    }
}
