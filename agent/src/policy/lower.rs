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

/// A role, with grants of an exact address apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Floor,
    Unlisted,
    Deny,
    Allow,
    Exact,
}

/// The items of one prefix.
type Own<'i> = &'i [(Prefix, &'i Item)];

/// Where something begins to cover ports, or has ended.
#[derive(Clone, Copy, Debug)]
struct Edge {
    port: u32,
    begins: bool,
    kind: Kind,
    rank: Rank,
}

/// What covers the current port during a sweep, by kind. The sets are tiny as a rule, but a file
/// may put thousands of ports on one address. A rank may be there more than once (a set that lists
/// a network twice), so the copies are numbered.
#[derive(Debug, Default)]
struct Active {
    floor: BTreeSet<(Rank, u32)>,
    unlisted: BTreeSet<(Rank, u32)>,
    deny: BTreeSet<(Rank, u32)>,
    allow: BTreeSet<(Rank, u32)>,
    exact: BTreeSet<(Rank, u32)>,
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
    let key = |prefix: &Prefix| (prefix.bits(), prefix.len);
    let mut order: Vec<(Prefix, &Item)> = items.iter().map(|item| (item.prefix, item)).collect();
    order.sort_by_key(|(prefix, item)| (key(prefix), item.entry));
    let mut nodes: Vec<(Prefix, Own<'_>)> = order
        .chunk_by(|left, right| left.0 == right.0)
        .filter_map(|own| own.first().map(|(prefix, _)| (*prefix, own)))
        .collect();
    let barriers = barriers();
    let bare: Vec<Prefix> = barriers
        .iter()
        .map(|(range, _)| *range)
        .filter(|range| {
            nodes
                .binary_search_by_key(&key(range), |(each, _)| key(each))
                .is_err()
        })
        .collect();
    nodes.extend(bare.into_iter().map(|prefix| (prefix, [].as_slice())));
    nodes.sort_by_key(|(prefix, _)| key(prefix));

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
    fn judge(&mut self, own: Own<'_>, layer: &Layer) {
        for (prefix, item) in own.iter().filter(|(_, item)| item.role == Role::Allow) {
            let entry = item.entry as usize;
            for ((_, intervals), segments) in item.ports.iter().zip(layer) {
                for (low, high) in intervals {
                    for segment in overlapping(segments, *low, *high) {
                        let stopped = segment.cell.stops_grant(prefix.len == 128);
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
fn add(inherited: &Layer, own: Own<'_>, expires: &[Option<UnixMillis>]) -> Layer {
    let mut layer = inherited.clone();
    for (class, segments) in Class::ALL.iter().zip(&mut layer) {
        let mut edges = Vec::new();
        for (prefix, item) in own {
            let (kind, key) = match item.role {
                // Longest prefix first: what is inherited is always shorter.
                Role::Floor => (Kind::Floor, -i64::from(prefix.len)),
                Role::Unlisted => (Kind::Unlisted, -i64::from(prefix.len)),
                Role::Deny => (Kind::Deny, -i64::from(prefix.len)),
                Role::Allow => {
                    let ends = expires.get(item.entry as usize).copied().flatten();
                    let kind = if prefix.len == 128 {
                        Kind::Exact
                    } else {
                        Kind::Allow
                    };
                    (kind, -ends.unwrap_or(i64::MAX))
                }
            };
            let rank = Rank {
                key,
                entry: item.entry,
            };
            for (low, high) in item.ports.of(*class) {
                edges.extend(Edge::pair(*low, *high, kind, rank));
            }
        }
        if edges.is_empty() {
            continue;
        }
        for Segment { low, high, cell } in segments.iter() {
            // Nothing is below an exact address, so no layer hands one down.
            let kinds = [
                (Kind::Floor, cell.floor),
                (Kind::Unlisted, cell.unlisted),
                (Kind::Deny, cell.deny),
                (Kind::Allow, cell.allow),
            ];
            for (kind, rank) in kinds {
                edges.extend(
                    rank.into_iter()
                        .flat_map(|rank| Edge::pair(*low, *high, kind, rank)),
                );
            }
        }
        *segments = Rc::new(sweep(edges));
    }
    layer
}

/// Disjoint segments, in order, of what covers something.
fn sweep(mut edges: Vec<Edge>) -> Vec<Segment> {
    edges.sort_unstable_by_key(|edge| edge.port);
    let mut active = Active::default();
    let mut segments: Vec<Segment> = Vec::new();
    let mut from = 0;
    for at in edges.chunk_by(|left, right| left.port == right.port) {
        let port = at.first().map_or(from, |edge| edge.port);
        push_segment(&mut segments, from, port, active.cell());
        from = port;
        for edge in at {
            active.turn(edge);
        }
    }
    segments
}

/// Adds the ports from `from` to before `to`.
fn push_segment(segments: &mut Vec<Segment>, from: u32, to: u32, cell: Cell) {
    let (Ok(low), Some(last)) = (u16::try_from(from), to.checked_sub(1)) else {
        return;
    };
    if cell == Cell::default() || from == to {
        return;
    }
    let high = u16::try_from(last).unwrap_or(u16::MAX);
    match segments.last_mut() {
        Some(before) if before.cell == cell && u32::from(before.high) + 1 == from => {
            before.high = high;
        }
        _ => segments.push(Segment { low, high, cell }),
    }
}

// === impl Edge ===

impl Edge {
    fn pair(low: u16, high: u16, kind: Kind, rank: Rank) -> [Self; 2] {
        let begins = Self {
            port: u32::from(low),
            begins: true,
            kind,
            rank,
        };
        [
            begins,
            Self {
                port: u32::from(high) + 1,
                begins: false,
                ..begins
            },
        ]
    }
}

// === impl Active ===

impl Active {
    fn turn(&mut self, edge: &Edge) {
        let list = match edge.kind {
            Kind::Floor => &mut self.floor,
            Kind::Unlisted => &mut self.unlisted,
            Kind::Deny => &mut self.deny,
            Kind::Allow => &mut self.allow,
            Kind::Exact => &mut self.exact,
        };
        let copies = (edge.rank, 0)..=(edge.rank, u32::MAX);
        let last = list.range(copies).next_back().map(|(_, copy)| *copy);
        if edge.begins {
            list.insert((edge.rank, last.map_or(0, |copy| copy + 1)));
        } else if let Some(copy) = last {
            list.remove(&(edge.rank, copy));
        }
    }

    fn cell(&self) -> Cell {
        let first = |list: &BTreeSet<(Rank, u32)>| list.first().map(|(rank, _)| *rank);
        Cell {
            floor: first(&self.floor),
            unlisted: first(&self.unlisted),
            deny: first(&self.deny),
            allow: first(&self.allow),
            exact: first(&self.exact),
        }
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

#[cfg(test)]
mod tests {
    use super::{
        super::net::{Cidr, PortSpec},
        *,
    };

    fn item(entry: u32, role: Role, to: &str, ports: &[&str]) -> Item {
        Item {
            prefix: to.parse::<Cidr>().unwrap().prefix(),
            role,
            ports: ports
                .iter()
                .map(|spec| spec.parse::<PortSpec>().unwrap())
                .collect(),
            entry,
        }
    }

    fn lowered(items: &[Item]) -> Lowered {
        lower(items, &[None; 8], 64)
    }

    /// `PREFIX/LEN: CLASS LOW-HIGH EFFECT ENTRY, …` of each prefix.
    fn shown(lowered: &Lowered) -> Vec<String> {
        let rule = |rule: &TimedRule| {
            let class = rule.class.map_or("all", Class::name);
            let effect = rule.effect.name();
            format!("{class} {}-{} {effect} {}", rule.low, rule.high, rule.entry)
        };
        let line = |placed: &Placed| {
            let rules: Vec<String> = placed.rules.iter().map(rule).collect();
            let Prefix { addr, len } = placed.prefix;
            format!("{}/{len}: {}", IpAddr::from(addr), rules.join(", "))
        };
        lowered.placed.iter().map(line).collect()
    }

    #[test]
    fn a_longer_prefix_carries_the_rules_of_the_shorter() {
        let items = [
            item(0, Role::Allow, "10.0.0.0/8", &["443"]),
            item(1, Role::Deny, "10.1.0.0/16", &["443-445"]),
            item(2, Role::Allow, "10.1.2.0/24", &["53/udp"]),
        ];
        assert_eq!(
            shown(&lowered(&items)),
            [
                "10.0.0.0/104: tcp 443-443 allow 0",
                "10.1.0.0/112: tcp 443-445 deny 1",
                "10.1.2.0/120: tcp 443-445 deny 1, udp 53-53 allow 2",
            ]
        );
    }

    #[test]
    fn prefixes_that_say_nothing_new_are_left_out() {
        let items = [
            item(0, Role::Deny, "10.0.0.0/8", &["any"]),
            item(1, Role::Allow, "10.1.0.0/16", &["443"]),
        ];
        let lowered = lowered(&items);
        assert_eq!(shown(&lowered), ["10.0.0.0/104: all 0-65535 deny 0"]);
        assert!(!lowered.live[1]);
        assert_eq!(lowered.blocked_by[1], Some(0));
    }

    #[test]
    fn wide_grants_stop_at_special_ranges() {
        let items = [item(0, Role::Allow, "0.0.0.0/0", &["any"])];
        let empty = [
            "0.0.0.0/128: ",
            "127.0.0.0/104: ",
            "224.0.0.0/100: ",
            "255.255.255.255/128: ",
        ];
        let shown = shown(&lowered(&items));
        assert_eq!(shown[0], "0.0.0.0/96: all 0-65535 allow 0");
        assert_eq!(shown[1..], empty);
    }

    #[test]
    fn pieces_of_one_entry_that_touch_are_one_rule() {
        let items = [
            item(0, Role::Allow, "10.0.0.1", &["80-90"]),
            item(0, Role::Allow, "10.0.0.1", &["91", "85-95"]),
        ];
        assert_eq!(shown(&lowered(&items)), ["10.0.0.1/128: tcp 80-95 allow 0"]);
    }

    #[test]
    fn a_hundred_thousand_prefixes_take_no_square_of_it() {
        let mut items = vec![
            item(0, Role::Allow, "10.0.0.0/8", &["443"]),
            item(1, Role::Deny, "10.128.0.0/9", &["22"]),
        ];
        for number in 0..100_000_u32 {
            let addr = IpAddr::from((0x0a00_0000 + number * 3).to_be_bytes());
            let prefix = Cidr::from(addr).prefix();
            items.push(Item {
                prefix,
                ..item(2, Role::Allow, "10.0.0.1", &["8443"])
            });
        }
        let started = std::time::Instant::now();
        assert_eq!(lowered(&items).placed.len(), 100_002);
        // Generous: a debug build on a busy machine takes about a second.
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    }
}
