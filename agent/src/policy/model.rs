//! The registry, checked: what each entry says, every leaf valid by its type. Places stay with
//! what a later stage may complain about.

use std::fmt;

use agent_ebpf::abi::{Loopback, Mode, State};

use super::{
    name::{HostPattern, Id},
    net::{Cidr, Ports},
    reader::At,
    selector::Selector,
    source::Span,
    tables::UnixMillis,
};

/// One agent's entry.
#[derive(Clone, Debug)]
pub struct Agent {
    /// `agent.id`, which is the file's name.
    pub id: Id,
    /// `agent.name`, or the id.
    pub name: String,
    /// `agent.purpose`.
    pub purpose: Option<String>,
    /// `agent.owner`: the accountable person, or `group:NAME`.
    pub owner: String,
    /// `agent.sponsor`.
    pub sponsor: Option<String>,
    /// `agent.backup_owners`.
    pub backup_owners: Vec<String>,
    /// `agent.labels`, by key.
    pub labels: Vec<(String, String)>,
    /// `agent.capabilities`.
    pub capabilities: Vec<String>,
    /// `agent.tools`.
    pub tools: Vec<String>,
    /// `agent.models`.
    pub models: Vec<String>,
    /// `agent.risk`.
    pub risk: Option<String>,
    /// `agent.identities`: what it presents elsewhere.
    pub identities: Vec<String>,
    /// `[lifecycle]`.
    pub lifecycle: Lifecycle,
    /// `selector.cgroup`: at least one.
    pub selectors: Vec<Selector>,
}

/// Approval and times.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    /// As written. An approved hash that does not match makes the *tables* say draft.
    pub state: State,
    /// Who approved.
    pub approved_by: Option<String>,
    /// Under which change.
    pub approval_ref: Option<String>,
    /// What was approved.
    pub approved_hash: Option<(String, Span)>,
    /// First moment of validity.
    pub not_before: Option<UnixMillis>,
    /// First moment past validity.
    pub expires: Option<UnixMillis>,
    /// Milliseconds between reviews.
    pub review_every: Option<i64>,
    /// The last review.
    pub last_review: Option<UnixMillis>,
}

/// What an agent may reach and answer.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Enforce or monitor.
    pub mode: Mode,
    /// Loopback without a grant.
    pub loopback: Loopback,
    /// Globs of unix sockets.
    pub unix: Vec<String>,
    /// `[[scope.serve]]`.
    pub serve: Vec<Serve>,
    /// `[[scope.allow]]`.
    pub allow: Vec<Grant>,
    /// `[[scope.deny]]`; their `expires` is none.
    pub deny: Vec<Grant>,
}

/// Clients to answer.
#[derive(Clone, Debug)]
pub struct Serve {
    /// Place in the file's list, from 0.
    pub index: usize,
    /// Local ports, TCP and UDP.
    pub ports: Ports,
    /// Where clients may be.
    pub from: Vec<Client>,
    /// Where the entry stands.
    pub span: Span,
}

/// Where a client may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// In a network.
    Net(Cidr),
    /// `loopback`: on this host.
    Loopback,
}

/// One allow or deny entry.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Place in the file's list, from 0, unreadable entries counted.
    pub index: usize,
    /// Where to.
    pub to: Target,
    /// Which ports. Never empty.
    pub ports: Ports,
    /// Why.
    pub reason: Option<String>,
    /// Until when; none is without end.
    pub expires: Option<UnixMillis>,
    /// Names only: where addresses in private, shared, link-local or loopback ranges have to lie.
    pub within: Vec<At<Cidr>>,
    /// Where `to` stands.
    pub span: Span,
}

/// What an entry is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A network or address.
    Net(Cidr),
    /// The addresses that a name leads to, or the names of a pattern.
    Name(HostPattern),
    /// A named set.
    Set(Id),
}

/// What a set's file says besides its entries.
#[derive(Clone, Debug)]
pub struct Set {
    /// `set.name`, which is the file's name.
    pub name: Id,
    /// `set.description`.
    pub description: Option<String>,
    /// `set.source`: where the list comes from.
    pub source: Option<String>,
    /// `set.reviewed`.
    pub reviewed: Option<UnixMillis>,
    /// How many `[[allow]]` entries it has.
    pub entries: usize,
}

// === impl Target ===

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(cidr) => cidr.fmt(f),
            Self::Name(host) => host.fmt(f),
            Self::Set(name) => write!(f, "@{name}"),
        }
    }
}

// === impl Scope ===

impl Default for Scope {
    fn default() -> Self {
        Self {
            mode: Mode::Enforce,
            loopback: Loopback::Own,
            unix: Vec::new(),
            serve: Vec::new(),
            allow: Vec::new(),
            deny: Vec::new(),
        }
    }
}
