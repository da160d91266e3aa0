//! Rule sets in the kernel's array: content-addressed and counted, so that all scopes that say the
//! same of an address share one chain of blocks. Blocks are never changed while in use.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use agent_ebpf::abi::{RULES_PER_SET, Rule, RuleSet};

/// A chain in use.
struct Held {
    /// None for one found in the maps that no daemon would have written: it is kept away from new
    /// rules, and nothing counts as equal to it.
    rules: Option<Arc<[Rule]>>,
    chain: Vec<u32>,
    uses: usize,
}

/// Who holds which blocks. Only bookkeeping: the caller writes the blocks.
pub struct RuleSets {
    by_rules: HashMap<Arc<[Rule]>, u32>,
    held: HashMap<u32, Held>,
    /// Of each block that was ever in use the head of the chain that it is in, or [`NOBODY`].
    head_of: Vec<u32>,
    free: Vec<u32>,
    capacity: u32,
}

/// No head of a chain.
const NOBODY: u32 = u32::MAX;

/// What interning a set of rules came to.
pub enum Interned {
    /// It was there already: the index of its first block.
    Shared(u32),
    /// These blocks are to be written, the first of them last to be pointed to.
    New(u32, Vec<(u32, RuleSet)>),
    /// There is no room for so many blocks.
    Full(u32),
}

impl RuleSets {
    /// All of `capacity` blocks free.
    pub fn new(capacity: u32) -> Self {
        Self {
            by_rules: HashMap::new(),
            held: HashMap::new(),
            head_of: Vec::new(),
            free: (0..capacity).rev().collect(),
            capacity,
        }
    }

    /// Blocks in use.
    pub fn used(&self) -> u32 {
        self.capacity - u32::try_from(self.free.len()).unwrap_or(self.capacity)
    }

    /// Takes a use of the set with these rules.
    pub fn intern(&mut self, rules: &[Rule]) -> Interned {
        if let Some(&head) = self.by_rules.get(rules) {
            if let Some(held) = self.held.get_mut(&head) {
                held.uses += 1;
            }
            return Interned::Shared(head);
        }
        // An address about which nothing is said still needs a block, an empty one.
        let count = rules.len().div_ceil(RULES_PER_SET).max(1);
        if self.free.len() < count {
            return Interned::Full(self.used() + u32::try_from(count).unwrap_or(u32::MAX));
        }
        let chain = self.free.split_off(self.free.len() - count);
        let Some(&head) = chain.first() else {
            return Interned::Full(self.used());
        };
        let rules: Arc<[Rule]> = rules.into();
        let blocks = blocks(&rules, &chain);
        self.by_rules.insert(Arc::clone(&rules), head);
        self.belong(&chain, head);
        self.held.insert(
            head,
            Held {
                rules: Some(rules),
                chain,
                uses: 1,
            },
        );
        Interned::New(head, blocks)
    }

    /// Gives back a use; the blocks are free again after the last.
    pub fn release(&mut self, head: u32) {
        let Some(held) = self.held.get_mut(&head) else {
            return;
        };
        held.uses -= 1;
        if held.uses == 0 {
            self.bar(head);
            if let Some(held) = self.held.remove(&head) {
                self.belong(&held.chain, NOBODY);
                self.free.extend(held.chain);
            }
        }
    }

    /// Notes whose these blocks are.
    fn belong(&mut self, chain: &[u32], head: u32) {
        for &index in chain {
            let index = index as usize;
            if self.head_of.len() <= index {
                self.head_of.resize(index + 1, NOBODY);
            }
            if let Some(slot) = self.head_of.get_mut(index) {
                *slot = head;
            }
        }
    }

    /// Sees to it that nobody shares this chain from now on: it is not what it should be.
    pub fn bar(&mut self, head: u32) {
        if let Some(rules) = self.held.get(&head).and_then(|held| held.rules.as_ref())
            // Another chain may say the same.
            && self.by_rules.get(rules) == Some(&head)
        {
            self.by_rules.remove(rules);
        }
    }

