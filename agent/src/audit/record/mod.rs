//! A violation as OCSF Network Activity (4001). Pure: what happened goes in, one JSON value comes
//! out, and everything that people or tools read of a violation is derived from that value.
//!
//! The sum of `count` (absent: 1) over an agent's lines with `activity_id` 5 is the number of its
//! denied attempts; [`super::ledger`] says how many attempts each line stands for.

mod event;
mod kernel;
mod lookup;
mod reached;
#[cfg(test)]
pub(super) mod tests;
mod words;

use std::net::IpAddr;

use agent_ebpf::abi::{Cause, Hook, Reason, Verdict, Witness};

pub use self::{kernel::Context, lookup::Lookup, reached::Reached};
use super::text::{NAME_BYTES, clean, until_nul};
use crate::policy::tables::{AgentTables, Entry, UnixMillis};

/// `ai_agent.uid` of processes that no agent claims.
pub const UNREGISTERED: &str = "unregistered";
/// `firewall_rule.uid` where no entry decided.
pub const DEFAULT_DENY: &str = "default-deny";
/// What an entry said that is not known any more.
const UNKNOWN: &str = "unknown";

/// Attempts of one kind, refused or let through by monitor mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// When; the kernel's boot time put on the wall clock.
    pub time: UnixMillis,
    /// Who is accountable.
    pub agent: Subject,
    /// What came of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Where in the kernel it was judged.
    pub hook: Hook,
    /// What the kernel could not tell, if the reason is `fault`.
    pub cause: Cause,
    /// IP protocol number.
    pub protocol: u8,
    /// Address family of the socket (`AF_INET`, `AF_INET6`); 0 when not known.
    pub family: u8,
    /// Socket type (`SOCK_*`); 0 when not known, and always but at sock_create.
    pub socket_type: u8,
    /// Destination; none where a socket was refused before it had one.
    pub dst: Option<Endpoint>,
    /// Name that the destination was leased for, if one is known.
    pub dst_name: Option<String>,
    /// Source, as far as it was settled.
    pub src: Option<Endpoint>,
    /// Which process.
    pub process: ProcessInfo,
    /// Id of the cgroup.
    pub cgroup_id: u64,
    /// Path of the cgroup below the v2 mount, if it is still there.
    pub cgroup: Option<String>,
    /// Which start of its unit that is, as systemd says.
    pub invocation: Option<String>,
    /// The entry that decided; none is the default.
    pub entry: Option<EntryRef>,
    /// The registry state in force.
    pub revision: u64,
    /// Attempts that this stands for, 1 or more.
    pub count: u64,
}

/// Attempts of one agent whose details were lost: they are counted, so that nothing is lost
/// silently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// When the loss was settled.
    pub time: UnixMillis,
    /// Who is accountable.
    pub agent: Subject,
    /// What came of the attempts.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// How many, by where the details went.
    pub lost: Lost,
    /// Id and path of a cgroup that the agent has, if there is one.
    pub cgroup: Option<(u64, String)>,
    /// The registry state in force.
    pub revision: u64,
}

/// Attempts by where their details were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// In the kernel: the ring was full, the agent's event budget spent, or the fold slot went to
    /// another kind of attempt.
    pub kernel: u64,
    /// Over the agent's allowance of lines and bytes.
    pub rate: u64,
    /// The log could not be written.
    pub disk: u64,
}

impl std::ops::Add for Lost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            kernel: self.kernel + other.kernel,
            rate: self.rate + other.rate,
            disk: self.disk + other.disk,
        }
    }
}

/// The agent of an event, as its registry entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// `agent.id`, or [`UNREGISTERED`].
    pub id: String,
    /// `agent.name`.
    pub name: String,
    /// `agent.owner`; empty when nobody is.
    pub owner: String,
    /// Hash of the entry in force.
    pub hash: String,
    /// `lifecycle.approval_ref`.
    pub approval_ref: Option<String>,
    /// `lifecycle.expires`.
    pub expires: Option<UnixMillis>,
    /// Whether it is an agent at all.
    pub registered: bool,
}

/// An address, and a port where the protocol has one and it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

/// What was known of a process when its record was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Process id; 0 when not known.
    pub pid: u32,
    /// Its name, from the kernel's record.
    pub name: String,
    /// Path of its executable.
    pub exe: Option<String>,
    /// Whether that file has been removed since.
    pub exe_deleted: bool,
    /// Its arguments, spaced apart.
    pub cmd_line: Option<String>,
    /// Its user.
    pub uid: Option<u32>,
    /// That user's name.
    pub user: Option<String>,
    /// Its parent.
    pub parent: Option<Parent>,
    /// That one's parent, and so on.
    pub ancestors: Vec<Parent>,
    /// When it started, in clock ticks since boot: tells it from a later one with the same id.
    pub started: Option<u64>,
    /// Whether it, or its tenancy of the id, was over before it could be looked at.
    pub gone: bool,
    /// How the kernel found it.
    pub witness: Witness,
}

/// A process's parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Process id.
    pub pid: u32,
    /// Its name, if it could be read.
    pub name: Option<String>,
}

/// The entry that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryRef {
    /// `scope.deny[0]`.
    pub name: String,
    /// What it says.
    pub text: String,
    /// Its file; empty for what is in none.
    pub file: String,
    /// Its line, from 1; 0 for what is in none.
    pub line: u32,
}

// === impl Lost ===

impl Lost {
    /// All of them.
    pub const fn sum(self) -> u64 {
        self.kernel + self.rate + self.disk
    }
}

// === impl Subject ===

impl Subject {
    /// An agent that had left the registry before this daemon began: only its id is known.
    pub fn former(id: impl Into<String>) -> Self {
        let id = id.into();
        Self {
            name: id.clone(),
            id,
            owner: UNKNOWN.to_owned(),
            hash: UNKNOWN.to_owned(),
            approval_ref: None,
            expires: None,
            registered: true,
        }
    }

    /// The pseudo-agent of processes that no agent claims; `hash` is that of the rules that hold
    /// for them.
    pub fn unregistered(hash: impl Into<String>) -> Self {
        Self {
            id: UNREGISTERED.to_owned(),
            name: "Unregistered process".to_owned(),
            owner: String::new(),
            hash: hash.into(),
            approval_ref: None,
            expires: None,
            registered: false,
        }
    }
}

impl From<&AgentTables> for Subject {
    fn from(tables: &AgentTables) -> Self {
        Self {
            id: tables.id.clone(),
            name: tables.name.clone(),
            owner: tables.owner.clone(),
            hash: tables.hash.clone(),
            approval_ref: tables.approval_ref.clone(),
            expires: tables.expires,
            registered: true,
        }
    }
}

// === impl ProcessInfo ===

impl ProcessInfo {
    /// What the kernel's record itself says, before anyone looked further.
    pub fn from_record(pid: u32, comm: &[u8], uid: Option<u32>, witness: Witness) -> Self {
        Self {
            pid,
            name: clean(until_nul(comm), NAME_BYTES),
            exe: None,
            exe_deleted: false,
            cmd_line: None,
            uid,
            user: None,
            parent: None,
            ancestors: Vec::new(),
            started: None,
            gone: true,
            witness,
        }
    }
}

// === impl EntryRef ===

impl EntryRef {
    /// An entry decided, and which is not known any more.
    pub fn unknown() -> Self {
        Self {
            name: UNKNOWN.to_owned(),
            text: "an entry of an earlier registry".to_owned(),
            file: String::new(),
            line: 0,
        }
    }
}

impl From<&Entry> for EntryRef {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            text: entry.text.clone(),
            file: entry.file.clone(),
            line: entry.line,
        }
    }
}
