//! What shall be in force for one agent, in the kernel's terms, and whether what is found there is
//! the same. Pure.

use std::{borrow::Cow, collections::HashMap};

use agent_ebpf::abi::{
    Addr, AgentRow, FLAG_NAMES, INHERITED, Loopback, Mode, NEVER, NO_ENTRY, Rule, State,
};

use crate::policy::tables::Prefix;

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
    /// Leases that shall be in force with it, if it has to be written: addresses, and all their
    /// rules. They are no difference: leases come and go by themselves.
    pub leases: Vec<(Addr, Vec<Rule>)>,
    /// Whether it has to be written anew even where what is found is the same: the leases that are
    /// in force are of other names.
    pub fresh: bool,
}

/// Deadlines closer than this are the same, in nanoseconds. Each daemon relates wall-clock time
/// to boot time anew, and keeps to that until the two drift further apart than this.
pub const DEADLINE_SLACK: u64 = 200_000_000;

/// What is in force at one prefix. `rules` is none where the kernel holds what no daemon writes.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// About clients to answer, not about destinations.
    pub serve: bool,
    /// Where.
    pub prefix: Prefix,
    /// What.
    pub rules: Option<&'a [Rule]>,
    /// The entry of those rules that have none of their own.
    pub entry: u32,
}

impl Image {
    /// Whether its lookups are turned to the DNS guard.
    pub fn uses_names(&self) -> bool {
        self.row.flags & FLAG_NAMES != 0
    }

    /// Whether `row` and `found` are this image, and in its order; the policy's number is not
    /// compared. Where this is false, [`Self::differences`] tells why, if there is a reason.
    pub fn is_in_order<'a>(
        &self,
        row: &AgentRow,
        mut found: impl Iterator<Item = Found<'a>>,
    ) -> bool {
        let reach = self.reach.iter().map(|placed| (false, placed));
        let mut wanted = reach.chain(self.serve.iter().map(|placed| (true, placed)));
        !self.fresh
            && same_row(row, &self.row)
            && wanted.all(|(serve, (prefix, rules))| {
                found.next().is_some_and(|found| {
                    found.serve == serve && found.prefix == *prefix && found.is(rules)
                })
            })
            && found.next().is_none()
    }

    /// How `row` and `found` differ from this image, in words; nothing when they do not. The
    /// policy's number is not compared.
    pub fn differences<'a>(
        &self,
        row: &AgentRow,
        found: impl Iterator<Item = Found<'a>>,
    ) -> Vec<String> {
        let mut differences = Vec::new();
        if self.fresh {
            differences.push("its names are others".to_owned());
        }
        if !same_row(row, &self.row) {
            differences.push(format!(
                "its row says {}, not {}",
                describe_row(row),
                describe_row(&self.row)
            ));
        }
        let mut wanted: HashMap<(bool, Prefix), &[Rule]> = HashMap::new();
        for (serve, placed) in [(false, &self.reach), (true, &self.serve)] {
            for (prefix, rules) in placed {
                wanted.insert((serve, *prefix), rules);
            }
        }
        let (mut extra, mut other) = (0_usize, 0_usize);
        for found in found {
            match wanted.remove(&(found.serve, found.prefix)) {
                None => extra += 1,
                Some(wanted) if found.is(wanted) => {}
                Some(_) => other += 1,
            }
        }
        for (count, what) in [
            (extra, "prefixes too many"),
            (other, "prefixes with other rules"),
            (wanted.len(), "prefixes missing"),
        ] {
            if count > 0 {
                differences.push(format!("{count} {what}"));
            }
        }
        differences
    }
}

impl Found<'_> {
    /// Whether this is what is wanted here.
    fn is(&self, wanted: &[Rule]) -> bool {
        self.rules.is_some_and(|found| {
            found.len() == wanted.len()
                && found.iter().zip(wanted).all(|(found, wanted)| {
                    let deadline = wanted.deadline;
                    let found = with_entry(found, self.entry);
                    same_time(found.deadline, deadline) && Rule { deadline, ..found } == *wanted
                })
        })
    }
}

/// A rule with the entry that it inherits.
pub const fn with_entry(rule: &Rule, inherited: u32) -> Rule {
    let entry = if rule.entry == INHERITED {
        inherited
    } else {
        rule.entry
    };
    Rule { entry, ..*rule }
}

/// Rules as they are shared: those that are all of one entry leave it to the address.
pub fn shared(rules: &[Rule]) -> (Cow<'_, [Rule]>, u32) {
    match rules {
        [first, ..]
            if first.entry < INHERITED && rules.iter().all(|rule| rule.entry == first.entry) =>
        {
            let inheriting = rules.iter().map(|rule| Rule {
                entry: INHERITED,
                ..*rule
            });
            (inheriting.collect(), first.entry)
        }
        _ => (Cow::Borrowed(rules), NO_ENTRY),
    }
}

fn same_row(found: &AgentRow, wanted: &AgentRow) -> bool {
    let aligned = AgentRow {
        policy: wanted.policy,
        not_before: wanted.not_before,
        deadline: wanted.deadline,
        ..*found
    };
    same_time(found.not_before, wanted.not_before)
        && same_time(found.deadline, wanted.deadline)
        && aligned == *wanted
}

/// "Never" and "always" are no times that could be near to one.
fn same_time(found: u64, wanted: u64) -> bool {
    let is_open = |time| time == 0 || time == NEVER;
    if is_open(found) || is_open(wanted) {
        return found == wanted;
    }
    found.abs_diff(wanted) < DEADLINE_SLACK
}

