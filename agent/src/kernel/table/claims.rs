//! Which cgroup is whose, as the programs look it up.

use std::collections::HashMap;

use super::{ApplyError, Tables, put};

impl Tables {
    /// The agent that the map gives a cgroup to, read anew.
    pub fn claimant(&self, cgroup: u64) -> std::io::Result<Option<u32>> {
        self.claims.get(cgroup)
    }

    /// Makes the attributions equal to `wanted`: cgroup id to agent index. Returns how many
    /// changed.
    pub fn attribute(&mut self, wanted: &HashMap<u64, u32>) -> Result<usize, ApplyError> {
        let needs = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        if needs > self.capacity.claims {
            return Err(ApplyError::Full {
                map: "claims",
                has: self.capacity.claims,
                needs,
                limit: "agents",
            });
        }
        let gone: Vec<u64> = self
            .attributed
            .keys()
            .copied()
            .filter(|id| !wanted.contains_key(id))
            .collect();
        let mut changes = 0;
        let mut result = Ok(());
        for cgroup in gone {
            result = result.and_then(|()| self.unclaim(cgroup));
            if result.is_ok() {
                changes += 1;
            }
        }
        for (&cgroup, &agent) in wanted {
            if result.is_err() || self.attributed.get(&cgroup) == Some(&agent) {
                continue;
            }
            // Noted first: a claim that may have been written has to void cached verdicts too.
            changes += 1;
            result = self.claim(cgroup, agent);
        }
        if changes > 0 {
            self.next_epoch()?;
        }
        result.map(|()| changes)
    }

    pub(super) fn claim(&mut self, cgroup: u64, agent: u32) -> Result<(), ApplyError> {
        let failed = write_failed(cgroup);
        self.claims.set(cgroup, agent).map_err(&failed)?;
        if self.claims.get(cgroup).map_err(&failed)? != Some(agent) {
            return Err(ApplyError::ReadBack {
                map: "claims",
                key: format!("cgroup {cgroup}"),
            });
        }
        self.attributed.insert(cgroup, agent);
        Ok(())
    }

    pub(super) fn unclaim(&mut self, cgroup: u64) -> Result<(), ApplyError> {
        // Somebody may have been faster; what counts is that it is gone.
        let _was_there = self.claims.remove(cgroup).map_err(write_failed(cgroup))?;
        self.attributed.remove(&cgroup);
        Ok(())
    }

    /// Voids every cached verdict.
    pub(super) fn next_epoch(&mut self) -> Result<(), ApplyError> {
        let epoch = self.epoch_now.wrapping_add(1);
        put("epoch", &self.epoch, 0, epoch)?;
        self.epoch_now = epoch;
        Ok(())
    }

    /// Attributions in force.
    pub fn attributed(&self) -> &HashMap<u64, u32> {
        &self.attributed
    }
}

fn write_failed(cgroup: u64) -> impl Fn(std::io::Error) -> ApplyError {
    move |source| ApplyError::Write {
        map: "claims",
        key: format!("cgroup {cgroup}"),
        source,
    }
}
