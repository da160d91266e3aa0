//! What goes over the control socket: HTTP/1.1 with JSON bodies, paths below [`PREFIX`]. Pure: no
//! sockets, no clock. Words that come from the kernel contract (states, modes, reasons) travel as
//! their names.
//!
//! | request                          | rights | answer |
//! |----------------------------------|--------|--------|
//! | `GET /v1/status`                 | read   | [`Status`] |
//! | `GET /v1/agents`                 | read   | [`Agents`] |
//! | `GET /v1/agents/ID`              | read   | [`Agent`] |
//! | `GET /v1/explain?agent=&addr=&port=&protocol=` ([`Question`]) | read | [`Explain`] |
//! | `POST /v1/explain` ([`Question`]), which the kernel counts | change | [`Attached`] |
//! | `GET /v1/guard?cgroup=` ([`GuardQuestion`]) | read | [`Guarded`] |
//! | `GET /v1/metrics`                | read   | [`Exposition`], as text |
//! | `GET /v1/traffic`                | read   | [`Traffic`] |
//! | `GET /v1/reconcile`              | read   | [`Reconciled`] |
//! | `POST /v1/reconcile`, which mends | change | [`Reconciled`] |
//! | `POST /v1/reload` ([`ReloadRequest`], or nothing) | change | [`Reload`] |
//! | `POST /v1/agents/ID/suspend` ([`HoldRequest`]) | change | [`Held`] |
//! | `POST /v1/agents/ID/resume` ([`HoldRequest`])  | change | [`Held`] |
//! | `POST /v1/agents/ID/revoke` ([`HoldRequest`])  | change | [`Held`] |
//! | `POST /v1/agents/ID/probe` | change | [`Probed`] |
//! | `POST /v1/run` ([`RunRequest`])  | change | [`RunGrant`] |
//! | `GET /v1/self`                   | inside a governed cgroup | [`Myself`] |
//!
//! Whatever fails is a [`Refusal`] with the HTTP status of its [`Code`]. Within one version of the
//! API fields are added, never renamed or removed; readers ignore what they don't know.

mod drift;
mod guard;
mod lifecycle;
mod metrics;
mod probe;
mod traffic;

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use drift::{Drift, DriftSummary, Reconciled};
pub use guard::{GuardQuestion, Guarded};
pub use lifecycle::{Held, HoldInfo, HoldReason, HoldRequest, REASON_BYTES, ReasonError};
pub use metrics::Exposition;
pub use probe::{LastProbe, ProbeAttempt, ProbeCounts, ProbeVerdict, Probed};
pub use traffic::{Reached, Traffic};

/// Path prefix of this version of the API.
pub const PREFIX: &str = "/v1";

/// Milliseconds since the Unix epoch.
pub type UnixMillis = i64;

/// Whether this host enforces, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The one word that matters.
    pub posture: Posture,
    /// Why the posture is not [`Posture::Enforcing`]; empty when it is.
    pub reasons: Vec<String>,
    /// When the daemon began to enforce.
    pub since_ms: UnixMillis,
    /// Number of the registry state in force.
    pub revision: u64,
    /// Each guard as it was last read back from the kernel.
    pub guards: Vec<Guard>,
    /// Each registered agent, sorted by id.
    pub agents: Vec<AgentStatus>,
    /// Agents that have left the registry, and were refused something since the kernel counts; sorted
    /// by id.
    #[serde(default)]
    pub former: Vec<Former>,
    /// Findings of the registry in force, rendered.
    pub findings: Vec<String>,
    /// What the registry was compiled from.
    pub registry: Registry,
    /// What comparing registry and kernel came to.
    #[serde(default)]
    pub drift: DriftSummary,
    /// What probes came to.
    #[serde(default)]
    pub probes: ProbeCounts,
    /// Since when the kernel has counted what agents attempted; none where that is not known.
    #[serde(default)]
    pub counted_since_ms: Option<UnixMillis>,
}

/// How far the host enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Posture {
    /// Every guard that the settings ask for is live.
    Enforcing,
    /// Scopes are enforced, but something that the settings ask for is not.
    Degraded,
    /// A hook that carries the fence is missing.
    NotEnforcing,
}

/// One hook at one root, or one table: something that must be there for the fence to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    /// Stable name, such as `connect4` or `egress`.
    pub name: String,
    /// What sort of thing it is: `link`, `map`, `lsm`, …. An `observer` guards nothing, and has no
    /// part in the posture.
    pub kind: String,
    /// The root it guards; none for what is host-wide.
    pub root: Option<String>,
    /// Live or not.
    pub state: GuardState,
    /// What was read back, in words: proof for `live`, the difference for the rest.
    pub evidence: String,
    /// When it was read back.
    pub checked_ms: UnixMillis,
    /// Id of the BPF link.
    pub link_id: Option<u32>,
    /// Id of the BPF program.
    pub prog_id: Option<u32>,
    /// How often the program ran, where the kernel counts that.
    pub run_cnt: Option<u64>,
}

