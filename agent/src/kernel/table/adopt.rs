//! What an earlier daemon left in the maps. Whoever can write to bpffs may have been at them too,
//! so nothing that is read is trusted to be well-formed: what cannot be understood is never equal
//! to the registry, and goes when that is put in force.

use std::collections::{HashMap, HashSet};

use agent_ebpf::abi::{
    AgentName, AgentRow, Leaf, ROW_INDEX_BITS, RuleSet, SERVE, SETS_PER_ADDRESS, SPACE_BITS,
    UNREGISTERED,
};

use super::{ApplyError, Installed, Leased, Place, Tables, UNREGISTERED_ID, leases, name_bytes};

/// Why a map could not be read.
fn unread(map: &'static str) -> impl Fn(std::io::Error) -> ApplyError {
    move |source| ApplyError::Read { map, source }
}

/// Policies and generations that a daemon gives out stay far below these; a number above was
/// written by somebody else, and counting on from there would overflow.
const POLICY_BOUND: u64 = 1 << 62;
const GENERATION_BOUND: u64 = 1 << 39;

impl Tables {
    /// Reads back what is in the maps, so that words, policies, rows and blocks in use are not
    /// handed out again, and what nobody points to is removed.
    pub(super) fn adopt(&mut self) -> Result<(), ApplyError> {
        let epoch = self.epoch.get(0).map_err(unread("epoch"))?;
        self.epoch_now = epoch.unwrap_or(0);
        self.adopt_names()?;
        let owners = self.adopt_words()?;
        self.adopt_entries(&owners)?;
        let claims = self.claims.all().map_err(unread("claims"))?;
        self.attributed.extend(claims);
        Ok(())
    }

    fn adopt_names(&mut self) -> Result<(), ApplyError> {
        for (index, name) in self.names.all().map_err(unread("names"))? {
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
                None => {
                    let nobody = self.names.set(index, AgentName::zeroed());
                    nobody.map_err(|source| ApplyError::Write {
                        map: "names",
                        key: format!("[{index}]"),
                        source,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Takes words and rows over. Returns whose each policy is.
    fn adopt_words(&mut self) -> Result<HashMap<u64, u32>, ApplyError> {
        let mut owners = HashMap::new();
        let mut rows = HashSet::new();
        let contents = self.rows.all().map_err(unread("rows"))?;
        for (index, word) in self.agents.all().map_err(unread("agents"))? {
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
            if let Some((_, content)) = contents.get(at as usize) {
                installed.content = *content;
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

    fn adopt_entries(&mut self, owners: &HashMap<u64, u32>) -> Result<(), ApplyError> {
        let blocks = self.read_blocks()?;
        let mut owned = HashSet::new();
        let mut nobodys = Vec::new();
        for (place, leaf) in self.read_places()? {
            if place.policy() < POLICY_BOUND {
                self.next_policy = self.next_policy.max(place.policy() + 1);
            }
            let owner = place.prefix().and_then(|_| owners.get(&place.policy()));
            let Some(agent) = owner.filter(|agent| self.in_force.contains_key(agent)) else {
                nobodys.push(place);
                continue;
            };
            let (agent, set) = (*agent, leaf.set);
            self.count(place, 1);
            if !self.sets.holds(set) {
                let chain = self.chain(&blocks, set);
                self.sets.adopt(set, &chain, &mut owned);
            }
            self.sets.uses(set);
            let is_leased = self.sets.rules(set).is_some_and(leases::is_leased);
            let Some(installed) = self.in_force.get_mut(&agent) else {
                continue;
            };
            if is_leased && place.bits.is_none() && place.key.space & SERVE == 0 {
                let held = Leased { leaf, base: None };
                installed.leases.insert(place, held);
            } else {
                installed.entries.push((place, leaf));
            }
        }
        self.sets.adopted(&owned);
        for installed in self.in_force.values_mut() {
            installed
                .entries
                .sort_unstable_by_key(|(place, _)| place.order());
        }
        self.delete_all(nobodys.iter())
            .map_err(|source| ApplyError::Write {
                map: "exacts or prefixes",
                key: "that no policy has".to_owned(),
                source,
            })
    }

    /// Every key of the scope maps, with what it points to.
    pub(super) fn read_places(&self) -> Result<Vec<(Place, Leaf)>, ApplyError> {
        let mut found = Vec::new();
        let exacts = self.exacts.each(|key, leaf| {
            found.push((Place { key, bits: None }, leaf));
        });
        exacts.map_err(unread("exacts"))?;
        let prefixes = self.prefixes.each(|key, leaf| {
            found.push((Place::found(key), leaf));
        });
        prefixes.map_err(unread("prefixes"))?;
        Ok(found)
    }

    /// Every block up to the last that was ever written.
    fn read_blocks(&self) -> Result<Vec<RuleSet>, ApplyError> {
        let mut blocks = Vec::new();
        let read = self.rulesets.each(|index, block| {
            if block != RuleSet::zeroed() {
                blocks.resize(index as usize, RuleSet::zeroed());
                blocks.push(block);
            }
        });
        read.map_err(unread("rulesets"))?;
        Ok(blocks)
    }

    /// The blocks from `head` on, as far as they can be followed. `written` are those of
    /// [`Self::read_blocks`].
    fn chain(&self, written: &[RuleSet], head: u32) -> Vec<(u32, RuleSet)> {
        let (mut chain, mut at) = (Vec::new(), head);
        while chain.len() < SETS_PER_ADDRESS && at < self.rulesets.len() {
            let set = written.get(at as usize).copied();
            let set = set.unwrap_or(RuleSet::zeroed());
            chain.push((at, set));
            if set.next == 0 {
                break;
            }
            at = set.next - 1;
        }
        chain
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
