//! The maps as one store of agents' rows, changed in transactions: everything new is written and
//! read back first, then each agent's word flips (one aligned store), and what is no longer
//! pointed to is removed a second later, when no program can still be reading it.

mod adopt;
mod claims;
mod inspect;
mod leases;
mod loan;
mod repair;
mod stage;
mod usage;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{
    Addr, AgentName, AgentRow, Leaf, ROW_INDEX_BITS, RuleSet, SERVE, SPACE_BITS, ScopeKey,
    UNREGISTERED,
};
use aya::Ebpf;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    Capacity,
    bulk::{Bulk, Keyed, Plain},
    error::{ApplyError, OpenError},
    image::{Found, Image},
    object,
    sets::RuleSets,
};
use stage::Writes;

pub use inspect::{Spot, SpotKey};
pub use loan::Loan;
pub use usage::Usage;

use crate::policy::{UNREGISTERED_ID, tables::Prefix};

/// Rules stay readable this long after the last pointer to them has moved on.
const GRACE: Duration = Duration::from_secs(1);

/// A key of `prefixes`, as the kernel wants it: without padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PrefixKey {
    bits: u32,
    space: [u8; 8],
    addr: Addr,
}

/// A key of the scope maps. Those found in a map may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    key: ScopeKey,
    /// Length as the map counts it, the space included; none: in `exacts`.
    bits: Option<u32>,
}

/// One policy in the kernel.
struct Installed {
    /// As an earlier daemon wrote it, and not yet compared with the registry.
    adopted: bool,
    word: u64,
    /// None for an adopted word whose row is not there or another agent's.
    row: Option<u32>,
    /// What the row says, or must say.
    content: AgentRow,
    /// Keys, and what they point to.
    entries: Vec<(Place, Leaf)>,
    /// Exact addresses with leases, which stand before those of `entries`.
    leases: HashMap<Place, Leased>,
}

/// The rules of an address with leases worked in.
#[derive(Clone, Copy, Debug)]
struct Leased {
    /// What is in force there.
    leaf: Leaf,
    /// What `entries` have for the same key, if anything.
    base: Option<Leaf>,
}

/// How an adopted agent's state in the kernel differed from the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The agent.
    pub agent: String,
    /// In words; at least one.
    pub what: Vec<String>,
}

/// The typed maps and what is known to be in them.
pub struct Tables {
    claims: Bulk<u64, u32>,
    epoch: Bulk<u32, u64>,
    agents: Bulk<u32, u64>,
    names: Bulk<u32, AgentName>,
    rows: Bulk<u32, AgentRow>,
    exacts: Bulk<ScopeKey, Leaf>,
    prefixes: Bulk<PrefixKey, Leaf>,
    rulesets: Bulk<u32, RuleSet>,

    index: BTreeMap<String, u32>,
    ids: BTreeMap<u32, String>,
    in_force: BTreeMap<u32, Installed>,
    retired: Vec<(Instant, Installed)>,
    /// Rule sets that nothing points to any more, but for programs that are running.
    parted: Vec<(Instant, u32)>,
    /// Addresses of agents that are lent to a probe.
    lent: Vec<(u32, Place)>,
    attributed: HashMap<u64, u32>,
    epoch_now: u64,
    sets: RuleSets,
    free_rows: Vec<u32>,
    exact_count: u32,
    prefix_count: u32,
    next_word: u64,
    next_policy: u64,
    capacity: Capacity,
    differences: BTreeMap<String, Vec<String>>,
}

/// A map of the loaded object, which has compared the sizes of its keys and values.
pub(super) fn bulk<K: Plain + Eq + std::hash::Hash, V: Plain>(
    ebpf: &Ebpf,
    name: &'static str,
    keyed: Keyed,
) -> Result<Bulk<K, V>, OpenError> {
    let map = ebpf.map(name).and_then(object::data);
    let map = map.ok_or(OpenError::MapMissing { name })?;
    let info = map.info().map_err(|source| OpenError::Map {
        name,
        source: Box::new(source.into()),
    })?;
    let fd = map.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|source| OpenError::Pins {
        path: name.into(),
        source,
    })?;
    Ok(Bulk::new(fd, keyed, info.max_entries()))
}

