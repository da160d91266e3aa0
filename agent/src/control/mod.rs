//! The control socket: HTTP/JSON on a unix socket, for the command line and for whoever speaks
//! `curl --unix-socket`. Who may ask what is decided by what the kernel says of the peer, never by
//! what the peer says:
//!
//! | the peer                                              | [`Rights`] |
//! |-------------------------------------------------------|------------|
//! | runs below a governed root, or it can't be told where | `OnlySelf` |
//! | otherwise: root                                       | `Change`   |
//! | otherwise: in the group `remit`                       | `Read`     |
//! | anyone else                                           | `Nothing`  |
//!
//! The first row comes first: root inside the fence is an agent, not an administrator.
//!
//! The server knows nothing of the daemon. It hands on [`Call`]s, and each carries the sender to
//! answer through.

pub mod client;
mod holder;
pub mod peer;
pub mod protocol;
pub mod scrape;
pub mod server;

use tokio::sync::oneshot;

pub use peer::{Caller, Rights};
use protocol::{
    Agent, Agents, Attached, Explain, Exposition, Guarded, Held, HoldReason, Myself, Probed,
    Question, Reconciled, Refusal, Reload, ReloadRequest, RunGrant, RunRequest, Status, Traffic,
};

/// Where the answer to a [`Request`] goes. Dropped without one, the caller is told so.
pub type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A request that its caller has the right to make.
#[derive(Debug)]
pub struct Call {
    /// Who asks, as settled when the connection was accepted.
    pub caller: Caller,
    /// What.
    pub request: Request,
}

/// What can be asked. Rights are checked before a request is made into one of these.
#[derive(Debug)]
pub enum Request {
    /// `GET /v1/status`.
    Status(Reply<Status>),
    /// `GET /v1/agents`.
    Agents(Reply<Agents>),
    /// `GET /v1/agents/ID`.
    Agent(String, Reply<Agent>),
    /// `GET /v1/explain`.
    Explain(Question, Reply<Explain>),
    /// `POST /v1/explain`: asks the attached program.
    Attached(Question, Reply<Attached>),
    /// `POST /v1/agents/ID/probe`.
    Probe(String, Reply<Probed>),
    /// `GET /v1/guard`: whether what runs in this cgroup is an active agent behind a fence.
    Guard(String, Reply<Guarded>),
    /// `GET /v1/reconcile`, and `POST /v1/reconcile`, which mends.
    Reconcile {
        /// Whether to mend what differs.
        repair: bool,
        /// Where the answer goes.
        reply: Reply<Reconciled>,
    },
    /// `POST /v1/reload`.
    Reload(ReloadRequest, Reply<Reload>),
    /// `POST /v1/agents/ID/suspend` and `POST /v1/agents/ID/revoke`.
    Hold(Hold, Reply<Held>),
    /// `POST /v1/agents/ID/resume`.
    Resume(Resume, Reply<Held>),
    /// `POST /v1/run`.
    Run(RunRequest, Reply<RunGrant>),
    /// `GET /v1/metrics`, and `GET /metrics` on the loopback address of the settings.
    Metrics(Reply<Exposition>),
    /// `GET /v1/traffic`.
    Traffic(Reply<Traffic>),
    /// `GET /v1/self`, from a caller with [`Rights::OnlySelf`].
    Myself(Reply<Myself>),
}

/// Takes everything from an agent, whatever its entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The agent's id, as the caller wrote it.
    pub id: String,
    /// What it becomes.
    pub state: HoldState,
    /// Why.
    pub reason: HoldReason,
    /// What becomes of its processes.
    pub processes: Processes,
}

/// What a held agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// Until somebody resumes it.
    Suspended,
    /// Until its file changes and is approved again.
    Revoked,
}

/// What becomes of a held agent's processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processes {
    /// They go on, and reach nothing.
    #[default]
    Keep,
    /// They are killed.
    Kill,
    /// They are frozen until the agent is resumed.
    Freeze,
}

/// Ends a suspension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The agent's id, as the caller wrote it.
    pub id: String,
    /// Why.
    pub reason: HoldReason,
}

// === impl HoldState ===

impl HoldState {
    /// Its name, which is that of the lifecycle state.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Suspended => "suspended",
            Self::Revoked => "revoked",
        }
    }
}