/// State of a [`Guard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardState {
    /// Read back from the kernel as it should be.
    Live,
    /// There, but not as it should be.
    Degraded,
    /// Wanted and not there.
    Absent,
    /// Turned off by the settings; not a fault.
    Off,
}

/// One agent as it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// `agent.id`; `unregistered` for the processes that no agent claims.
    pub id: String,
    /// `agent.name`, or the id.
    pub name: String,
    /// Lifecycle state in force: `active`, `draft`, `suspended`, `revoked`, `unregistered`.
    pub state: String,
    /// `enforce` or `monitor`.
    pub mode: String,
    /// Revision in which its entry last changed.
    pub revision: u64,
    /// `sha256:…` of the entry in force.
    pub hash: String,
    /// `lifecycle.expires`.
    pub expires_ms: Option<UnixMillis>,
    /// Cgroups that it claims now.
    pub cgroups: Vec<Cgroup>,
    /// Processes in them, descendants included.
    pub processes: u64,
    /// Attempts let through, as far as the kernel counts them.
    pub allowed: u64,
    /// Attempts refused.
    pub denied: u64,
    /// Attempts that only monitor mode let through.
    pub monitored: u64,
    /// Refused and monitored attempts by reason.
    pub by_reason: BTreeMap<String, u64>,
    /// The newest violation.
    pub last_violation: Option<LastViolation>,
    /// Why its last good entry stays in force although its file says something else.
    pub finding: Option<String>,
    /// Who suspended or revoked it, and why; none when only its file says its state.
    #[serde(default)]
    pub hold: Option<HoldInfo>,
    /// What its last probe came to; none since the daemon started.
    #[serde(default)]
    pub last_probe: Option<LastProbe>,
    /// Addresses that names lead it to now, sorted by name; those that end first, if there are
    /// many.
    #[serde(default)]
    pub leases: Vec<Lease>,
    /// How many there are.
    #[serde(default)]
    pub leased: u64,
}

/// What the kernel counted of an agent that is not in the registry any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    /// Its id.
    pub id: String,
    /// Attempts refused.
    pub denied: u64,
    /// Attempts that only monitor mode let through.
    pub monitored: u64,
    /// Both by reason.
    pub by_reason: BTreeMap<String, u64>,
}

/// An address that is open for a while, because a name in scope resolved to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The name; none where an earlier daemon resolved it.
    pub name: Option<String>,
    /// The address.
    pub addr: IpAddr,
    /// When new connections are refused again.
    pub until_ms: UnixMillis,
}

/// A cgroup that an agent claims.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Path below the v2 mount, starting with `/`.
    pub path: String,
    /// Kernel id: inode of the directory.
    pub id: u64,
    /// Processes in it, descendants included.
    pub processes: u64,
}

/// The newest violation of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastViolation {
    /// When.
    pub time_ms: UnixMillis,
    /// The line for people.
    pub text: String,
}

/// What a registry state was compiled from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// Files read: entries, sets, floor.
    pub files: u64,
    /// Findings that kept an entry from being used.
    pub errors: u64,
    /// Findings that did not.
    pub warnings: u64,
}

/// The registry as it is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agents {
    /// Its number.
    pub revision: u64,
    /// Its agents, sorted by id.
    pub agents: Vec<Agent>,
}

/// One agent's entry as it is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// `agent.id`.
    pub id: String,
    /// `agent.name`, or the id.
    pub name: String,
    /// `agent.owner`.
    pub owner: String,
    /// `lifecycle.approval_ref`.
    pub approval_ref: Option<String>,
    /// The file that it came from.
    pub file: PathBuf,
    /// `sha256:…` over the entry and all that it includes.
    pub hash: String,
    /// Lifecycle state in force.
    pub state: String,
    /// `enforce` or `monitor`.
    pub mode: String,
    /// `own`, `none` or `any`.
    pub loopback: String,
    /// `lifecycle.not_before`.
    pub not_before_ms: Option<UnixMillis>,
    /// `lifecycle.expires`.
    pub expires_ms: Option<UnixMillis>,
    /// Globs of cgroup paths below the v2 mount.
    pub selectors: Vec<String>,
    /// Grants, denials, served clients, and the floor, in the order of the file.
    pub entries: Vec<Entry>,
    /// Why this last good entry stays in force although its file says something else.
    pub finding: Option<String>,
    /// Who suspended or revoked it, and why; none when only its file says its state.
    #[serde(default)]
    pub hold: Option<HoldInfo>,
}

