//! How full the maps are, by what this process has put there.

use super::Tables;

/// How full one map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub map: &'static str,
    /// Entries in use, those included that wait to be removed.
    pub entries: u64,
    /// Entries that it has room for.
    pub capacity: u64,
}

impl Tables {
    /// The maps that a registry can fill.
    pub fn usage(&self) -> Vec<Usage> {
        let capacity = self.capacity;
        let retired = self.retired.len();
        let row = |map, entries: usize, capacity: u32| Usage {
            map,
            entries: entries as u64,
            capacity: u64::from(capacity),
        };
        let number = |entries: u32| usize::try_from(entries).unwrap_or(usize::MAX);
        vec![
            row("agents", self.index.len(), capacity.agents),
            row("rows", self.in_force.len() + retired, capacity.rows),
            row("claims", self.attributed.len(), capacity.claims),
            row("exacts", number(self.exact_count), capacity.addresses),
            row("prefixes", number(self.prefix_count), capacity.prefixes),
            row("rulesets", number(self.sets.used()), capacity.rule_sets),
        ]
    }
}
