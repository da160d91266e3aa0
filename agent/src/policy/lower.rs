//! A flat scope into the kernel's terms: for each prefix the rules that decide there, with those of
//! shorter prefixes worked in, because the kernel asks the longest match alone.
//!
//! What one address, class and port meets, first match wins:
//!
//! | # | covered by                                                     | rule  |
//! |---|----------------------------------------------------------------|-------|
//! | 1 | the floor, and granted by its exact address and not denied     | allow |
//! | 2 | the floor                                                      | floor |
//! | 3 | multicast or broadcast, granted by a range in it and not denied| allow |
//! | 4 | multicast or broadcast                                         | floor |
//! | 5 | a denial                                                       | deny  |
//! | 6 | a grant                                                        | allow |
//!
//! Of several floors or denials the one of the longest prefix is named, then the first; of several
//! grants the one that lasts longest counts, then the first.
//!
//! Some ranges a wider prefix does not reach into ([`Barrier`]). Prefixes are walked in order of
//! address and length, so that a stack holds exactly those that contain the current one.

use std::{collections::BTreeSet, net::IpAddr, rc::Rc};

use agent_ebpf::abi::{Class, Effect};

use super::{
    expand::{Item, Role},
    tables::{Placed, Prefix, TimedRule, UnixMillis},
};

/// What a wider prefix does not reach into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// IPv4: an IPv6 grant such as `::/0` stops here, a denial does not.
    Mapped,
    /// Loopback: nothing wider reaches in.
    Loopback,
    /// Multicast and broadcast: no wider grant reaches in.
    Multicast,
}

/// The lowered form of one space (destinations, or clients to answer).
#[derive(Debug, Default)]
pub struct Lowered {
    /// Sorted by address and length.
    pub placed: Vec<Placed>,
    /// For each entry whether some of it takes effect as a grant.
    pub live: Vec<bool>,
    /// For each entry the one that keeps some of it from taking effect.
    pub blocked_by: Vec<Option<u32>>,
    /// Prefixes with more than `bound` rules, with the entries that made them.
    pub overfull: Vec<(Prefix, usize, Vec<u32>)>,
}

/// Order among items of one role: smaller wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Rank {
    key: i64,
    entry: u32,
}

/// What covers a segment, the first of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    floor: Option<Rank>,
    unlisted: Option<Rank>,
    deny: Option<Rank>,
    allow: Option<Rank>,
    /// A grant of the exact address.
    exact: Option<Rank>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    low: u16,
    high: u16,
    cell: Cell,
}

/// The segments of the four classes, in the order of [`Class::ALL`]; shared down the tree.
type Layer = [Rc<Vec<Segment>>; 4];

/// A prefix that contains the current one.
struct Level {
    prefix: Prefix,
    layer: Layer,
    /// Rules that a look-up gets here: those of [`Lowered::placed`] at this index, or none.
    rules: Option<usize>,
}

/// The ranges of [`Barrier`], and which.
pub fn barriers() -> [(Prefix, Barrier); 8] {
    let v4 = |octets: [u8; 4], len| Prefix::new(IpAddr::from(octets), len);
    let v6 = |bits: u128, len| Prefix::new(IpAddr::from(bits.to_be_bytes()), len);
    [
        (v4([0, 0, 0, 0], 0), Barrier::Mapped),
        (v4([0, 0, 0, 0], 32), Barrier::Loopback),
        (v4([127, 0, 0, 0], 8), Barrier::Loopback),
        (v6(0, 128), Barrier::Loopback),
        (v6(1, 128), Barrier::Loopback),
        (v4([224, 0, 0, 0], 4), Barrier::Multicast),
        (v4([255, 255, 255, 255], 32), Barrier::Multicast),
        (v6(0xff << 120, 8), Barrier::Multicast),
    ]
}