/// Writes an array element and reads it back.
fn put<V: Plain + PartialEq>(
    map: &'static str,
    array: &Bulk<u32, V>,
    index: u32,
    value: V,
) -> Result<(), ApplyError> {
    let key = || format!("[{index}]");
    let failed = |source| ApplyError::Write {
        map,
        key: key(),
        source,
    };
    array.set(index, value).map_err(failed)?;
    if array.get(index).map_err(failed)? != Some(value) {
        return Err(ApplyError::ReadBack { map, key: key() });
    }
    Ok(())
}

impl Place {
    /// Where a prefix of a scope goes.
    fn new(space: u64, prefix: Prefix) -> Self {
        let key = ScopeKey {
            space,
            addr: prefix.addr,
        };
        let bits = (prefix.len != 128).then(|| SPACE_BITS + u32::from(prefix.len));
        Self { key, bits }
    }

    /// A key found in `prefixes`.
    fn found(key: PrefixKey) -> Self {
        Self {
            key: ScopeKey {
                space: u64::from_ne_bytes(key.space),
                addr: key.addr,
            },
            bits: Some(key.bits),
        }
    }

    /// The key for `prefixes`, of a place that is there.
    fn prefix_key(&self, bits: u32) -> PrefixKey {
        PrefixKey {
            bits,
            space: self.key.space.to_ne_bytes(),
            addr: self.key.addr,
        }
    }

    /// Destinations come before clients, then it goes by address and length, as in an [`Image`].
    fn order(&self) -> (u64, u128, u32) {
        let addr = u128::from_be_bytes(self.key.addr.octets());
        (self.key.space, addr, self.bits.unwrap_or(SPACE_BITS + 128))
    }

    /// The prefix that it stands for; none where no daemon would have put such a key.
    fn prefix(&self) -> Option<Prefix> {
        let len = match self.bits {
            None => 128,
            Some(bits) => u8::try_from(bits.checked_sub(SPACE_BITS)?).ok()?,
        };
        (self.bits.is_none() || len < 128).then_some(Prefix {
            addr: self.key.addr,
            len,
        })
    }

    /// The policy that it belongs to.
    fn policy(&self) -> u64 {
        self.key.space & !SERVE
    }

    fn map(&self) -> &'static str {
        match self.bits {
            None => "exacts",
            Some(_) => "prefixes",
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let addr = std::net::IpAddr::from(self.key.addr);
        let side = if self.key.space & SERVE == 0 {
            "reach"
        } else {
            "serve"
        };
        match self.prefix() {
            Some(prefix) if self.key.addr.is_v4() && prefix.len >= 96 => {
                write!(f, "{addr}/{}", prefix.len - 96)?;
            }
            Some(prefix) => write!(f, "{addr}/{}", prefix.len)?,
            None => write!(f, "{addr}, {} bits", self.bits.unwrap_or(0))?,
        }
        write!(f, " ({side} of policy {})", self.policy())
    }
}

impl Tables {
    /// Takes the maps out of a loaded object, and with them what an earlier daemon left there.
    pub fn open(ebpf: &Ebpf, capacity: Capacity) -> Result<Self, OpenError> {
        let mut tables = Self {
            claims: bulk(ebpf, "claims", Keyed::Free)?,
            epoch: bulk(ebpf, "epoch", Keyed::Array)?,
            agents: bulk(ebpf, "agents", Keyed::Array)?,
            names: bulk(ebpf, "names", Keyed::Array)?,
            rows: bulk(ebpf, "rows", Keyed::Array)?,
            exacts: bulk(ebpf, "exacts", Keyed::Free)?,
            prefixes: bulk(ebpf, "prefixes", Keyed::Free)?,
            rulesets: bulk(ebpf, "rulesets", Keyed::Array)?,
            index: BTreeMap::new(),
            ids: BTreeMap::new(),
            in_force: BTreeMap::new(),
            retired: Vec::new(),
            parted: Vec::new(),
            lent: Vec::new(),
            attributed: HashMap::new(),
            epoch_now: 0,
            sets: RuleSets::new(capacity.rule_sets),
            free_rows: Vec::new(),
            exact_count: 0,
            prefix_count: 0,
            next_word: 1,
            next_policy: 1,
            capacity,
            differences: BTreeMap::new(),
        };
        tables.adopt()?;
        Ok(tables)
    }

