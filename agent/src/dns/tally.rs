//! What came of lookups, counted, and how long they took. Pure.

use std::{collections::BTreeMap, time::Duration};

/// Upper bounds of the times that are told apart, in microseconds; what took longer is beyond.
pub const BOUNDS: [u64; 12] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 500_000, 1_000_000, 4_000_000,
];

/// What came of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Came {
    /// It was answered, be it with nothing.
    Answered,
    /// It was refused, for what this word says (see [`super::guard::Why::word`]).
    Refused(&'static str),
    /// No upstream had an answer that could be used.
    Failed,
    /// There was an answer, and its leases could not be put in force.
    Unleased,
}

/// How many lookups took how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// How many up to each of [`BOUNDS`] and over the one before; the last is beyond all.
    pub counts: [u64; BOUNDS.len() + 1],
    /// All of it.
    pub sum: Duration,
}

/// The counts.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    agents: BTreeMap<String, BTreeMap<Came, u64>>,
    /// Of lookups that were asked upstream, the time until an answer was there.
    pub upstream: Spent,
    /// Of all that were somebody's, the rest of the time until the reply was ready.
    pub guard: Spent,
}

// === impl Came ===

impl Came {
    /// Outcome and reason, in words; the reason is empty where there is but one.
    pub const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Answered => ("answered", ""),
            Self::Refused(why) => ("refused", why),
            Self::Failed => ("failed", "upstream"),
            Self::Unleased => ("failed", "lease"),
        }
    }
}

// === impl Spent ===

impl Spent {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS.partition_point(|bound| *bound < micros);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        self.sum = self.sum.saturating_add(took);
    }
}

// === impl Tally ===

impl Tally {
    /// Counts a lookup of an agent, which took so long in all, and of it so long upstream.
    pub fn add(&mut self, agent: &str, came: Came, took: Duration, upstream: Option<Duration>) {
        let counts = match self.agents.get_mut(agent) {
            Some(counts) => counts,
            None => self.agents.entry(agent.to_owned()).or_default(),
        };
        *counts.entry(came).or_default() += 1;
        if let Some(upstream) = upstream {
            self.upstream.add(upstream);
        }
        self.guard
            .add(took.saturating_sub(upstream.unwrap_or_default()));
    }

    /// Forgets an agent that is no more.
    pub fn forget(&mut self, agent: &str) {
        self.agents.remove(agent);
    }

    /// Agent, what came of its lookups, and how often.
    pub fn each(&self) -> impl Iterator<Item = (&str, Came, u64)> {
        self.agents.iter().flat_map(|(agent, counts)| {
            let each = counts.iter();
            each.map(move |(came, count)| (agent.as_str(), *came, *count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lookup_is_counted_once_and_its_time_in_two_parts() {
        let mut tally = Tally::default();
        let (ms, us) = (Duration::from_millis, Duration::from_micros);
        tally.add("a", Came::Answered, ms(3), Some(us(2_900)));
        tally.add("a", Came::Answered, us(100), None);
        tally.add("a", Came::Refused("name"), us(101), None);
        tally.add("b", Came::Failed, ms(4_001), Some(ms(4_001)));
        let each: Vec<_> = tally.each().collect();
        assert_eq!(
            each,
            [
                ("a", Came::Answered, 2),
                ("a", Came::Refused("name"), 1),
                ("b", Came::Failed, 1),
            ]
        );
        // 100 µs twice, 101 µs, and none at all.
        assert_eq!(tally.guard.counts[..3], [3, 1, 0]);
        assert_eq!(tally.guard.sum, us(301));
        assert_eq!(tally.upstream.counts[5], 1);
        assert_eq!(tally.upstream.counts[BOUNDS.len()], 1);
        tally.forget("a");
        assert_eq!(tally.each().count(), 1);
    }
}
