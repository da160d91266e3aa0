//! The maps as one store of agents' rows, changed in transactions: everything new is written and
//! read back first, then each agent's word flips (one aligned store), and what is no longer
//! pointed to is removed a second later, when no program can still be reading it.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use agent_ebpf::abi::{
    AgentName, AgentRow, ROW_INDEX_BITS, Rule, RuleSet, SERVE, SETS_PER_ADDRESS, SPACE_BITS,
    ScopeKey, UNREGISTERED,
};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap as KernelHash, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};

use super::{
    Capacity,
    error::{ApplyError, OpenError},
    sets::{Interned, RuleSets},
};
use crate::policy::{UNREGISTERED_ID, tables::Prefix};

/// What shall be in force for one agent, in the kernel's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The agent's id; it finds its own index.
    pub id: String,
    /// Its row; `policy` is filled in when it is written.
    pub row: AgentRow,
    /// Destinations.
    pub reach: Vec<(Prefix, Vec<Rule>)>,
    /// Clients to answer.
    pub serve: Vec<(Prefix, Vec<Rule>)>,
}

/// Rules stay readable this long after the last pointer to them has moved on.
const GRACE: Duration = Duration::from_secs(1);

/// One policy in the kernel.
struct Installed {
    /// None for one that an earlier daemon wrote.
    image: Option<Image>,
    word: u64,
    row: u32,
    keys: Vec<(ScopeKey, u8)>,
    sets: Vec<u32>,
}

/// The typed maps and what is known to be in them.
pub struct Tables {
    claims: KernelHash<MapData, u64, u32>,
    epoch: Array<MapData, u64>,
    agents: Array<MapData, u64>,
    names: Array<MapData, AgentName>,
    rows: Array<MapData, AgentRow>,
    exacts: KernelHash<MapData, ScopeKey, u32>,
    prefixes: LpmTrie<MapData, ScopeKey, u32>,
    rulesets: Array<MapData, RuleSet>,

    index: BTreeMap<String, u32>,
    in_force: HashMap<u32, Installed>,
    retired: Vec<(Instant, Installed)>,
    attributed: HashMap<u64, u32>,
    sets: RuleSets,
    free_rows: Vec<u32>,
    exact_count: u32,
    prefix_count: u32,
    next_word: u64,
    next_policy: u64,
    capacity: Capacity,
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, OpenError> {
    let map = ebpf.take_map(name).ok_or(OpenError::MapMissing { name })?;
    T::try_from(map).map_err(|source| OpenError::Map {
        name,
        source: Box::new(source.into()),
    })
}

/// Writes an array element and reads it back.
fn put<V: Pod + PartialEq>(
    map: &'static str,
    array: &mut Array<MapData, V>,
    index: u32,
    value: V,
) -> Result<(), ApplyError> {
    let key = || format!("[{index}]");
    let failed = |source| ApplyError::Write {
        map,
        key: key(),
        source: Box::new(source),
    };
    array.set(index, value, 0).map_err(failed)?;
    if array.get(&index, 0).map_err(failed)? != value {
        return Err(ApplyError::ReadBack { map, key: key() });
    }
    Ok(())
}

impl Tables {
    /// Takes the maps out of a loaded object, and with them what an earlier daemon left there.
    pub fn open(ebpf: &mut Ebpf, capacity: Capacity) -> Result<Self, OpenError> {
        let mut tables = Self {
            claims: typed(ebpf, "claims")?,
            epoch: typed(ebpf, "epoch")?,
            agents: typed(ebpf, "agents")?,
            names: typed(ebpf, "names")?,
            rows: typed(ebpf, "rows")?,
            exacts: typed(ebpf, "exacts")?,
            prefixes: typed(ebpf, "prefixes")?,
            rulesets: typed(ebpf, "rulesets")?,
            index: BTreeMap::new(),
            in_force: HashMap::new(),
            retired: Vec::new(),
            attributed: HashMap::new(),
            sets: RuleSets::new(capacity.rule_sets),
            free_rows: Vec::new(),
            exact_count: 0,
            prefix_count: 0,
            next_word: 1,
            next_policy: 1,
            capacity,
        };
        tables.adopt().map_err(|source| OpenError::Map {
            name: "agents",
            source: Box::new(source.into()),
        })?;
        Ok(tables)
    }

