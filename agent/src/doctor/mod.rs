//! Whether this host can enforce, how an agent could get out, and which agents run unregistered:
//! `remit doctor` and `remit discover`. It looks at the host itself and needs no daemon.

mod agents;
mod features;
mod others;
mod permissions;
mod traffic;
mod users;
mod ways;

use serde::Serialize;

pub use agents::{Known, Stray, discover};
pub use features::features;
pub use traffic::{Note, Reached};
pub use ways::ways;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// What came of it.
    pub state: State,
    /// Whether nothing is enforced without it.
    pub needed: bool,
    /// What was found.
    pub found: String,
    /// Of a feature: what is lost without it. Of a way out: how to close it.
    pub mend: String,
}

/// What came of a [`Check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A feature that is there, or a way out that is closed.
    Ok,
    /// A feature that is not there.
    Missing,
    /// A way out that an agent's user can take now.
    Open,
    /// A way out that is there on this host, and of which it cannot be told from here whether an
    /// agent can take it.
    Watch,
    /// It could not be told.
    Unknown,
}

impl State {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Open => "open",
            Self::Watch => "watch",
            Self::Unknown => "unknown",
        }
    }
}

impl Check {
    fn new(name: &str, state: State, found: impl Into<String>, mend: &str) -> Self {
        Self {
            name: name.to_owned(),
            state,
            needed: false,
            found: found.into(),
            mend: mend.to_owned(),
        }
    }

    fn needed(mut self) -> Self {
        self.needed = true;
        self
    }
}
