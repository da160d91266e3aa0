//! What must survive a restart, in the state directory and beside the registry:
//!
//! ```text
//! STATE/registry/_index.json          which agents the last good registry has
//! STATE/registry/_unregistered.json   its floor, as the pseudo-agent
//! STATE/registry/ID.json              its entry of an agent
//! STATE/holds/ID.json                 a suspension or revocation
//! REGISTRY/ID.hold                    the same, should the state directory be lost
//! STATE/clock.json                    the latest time that was seen, the offset of this boot
//! REGISTRY/.clock                     the same, should the state directory be lost
//! ```
//!
//! Each is one [`file`], replaced whole. What cannot be read is [`Damage`], never guessed: an entry
//! that is lost reaches nothing, a hold that is lost holds. Damaged files are kept under another
//! name. Nothing here keeps enforcement from going on: a store that cannot be written is an error
//! to tell, not one to stop at.

mod clock;
mod file;
mod hold;
mod registry;

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use clock::{ClockMark, boot_id};
pub use file::{Damage, StateError};
pub use hold::{Approval, By, Copies, Hold, HoldState, Holds, HoldsRead};
pub use registry::{LastGood, Record, Saved, Stored};

use crate::policy::AgentTables;

/// The state directory, and the registry's folder for the markers beside it. One process only may
/// have one: the daemon that holds the lock.
#[derive(Clone, Debug)]
pub struct Store {
    state: PathBuf,
    registry: registry::Folder,
    holds: hold::Places,
    clocks: [PathBuf; 2],
}

/// All that was found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The last good registry; none if none was ever saved or nothing of it is to be trusted.
    pub registry: Option<LastGood>,
    /// Suspensions and revocations.
    pub holds: Holds,
    /// The clocks as they were last seen.
    pub clock: Option<ClockMark>,
    /// What could not be read.
    pub damage: Vec<Damage>,
    /// What could not be written: then state does not survive, and the daemon is degraded.
    pub unwritten: Vec<StateError>,
}

// === impl Store ===

impl Store {
    /// A store in these folders. Touches nothing; folders are made when something is written.
    pub fn open(state: &Path, registry: &Path) -> Self {
        Self {
            state: state.to_owned(),
            registry: registry::Folder::new(state),
            holds: hold::Places::new(state, registry),
            clocks: [state.join(clock::NAME), registry.join(clock::MARKER)],
        }
    }

    /// Reads all there is. `now_ms`, the wall clock, goes into the names of damaged files and into
    /// the holds that stand for unreadable ones. Missing copies of holds are written anew.
    pub fn load(&mut self, now_ms: i64) -> Loaded {
        let mut loaded = Loaded::default();
        if let Err(error) = file::make_folder(&self.state) {
            loaded.unwritten.push(error);
        }
        let HoldsRead {
            holds,
            damage,
            unwritten,
        } = self.holds.read(now_ms);
        loaded.holds = holds;
        loaded.damage.extend(damage);
        loaded.unwritten.extend(unwritten);
        // Holds only take away, so whoever wrote them they count. These may give.
        if let Some(why) = file::exposed(&self.state) {
            let why = format!(
                "is not trusted, for {why}; neither the last good registry nor the clock is taken \
                 from it. Mend: chown root and chmod go-w"
            );
            loaded.damage.push(Damage::new(&self.state, why));
            return loaded;
        }
        loaded.registry = self.registry.load(now_ms, &mut loaded.damage);
        let (mark, damage) = clock::read(&self.clocks);
        let so = match mark {
            Some(_) => "the other copy is used",
            None => "no earlier time is known",
        };
        for mut damage in damage {
            file::move_aside(&mut damage, now_ms);
            loaded.damage.push(damage.so(so));
        }
        loaded.clock = mark;
        loaded
    }

    /// Saves the registry in force: whatever differs from what is on disk. `agents` are the entries
    /// as the registry says them, holds not laid over.
    ///
    /// # Errors
    /// What could not be written. What was before, or a part of what is new, can still be loaded;
    /// the next save tries again.
    pub fn save_registry<'a>(
        &mut self,
        revision: u64,
        unregistered: &Arc<AgentTables>,
        agents: impl IntoIterator<Item = Record<'a>>,
    ) -> Result<Saved, StateError> {
        self.registry.save(revision, unregistered, agents)
    }

    /// Reads all holds anew, as [`Self::load`] does.
    pub fn load_holds(&self, now_ms: i64) -> HoldsRead {
        self.holds.read(now_ms)
    }

    /// Writes a hold down in both places, durably.
    ///
    /// # Errors
    /// If neither could be written, or no agent can have such an id.
    pub fn hold(&self, id: &str, hold: &Hold) -> Result<Copies, StateError> {
        self.holds.write(id, hold)
    }

    /// Removes a hold from both places, durably.
    ///
    /// # Errors
    /// If either could not be removed: the agent is still held.
    pub fn release(&self, id: &str) -> Result<(), StateError> {
        self.holds.remove(id)
    }

    /// Writes the clocks down.
    ///
    /// # Errors
    /// If they could not be written.
    pub fn save_clock(&self, mark: &ClockMark) -> Result<(), StateError> {
        file::make_folder(&self.state)?;
        clock::write(&self.clocks, mark)
    }
}
