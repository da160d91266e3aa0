//! Rule sets in the kernel's array: content-addressed and counted, so that all scopes that say the
//! same of an address share one chain of blocks. Blocks are never changed while in use.

use std::{collections::HashMap, sync::Arc};

use agent_ebpf::abi::{RULES_PER_SET, Rule, RuleSet};

/// A chain in use.
struct Held {
    rules: Arc<[Rule]>,
    chain: Vec<u32>,
    uses: usize,
}

/// Who holds which blocks. Only bookkeeping: the caller writes the blocks.
pub struct RuleSets {
    by_rules: HashMap<Arc<[Rule]>, u32>,
    held: HashMap<u32, Held>,
    free: Vec<u32>,
    capacity: u32,
}

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
        let blocks = chain
            .iter()
            .enumerate()
            .map(|(at, &index)| (index, block(&rules, at, chain.get(at + 1).copied())))
            .collect();
        self.by_rules.insert(Arc::clone(&rules), head);
        self.held.insert(
            head,
            Held {
                rules,
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
        if held.uses == 0
            && let Some(held) = self.held.remove(&head)
        {
            self.by_rules.remove(&held.rules);
            self.free.extend(held.chain);
        }
    }

    /// Takes over a chain that an earlier daemon wrote, or one more use of it.
    pub fn adopt(&mut self, head: u32, rules: Vec<Rule>, chain: Vec<u32>) {
        if let Some(held) = self.held.get_mut(&head) {
            held.uses += 1;
            return;
        }
        self.free.retain(|index| !chain.contains(index));
        let rules: Arc<[Rule]> = rules.into();
        self.by_rules.insert(Arc::clone(&rules), head);
        self.held.insert(
            head,
            Held {
                rules,
                chain,
                uses: 1,
            },
        );
    }

    /// Whether the chain at `head` is known.
    pub fn holds(&self, head: u32) -> bool {
        self.held.contains_key(&head)
    }
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
        assert!(matches!(sets.intern(&rules(12)), Interned::Shared(again) if again == head));
        sets.release(head);
        assert!(sets.holds(head));
        sets.release(head);
        assert!(!sets.holds(head));
        assert_eq!(sets.used(), 0);
    }

    #[test]
    fn full_says_how_many_are_needed() {
        let mut sets = RuleSets::new(2);
        assert!(matches!(sets.intern(&rules(9)), Interned::New(..)));
        assert!(matches!(sets.intern(&rules(1)), Interned::Full(3)));
        assert_eq!(sets.used(), 2);
    }

    #[test]
    fn an_adopted_chain_is_not_handed_out_again() {
        let mut sets = RuleSets::new(3);
        sets.adopt(1, rules(1), vec![1]);
        let Interned::New(_, blocks) = sets.intern(&rules(12)) else {
            panic!("not new")
        };
        assert!(blocks.iter().all(|(index, _)| *index != 1));
        assert!(matches!(sets.intern(&rules(1)), Interned::Shared(1)));
    }
}