    /// Reads back what is in the maps, so that words, policies, rows and blocks in use are not
    /// handed out again, and what nobody points to is removed.
    fn adopt(&mut self) -> Result<(), MapError> {
        for index in 0..self.agents.len() {
            let name = self.names.get(&index, 0)?;
            let id: Vec<u8> = name
                .bytes
                .iter()
                .copied()
                .take_while(|byte| *byte != 0)
                .collect();
            if let Ok(id) = String::from_utf8(id)
                && !id.is_empty()
            {
                self.index.insert(id, index);
            }
            let word = self.agents.get(&index, 0)?;
            if word != 0 {
                let row = word as u32 & ((1 << ROW_INDEX_BITS) - 1);
                self.next_word = self.next_word.max((word >> ROW_INDEX_BITS) + 1);
                self.in_force.insert(
                    index,
                    Installed {
                        image: None,
                        word,
                        row,
                        keys: Vec::new(),
                        sets: Vec::new(),
                    },
                );
            }
        }
        let used: Vec<u32> = self
            .in_force
            .values()
            .map(|installed| installed.row)
            .collect();
        self.free_rows = (0..self.rows.len())
            .rev()
            .filter(|row| !used.contains(row))
            .collect();

        let mut owner_of = HashMap::new();
        for (&agent, installed) in &self.in_force {
            let row = self.rows.get(&installed.row, 0)?;
            self.next_policy = self.next_policy.max(row.policy + 1);
            owner_of.insert(row.policy, agent);
        }
        let exacts: Vec<(ScopeKey, u32)> = self.exacts.iter().collect::<Result<_, _>>()?;
        let prefixes: Vec<(Key<ScopeKey>, u32)> = self.prefixes.iter().collect::<Result<_, _>>()?;
        let found = exacts
            .into_iter()
            .map(|(key, set)| (key, 128_u8, set))
            .chain(prefixes.into_iter().map(|(key, set)| {
                (
                    key.data(),
                    u8::try_from(key.prefix_len() - SPACE_BITS).unwrap_or(128),
                    set,
                )
            }));
        for (key, len, set) in found {
            self.next_policy = self.next_policy.max((key.space & !SERVE) + 1);
            let Some(agent) = owner_of.get(&(key.space & !SERVE)) else {
                self.delete(key, len);
                continue;
            };
            self.count(len, 1);
            if self.sets.holds(set) {
                self.sets.adopt(set, Vec::new(), Vec::new());
            } else {
                let (rules, chain) = self.read_chain(set)?;
                self.sets.adopt(set, rules, chain);
            }
            if let Some(installed) = self.in_force.get_mut(agent) {
                installed.keys.push((key, len));
                installed.sets.push(set);
            }
        }
        for claim in self.claims.iter() {
            let (cgroup, agent) = claim?;
            self.attributed.insert(cgroup, agent);
        }
        Ok(())
    }

    fn read_chain(&self, head: u32) -> Result<(Vec<Rule>, Vec<u32>), MapError> {
        let (mut rules, mut chain, mut at) = (Vec::new(), Vec::new(), head);
        for _ in 0..SETS_PER_ADDRESS {
            let set = self.rulesets.get(&at, 0)?;
            chain.push(at);
            rules.extend(set.rules.iter().take(set.len as usize));
            if set.next == 0 {
                break;
            }
            at = set.next - 1;
        }
        Ok((rules, chain))
    }

    /// The index that stands for an agent in the kernel, if it has one.
    pub fn index_of(&self, id: &str) -> Option<u32> {
        self.index.get(id).copied()
    }

    /// All agents that have an index.
    pub fn indices(&self) -> impl Iterator<Item = (&str, u32)> {
        self.index.iter().map(|(id, index)| (id.as_str(), *index))
    }

    /// The policy id in force for an agent, as its row in the kernel has it.
    pub fn policy_of(&self, agent: u32) -> Option<u64> {
        let installed = self.in_force.get(&agent)?;
        self.rows.get(&installed.row, 0).ok().map(|row| row.policy)
    }

    /// Gives an agent an index, and writes its name beside it. Indices are not reused while an
    /// agent of that name may come back, since tags on sockets carry them.
    pub fn assign(&mut self, id: &str) -> Result<u32, ApplyError> {
        if let Some(index) = self.index.get(id) {
            return Ok(*index);
        }
        let taken: Vec<u32> = self.index.values().copied().collect();
        let full = ApplyError::Full {
            map: "agents",
            has: self.agents.len(),
            needs: u32::try_from(taken.len()).unwrap_or(u32::MAX) + 1,
            limit: "agents",
        };
        let index = if id == UNREGISTERED_ID {
            UNREGISTERED
        } else {
            (UNREGISTERED + 1..self.agents.len())
                .find(|index| !taken.contains(index))
                .ok_or(full)?
        };
        let mut name = AgentName::zeroed();
        for (slot, byte) in name.bytes.iter_mut().take(63).zip(id.bytes()) {
            *slot = byte;
        }
        put("names", &mut self.names, index, name)?;
        self.index.insert(id.to_owned(), index);
        Ok(index)
    }

