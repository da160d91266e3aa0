//! What the registry says and what the kernel has, compared over the control socket.

use serde::{Deserialize, Serialize};

use super::UnixMillis;

/// What a comparison of registry and kernel came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// When it began.
    pub checked_ms: UnixMillis,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// How many map entries, links and programs were compared.
    pub entries: u64,
    /// Each difference; empty when there is none.
    pub drift: Vec<Drift>,
    /// What is as registry and settings want it, and still not as one would expect: a cgroup with
    /// processes that nobody claims, a last good entry in force.
    #[serde(default)]
    pub notices: Vec<Drift>,
    /// What is worth knowing and no difference, such as an agent that has no cgroup yet. A sentence
    /// each.
    pub information: Vec<String>,
}

/// One difference between what should be in the kernel and what is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// `missing`, `extra`, `changed`, `detached`, `foreign_program`, `process_outside`,
    /// `approved_not_enforced`, `enforced_not_approved`; of a notice also `unclaimed_cgroup`.
    pub kind: String,
    /// What differs: a map and its key, a hook, a cgroup, a process, an entry.
    pub what: String,
    /// The agent that it concerns; none where it concerns all.
    pub agent: Option<String>,
    /// The root that it concerns; none where it concerns all.
    pub root: Option<String>,
    /// What the kernel has.
    pub found: String,
    /// What it should have.
    pub wanted: String,
    /// When it was first seen.
    pub since_ms: UnixMillis,
    /// What a repair does about it, or somebody has to.
    #[serde(default)]
    pub remedy: Option<String>,
    /// Whether it was mended; none where that was not tried.
    pub repaired: Option<bool>,
    /// Why it could not be mended.
    pub error: Option<String>,
}

/// The same in short, for a status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriftSummary {
    /// When registry and kernel were last compared; none before the first time.
    pub checked_ms: Option<UnixMillis>,
    /// Differences that still stand.
    pub open: u64,
    /// Differences found since the daemon started, mended or not.
    pub found: u64,
    /// When the last one was found.
    pub last_ms: Option<UnixMillis>,
}

// === impl Reconciled ===

impl Reconciled {
    /// Differences that stand: those that were not mended.
    pub fn open(&self) -> usize {
        let stands = |drift: &&Drift| drift.repaired != Some(true);
        self.drift.iter().filter(stands).count()
    }
}
