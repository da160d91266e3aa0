//! Who asked for something.

use std::fmt;

use serde_json::{Value, json};

use crate::audit::ocsf::put;

/// Who asked for what was decided. OCSF's word; never the AI agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// Nobody: the daemon itself found it necessary.
    Daemon,
    /// Somebody at the control socket or the command line.
    Caller {
        /// User id, as the kernel told it.
        uid: u32,
        /// Process id, where it could be told.
        pid: Option<i32>,
    },
}

// === impl Actor ===

impl Actor {
    /// As OCSF has it.
    pub(super) fn to_ocsf(self) -> Value {
        match self {
            Self::Daemon => json!({ "app_name": "remit", "app_uid": "daemon" }),
            Self::Caller { uid, pid } => {
                let mut actor = json!({ "user": { "uid": uid.to_string() } });
                put(&mut actor, "process", pid.map(|pid| json!({ "pid": pid })));
                actor
            }
        }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon => f.write_str("the daemon"),
            Self::Caller { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Caller {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid} (pid {pid})"),
        }
    }
}
