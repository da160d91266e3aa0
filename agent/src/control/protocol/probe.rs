//! What probing an agent came to, over the control socket.

use serde::{Deserialize, Serialize};

use super::UnixMillis;

/// Whether the fence of an agent holds, tried from inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// The agent.
    pub agent: String,
    /// The one word.
    pub verdict: ProbeVerdict,
    /// Why it is not [`ProbeVerdict::Pass`], one sentence each; empty when it is.
    pub why: Vec<String>,
    /// Stands in `unmapped.probe` of every violation line that the probe made.
    pub run: String,
    /// When it began.
    pub began_ms: UnixMillis,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// The agent's cgroup in which it was tried, as a path below the v2 mount.
    pub cgroup: Option<String>,
    /// Each attempt.
    pub attempts: Vec<ProbeAttempt>,
    /// Revision of the registry.
    pub revision: u64,
    /// `sha256:…` of the entry in force.
    pub hash: String,
}

/// One attempt of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAttempt {
    /// Such as `IPv4 TCP connect`.
    pub name: String,
    /// The hook on trial.
    pub hook: String,
    /// Where to.
    pub to: Option<String>,
    /// `arrives`, or the reason for which it must be refused.
    pub wanted: String,
    /// What it proves.
    pub verdict: ProbeVerdict,
    /// Why.
    pub evidence: String,
}

/// What a probe, or one attempt of it, proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeVerdict {
    /// The fence did what the registry says, by all of the evidence.
    Pass,
    /// It could not be told.
    Unknown,
    /// The fence did not do what the registry says.
    Fail,
}

/// The last probe of an agent, for a status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastProbe {
    /// When it began.
    pub time_ms: UnixMillis,
    /// What it proved.
    pub verdict: ProbeVerdict,
    /// Why it is not a pass.
    pub why: Option<String>,
}

/// Probes since the daemon started, by what they proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeCounts {
    /// The fence held.
    pub pass: u64,
    /// It did not.
    pub fail: u64,
    /// It could not be told.
    pub unknown: u64,
}

// === impl ProbeVerdict ===

impl ProbeVerdict {
    /// Its name in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Unknown => "unknown",
            Self::Fail => "fail",
        }
    }
}
