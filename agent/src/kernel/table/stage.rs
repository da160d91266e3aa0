//! New policies: first planned, in memory alone, then written all at once and read back, and only
//! then pointed to.

use std::{collections::HashMap, time::Instant};

use agent_ebpf::abi::{AgentRow, Leaf, ROW_INDEX_BITS, Rule, RuleSet, SERVE, ScopeKey};

use super::{ApplyError, Found, Image, Installed, Place, PrefixKey, Tables};
use crate::kernel::{
    bulk::{Bulk, FailedAt, Plain},
    image::shared,
    sets::Interned,
};

/// What has to be written before a word may point to it, in this order.
#[derive(Default)]
pub(super) struct Writes {
    blocks: Vec<(u32, RuleSet)>,
    pub(super) exacts: Vec<(ScopeKey, Leaf)>,
    prefixes: Vec<(PrefixKey, Leaf)>,
    rows: Vec<(u32, AgentRow)>,
}

impl Writes {
    /// The rules of one exact address.
    pub(super) fn exact(&mut self, key: ScopeKey, leaf: Leaf) {
        self.exacts.push((key, leaf));
    }
}

/// Writes all of these and reads them back.
fn put_all<K: Plain + Eq + std::hash::Hash, V: Plain + PartialEq>(
    map: &'static str,
    bulk: &Bulk<K, V>,
    elements: &[(K, V)],
    name: impl Fn(K) -> String,
) -> Result<(), ApplyError> {
    let named = |index: usize| {
        elements
            .get(index)
            .map_or_else(String::new, |(key, _)| name(*key))
    };
    bulk.set_all(elements)
        .map_err(|FailedAt { index, error }| ApplyError::Write {
            map,
            key: named(index),
            source: error,
        })?;
    let other = bulk.first_other(elements);
    match other.map_err(|source| ApplyError::Read { map, source })? {
        None => Ok(()),
        Some(index) => Err(ApplyError::ReadBack {
            map,
            key: named(index),
        }),
    }
}

impl Tables {
    /// Plans what must be written for `image`: nothing where the kernel has it already.
    pub(super) fn plan_change(
        &mut self,
        image: &Image,
        writes: &mut Writes,
    ) -> Result<(u32, Option<Installed>), ApplyError> {
        let index = self.assign(&image.id)?;
        if let Some(now) = self.in_force.get(&index) {
            if now.row.is_some() && self.has(now, image, &now.content) {
                return Ok((index, None));
            }
            if now.adopted {
                let differences = if now.row.is_none() {
                    vec!["its word points to no row of its own".to_owned()]
                } else {
                    image.differences(&now.content, self.found(now))
                };
                self.differences.insert(image.id.clone(), differences);
            }
        }
        Ok((index, Some(self.plan(image, writes)?)))
    }

    /// Whether what is in force, with this row, is `image`.
    pub(super) fn has(&self, installed: &Installed, image: &Image, row: &AgentRow) -> bool {
        // What this process wrote is in the image's order, and what it adopted was sorted as images
        // of the registry are. Whatever else there may be is compared the long way.
        image.is_in_order(row, self.found(installed))
            || image.differences(row, self.found(installed)).is_empty()
    }

    /// What is in force of a policy, prefix by prefix.
    pub(super) fn found<'a>(&'a self, installed: &'a Installed) -> impl Iterator<Item = Found<'a>> {
        installed.entries.iter().filter_map(|(place, leaf)| {
            Some(Found {
                serve: place.key.space & SERVE != 0,
                prefix: place.prefix()?,
                rules: self.sets.rules(leaf.set),
                entry: leaf.entry,
            })
        })
    }

    /// Plans a new policy and row for `image`. Nothing of it is in the maps yet.
    fn plan(&mut self, image: &Image, writes: &mut Writes) -> Result<Installed, ApplyError> {
        let policy = self.next_policy;
        self.next_policy += 1;
        let mut installed = Installed {
            adopted: false,
            word: 0,
            row: None,
            content: AgentRow {
                policy,
                ..image.row
            },
            entries: Vec::with_capacity(image.reach.len() + image.serve.len()),
            leases: HashMap::new(),
        };
        if let Err(error) = self.plan_into(image, &mut installed, writes) {
            self.forget(installed);
            return Err(error);
        }
        Ok(installed)
    }