/// Lowers `items`; `expires` has an end for each entry, and more than `bound` rules at one prefix
/// are too many.
pub fn lower(items: &[Item], expires: &[Option<UnixMillis>], bound: usize) -> Lowered {
    let mut lowered = Lowered {
        live: vec![false; expires.len()],
        blocked_by: vec![None; expires.len()],
        ..Lowered::default()
    };
    let mut order: Vec<(u128, u8, &Item)> = items
        .iter()
        .map(|item| (item.prefix.bits(), item.prefix.len, item))
        .collect();
    order.sort_by_key(|(bits, len, item)| (*bits, *len, item.entry));
    let mut nodes: Vec<(Prefix, &[(u128, u8, &Item)])> = order
        .chunk_by(|left, right| (left.0, left.1) == (right.0, right.1))
        .filter_map(|own| own.first().map(|(.., item)| (item.prefix, own)))
        .collect();
    let barriers = barriers();
    let bare: Vec<Prefix> = {
        let there = |prefix: &Prefix| {
            let key = (prefix.bits(), prefix.len);
            nodes
                .binary_search_by_key(&key, |(each, _)| (each.bits(), each.len))
                .is_ok()
        };
        barriers
            .iter()
            .map(|(prefix, _)| *prefix)
            .filter(|prefix| !there(prefix))
            .collect()
    };
    nodes.extend(bare.into_iter().map(|prefix| (prefix, [].as_slice())));
    nodes.sort_by_key(|(prefix, _)| (prefix.bits(), prefix.len));

    let mut stack: Vec<Level> = Vec::new();
    for (prefix, own) in nodes {
        while stack
            .pop_if(|level| !level.prefix.contains(&prefix.addr))
            .is_some()
        {}
        let barrier = barriers
            .iter()
            .find(|(range, _)| *range == prefix)
            .map(|(_, kind)| *kind);
        let above = stack.last();
        let inherited = above.map_or_else(Layer::default, |level| inherit(&level.layer, barrier));
        let layer = add(&inherited, own, expires);
        lowered.judge(own, &layer);

        let rules = resolve(&layer, expires);
        let standing = above.and_then(|level| level.rules);
        let said = standing
            .and_then(|at| lowered.placed.get(at))
            .map(|placed| &placed.rules);
        let level_rules = if said.map_or(&[][..], Vec::as_slice) == rules {
            standing
        } else {
            if rules.len() > bound {
                let mut entries: Vec<u32> = rules.iter().map(|rule| rule.entry).collect();
                entries.sort_unstable();
                entries.dedup();
                lowered.overfull.push((prefix, rules.len(), entries));
            }
            lowered.placed.push(Placed { prefix, rules });
            Some(lowered.placed.len() - 1)
        };
        if prefix.len < 128 {
            stack.push(Level {
                prefix,
                layer,
                rules: level_rules,
            });
        }
    }
    lowered
}

// === impl Lowered ===

impl Lowered {
    /// Notes which of the grants at this prefix take effect, and what stops the others. A denial
    /// further down may take parts of a grant away, but not more than it says itself.
    fn judge(&mut self, own: &[(u128, u8, &Item)], layer: &Layer) {
        for (_, len, item) in own.iter().filter(|(.., item)| item.role == Role::Allow) {
            let entry = item.entry as usize;
            for ((_, intervals), segments) in item.ports.iter().zip(layer) {
                for (low, high) in intervals {
                    for segment in overlapping(segments, *low, *high) {
                        let stopped = segment.cell.stops_grant(*len == 128);
                        match stopped {
                            None => set(&mut self.live, entry, true),
                            stopped => set(&mut self.blocked_by, entry, stopped),
                        }
                    }
                }
            }
        }
    }
}

fn set<T>(list: &mut [T], index: usize, value: T) {
    if let Some(slot) = list.get_mut(index) {
        *slot = value;
    }
}

/// The segments that have a port of `low` to `high`.
fn overlapping(segments: &[Segment], low: u16, high: u16) -> impl Iterator<Item = &Segment> {
    let first = segments.partition_point(|segment| segment.high < low);
    let rest = segments.get(first..).unwrap_or_default();
    rest.iter().take_while(move |segment| segment.low <= high)
}

