//! Rules for one exact address, added to what an agent has in force and taken back again. Neither
//! its row nor its word changes: what was in force before stays so, which is the point of a probe.

use std::time::Instant;

use agent_ebpf::abi::{Addr, Leaf, Rule};

use super::{ApplyError, Place, Tables, stage::Writes};
use crate::policy::tables::Prefix;

/// Rules that were lent.
#[derive(Debug)]
pub struct Loan {
    agent: u32,
    policy: u64,
    place: Place,
    leaf: Leaf,
    before: Option<Leaf>,
}

impl Tables {
    /// Puts `rules` at the exact address `addr` of an agent in force, in place of those that are
    /// there. None for an agent that is not in force. Not where a lease stands: each would put back
    /// what it found when it goes, and they may go in any order.
    pub fn lend(
        &mut self,
        agent: u32,
        addr: Addr,
        rules: &[Rule],
    ) -> Result<Option<Loan>, ApplyError> {
        let Some(policy) = self.policy_of(agent) else {
            return Ok(None);
        };
        let place = Place::new(policy, Prefix { addr, len: 128 });
        let installed = self.in_force.get(&agent);
        if installed.is_some_and(|installed| installed.leases.contains_key(&place)) {
            return Err(ApplyError::Taken {
                key: place.to_string(),
                by: "a lease",
            });
        }
        let before = self.entry(agent, place).map(|leaf| *leaf);
        if before.is_none() {
            self.check_room(place)?;
        }
        let mut writes = Writes::default();
        let leaf = self.plan_rules(rules, &mut writes)?;
        writes.exact(place.key, leaf);
        // Noted first, so that a comparison finds what it expects whatever comes of the write.
        match self.entry(agent, place) {
            Some(known) => *known = leaf,
            None => {
                if let Some(installed) = self.in_force.get_mut(&agent) {
                    installed.entries.push((place, leaf));
                }
                self.count(place, 1);
            }
        }
        let loan = Loan {
            agent,
            policy,
            place,
            leaf,
            before,
        };
        self.lent.push((agent, place));
        match self.write(&writes) {
            Ok(()) => Ok(Some(loan)),
            Err(error) => {
                self.take_back(loan)?;
                Err(error)
            }
        }
    }

    /// Takes a loan back. Where the agent's policy has changed meanwhile, it went with the old one.
    pub fn take_back(&mut self, loan: Loan) -> Result<(), ApplyError> {
        let now = Instant::now();
        self.lent.retain(|lent| *lent != (loan.agent, loan.place));
        if self.policy_of(loan.agent) != Some(loan.policy) {
            self.parted.extend(loan.before.map(|leaf| (now, leaf.set)));
            return Ok(());
        }
        let done = match loan.before {
            Some(before) => {
                let mut writes = Writes::default();
                writes.exact(loan.place.key, before);
                self.write(&writes)
            }
            None => self.delete(loan.place).map_err(|source| ApplyError::Write {
                map: loan.place.map(),
                key: loan.place.to_string(),
                source,
            }),
        };
        // Whatever came of it: the next comparison finds what is left, and mends it.
        match (loan.before, self.entry(loan.agent, loan.place)) {
            (Some(before), Some(known)) => *known = before,
            (None, Some(_)) => {
                if let Some(installed) = self.in_force.get_mut(&loan.agent) {
                    installed.entries.retain(|(place, _)| *place != loan.place);
                }
                self.count(loan.place, -1);
            }
            (_, None) => {}
        }
        self.parted.push((now, loan.leaf.set));
        done
    }

    fn entry(&mut self, agent: u32, place: Place) -> Option<&mut Leaf> {
        let installed = self.in_force.get_mut(&agent)?;
        installed
            .entries
            .iter_mut()
            .find(|(known, _)| *known == place)
            .map(|(_, leaf)| leaf)
    }
}