/// A row for people. Every byte may be anything.
pub fn describe_row(row: &AgentRow) -> String {
    let word = |name: Option<&'static str>, byte: u8| {
        name.map_or_else(|| format!("unknown ({byte})"), str::to_owned)
    };
    format!(
        "policy {}, state {}, mode {}, loopback {}, sockets {}, flags {}, valid from {} until {}",
        row.policy,
        word(State::from_byte(row.state).map(State::name), row.state),
        word(Mode::from_byte(row.mode).map(Mode::name), row.mode),
        word(
            Loopback::from_byte(row.loopback).map(Loopback::name),
            row.loopback
        ),
        row.sockets,
        row.flags,
        describe_time(row.not_before),
        describe_time(row.deadline),
    )
}

/// A boot time for people.
fn describe_time(nanos: u64) -> String {
    match nanos {
        0 => "the start".to_owned(),
        NEVER => "ever".to_owned(),
        _ => format!(
            "boot + {}.{:03} s",
            nanos / 1_000_000_000,
            nanos / 1_000_000 % 1000
        ),
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Addr;

    use super::*;

    const HOST: Prefix = Prefix {
        addr: Addr::v4([10, 0, 0, 1]),
        len: 128,
    };
    const NET: Prefix = Prefix {
        addr: Addr::v4([10, 0, 0, 0]),
        len: 104,
    };

    fn rule(low: u16, deadline: u64) -> Rule {
        Rule {
            low,
            high: low,
            deadline,
            ..Rule::zeroed()
        }
    }

    fn image() -> Image {
        Image {
            leases: Vec::new(),
            fresh: false,
            id: "alpha".to_owned(),
            row: AgentRow {
                deadline: 5_000_000_000,
                state: State::Active as u8,
                ..AgentRow::zeroed()
            },
            reach: vec![
                (NET, vec![]),
                (HOST, vec![rule(80, NEVER), rule(443, 7_000_000_000)]),
            ],
            serve: vec![(NET, vec![rule(8080, NEVER)])],
        }
    }

    /// What the kernel would hold for an image, in another order.
    fn found(image: &Image) -> Vec<Found<'_>> {
        let of = |serve, placed: &'_ [(Prefix, Vec<Rule>)]| -> Vec<(bool, Prefix)> {
            placed.iter().map(|(prefix, _)| (serve, *prefix)).collect()
        };
        let mut all = of(true, &image.serve);
        all.extend(of(false, &image.reach));
        all.reverse();
        all.into_iter()
            .map(|(serve, prefix)| {
                let placed = if serve { &image.serve } else { &image.reach };
                let rules = placed.iter().find(|(at, _)| *at == prefix);
                Found {
                    serve,
                    prefix,
                    rules: rules.map(|(_, rules)| rules.as_slice()),
                    entry: NO_ENTRY,
                }
            })
            .collect()
    }

    #[test]
    fn the_same_content_has_no_differences_whatever_its_policy_and_order() {
        let image = image();
        let row = AgentRow {
            policy: 77,
            deadline: 5_000_000_000 + DEADLINE_SLACK - 1,
            ..image.row
        };
        let none: Vec<String> = Vec::new();
        assert_eq!(image.differences(&row, found(&image).into_iter()), none);
        assert!(!image.is_in_order(&row, found(&image).into_iter()));
        let mut in_order = found(&image);
        in_order.sort_by_key(|found| (found.serve, found.prefix.bits(), found.prefix.len));
        assert!(image.is_in_order(&row, in_order.iter().copied()));
        assert!(!image.is_in_order(&row, in_order.iter().copied().take(2)));
        let more = in_order.iter().chain(in_order.last()).copied();
        assert!(!image.is_in_order(&row, more));
        let other = AgentRow { flags: 1, ..row };
        assert!(!image.is_in_order(&other, in_order.iter().copied()));
        for found in &mut in_order {
            found.rules = None;
        }
        assert!(!image.is_in_order(&row, in_order.iter().copied()));
    }

    #[test]
    fn every_difference_is_found() {
        let wanted = image();
        let count = |row: AgentRow, kernel: &Image| {
            wanted.differences(&row, found(kernel).into_iter()).len()
        };
        for row in [
            AgentRow {
                state: 9,
                ..wanted.row
            },
            AgentRow {
                pad: [0, 0, 1],
                ..wanted.row
            },
            AgentRow {
                deadline: NEVER,
                ..wanted.row
            },
            AgentRow {
                not_before: 1,
                ..wanted.row
            },
            AgentRow {
                deadline: wanted.row.deadline + DEADLINE_SLACK,
                ..wanted.row
            },
        ] {
            assert_eq!(count(row, &wanted), 1, "{row:?}");
        }
        let mut kernel = wanted.clone();
        kernel.reach[1].1[0].high = 81;
        assert_eq!(count(wanted.row, &kernel), 1, "a wider port");
        let mut kernel = wanted.clone();
        kernel.reach[1].1[1].deadline = NEVER;
        assert_eq!(count(wanted.row, &kernel), 1, "a grant without end");
        let mut kernel = wanted.clone();
        kernel.reach[0].1.push(rule(1, NEVER));
        assert_eq!(count(wanted.row, &kernel), 1, "a rule more");
        let mut kernel = wanted.clone();
        let moved = kernel.serve.pop().unwrap();
        assert_eq!(count(wanted.row, &kernel), 1, "a prefix less");
        kernel.reach.push((
            Prefix {
                len: 128,
                ..moved.0
            },
            moved.1,
        ));
        assert_eq!(count(wanted.row, &kernel), 2, "in the wrong space");
        let unreadable = found(&wanted).into_iter().map(|found| Found {
            rules: None,
            ..found
        });
        assert_eq!(
            wanted.differences(&wanted.row, unreadable),
            ["3 prefixes with other rules"]
        );
    }
}