// === impl Cell ===

impl Cell {
    fn slot(&mut self, role: Role, exact: bool) -> &mut Option<Rank> {
        match role {
            Role::Floor => &mut self.floor,
            Role::Unlisted => &mut self.unlisted,
            Role::Deny => &mut self.deny,
            Role::Allow if exact => &mut self.exact,
            Role::Allow => &mut self.allow,
        }
    }

    /// The entry that a grant here gives way to.
    fn stops_grant(&self, exact: bool) -> Option<u32> {
        let floor = self.floor.filter(|_| !exact);
        floor.or(self.deny).map(|rank| rank.entry)
    }

    /// The table at the top of this file.
    fn verdict(&self) -> Option<(Effect, u32)> {
        let granted = match (self.allow, self.exact) {
            (Some(allow), Some(exact)) => Some(allow.min(exact)),
            (allow, exact) => allow.or(exact),
        };
        let undenied = |rank: Option<Rank>| rank.filter(|_| self.deny.is_none());
        let (effect, rank) = if let Some(floor) = self.floor {
            undenied(self.exact).map_or((Effect::Floor, floor), |rank| (Effect::Allow, rank))
        } else if let Some(unlisted) = self.unlisted {
            undenied(granted).map_or((Effect::Floor, unlisted), |rank| (Effect::Allow, rank))
        } else if let Some(deny) = self.deny {
            (Effect::Deny, deny)
        } else {
            (Effect::Allow, granted?)
        };
        Some((effect, rank.entry))
    }
}

/// What of the layer above reaches past `barrier`.
fn inherit(above: &Layer, barrier: Option<Barrier>) -> Layer {
    let Some(barrier) = barrier else {
        return above.clone();
    };
    above.each_ref().map(|segments| {
        let kept = segments.iter().filter_map(|segment| {
            let cell = match barrier {
                Barrier::Loopback => Cell::default(),
                Barrier::Mapped | Barrier::Multicast => Cell {
                    allow: None,
                    ..segment.cell
                },
            };
            (cell != Cell::default()).then_some(Segment { cell, ..*segment })
        });
        Rc::new(kept.collect())
    })
}

/// The layer with the items of one prefix added.
fn add(inherited: &Layer, own: &[(u128, u8, &Item)], expires: &[Option<UnixMillis>]) -> Layer {
    let mut layer = inherited.clone();
    for (class, segments) in Class::ALL.iter().zip(&mut layer) {
        let mut edges = Vec::new();
        for (_, len, item) in own {
            let key = match item.role {
                // Longest prefix first: what is inherited is always shorter.
                Role::Floor | Role::Unlisted | Role::Deny => -i64::from(*len),
                Role::Allow => {
                    let ends = expires.get(item.entry as usize).copied().flatten();
                    -ends.unwrap_or(i64::MAX)
                }
            };
            let rank = Rank {
                key,
                entry: item.entry,
            };
            let kind = (item.role, *len == 128);
            for (low, high) in item.ports.of(*class) {
                edges.push((u32::from(*low), true, kind, rank));
                edges.push((u32::from(*high) + 1, false, kind, rank));
            }
        }
        if edges.is_empty() {
            continue;
        }
        for segment in segments.iter() {
            let cell = segment.cell;
            let kinds = [
                (Role::Floor, cell.floor),
                (Role::Unlisted, cell.unlisted),
                (Role::Deny, cell.deny),
                (Role::Allow, cell.allow),
            ];
            for (role, rank) in kinds {
                if let Some(rank) = rank {
                    edges.push((u32::from(segment.low), true, (role, false), rank));
                    edges.push((u32::from(segment.high) + 1, false, (role, false), rank));
                }
            }
        }
        *segments = Rc::new(sweep(edges));
    }
    layer
}