/// An entry of a scope and where it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Stable name within the agent: `scope.allow[0]`, `set:github.allow[3]`, `floor.builtin[2]`.
    pub name: String,
    /// What it says, on one line.
    pub text: String,
    /// File; empty for what is built in.
    pub file: String,
    /// Line, from 1; 0 for what is built in.
    pub line: u32,
    /// The entry's own `reason`.
    pub reason: Option<String>,
}

/// Whether an agent may reach a destination. As a query string, the protocol defaults to TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The agent's id.
    pub agent: String,
    /// Destination.
    pub addr: IpAddr,
    /// Port; 0 where the protocol has none.
    #[serde(default)]
    pub port: u16,
    /// IP protocol number.
    #[serde(default = "tcp")]
    pub protocol: u8,
}

const fn tcp() -> u8 {
    6
}

/// Answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// What was asked.
    pub question: Question,
    /// The answer.
    pub verdict: Answer,
    /// Why not, or why not without monitor mode: a reason of the log.
    pub reason: Option<String>,
    /// The entry that decided; none for the rules that are no entry (default deny, loopback).
    pub entry: Option<Entry>,
    /// Until when an allow holds; none means without end.
    pub until_ms: Option<UnixMillis>,
    /// Who answered.
    pub source: Source,
    /// `sha256:…` of the entry that was asked.
    pub hash: String,
    /// Revision that was asked; 0 for the registry on disk.
    pub revision: u64,
    /// Cgroups that the agent claims now; none where the registry on disk answered.
    #[serde(default)]
    pub cgroups: Vec<String>,
    /// What else is worth saying, such as the cause of a fault.
    pub note: Option<String>,
    /// The lease of the address that the answer hangs on, or hung on before it ended. The registry
    /// knows names alone, so it says otherwise.
    #[serde(default)]
    pub lease: Option<Lease>,
}

/// What the attached egress program did with a packet, run on it from inside the agent's cgroup
/// (`BPF_PROG_TEST_RUN`). The kernel counts that as an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Whether it lets the packet pass.
    pub passes: bool,
    /// The program's id, which is that under the root's link.
    pub program: u32,
    /// The agent's cgroup from which it was asked.
    pub cgroup: String,
    /// Stands in `unmapped.probe` of the line, if it dropped the packet.
    pub run: String,
}

/// A verdict, as an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It may.
    Allowed,
    /// It may because the agent is in monitor mode, and it is reported.
    Monitored,
    /// It may not.
    Denied,
    /// It may not, for the kernel side could not tell.
    Fault,
}

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The live tables in the kernel.
    Kernel,
    /// The registry on disk.
    Registry,
}

/// Body of `POST /v1/reload`; without one, nothing of it is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadRequest {
    /// Take the wall clock as it is now, although it is behind the latest time ever seen. Grants
    /// that had expired could come back.
    #[serde(default)]
    pub accept_clock: bool,
}

/// What a reload did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Number of the registry state in force now.
    pub revision: u64,
    /// Agents whose entry is new, different or gone.
    pub changed: Vec<String>,
    /// Agents whose last good entry stays because their file is bad.
    pub kept: Vec<String>,
    /// Everything found, rendered.
    pub findings: Vec<String>,
    /// Whether every file was good.
    pub ok: bool,
    /// TCP connections closed because no grant is left for them.
    #[serde(default)]
    pub closed: u64,
}

/// Asks for a cgroup to start a command in as an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// The agent's id.
    pub agent: String,
}

/// A cgroup that the daemon made and claimed for the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunGrant {
    /// Its directory, as an absolute path in the file system.
    pub cgroup: PathBuf,
    /// Its kernel id.
    pub id: u64,
}

/// What a process inside the fence may know of itself, in words that a program or a model can act
/// on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Myself {
    /// The agent that claims the caller's cgroup; none when no agent does.
    pub agent: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Whom to ask for more scope.
    pub owner: Option<String>,
    /// The change under which the scope was approved.
    pub approval_ref: Option<String>,
    /// Lifecycle state in force.
    pub state: String,
    /// Who suspended or revoked it, and why; none when only its file says its state.
    #[serde(default)]
    pub hold: Option<HoldInfo>,
    /// `enforce` or `monitor`.
    pub mode: String,
    /// When it ends.
    pub expires_ms: Option<UnixMillis>,
    /// The caller's cgroup below the v2 mount; none when it could not be told.
    pub cgroup: Option<String>,
    /// Whether the fence stands around it and the agent is active.
    #[serde(default)]
    pub guard: Option<Guarded>,
    /// Number of the registry state in force.
    pub revision: u64,
    /// `sha256:…` of the entry in force.
    pub hash: Option<String>,
    /// What it may reach, and what is denied inside that.
    pub scope: Vec<Entry>,
    /// The last denials, newest first.
    pub denials: Vec<Denial>,
    /// What to do now, in sentences.
    pub advice: String,
}