    /// Takes over the chain that starts with `found`, as an earlier daemon wrote it. To be called
    /// before anything is interned, and [`Self::adopted`] after the last.
    pub fn adopt(&mut self, head: u32, found: &[(u32, RuleSet)], owned: &mut HashSet<u32>) {
        let mut rules = rules_of(found);
        let mut chain = Vec::new();
        for (index, _) in found {
            if *index < self.capacity && owned.insert(*index) {
                chain.push(*index);
            } else {
                // Chains that share blocks were written by nobody.
                rules = None;
            }
        }
        let rules: Option<Arc<[Rule]>> = rules.map(Into::into);
        if let Some(rules) = &rules {
            self.by_rules.entry(Arc::clone(rules)).or_insert(head);
        }
        self.belong(&chain, head);
        self.held.insert(
            head,
            Held {
                rules,
                chain,
                uses: 0,
            },
        );
    }

    /// Counts one more use of an adopted chain.
    pub fn uses(&mut self, head: u32) {
        if let Some(held) = self.held.get_mut(&head) {
            held.uses += 1;
        }
    }

    /// Ends the adoption: what is in none of its chains is free.
    pub fn adopted(&mut self, owned: &HashSet<u32>) {
        self.free.retain(|index| !owned.contains(index));
    }

    /// Whether the chain at `head` is known.
    pub fn holds(&self, head: u32) -> bool {
        self.held.contains_key(&head)
    }

    /// The rules of a chain; none for one that is not as any daemon writes it.
    pub fn rules(&self, head: u32) -> Option<&[Rule]> {
        self.held.get(&head)?.rules.as_deref()
    }

    /// The highest block that may be in use.
    pub fn last_block(&self) -> Option<u32> {
        u32::try_from(self.head_of.len()).ok()?.checked_sub(1)
    }

    /// How a block must read, and the head of the chain that it is in; none for one that is not in
    /// use, or in a chain that no daemon would have written.
    pub fn wanted(&self, index: u32) -> Option<(u32, RuleSet)> {
        let head = *self.head_of.get(index as usize)?;
        let held = self.held.get(&head)?;
        let at = held.chain.iter().position(|each| *each == index)?;
        let next = held.chain.get(at + 1).copied();
        Some((head, block(held.rules.as_ref()?, at, next)))
    }
}

/// The blocks of a chain.
fn blocks(rules: &[Rule], chain: &[u32]) -> Vec<(u32, RuleSet)> {
    chain
        .iter()
        .enumerate()
        .map(|(at, &index)| (index, block(rules, at, chain.get(at + 1).copied())))
        .collect()
}

/// The rules in a chain that was read, if it is to the bit what a daemon would have written.
fn rules_of(found: &[(u32, RuleSet)]) -> Option<Vec<Rule>> {
    let rules: Vec<Rule> = found
        .iter()
        .flat_map(|(_, set)| set.rules.iter().take(set.len as usize).copied())
        .collect();
    let chain: Vec<u32> = found.iter().map(|(index, _)| *index).collect();
    let count = rules.len().div_ceil(RULES_PER_SET).max(1);
    (count == chain.len() && blocks(&rules, &chain) == found).then_some(rules)
}