    /// The index that stands for an agent in the kernel, if it has one.
    pub fn index_of(&self, id: &str) -> Option<u32> {
        self.index.get(id).copied()
    }

    /// The agent that an index stands for.
    pub fn id_of(&self, index: u32) -> Option<&str> {
        self.ids.get(&index).map(String::as_str)
    }

    /// All agents that have an index.
    pub fn indices(&self) -> impl Iterator<Item = (&str, u32)> {
        self.index.iter().map(|(id, index)| (id.as_str(), *index))
    }

    /// The policy id in force for an agent.
    pub fn policy_of(&self, agent: u32) -> Option<u64> {
        let installed = self.in_force.get(&agent)?;
        Some(installed.content.policy)
    }

    /// Entries that the maps are made for.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// How adopted agents differed from what was then put in force, up to now.
    pub fn take_differences(&mut self) -> Vec<Difference> {
        std::mem::take(&mut self.differences)
            .into_iter()
            .map(|(agent, what)| Difference { agent, what })
            .collect()
    }

    /// Takes note of differences that other tables' adoption has found.
    pub fn remember(&mut self, differences: Vec<Difference>) {
        for difference in differences {
            self.differences.insert(difference.agent, difference.what);
        }
    }

    /// Takes over the agents' indices of other maps: tags on sockets carry them. Those that have
    /// another one here already keep it.
    pub fn inherit(&mut self, names: &BTreeMap<u32, String>) -> Result<(), ApplyError> {
        for (index, id) in names {
            if !self.index.contains_key(id) && !self.ids.contains_key(index) {
                self.name(*index, id)?;
            }
        }
        Ok(())
    }

    /// Uses only policy ids above this one: records of other maps' policies may still come in.
    pub fn number_after(&mut self, policy: u64) {
        self.next_policy = self.next_policy.max(policy.saturating_add(1));
    }

    /// Gives an agent an index, and writes its name beside it. Indices are not reused while an
    /// agent of that name may come back, since tags on sockets carry them.
    pub fn assign(&mut self, id: &str) -> Result<u32, ApplyError> {
        if let Some(index) = self.index.get(id) {
            return Ok(*index);
        }
        let full = ApplyError::Full {
            map: "agents",
            has: self.agents.len(),
            needs: u32::try_from(self.index.len()).unwrap_or(u32::MAX) + 1,
            limit: "agents",
        };
        let index = if id == UNREGISTERED_ID {
            UNREGISTERED
        } else {
            // The lowest that is free; mostly the one after the last.
            let after = self.ids.last_key_value().map_or(0, |(last, _)| last + 1);
            let dense = usize::try_from(after).is_ok_and(|after| after == self.ids.len());
            let from = if dense { after } else { 0 }.max(UNREGISTERED + 1);
            (from..self.agents.len())
                .find(|index| !self.ids.contains_key(index))
                .ok_or(full)?
        };
        self.name(index, id)?;
        Ok(index)
    }

    fn name(&mut self, index: u32, id: &str) -> Result<(), ApplyError> {
        put("names", &self.names, index, name_bytes(id))?;
        self.index.insert(id.to_owned(), index);
        self.ids.insert(index, id.to_owned());
        Ok(())
    }

