//! Leases: exact addresses of a policy in force, which come and go without a new policy. Where the
//! scope has rules for the same address they are worked into the lease's, whose key stands before
//! theirs; they are in force again when the lease is gone.

use std::{collections::HashMap, time::Instant};

use agent_ebpf::abi::{Addr, INHERITED, Leaf, RULE_LEASED, Rule, ScopeKey};

use super::{ApplyError, Image, Installed, Leased, Place, Tables, put, stage::Writes};
use crate::{kernel::bulk::Bulk, policy::tables::Prefix};

/// Element of `epoch` that counts leases: whatever was refused before may be open.
const LEASES: u32 = 1;

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
        let done = self.lease_into(agent, &mut installed, leases);
        self.in_force.insert(agent, installed);
        done
    }

    fn lease_into(
        &mut self,
        agent: u32,
        installed: &mut Installed,
        leases: &[(Addr, Vec<Rule>)],
    ) -> Result<(), ApplyError> {
        let mut writes = Writes::default();
        for (addr, rules) in leases {
            let at = place(installed.content.policy, *addr);
            if is_leased(rules) {
                if self.lent.contains(&(agent, at)) {
                    return Err(ApplyError::Taken {
                        key: at.to_string(),
                        by: "a grant to a probe",
                    });
                }
                let base = match installed.leases.get(&at) {
                    Some(held) => held.base,
                    None => installed.base_of(at, &self.exacts),
                };
                self.plan_lease(installed, at, rules, base, &mut writes)?;
            } else {
                self.end_lease(installed, at)?;
            }
        }
        if writes.exacts.is_empty() {
            return Ok(());
        }
        self.write(&writes)?;
        // What was refused a moment ago, and is remembered, may be open now.
        let added = self.epoch.get(LEASES).map_err(|source| ApplyError::Read {
            map: "epoch",
            source,
        })?;
        put(
            "epoch",
            &self.epoch,
            LEASES,
            added.unwrap_or(0).wrapping_add(1),
        )
    }

    /// Plans the leases of `image` under a policy that is being planned.
    pub(super) fn plan_leases(
        &mut self,
        image: &Image,
        installed: &mut Installed,
        writes: &mut Writes,
    ) -> Result<(), ApplyError> {
        let leased = image.leases.iter().filter(|(_, rules)| is_leased(rules));
        let leased: Vec<_> = leased.collect();
        if leased.is_empty() {
            return Ok(());
        }
        let exact = installed.entries.iter().filter(|(at, _)| at.bits.is_none());
        let bases: HashMap<Place, Leaf> = exact.copied().collect();
        for (addr, rules) in leased {
            let at = place(installed.content.policy, *addr);
            let base = bases.get(&at).copied();
            self.plan_lease(installed, at, rules, base, writes)?;
        }
        Ok(())
    }

    /// Takes a lease into `installed`, and notes what has to be written for it.
    fn plan_lease(
        &mut self,
        installed: &mut Installed,
        at: Place,
        rules: &[Rule],
        base: Option<Leaf>,
        writes: &mut Writes,
    ) -> Result<(), ApplyError> {
        let held = installed.leases.get(&at).copied();
        if held.is_none() && base.is_none() {
            self.check_room(at)?;
        }
        let leaf = self.plan_rules(rules, writes)?;
        if held.is_some_and(|held| held.leaf == leaf) {
            self.sets.release(leaf.set);
            return Ok(());
        }
        // Noted first, so that whatever comes of the write is removed again.
        installed.leases.insert(at, Leased { leaf, base });
        match held {
            Some(held) => self.parted.push((Instant::now(), held.leaf.set)),
            None if base.is_none() => self.count(at, 1),
            None => {}
        }
        writes.exacts.push((at.key, leaf));
        Ok(())
    }

    fn end_lease(&mut self, installed: &mut Installed, at: Place) -> Result<(), ApplyError> {
        let Some(held) = installed.leases.get(&at).copied() else {
            return Ok(());
        };
        let failed = |source| ApplyError::Write {
            map: at.map(),
            key: at.to_string(),
            source,
        };
        match held.base {
            Some(base) => self.exacts.set(at.key, base).map_err(failed)?,
            None => {
                self.delete(at).map_err(failed)?;
                self.count(at, -1);
            }
        }
        installed.leases.remove(&at);
        self.parted.push((Instant::now(), held.leaf.set));
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
        self.rules_of(held.leaf)
    }

    /// The rules behind a key, each with its entry.
    fn rules_of(&self, leaf: Leaf) -> Option<Vec<Rule>> {
        let rules = self.sets.rules(leaf.set)?;
        let each = rules.iter().map(|rule| Rule {
            entry: match rule.entry {
                INHERITED => leaf.entry,
                entry => entry,
            },
            ..*rule
        });
        Some(each.collect())
    }

    /// The leases of a policy.
    pub(super) fn leased_in(&self, installed: &Installed) -> Vec<(Addr, Vec<Rule>)> {
        let each = installed
            .leases
            .iter()
            .filter_map(|(at, held)| Some((at.key.addr, self.rules_of(held.leaf)?)));
        each.collect()
    }

    /// The agents with a lease that was over after `since`, up to `now`.
    pub fn leases_over(&self, since: u64, now: u64) -> Vec<u32> {
        let is_over = |held: &Leased| {
            let over = self.sets.rules(held.leaf.set).map_or(0, over);
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
                .filter(|(_, held)| is_over(held.leaf.set))
                .map(|(at, _)| (at.key.addr, Vec::new()))
                .collect();
            if let Err(error) = self.lease(agent, &ended) {
                tracing::warn!(message = "Leases that are over could not be removed.", %error);
            }
        }
    }
}

impl Installed {
    /// What the scope itself has at an exact address.
    fn base_of(&self, at: Place, exacts: &Bulk<ScopeKey, Leaf>) -> Option<Leaf> {
        // Asking the kernel first: few addresses have one, and a scope may have very many.
        exacts.get(at.key).ok().flatten()?;
        let own = self.entries.iter().find(|(place, _)| *place == at);
        own.map(|(_, leaf)| *leaf)
    }
}