/// Beginnings and (past the) ends of what covers ports, into disjoint segments.
fn sweep(mut edges: Vec<(u32, bool, (Role, bool), Rank)>) -> Vec<Segment> {
    edges.sort_unstable_by_key(|(port, ..)| *port);
    // The sets are tiny as a rule, but a file may put thousands of ports on one address.
    let mut active: [((Role, bool), BTreeSet<(Rank, u32)>); 5] = [
        ((Role::Floor, false), BTreeSet::new()),
        ((Role::Unlisted, false), BTreeSet::new()),
        ((Role::Deny, false), BTreeSet::new()),
        ((Role::Allow, false), BTreeSet::new()),
        ((Role::Allow, true), BTreeSet::new()),
    ];
    let mut segments: Vec<Segment> = Vec::new();
    let mut from = 0;
    for at in edges.chunk_by(|left, right| left.0 == right.0) {
        let port = at.first().map_or(0, |edge| edge.0);
        push_segment(&mut segments, from, port, &active);
        from = port;
        for (_, starts, kind, rank) in at {
            let exact = matches!(kind, (Role::Allow, true));
            let list = active.iter_mut().find(|(each, _)| *each == (kind.0, exact));
            if let Some((_, list)) = list {
                count(list, *rank, *starts);
            }
        }
    }
    segments
}

/// The same rank may be there more than once (a set that lists a network twice), so the sets
/// number the copies.
fn count(list: &mut BTreeSet<(Rank, u32)>, rank: Rank, starts: bool) {
    let copies = list
        .range((rank, 0)..=(rank, u32::MAX))
        .next_back()
        .map(|(_, copy)| *copy);
    match (copies, starts) {
        (copies, true) => {
            list.insert((rank, copies.map_or(0, |copy| copy + 1)));
        }
        (Some(copy), false) => {
            list.remove(&(rank, copy));
        }
        (None, false) => {}
    }
}

fn push_segment(
    segments: &mut Vec<Segment>,
    from: u32,
    to: u32,
    active: &[((Role, bool), BTreeSet<(Rank, u32)>); 5],
) {
    let mut cell = Cell::default();
    for ((role, exact), list) in active {
        *cell.slot(*role, *exact) = list.first().map(|(rank, _)| *rank);
    }
    let (Ok(low), Some(last)) = (u16::try_from(from), to.checked_sub(1)) else {
        return;
    };
    let high = u16::try_from(last).unwrap_or(u16::MAX);
    if cell == Cell::default() || from == to {
        return;
    }
    match segments.last_mut() {
        Some(before) if before.cell == cell && u32::from(before.high) + 1 == from => {
            before.high = high;
        }
        _ => segments.push(Segment { low, high, cell }),
    }
}

/// The rules that the layer comes down to, sorted by class and port.
fn resolve(layer: &Layer, expires: &[Option<UnixMillis>]) -> Vec<TimedRule> {
    let mut lists = layer.iter().map(|segments| {
        let mut rules: Vec<TimedRule> = Vec::with_capacity(segments.len());
        for segment in segments.iter() {
            let Some((effect, entry)) = segment.cell.verdict() else {
                continue;
            };
            if let Some(before) = rules.last_mut()
                && (before.effect, before.entry) == (effect, entry)
                && u32::from(before.high) + 1 == u32::from(segment.low)
            {
                before.high = segment.high;
                continue;
            }
            let ends = expires.get(entry as usize).copied().flatten();
            let expires = ends.filter(|_| effect == Effect::Allow);
            let (low, high) = (segment.low, segment.high);
            rules.push(TimedRule {
                class: None,
                low,
                high,
                effect,
                entry,
                expires,
            });
        }
        rules
    });
    let mut next = || lists.next().unwrap_or_default();
    let lists = [next(), next(), next(), next()];
    let [first, rest @ ..] = lists;
    if rest.iter().all(|each| *each == first) {
        return first;
    }
    let classes = Class::ALL.iter().zip(std::iter::once(first).chain(rest));
    let with_class = classes.flat_map(|(class, rules)| {
        rules.into_iter().map(|rule| TimedRule {
            class: Some(*class),
            ..rule
        })
    });
    with_class.collect()
}