    fn plan_into(
        &mut self,
        image: &Image,
        installed: &mut Installed,
        writes: &mut Writes,
    ) -> Result<(), ApplyError> {
        let policy = installed.content.policy;
        for (space, placed) in [(policy, &image.reach), (policy | SERVE, &image.serve)] {
            for (prefix, rules) in placed {
                let place = Place::new(space, *prefix);
                self.check_room(place)?;
                let leaf = self.plan_rules(rules, writes)?;
                installed.entries.push((place, leaf));
                self.count(place, 1);
                match place.bits {
                    None => writes.exacts.push((place.key, leaf)),
                    Some(bits) => writes.prefixes.push((place.prefix_key(bits), leaf)),
                }
            }
        }
        self.plan_leases(image, installed, writes)?;
        let row = self.take_row()?;
        installed.row = Some(row);
        installed.word = self.next_word << ROW_INDEX_BITS | u64::from(row);
        self.next_word += 1;
        writes.rows.push((row, installed.content));
        Ok(())
    }

    pub(super) fn plan_rules(
        &mut self,
        rules: &[Rule],
        writes: &mut Writes,
    ) -> Result<Leaf, ApplyError> {
        let (rules, entry) = shared(rules);
        match self.sets.intern(&rules) {
            Interned::Shared(set) => Ok(Leaf { set, entry }),
            Interned::New(set, blocks) => {
                writes.blocks.extend(blocks);
                Ok(Leaf { set, entry })
            }
            Interned::Full(needs) => Err(ApplyError::Full {
                map: "rulesets",
                has: self.capacity.rule_sets,
                needs,
                limit: "rule_sets",
            }),
        }
    }

    pub(super) fn check_room(&self, place: Place) -> Result<(), ApplyError> {
        let (used, has, limit) = match place.bits {
            None => (self.exact_count, self.capacity.addresses, "addresses"),
            Some(_) => (self.prefix_count, self.capacity.prefixes, "prefixes"),
        };
        if used < has {
            return Ok(());
        }
        Err(ApplyError::Full {
            map: place.map(),
            has,
            needs: used + 1,
            limit,
        })
    }

    /// Writes what was planned, and reads it back.
    pub(super) fn write(&self, writes: &Writes) -> Result<(), ApplyError> {
        let index = |index: u32| format!("[{index}]");
        put_all("rulesets", &self.rulesets, &writes.blocks, index)?;
        put_all("exacts", &self.exacts, &writes.exacts, |key| {
            Place { key, bits: None }.to_string()
        })?;
        put_all("prefixes", &self.prefixes, &writes.prefixes, |key| {
            Place::found(key).to_string()
        })?;
        put_all("rows", &self.rows, &writes.rows, index)
    }

    /// The policy, written; on an error nothing is left of it.
    pub(super) fn written(
        &mut self,
        installed: Installed,
        writes: &Writes,
    ) -> Result<Installed, ApplyError> {
        match self.write(writes) {
            Ok(()) => Ok(installed),
            Err(error) => {
                self.remove(installed);
                Err(error)
            }
        }
    }

    /// Writes and reads back everything of `image` but the word that points to it.
    pub(super) fn stage(&mut self, image: &Image) -> Result<Installed, ApplyError> {
        let mut writes = Writes::default();
        let installed = self.plan(image, &mut writes)?;
        self.written(installed, &writes)
    }

    /// Points agents to what was written for them, and retires what they pointed to.
    pub(super) fn flip(&mut self, staged: Vec<(u32, Installed)>) -> Result<(), ApplyError> {
        let words: Vec<(u32, u64)> = staged
            .iter()
            .map(|(index, installed)| (*index, installed.word))
            .collect();
        let failed = |source, index: usize| ApplyError::Write {
            map: "agents",
            key: words
                .get(index)
                .map_or_else(String::new, |(agent, _)| format!("[{agent}]")),
            source,
        };
        let (flipped, result) = match self.agents.set_all(&words) {
            Ok(()) => (words.len(), self.read_words_back(&words)),
            Err(FailedAt { index, error }) => (index, Err(failed(error, index))),
        };
        for (at, (index, installed)) in staged.into_iter().enumerate() {
            if at < flipped {
                if let Some(old) = self.in_force.insert(index, installed) {
                    self.retired.push((Instant::now(), old));
                }
            } else if at == flipped {
                // It may point there or not.
                self.retired.push((Instant::now(), installed));
            } else {
                self.remove(installed);
            }
        }
        result
    }

    fn read_words_back(&self, words: &[(u32, u64)]) -> Result<(), ApplyError> {
        let map = "agents";
        let other = self.agents.first_other(words);
        match other.map_err(|source| ApplyError::Read { map, source })? {
            None => Ok(()),
            Some(at) => Err(ApplyError::ReadBack {
                map,
                key: words
                    .get(at)
                    .map_or_else(String::new, |(agent, _)| format!("[{agent}]")),
            }),
        }
    }
}
