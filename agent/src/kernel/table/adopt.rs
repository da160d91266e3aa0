//! What an earlier daemon left in the maps. Whoever can write to bpffs may have been at them too,
//! so nothing that is read is trusted to be well-formed: what cannot be understood is never equal
//! to the registry, and goes when that is put in force.

use std::collections::{HashMap, HashSet};

use agent_ebpf::abi::{
    AgentName, AgentRow, ROW_INDEX_BITS, RuleSet, SERVE, SETS_PER_ADDRESS, SPACE_BITS, ScopeKey,
    UNREGISTERED,
};
use aya::maps::{MapError, lpm_trie::Key};

use super::{Installed, Leased, Place, Tables, UNREGISTERED_ID, leases, name_bytes};

/// Policies and generations that a daemon gives out stay far below these; a number above was
/// written by somebody else, and counting on from there would overflow.
const POLICY_BOUND: u64 = 1 << 62;
const GENERATION_BOUND: u64 = 1 << 39;

impl Tables {
    /// Reads back what is in the maps, so that words, policies, rows and blocks in use are not
    /// handed out again, and what nobody points to is removed.
    pub(super) fn adopt(&mut self) -> Result<(), MapError> {
        self.epoch_now = self.epoch.get(&0, 0)?;
        self.adopt_names()?;
        let owners = self.adopt_words()?;
        self.adopt_entries(&owners)?;
        for claim in self.claims.iter() {
            let (cgroup, agent) = claim?;
            self.attributed.insert(cgroup, agent);
        }
        Ok(())
    }

    fn adopt_names(&mut self) -> Result<(), MapError> {
        for index in 0..self.names.len() {
            let name = self.names.get(&index, 0)?;
            if name == AgentName::zeroed() {
                continue;
            }
            let id = id_of(&name).filter(|id| {
                let is_pseudo = id == UNREGISTERED_ID;
                is_pseudo == (index == UNREGISTERED) && !self.index.contains_key(id)
            });
            match id.filter(|_| index < self.agents.len()) {
                Some(id) => {
                    self.index.insert(id.clone(), index);
                    self.ids.insert(index, id);
                }
                // No daemon wrote this.
                None => self.names.set(index, AgentName::zeroed(), 0)?,
            }
        }
        Ok(())
    }

    /// Takes words and rows over. Returns whose each policy is.
    fn adopt_words(&mut self) -> Result<HashMap<u64, u32>, MapError> {
        let mut owners = HashMap::new();
        let mut rows = HashSet::new();
        for index in 0..self.agents.len() {
            let word = self.agents.get(&index, 0)?;
            if word == 0 {
                continue;
            }
            let generation = word >> ROW_INDEX_BITS;
            if generation < GENERATION_BOUND {
                self.next_word = self.next_word.max(generation + 1);
            }
            let at = (word & ((1 << ROW_INDEX_BITS) - 1)) as u32;
            let mut installed = Installed {
                adopted: true,
                word,
                row: None,
                content: AgentRow::zeroed(),
                entries: Vec::new(),
                leases: HashMap::new(),
            };
            if at < self.rows.len() {
                installed.content = self.rows.get(&at, 0)?;
                let policy = installed.content.policy;
                let sound = policy != 0 && policy < POLICY_BOUND && !owners.contains_key(&policy);
                if sound && rows.insert(at) {
                    installed.row = Some(at);
                    owners.insert(policy, index);
                    self.next_policy = self.next_policy.max(policy + 1);
                }
            }
            self.in_force.insert(index, installed);
        }
        self.free_rows = (0..self.rows.len())
            .rev()
            .filter(|row| !rows.contains(row))
            .collect();
        Ok(owners)
    }

    fn adopt_entries(&mut self, owners: &HashMap<u64, u32>) -> Result<(), MapError> {
        let mut owned = HashSet::new();
        for (place, set) in self.read_places()? {
            if place.policy() < POLICY_BOUND {
                self.next_policy = self.next_policy.max(place.policy() + 1);
            }
            let owner = place.prefix().and_then(|_| owners.get(&place.policy()));
            let Some(installed) = owner.and_then(|agent| self.in_force.get(agent)) else {
                self.delete(place)?;
                continue;
            };
            let agent = installed.content.policy;
            self.count(place, 1);
            if !self.sets.holds(set) {
                let chain = self.read_chain(set)?;
                self.sets.adopt(set, &chain, &mut owned);
            }
            self.sets.uses(set);
            let is_leased = self.sets.rules(set).is_some_and(leases::is_leased);
            let Some(installed) = owners
                .get(&agent)
                .and_then(|agent| self.in_force.get_mut(agent))
            else {
                continue;
            };
            if is_leased && place.bits.is_none() && place.key.space & SERVE == 0 {
                let held = Leased { set, base: None };
                installed.leases.insert(place, held);
            } else {
                installed.entries.push((place, set));
            }
        }
        self.sets.adopted(&owned);
        Ok(())
    }

    /// Every key of the scope maps, with the set that it points to.
    pub(super) fn read_places(&self) -> Result<Vec<(Place, u32)>, MapError> {
        let mut found = Vec::new();
        for entry in self.exacts.iter() {
            let (key, set) = entry?;
            found.push((Place { key, bits: None }, set));
        }
        for entry in self.prefixes.iter() {
            let (key, set): (Key<ScopeKey>, u32) = entry?;
            let (key, bits) = (key.data(), Some(key.prefix_len()));
            found.push((Place { key, bits }, set));
        }
        Ok(found)
    }

    /// The blocks from `head` on, as far as they can be followed.
    pub(super) fn read_chain(&self, head: u32) -> Result<Vec<(u32, RuleSet)>, MapError> {
        let (mut chain, mut at) = (Vec::new(), head);
        while chain.len() < SETS_PER_ADDRESS && at < self.rulesets.len() {
            let set = self.rulesets.get(&at, 0)?;
            chain.push((at, set));
            if set.next == 0 {
                break;
            }
            at = set.next - 1;
        }
        Ok(chain)
    }
}

/// The id in a name; none where the bytes are no daemon's.
pub(super) fn id_of(name: &AgentName) -> Option<String> {
    let id: Vec<u8> = name
        .bytes
        .iter()
        .copied()
        .take_while(|byte| *byte != 0)
        .collect();
    let id = String::from_utf8(id).ok()?;
    (!id.is_empty() && name_bytes(&id) == *name).then_some(id)
}

const _: () = assert!(POLICY_BOUND < SERVE && SPACE_BITS == 64);
const _: () = assert!(GENERATION_BOUND < 1 << (64 - ROW_INDEX_BITS));