    /// Puts `images` in force, all or none, and takes every other agent out. Returns the ids of
    /// the agents that changed.
    pub fn apply(&mut self, images: Vec<Image>) -> Result<Vec<String>, ApplyError> {
        self.sweep(Instant::now());
        let mut staged = Vec::new();
        let mut kept = Vec::new();
        let mut failed = None;
        for image in images {
            let index = match self.assign(&image.id) {
                Ok(index) => index,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            kept.push(index);
            let same = self
                .in_force
                .get(&index)
                .is_some_and(|now| now.image.as_ref() == Some(&image));
            if same {
                continue;
            }
            match self.stage(&image) {
                Ok(mut installed) => {
                    installed.image = Some(image);
                    staged.push((index, installed));
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = failed {
            for (_, installed) in staged {
                self.remove(installed);
            }
            return Err(error);
        }

        let mut changed = Vec::new();
        for (index, installed) in staged {
            put("agents", &mut self.agents, index, installed.word)?;
            changed.extend(installed.image.iter().map(|image| image.id.clone()));
            if let Some(old) = self.in_force.insert(index, installed) {
                self.retired.push((Instant::now(), old));
            }
        }
        let gone: Vec<u32> = self
            .in_force
            .keys()
            .copied()
            .filter(|index| !kept.contains(index))
            .collect();
        for index in gone {
            put("agents", &mut self.agents, index, 0)?;
            if let Some(old) = self.in_force.remove(&index) {
                changed.extend(old.image.iter().map(|image| image.id.clone()));
                self.retired.push((Instant::now(), old));
            }
        }
        Ok(changed)
    }

    /// Puts one agent in force and leaves all others as they are.
    pub fn apply_one(&mut self, image: Image) -> Result<(), ApplyError> {
        let index = self.assign(&image.id)?;
        let same = self
            .in_force
            .get(&index)
            .is_some_and(|now| now.image.as_ref() == Some(&image));
        if same {
            return Ok(());
        }
        let mut installed = self.stage(&image)?;
        installed.image = Some(image);
        put("agents", &mut self.agents, index, installed.word)?;
        if let Some(old) = self.in_force.insert(index, installed) {
            self.retired.push((Instant::now(), old));
        }
        Ok(())
    }

    /// Writes and reads back everything of `image` but the word that points to it.
    fn stage(&mut self, image: &Image) -> Result<Installed, ApplyError> {
        let policy = self.next_policy;
        self.next_policy += 1;
        let mut installed = Installed {
            image: None,
            word: 0,
            row: 0,
            keys: Vec::new(),
            sets: Vec::new(),
        };
        let staged = self.stage_into(image, policy, &mut installed);
        if let Err(error) = staged {
            self.remove(installed);
            return Err(error);
        }
        Ok(installed)
    }

    fn stage_into(
        &mut self,
        image: &Image,
        policy: u64,
        installed: &mut Installed,
    ) -> Result<(), ApplyError> {
        let spaces = [(policy, &image.reach), (policy | SERVE, &image.serve)];
        for (space, placed) in spaces {
            for (prefix, rules) in placed {
                let set = self.write_rules(rules)?;
                installed.sets.push(set);
                let key = ScopeKey {
                    space,
                    addr: prefix.addr,
                };
                self.insert(key, prefix.len, set)?;
                installed.keys.push((key, prefix.len));
            }
        }
        let Some(row) = self.free_rows.pop() else {
            let has = self.rows.len();
            return Err(ApplyError::Full {
                map: "rows",
                has,
                needs: has + 1,
                limit: "agents",
            });
        };
        installed.row = row;
        installed.word = self.next_word << ROW_INDEX_BITS | u64::from(row);
        self.next_word += 1;
        put(
            "rows",
            &mut self.rows,
            row,
            AgentRow {
                policy,
                ..image.row
            },
        )
    }

    fn write_rules(&mut self, rules: &[Rule]) -> Result<u32, ApplyError> {
        match self.sets.intern(rules) {
            Interned::Shared(head) => Ok(head),
            Interned::New(head, blocks) => {
                for (index, block) in blocks {
                    if let Err(error) = put("rulesets", &mut self.rulesets, index, block) {
                        self.sets.release(head);
                        return Err(error);
                    }
                }
                Ok(head)
            }
            Interned::Full(needs) => Err(ApplyError::Full {
                map: "rulesets",
                has: self.capacity.rule_sets,
                needs,
                limit: "rule_sets",
            }),
        }
    }

    fn insert(&mut self, key: ScopeKey, len: u8, set: u32) -> Result<(), ApplyError> {
        let words = || format!("{}/{len}", std::net::IpAddr::from(key.addr));
        if len == 128 {
            if self.exact_count >= self.capacity.addresses {
                return Err(ApplyError::Full {
                    map: "exacts",
                    has: self.capacity.addresses,
                    needs: self.exact_count + 1,
                    limit: "addresses",
                });
            }
            let failed = |source| ApplyError::Write {
                map: "exacts",
                key: words(),
                source: Box::new(source),
            };
            self.exacts.insert(key, set, 0).map_err(failed)?;
            self.exact_count += 1;
            if self.exacts.get(&key, 0).map_err(failed)? != set {
                return Err(ApplyError::ReadBack {
                    map: "exacts",
                    key: words(),
                });
            }
        } else {
            if self.prefix_count >= self.capacity.prefixes {
                return Err(ApplyError::Full {
                    map: "prefixes",
                    has: self.capacity.prefixes,
                    needs: self.prefix_count + 1,
                    limit: "prefixes",
                });
            }
            let failed = |source| ApplyError::Write {
                map: "prefixes",
                key: words(),
                source: Box::new(source),
            };
            let key = Key::new(SPACE_BITS + u32::from(len), key);
            self.prefixes.insert(&key, set, 0).map_err(failed)?;
            self.prefix_count += 1;
            if self.prefixes.get(&key, 0).map_err(failed)? != set {
                return Err(ApplyError::ReadBack {
                    map: "prefixes",
                    key: words(),
                });
            }
        }
        Ok(())
    }

    fn count(&mut self, len: u8, by: i64) {
        let counter = if len == 128 {
            &mut self.exact_count
        } else {
            &mut self.prefix_count
        };
        *counter = u32::try_from(i64::from(*counter) + by).unwrap_or(0);
    }

    fn delete(&mut self, key: ScopeKey, len: u8) {
        let removed = if len == 128 {
            self.exacts.remove(&key)
        } else {
            self.prefixes
                .remove(&Key::new(SPACE_BITS + u32::from(len), key))
        };
        if let Err(error) = removed {
            tracing::warn!(message = "Stale scope entry could not be removed.", %error);
        }
    }

    /// Removes what nothing points to.
    fn remove(&mut self, installed: Installed) {
        for (key, len) in installed.keys {
            self.delete(key, len);
            self.count(len, -1);
        }
        for set in installed.sets {
            self.sets.release(set);
        }
        if installed.word != 0 {
            self.free_rows.push(installed.row);
        }
    }

    /// Removes what has been out of force for longer than any program can run.
    pub fn sweep(&mut self, now: Instant) {
        let (old, young): (Vec<_>, Vec<_>) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|(at, _)| now.duration_since(*at) > GRACE);
        self.retired = young;
        for (_, installed) in old {
            self.remove(installed);
        }
    }

    /// Makes the attributions equal to `wanted`: cgroup id to agent index. Returns how many
    /// changed.
    pub fn attribute(&mut self, wanted: &HashMap<u64, u32>) -> Result<usize, ApplyError> {
        let failed = |cgroup: u64| {
            move |source| ApplyError::Write {
                map: "claims",
                key: format!("cgroup {cgroup}"),
                source: Box::new(source),
            }
        };
        let needs = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        if needs > self.capacity.claims {
            return Err(ApplyError::Full {
                map: "claims",
                has: self.capacity.claims,
                needs,
                limit: "agents",
            });
        }
        let gone: Vec<u64> = self
            .attributed
            .keys()
            .copied()
            .filter(|id| !wanted.contains_key(id))
            .collect();
        let mut changes = gone.len();
        for cgroup in gone {
            self.claims.remove(&cgroup).map_err(failed(cgroup))?;
            self.attributed.remove(&cgroup);
        }
        for (&cgroup, &agent) in wanted {
            if self.attributed.get(&cgroup) == Some(&agent) {
                continue;
            }
            self.claims
                .insert(cgroup, agent, 0)
                .map_err(failed(cgroup))?;
            if self.claims.get(&cgroup, 0).map_err(failed(cgroup))? != agent {
                return Err(ApplyError::ReadBack {
                    map: "claims",
                    key: format!("cgroup {cgroup}"),
                });
            }
            self.attributed.insert(cgroup, agent);
            changes += 1;
        }
        if changes > 0 {
            let failed = |source| ApplyError::Write {
                map: "epoch",
                key: "[0]".to_owned(),
                source: Box::new(source),
            };
            let epoch = self.epoch.get(&0, 0).map_err(failed)?;
            put("epoch", &mut self.epoch, 0, epoch + 1)?;
        }
        Ok(changes)
    }

    /// Attributions in force.
    pub fn attributed(&self) -> &HashMap<u64, u32> {
        &self.attributed
    }
}
