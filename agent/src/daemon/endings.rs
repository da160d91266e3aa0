//! When what is in force ends. The kernel ends it by itself; the daemon then closes the connections
//! that are left without a grant, and keeps the time so that no clock behind it revives anything.

use std::collections::{BTreeMap, BTreeSet};

use super::force::Force;
use crate::policy::UnixMillis;

/// Agents by the moments at which their entry, or a grant of it, ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endings(BTreeMap<UnixMillis, BTreeSet<String>>);

impl Endings {
    /// Those that lie after `now`.
    pub fn after(now: UnixMillis, force: &Force) -> Self {
        let mut endings = Self::default();
        for (id, agent) in &force.agents {
            let rules = agent.tables.scope.reach.iter().flat_map(|at| &at.rules);
            let ends = rules
                .filter_map(|rule| rule.expires)
                .chain(agent.tables.expires);
            for end in ends.filter(|end| *end > now) {
                endings.0.entry(end).or_default().insert(id.clone());
            }
        }
        endings
    }

    /// Takes out what has passed: the agents of which something has ended.
    pub fn passed(&mut self, now: UnixMillis) -> BTreeSet<String> {
        let ahead = self.0.split_off(&now.saturating_add(1));
        let passed = std::mem::replace(&mut self.0, ahead);
        passed.into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_is_told_once() {
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let mut endings = Endings(BTreeMap::from([
            (10, ids(&["a", "b"])),
            (20, ids(&["b"])),
            (30, ids(&["c"])),
        ]));
        assert_eq!(endings.passed(9), BTreeSet::new());
        assert_eq!(endings.passed(20), ids(&["a", "b"]));
        assert_eq!(endings.passed(29), BTreeSet::new());
        assert_eq!(endings.passed(i64::MAX), ids(&["c"]));
    }
}
