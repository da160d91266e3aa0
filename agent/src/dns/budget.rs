//! How much a wildcard grant may be asked: an allowed zone whose names nobody lists would else be
//! a tunnel, for whoever owns it reads every name that is looked up below it. Pure.
//!
//! Counted are names, not questions: the same name again tells nobody anything new. A name is
//! forgotten an hour after it was last asked for. Names are kept as hashes with a key of the
//! process's own, so that a name costs 16 octets and nobody can make two collide.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
};

/// How long a name counts, in nanoseconds.
pub const HOUR: u64 = 3_600 * 1_000_000_000;
/// Octets below the wildcard's base that a name may have on average, where all names of the budget
/// are used. Names made by machines for people are shorter; a tunnel fills its labels.
pub const OCTETS: u64 = 40;

/// What one wildcard grant of one agent was asked for.
#[derive(Debug, Default)]
pub struct Budget {
    names: HashMap<u64, Spent>,
    octets: u64,
    /// No name is older than this; spares looking through all of them.
    oldest: u64,
}

/// One name.
#[derive(Clone, Copy, Debug)]
struct Spent {
    at: u64,
    octets: u16,
}

/// What is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// Distinct names.
    Names(u64),
    /// Octets in them.
    Octets(u64),
}

/// The limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Distinct names an hour.
    pub names: u64,
}

// === impl Limit ===

impl Limit {
    /// Octets an hour.
    pub const fn octets(&self) -> u64 {
        self.names.saturating_mul(OCTETS)
    }
}

// === impl Budget ===

impl Budget {
    /// Spends `name`, of which `below` is what stands before the wildcard's base, at the boot time
    /// `now` in nanoseconds.
    ///
    /// # Errors
    /// When the budget is used up; the name is not counted then.
    pub fn spend(
        &mut self,
        hasher: &RandomState,
        name: &str,
        below: &str,
        limit: Limit,
        now: u64,
    ) -> Result<(), Exhausted> {
        let key = hasher.hash_one(name);
        if let Some(spent) = self.names.get_mut(&key)
            && now.saturating_sub(spent.at) < HOUR
        {
            spent.at = now;
            return Ok(());
        }
        let octets = u16::try_from(below.len()).unwrap_or(u16::MAX);
        let over = |budget: &Self| {
            if u64::try_from(budget.names.len()).unwrap_or(u64::MAX) >= limit.names {
                Some(Exhausted::Names(limit.names))
            } else if budget.octets.saturating_add(u64::from(octets)) > limit.octets() {
                Some(Exhausted::Octets(limit.octets()))
            } else {
                None
            }
        };
        if over(self).is_some() {
            self.forget(now);
        }
        if let Some(exhausted) = over(self) {
            return Err(exhausted);
        }
        if let Some(old) = self.names.insert(key, Spent { at: now, octets }) {
            self.octets = self.octets.saturating_sub(u64::from(old.octets));
        }
        self.octets = self.octets.saturating_add(u64::from(octets));
        Ok(())
    }

    /// Distinct names that count now.
    pub fn used(&self) -> usize {
        self.names.len()
    }

    /// Drops what is older than an hour. Between two of these as many names have to be asked for
    /// as were dropped, or a hundredth of an hour passes: a refused flood costs nothing.
    fn forget(&mut self, now: u64) {
        if now.saturating_sub(self.oldest) < HOUR / 100 {
            return;
        }
        self.oldest = now;
        let octets = &mut self.octets;
        self.names.retain(|_, spent| {
            let keep = now.saturating_sub(spent.at) < HOUR;
            if !keep {
                *octets = octets.saturating_sub(u64::from(spent.octets));
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1 << 50;
    const LIMIT: Limit = Limit { names: 1_000 };

    #[test]
    fn nine_hundred_fresh_names_pass_and_a_tunnel_does_not() {
        let hasher = RandomState::new();
        let mut budget = Budget::default();
        for number in 0..900_u64 {
            let below = format!("host-{number}");
            let name = format!("{below}.example.com");
            assert_eq!(
                budget.spend(&hasher, &name, &below, LIMIT, START + number),
                Ok(())
            );
        }
        let mut tunnel = Budget::default();
        let passed = (0..5_000_u64)
            .take_while(|number| {
                let below = format!("{number:0>60}.{number:0>60}");
                let name = format!("{below}.example.com");
                tunnel.spend(&hasher, &name, &below, LIMIT, START).is_ok()
            })
            .count();
        // 121 octets a name: what leaves in an hour is bounded by octets, not by names.
        assert_eq!(passed, 40_000 / 121);
    }

    #[test]
    fn the_same_name_again_costs_nothing() {
        let hasher = RandomState::new();
        let mut budget = Budget::default();
        let limit = Limit { names: 2 };
        for name in ["a.x", "b.x", "a.x", "b.x"] {
            assert_eq!(budget.spend(&hasher, name, "a", limit, START), Ok(()));
        }
        assert_eq!(
            budget.spend(&hasher, "c.x", "c", limit, START),
            Err(Exhausted::Names(2))
        );
        assert_eq!(budget.spend(&hasher, "a.x", "a", limit, START), Ok(()));
    }

    #[test]
    fn a_name_is_forgotten_an_hour_after_it_was_asked_for() {
        let hasher = RandomState::new();
        let mut budget = Budget::default();
        let limit = Limit { names: 2 };
        let mut spend = |name: &str, at| budget.spend(&hasher, name, "a", limit, START + at);
        assert_eq!(spend("a.x", 0), Ok(()));
        assert_eq!(spend("b.x", 0), Ok(()));
        assert_eq!(spend("a.x", HOUR / 2), Ok(()));
        assert_eq!(spend("c.x", HOUR - 1), Err(Exhausted::Names(2)));
        let later = HOUR + HOUR / 50;
        assert_eq!(spend("c.x", later), Ok(()));
        assert_eq!(spend("d.x", later), Err(Exhausted::Names(2)));
        assert_eq!(spend("d.x", 2 * later), Ok(()));
    }

    #[test]
    fn memory_is_bounded_by_the_limit() {
        let hasher = RandomState::new();
        let mut budget = Budget::default();
        for number in 0..100_000_u64 {
            let name = format!("{number}.x");
            let _told = budget.spend(&hasher, &name, "1", LIMIT, START + number * (HOUR / 10_000));
            assert!(budget.used() <= 1_000);
        }
    }
}