    /// Puts `images` in force, all or none, and takes every other agent out. An agent whose
    /// content in the kernel is what its image asks for is left alone, whoever wrote it. Returns
    /// the ids of the agents that changed.
    pub fn apply(&mut self, images: &[Image]) -> Result<Vec<String>, ApplyError> {
        self.sweep(Instant::now());
        let mut staged = Vec::new();
        let mut kept = HashSet::new();
        let mut writes = Writes::default();
        for image in images {
            match self.plan_change(image, &mut writes) {
                Ok((index, installed)) => {
                    kept.insert(index);
                    staged.extend(installed.map(|installed| (index, installed)));
                }
                Err(error) => {
                    for (_, installed) in staged {
                        self.forget(installed);
                    }
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.write(&writes) {
            for (_, installed) in staged {
                self.remove(installed);
            }
            return Err(error);
        }
        let mut changed: Vec<String> = staged
            .iter()
            .filter_map(|(index, _)| self.ids.get(index).cloned())
            .collect();
        self.flip(staged)?;
        let gone: Vec<u32> = self
            .in_force
            .keys()
            .copied()
            .filter(|index| !kept.contains(index))
            .collect();
        for index in gone {
            put("agents", &self.agents, index, 0)?;
            if let Some(old) = self.in_force.remove(&index) {
                let id = self.ids.get(&index).cloned();
                if old.adopted {
                    let agent = id.clone().unwrap_or_else(|| format!("agent {index}"));
                    let what = "it is in force, and the registry has no such agent".to_owned();
                    self.differences.insert(agent, vec![what]);
                }
                changed.extend(id);
                self.retired.push((Instant::now(), old));
            }
        }
        for installed in self.in_force.values_mut() {
            installed.adopted = false;
        }
        Ok(changed)
    }

    /// The agents that [`Self::apply`] would change.
    pub fn changes(&self, images: &[Image]) -> Vec<String> {
        let mut gone: BTreeMap<u32, &str> = self
            .in_force
            .keys()
            .filter_map(|index| Some((*index, self.ids.get(index)?.as_str())))
            .collect();
        let mut changed = Vec::new();
        for image in images {
            let index = self.index.get(&image.id);
            index.map(|index| gone.remove(index));
            let now = index.and_then(|index| self.in_force.get(index));
            let same =
                now.is_some_and(|now| now.row.is_some() && self.has(now, image, &now.content));
            if !same {
                changed.push(image.id.clone());
            }
        }
        changed.extend(gone.into_values().map(str::to_owned));
        changed
    }

    /// Puts one agent in force and leaves all others as they are. Where only its row differs, the
    /// rules stay and a new row points to them: a suspension does not wait for a large scope.
    pub fn apply_one(&mut self, image: &Image) -> Result<(), ApplyError> {
        self.sweep(Instant::now());
        if let Some(index) = self.same_rules(image) {
            return self.flip_row(index, image);
        }
        let mut writes = Writes::default();
        match self.plan_change(image, &mut writes)? {
            (index, Some(installed)) => {
                let installed = self.written(installed, &writes)?;
                self.flip(vec![(index, installed)])
            }
            (_, None) => Ok(()),
        }
    }

    /// The agent's index, if the rules that it has in force are those of `image`.
    fn same_rules(&self, image: &Image) -> Option<u32> {
        let index = self.index_of(&image.id)?;
        let now = self.in_force.get(&index)?;
        let as_asked = AgentRow {
            policy: now.content.policy,
            ..image.row
        };
        let same = now.row.is_some() && now.content != as_asked && self.has(now, image, &as_asked);
        same.then_some(index)
    }

    /// Points an agent to a new row for the rules that it has.
    fn flip_row(&mut self, index: u32, image: &Image) -> Result<(), ApplyError> {
        let Some(policy) = self.policy_of(index) else {
            return Ok(());
        };
        let content = AgentRow {
            policy,
            ..image.row
        };
        let row = self.take_row()?;
        if let Err(error) = put("rows", &self.rows, row, content) {
            self.free_rows.push(row);
            return Err(error);
        }
        let word = self.next_word << ROW_INDEX_BITS | u64::from(row);
        self.next_word += 1;
        let mut installed = Installed {
            adopted: false,
            word,
            row: Some(row),
            content,
            entries: Vec::new(),
            leases: HashMap::new(),
        };
        // After an error it may point there or not, so the new row is not given out again.
        put("agents", &self.agents, index, word)?;
        if let Some(mut old) = self.in_force.remove(&index) {
            installed.entries = std::mem::take(&mut old.entries);
            installed.leases = std::mem::take(&mut old.leases);
            self.retired.push((Instant::now(), old));
        }
        self.in_force.insert(index, installed);
        Ok(())
    }

    fn take_row(&mut self) -> Result<u32, ApplyError> {
        let has = self.rows.len();
        self.free_rows.pop().ok_or(ApplyError::Full {
            map: "rows",
            has,
            needs: has + 1,
            limit: "agents",
        })
    }

    fn count(&mut self, place: Place, by: i64) {
        let counter = match place.bits {
            None => &mut self.exact_count,
            Some(_) => &mut self.prefix_count,
        };
        *counter = u32::try_from(i64::from(*counter) + by).unwrap_or(0);
    }

    /// Deletes a key; one that is not there is as good.
    fn delete(&self, place: Place) -> io::Result<()> {
        match place.bits {
            None => self.exacts.remove(place.key),
            Some(bits) => self.prefixes.remove(place.prefix_key(bits)),
        }
        .map(drop)
    }

    /// Deletes keys; those that are not there are as good.
    fn delete_all<'a>(&self, places: impl Iterator<Item = &'a Place>) -> io::Result<()> {
        let (mut exacts, mut prefixes) = (Vec::new(), Vec::new());
        for place in places {
            match place.bits {
                None => exacts.push(place.key),
                Some(bits) => prefixes.push(place.prefix_key(bits)),
            }
        }
        let removed = self.exacts.remove_all(&exacts);
        removed.and(self.prefixes.remove_all(&prefixes))
    }

    /// Removes what nothing points to.
    fn remove(&mut self, installed: Installed) {
        let only_leased = installed.leases.iter();
        let only_leased = only_leased.filter(|(_, held)| held.base.is_none());
        let places = installed.entries.iter().map(|(place, _)| place);
        let places = places.chain(only_leased.map(|(place, _)| place));
        if let Err(error) = self.delete_all(places) {
            tracing::warn!(message = "Stale scope entries could not be removed.", %error);
        }
        self.forget(installed);
    }

    /// Gives back what a policy has taken of the room there is; its keys are not in the maps.
    fn forget(&mut self, installed: Installed) {
        for (place, held) in &installed.leases {
            if held.base.is_none() {
                self.count(*place, -1);
            }
            self.sets.release(held.leaf.set);
        }
        for (place, leaf) in installed.entries {
            self.count(place, -1);
            self.sets.release(leaf.set);
        }
        self.free_rows.extend(installed.row);
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
        let (old, young): (Vec<_>, Vec<_>) = std::mem::take(&mut self.parted)
            .into_iter()
            .partition(|(at, _)| now.duration_since(*at) > GRACE);
        self.parted = young;
        for (_, set) in old {
            self.sets.release(set);
        }
    }
}

impl Installed {
    /// Every key in the kernel, and what it points to.
    fn places(&self) -> impl Iterator<Item = (Place, Leaf)> {
        let base = self.entries.iter().copied();
        let unleased = base.filter(|(place, _)| !self.leases.contains_key(place));
        unleased.chain(self.leases.iter().map(|(place, held)| (*place, held.leaf)))
    }
}

/// An id as `names` has it.
fn name_bytes(id: &str) -> AgentName {
    let mut name = AgentName::zeroed();
    for (slot, byte) in name.bytes.iter_mut().take(63).zip(id.bytes()) {
        *slot = byte;
    }
    name
}
