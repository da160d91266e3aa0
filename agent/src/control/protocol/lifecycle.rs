//! Suspending, resuming and revoking an agent over the control socket.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::UnixMillis;

/// Longest [`HoldReason`], in bytes: a sentence or a ticket's title, not a report. It is repeated in
/// every status.
pub const REASON_BYTES: usize = 1_024;

/// Body of `POST /v1/agents/ID/suspend`, `…/resume` and `…/revoke`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldRequest {
    /// Why: for the audit log, and for whoever asks later.
    pub reason: HoldReason,
    /// Kill all processes of the agent; not with `freeze`, not for a resume.
    #[serde(default)]
    pub kill: bool,
    /// Freeze all processes of the agent; not with `kill`, not for a resume, which thaws them.
    #[serde(default)]
    pub freeze: bool,
}

/// Why an agent is held or released: not blank, and at most [`REASON_BYTES`] long. The text is the
/// caller's, control characters included: who prints it makes it harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HoldReason(String);

/// Why a text is no [`HoldReason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReasonError {
    /// Nothing in it.
    #[error("the reason is blank")]
    Blank,
    /// More than [`REASON_BYTES`].
    #[error("the reason is {0} bytes long, {REASON_BYTES} is the most")]
    TooLong(usize),
}

/// What keeps an agent from reaching anything, besides its entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldInfo {
    /// `suspended` or `revoked`.
    pub state: String,
    /// Why, in the words of whoever asked for it.
    pub reason: String,
    /// Who asked for it, such as `root (pid 4711)`.
    pub by: String,
    /// Since when.
    pub since_ms: UnixMillis,
    /// Whether its processes are frozen as well.
    pub frozen: bool,
}

/// What a suspend, resume or revoke came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The agent's id.
    pub id: String,
    /// Lifecycle state in force before: `active`, `suspended`, ….
    pub before: String,
    /// Lifecycle state in force now. The same as `before` when there was nothing to change.
    pub after: String,
    /// The reason given.
    pub reason: String,
    /// Number of the registry state in force now.
    pub revision: u64,
    /// TCP connections closed because no grant is left for them.
    #[serde(default)]
    pub closed: u64,
    /// Processes killed.
    #[serde(default)]
    pub killed: u64,
    /// Processes frozen, or thawed by a resume.
    #[serde(default)]
    pub frozen: u64,
    /// Whether it is on disk and so survives a restart. It is in force either way.
    pub durable: bool,
    /// What did not go as it should have, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

// === impl HoldReason ===

impl HoldReason {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HoldReason {
    type Err = ReasonError;

    fn from_str(text: &str) -> Result<Self, ReasonError> {
        let text = text.trim();
        match text.len() {
            0 => Err(ReasonError::Blank),
            length if length > REASON_BYTES => Err(ReasonError::TooLong(length)),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for HoldReason {
    type Error = ReasonError;

    fn try_from(text: String) -> Result<Self, ReasonError> {
        text.parse()
    }
}

impl From<HoldReason> for String {
    fn from(reason: HoldReason) -> Self {
        reason.0
    }
}

impl fmt::Display for HoldReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_reason_says_something_and_is_bounded() {
        assert_eq!("  leaked key ".parse(), Ok(HoldReason("leaked key".into())));
        assert_eq!(" \n\t".parse::<HoldReason>(), Err(ReasonError::Blank));
        let most = "é".repeat(REASON_BYTES / 2);
        assert!(most.parse::<HoldReason>().is_ok());
        assert_eq!(
            format!("{most}x").parse::<HoldReason>(),
            Err(ReasonError::TooLong(REASON_BYTES + 1))
        );
    }

    #[test]
    fn a_body_needs_a_reason_and_nothing_else() {
        let plain: HoldRequest = serde_json::from_value(json!({"reason": "x"})).unwrap();
        assert!(!plain.kill && !plain.freeze);
        for bad in [
            json!({}),
            json!({"reason": ""}),
            json!({"reason": 7}),
            json!({"reason": "x", "kil": true}),
            json!({"reason": "x".repeat(REASON_BYTES + 1)}),
        ] {
            assert!(serde_json::from_value::<HoldRequest>(bad).is_err());
        }
    }
}
