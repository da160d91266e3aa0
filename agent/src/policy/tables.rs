//! What the compiler hands on: one agent's registry entry as plain data, in the terms of the
//! kernel's tables but with wall-clock times and without ids, which are the kernel module's to
//! give out.

use std::{net::IpAddr, path::PathBuf};

use agent_ebpf::abi::{Addr, Class, Effect, Loopback, Mode, State};
use serde::{Deserialize, Serialize};

use super::stored;

use super::names::NameRule;

/// A prefix of the one address space, where IPv4 is `::ffff:0:0/96`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// The network address; host bits are zero.
    pub addr: Addr,
    /// Length in bits of the 128-bit form: IPv4 `/24` is 120.
    pub len: u8,
}

/// Milliseconds since the Unix epoch.
pub type UnixMillis = i64;

/// One port interval at one prefix. Within a [`Placed`] at most one rule matches any class and
/// port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimedRule {
    /// Protocol class; none means all of them.
    #[serde(with = "stored::class")]
    pub class: Option<Class>,
    /// First port (0 for classes without ports).
    pub low: u16,
    /// Last port, inclusive (65535 for classes without ports).
    pub high: u16,
    /// What it does.
    #[serde(with = "stored::effect")]
    pub effect: Effect,
    /// Index into [`AgentTables::entries`].
    pub entry: u32,
    /// End of an allow; none means without end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<UnixMillis>,
}

/// The rules of a prefix, those inherited from shorter prefixes included: the longest match alone
/// decides. No rules means that nothing is said there, though a shorter prefix may say something.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placed {
    /// Where.
    pub prefix: Prefix,
    /// What, sorted by class and port.
    pub rules: Vec<TimedRule>,
}

/// A scope, sorted by address and length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// Destinations.
    pub reach: Vec<Placed>,
    /// Clients to answer; ports are local ones.
    pub serve: Vec<Placed>,
}

/// Where an entry of a scope comes from, for logs and `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Stable name within the agent: `scope.allow[0]`, `scope.deny[1]`, `scope.serve[0]`,
    /// `set:github.allow[3]`, `floor.deny[0]`, `floor.builtin[2]`.
    pub name: String,
    /// What it says, on one line: `10.0.0.0/8 443/tcp, 53/udp`.
    pub text: String,
    /// File as it was named to the compiler; empty for what is built in.
    pub file: String,
    /// Line, from 1; 0 for what is built in.
    pub line: u32,
    /// The entry's `reason`, if it has one.
    pub reason: Option<String>,
}

/// One agent's entry, checked and lowered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentTables {
    /// `agent.id`.
    pub id: String,
    /// `agent.name`, or the id.
    pub name: String,
    /// `agent.owner`.
    pub owner: String,
    /// `lifecycle.approved_by`.
    pub approved_by: Option<String>,
    /// `lifecycle.approval_ref`.
    pub approval_ref: Option<String>,
    /// `lifecycle.approved_hash`, as written.
    pub approved_hash: Option<String>,
    /// The file it came from.
    #[serde(with = "stored::path")]
    pub file: PathBuf,
    /// `sha256:` and 64 hex digits over the entry and all that it includes (sets, floor).
    pub hash: String,
    /// Lifecycle state.
    #[serde(with = "stored::state")]
    pub state: State,
    /// Enforce or monitor.
    #[serde(with = "stored::mode")]
    pub mode: Mode,
    /// What is reachable on loopback without a grant.
    #[serde(with = "stored::loopback")]
    pub loopback: Loopback,
    /// `agent_ebpf::abi::SOCKETS_*` bits.
    pub sockets: u8,
    /// `lifecycle.not_before`.
    pub not_before: Option<UnixMillis>,
    /// `lifecycle.expires`.
    pub expires: Option<UnixMillis>,
    /// Globs of cgroup paths below the v2 mount, each starting with `/`.
    pub selectors: Vec<String>,
    /// What it may reach and answer.
    pub scope: Scope,
    /// Names that it may or may not resolve, sorted by base, depth and entry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<NameRule>,
    /// Entries, by the index that rules carry.
    pub entries: Vec<Entry>,
}

impl Prefix {
    /// A prefix from an address and its length in the address's own family.
    pub fn new(ip: IpAddr, len: u8) -> Self {
        let len = if ip.is_ipv4() { len + 96 } else { len };
        Self {
            addr: Addr::from(ip),
            len,
        }
    }

    /// Whether `addr` lies inside.
    pub fn contains(&self, addr: &Addr) -> bool {
        let (ours, theirs) = (self.bits(), u128::from_be_bytes(addr.octets()));
        self.len == 0 || (ours ^ theirs) >> (128 - u32::from(self.len)) == 0
    }

    /// The address as a number.
    pub fn bits(&self) -> u128 {
        u128::from_be_bytes(self.addr.octets())
    }
}

impl AgentTables {
    /// An entry that reaches nothing and has nothing to say: for records about an agent of which
    /// nothing is known any more.
    pub fn nobody() -> Self {
        Self {
            id: String::new(),
            name: String::new(),
            owner: String::new(),
            approved_by: None,
            approval_ref: None,
            approved_hash: None,
            file: PathBuf::new(),
            hash: String::new(),
            state: State::Draft,
            mode: Mode::Enforce,
            loopback: Loopback::None,
            sockets: 0,
            not_before: None,
            expires: None,
            selectors: Vec::new(),
            scope: Scope::default(),
            names: Vec::new(),
            entries: Vec::new(),
        }
    }
}
