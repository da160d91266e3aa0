//! Whether a cgroup is guarded, over the control socket.

use serde::{Deserialize, Serialize};

/// Which cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardQuestion {
    /// Its path below the v2 mount.
    pub cgroup: String,
}

/// Whether what runs in a cgroup is an active agent behind a fence that stands, read from the kernel
/// when it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guarded {
    /// The cgroup that was asked about.
    pub cgroup: String,
    /// The root that it is below.
    pub root: Option<String>,
    /// Whether every hook of that root is live.
    pub fenced: bool,
    /// The agent that claims it.
    pub agent: Option<String>,
    /// `active`, or why the kernel lets the agent reach nothing.
    pub state: String,
    /// Whether all of it is as it should be.
    pub ok: bool,
    /// What is not; empty when all is.
    pub why: Vec<String>,
}
