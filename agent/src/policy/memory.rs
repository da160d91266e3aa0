//! The kernel's look-ups over tables in memory, so that `decide` answers without a kernel: for
//! `remit explain`, the daemon's self-test and the parity tests.

use std::collections::HashMap;

use agent_ebpf::{
    abi::{Addr, AgentRow, FLAG_SERVES, Leaf, NO_ENTRY, RULES_PER_SET, Rule, RuleSet, SERVE},
    decide::{Attempt, Peer, Rules},
};

use super::{
    clock::Clock,
    net::network_mask,
    tables::{AgentTables, Placed, TimedRule},
};

/// The policy id that [`MemoryRules`] answers for.
const POLICY: u64 = 1;

/// One agent's tables, as the kernel would hold them.
#[derive(Clone, Debug)]
pub struct MemoryRules {
    reach: Space,
    serve: Space,
    sets: Vec<RuleSet>,
    row: AgentRow,
    /// Whose socket every loopback attempt would reach.
    pub peer: Peer,
}

/// Prefixes of one space.
#[derive(Clone, Debug, Default)]
struct Space {
    /// Lengths that occur, longest first.
    lengths: Vec<u8>,
    /// First rule set by length and network.
    sets: HashMap<(u8, u128), u32>,
}

/// The row of an agent whose scope is in the space `policy`.
pub fn row(tables: &AgentTables, policy: u64, clock: &Clock) -> AgentRow {
    AgentRow {
        policy,
        not_before: clock.not_before(tables.not_before),
        deadline: clock.deadline(tables.expires),
        state: tables.state as u8,
        mode: tables.mode as u8,
        loopback: tables.loopback as u8,
        sockets: tables.sockets,
        flags: if tables.scope.serve.is_empty() {
            0
        } else {
            FLAG_SERVES
        },
        ..AgentRow::zeroed()
    }
}

/// The blocks that `rules` fill, of which the first lies at index `first` of the table and the
/// others behind it. No rules fill one empty block: the prefix has to be there.
pub fn rule_sets(rules: &[TimedRule], first: u32, clock: &Clock) -> Vec<RuleSet> {
    let mut blocks: Vec<&[TimedRule]> = rules.chunks(RULES_PER_SET).collect();
    if blocks.is_empty() {
        blocks.push(&[]);
    }
    let last = blocks.len() - 1;
    let mut index = first;
    let mut sets = Vec::with_capacity(blocks.len());
    for (position, block) in blocks.into_iter().enumerate() {
        let mut set = RuleSet::EMPTY;
        for (slot, rule) in set.rules.iter_mut().zip(block) {
            *slot = clock.rule(rule);
            set.len += 1;
        }
        index += 1;
        // `next` is an index plus one.
        set.next = if position == last { 0 } else { index + 1 };
        sets.push(set);
    }
    sets
}

// === impl MemoryRules ===

impl MemoryRules {
    /// The tables at the moment of `clock`.
    pub fn new(tables: &AgentTables, clock: &Clock, peer: Peer) -> Self {
        let mut sets = Vec::new();
        let reach = Space::new(&tables.scope.reach, &mut sets, clock);
        let serve = Space::new(&tables.scope.serve, &mut sets, clock);
        Self {
            reach,
            serve,
            sets,
            row: row(tables, POLICY, clock),
            peer,
        }
    }

    /// The agent's row.
    pub const fn row(&self) -> &AgentRow {
        &self.row
    }

    /// The rules of an address, block by block; for tests and displays.
    pub fn rules_at(&self, addr: &Addr) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut next = self.reach.longest(addr);
        while let Some(set) = next.and_then(|index| self.rule_set(index)) {
            rules.extend(set.rules.iter().take(set.len as usize));
            next = set.next.checked_sub(1);
        }
        rules
    }
}

impl Rules for MemoryRules {
    fn rule_set_for(&self, space: u64, addr: &Addr) -> Option<Leaf> {
        let set = match space {
            POLICY => self.reach.longest(addr),
            space if space == POLICY | SERVE => self.serve.longest(addr),
            _ => None,
        }?;
        // Each rule has its entry here.
        let entry = NO_ENTRY;
        Some(Leaf { set, entry })
    }

    fn rule_set(&self, index: u32) -> Option<&RuleSet> {
        self.sets.get(index as usize)
    }

    fn peer(&self, _attempt: &Attempt) -> Peer {
        self.peer
    }
}

// === impl Space ===

impl Space {
    fn new(placed: &[Placed], sets: &mut Vec<RuleSet>, clock: &Clock) -> Self {
        let mut space = Self::default();
        for Placed { prefix, rules } in placed {
            let Ok(first) = u32::try_from(sets.len()) else {
                break;
            };
            sets.extend(rule_sets(rules, first, clock));
            space.sets.insert((prefix.len, prefix.bits()), first);
            space.lengths.push(prefix.len);
        }
        space
            .lengths
            .sort_unstable_by(|left, right| right.cmp(left));
        space.lengths.dedup();
        space
    }

    fn longest(&self, addr: &Addr) -> Option<u32> {
        let bits = u128::from_be_bytes(addr.octets());
        let network = |len: &u8| (*len, bits & network_mask(*len));
        self.lengths
            .iter()
            .find_map(|len| self.sets.get(&network(len)).copied())
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Effect;

    use super::*;

    const CLOCK: Clock = Clock::at(1, 0);

    fn rules(count: u16) -> Vec<TimedRule> {
        let rule = |port| TimedRule {
            class: None,
            low: port,
            high: port,
            effect: Effect::Allow,
            entry: u32::from(port),
            expires: None,
        };
        (0..count).map(rule).collect()
    }

    #[test]
    fn blocks_are_chained_by_index_plus_one() {
        let full = u32::try_from(RULES_PER_SET).unwrap();
        let count = u16::try_from(2 * full + 1).unwrap();
        let sets = rule_sets(&rules(count), 7, &CLOCK);
        let links: Vec<(u32, u32)> = sets.iter().map(|set| (set.len, set.next)).collect();
        assert_eq!(links, [(full, 9), (full, 10), (1, 0)]);
        assert_eq!(sets[2].rules[0].entry, 2 * full);
    }

    #[test]
    fn no_rules_are_one_empty_block() {
        let sets = rule_sets(&[], 3, &CLOCK);
        assert_eq!((sets.len(), sets[0].len, sets[0].next), (1, 0, 0));
    }
}