/// The `at`th block of a chain.
fn block(rules: &[Rule], at: usize, next: Option<u32>) -> RuleSet {
    let mut set = RuleSet::EMPTY;
    for (slot, rule) in set
        .rules
        .iter_mut()
        .zip(rules.iter().skip(at * RULES_PER_SET))
    {
        *slot = *rule;
        set.len += 1;
    }
    set.next = next.map_or(0, |index| index + 1);
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(count: u16) -> Vec<Rule> {
        (0..count)
            .map(|port| Rule {
                low: port,
                high: port,
                ..Rule::zeroed()
            })
            .collect()
    }

    #[test]
    fn the_same_rules_share_a_chain_until_the_last_use_ends() {
        let mut sets = RuleSets::new(8);
        let Interned::New(head, blocks) = sets.intern(&rules(12)) else {
            panic!("not new")
        };
        assert_eq!(blocks.len(), 2);
        assert_eq!(blocks[0].1.len, 8);
        assert_eq!(blocks[0].1.next, blocks[1].0 + 1);
        assert_eq!((blocks[1].1.len, blocks[1].1.next), (4, 0));
        for (index, block) in blocks {
            assert_eq!(sets.wanted(index), Some((head, block)));
        }
        assert!(matches!(sets.intern(&rules(12)), Interned::Shared(again) if again == head));
        sets.release(head);
        assert!(sets.holds(head));
        sets.release(head);
        assert!(!sets.holds(head));
        assert_eq!(sets.used(), 0);
        assert!((0..8).all(|index| sets.wanted(index).is_none()));
    }

    #[test]
    fn full_says_how_many_are_needed() {
        let mut sets = RuleSets::new(2);
        assert!(matches!(sets.intern(&rules(9)), Interned::New(..)));
        assert!(matches!(sets.intern(&rules(1)), Interned::Full(3)));
        assert_eq!(sets.used(), 2);
    }

    /// Adopts these chains, one use each.
    fn adopted(capacity: u32, chains: &[&[(u32, RuleSet)]]) -> RuleSets {
        let mut sets = RuleSets::new(capacity);
        let mut owned = HashSet::new();
        for chain in chains {
            let head = chain[0].0;
            if !sets.holds(head) {
                sets.adopt(head, chain, &mut owned);
            }
            sets.uses(head);
        }
        sets.adopted(&owned);
        sets
    }

    #[test]
    fn an_adopted_chain_is_shared_and_not_handed_out_again() {
        let mut sets = adopted(3, &[&blocks(&rules(1), &[1])]);
        let Interned::New(_, written) = sets.intern(&rules(12)) else {
            panic!("not new")
        };
        assert!(written.iter().all(|(index, _)| *index != 1));
        assert!(matches!(sets.intern(&rules(1)), Interned::Shared(1)));
    }

    #[test]
    fn two_adopted_chains_of_one_content_live_their_own_lives() {
        let mut sets = adopted(4, &[&blocks(&rules(1), &[1]), &blocks(&rules(1), &[2])]);
        assert_eq!(sets.rules(1), sets.rules(2));
        sets.release(2);
        assert!(matches!(sets.intern(&rules(1)), Interned::Shared(1)));
        sets.release(1);
        sets.release(1);
        assert!(!sets.holds(1) && !sets.holds(2));
        assert_eq!(sets.used(), 0);
        assert!(matches!(sets.intern(&rules(1)), Interned::New(..)));
    }

    #[test]
    fn what_no_daemon_writes_is_nobodys_equal() {
        let good = blocks(&rules(12), &[1, 2]);
        let adopted_rules =
            |found: &[(u32, RuleSet)]| adopted(8, &[found]).rules(1).map(<[_]>::len);
        assert_eq!(adopted_rules(&good), Some(12));
        // A loop, a longer length, a hidden rule behind the length, a chain that breaks off.
        let mut chain = good.clone();
        chain[1].1.next = 2;
        assert_eq!(adopted_rules(&chain), None);
        let mut chain = good.clone();
        chain[1].1.len = u32::MAX;
        assert_eq!(adopted_rules(&chain), None);
        let mut chain = good.clone();
        chain[1].1.rules[7] = Rule {
            high: u16::MAX,
            ..Rule::zeroed()
        };
        assert_eq!(adopted_rules(&chain), None);
        assert_eq!(adopted_rules(&good[..1]), None);
        // Chains that share a block: the second is not trusted, and frees nothing of the first.
        let mut second = blocks(&rules(12), &[3, 2]);
        second[0].1.rules[0].high = 9;
        let mut sets = adopted(8, &[&good, &second]);
        assert!(sets.rules(1).is_some() && sets.rules(3).is_none());
        sets.release(3);
        assert_eq!(sets.used(), 2);
    }

    #[test]
    fn a_barred_chain_is_not_shared() {
        let mut sets = RuleSets::new(4);
        let Interned::New(head, _) = sets.intern(&rules(1)) else {
            panic!("not new")
        };
        sets.bar(head);
        let Interned::New(other, _) = sets.intern(&rules(1)) else {
            panic!("shared")
        };
        assert_ne!(head, other);
        sets.release(head);
        assert!(matches!(sets.intern(&rules(1)), Interned::Shared(same) if same == other));
    }
}