/// One refusal, as its agent may see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// When.
    pub time_ms: UnixMillis,
    /// Destination, such as `192.0.2.7:443/tcp`.
    pub destination: String,
    /// A reason of the log.
    pub reason: String,
    /// The line for people.
    pub text: String,
    /// What to do about it, in a sentence that a program or a model can act on.
    #[serde(default)]
    pub advice: String,
}

/// Why a request got no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people: what, and about which value.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// A [`Refusal`] as it stands in a body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The refusal.
    pub error: Refusal,
}

/// Kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request can't be read.
    BadRequest,
    /// The caller may not ask this.
    Forbidden,
    /// No such path.
    NotFound,
    /// No such agent.
    NoSuchAgent,
    /// `GET /v1/self` from outside every root.
    NotGoverned,
    /// The path is there, the method is not.
    MethodNotAllowed,
    /// The state of things forbids it now.
    Conflict,
    /// The body is too long.
    TooLarge,
    /// The daemon failed at it.
    Internal,
    /// The daemon is starting, stopping, or has too much to do.
    Unavailable,
    /// The daemon took too long.
    Timeout,
}

// === impl Code ===

impl Code {
    /// The HTTP status that goes with it.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Forbidden => 403,
            Self::NotFound | Self::NoSuchAgent | Self::NotGoverned => 404,
            Self::MethodNotAllowed => 405,
            Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::Internal => 500,
            Self::Unavailable => 503,
            Self::Timeout => 504,
        }
    }
}

// === impl Refusal ===

impl Refusal {
    /// A refusal without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            help: None,
        }
    }

    /// The same with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// There is no agent `id`.
    pub fn no_such_agent(id: &str) -> Self {
        Self::new(
            Code::NoSuchAgent,
            format!("no agent `{id}` in the registry in force"),
        )
        .help("`remit agents` lists them; `remit check` says why a file was not loaded")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

// === impl Answer ===

impl Answer {
    /// Whether the attempt goes through.
    pub const fn passes(self) -> bool {
        matches!(self, Self::Allowed | Self::Monitored)
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Monitored => "monitored",
            Self::Denied => "denied",
            Self::Fault => "fault",
        }
    }
}

// === impl Posture ===

impl Posture {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforcing => "enforcing",
            Self::Degraded => "degraded",
            Self::NotEnforcing => "not_enforcing",
        }
    }
}

// === impl GuardState ===

impl GuardState {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Degraded => "degraded",
            Self::Absent => "absent",
            Self::Off => "off",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_in_json_are_their_names() {
        for posture in [Posture::Enforcing, Posture::Degraded, Posture::NotEnforcing] {
            assert_eq!(
                serde_json::to_value(posture).unwrap(),
                json!(posture.name())
            );
        }
        for state in [
            GuardState::Live,
            GuardState::Degraded,
            GuardState::Absent,
            GuardState::Off,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), json!(state.name()));
        }
        for answer in [
            Answer::Allowed,
            Answer::Monitored,
            Answer::Denied,
            Answer::Fault,
        ] {
            assert_eq!(serde_json::to_value(answer).unwrap(), json!(answer.name()));
        }
    }

    #[test]
    fn a_refusal_has_the_documented_shape() {
        let error = Refusal::no_such_agent("ghost");
        let body = serde_json::to_value(ErrorBody { error }).unwrap();
        assert_eq!(body["error"]["code"], "no_such_agent");
        assert_eq!(
            body["error"]["message"],
            "no agent `ghost` in the registry in force"
        );
        assert!(body["error"]["help"].is_string());
    }

    #[test]
    fn what_an_older_daemon_does_not_say_is_nothing() {
        let reload = json!({"revision": 1, "changed": [], "kept": [], "findings": [], "ok": true});
        assert_eq!(serde_json::from_value::<Reload>(reload).unwrap().closed, 0);
        let empty: ReloadRequest = serde_json::from_value(json!({})).unwrap();
        assert!(!empty.accept_clock);
        let typo = json!({"accept_clocks": true});
        assert!(serde_json::from_value::<ReloadRequest>(typo).is_err());
    }

    #[test]
    fn a_question_needs_no_port_and_no_protocol() {
        let question: Question =
            serde_json::from_value(json!({"agent": "a", "addr": "2001:db8::1"})).unwrap();
        assert_eq!((question.port, question.protocol), (0, 6));
        let unknown = json!({"agent": "a", "addr": "192.0.2.1", "prot": 17});
        assert!(serde_json::from_value::<Question>(unknown).is_err());
    }
}
