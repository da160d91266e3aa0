//! Map values.

use super::{AccessKey, Addr, REASONS, RULES_PER_SET, shared};

shared! {
    /// One port interval of one protocol class, at one address. The compiler resolves precedence:
    /// within the rules of an address at most one matches.
    pub struct Rule {
        /// Boot time in nanoseconds from which an allow is `expired`; [`super::NEVER`] without end.
        pub deadline: u64,
        /// Index of the registry entry that it comes from, in the agent's own numbering; or
        /// [`super::INHERITED`].
        pub entry: u32,
        /// First port.
        pub low: u16,
        /// Last port, inclusive.
        pub high: u16,
        /// A [`super::Class`], or 0 for all of them.
        pub class: u8,
        /// An [`super::Effect`].
        pub effect: u8,
        /// [`RULE_LEASED`].
        pub flags: u8,
        /// Zero.
        pub pad: u8,
        /// Seconds by which an open TCP connection may outlive a lease's deadline.
        pub tail: u32,
    }

    /// Value of `exacts` and `prefixes`: what is said of an address.
    pub struct Leaf {
        /// The first block of its rules.
        pub set: u32,
        /// The registry entry of those of its rules that have none of their own: thousands of
        /// addresses with equal rules then share one block, though their entries are many.
        pub entry: u32,
    }

    /// Value of `rulesets`: a block of rules. Immutable once published.
    pub struct RuleSet {
        /// Rules in use.
        pub len: u32,
        /// Index of the next block plus one; 0 ends the chain.
        pub next: u32,
        /// The rules.
        pub rules: [Rule; RULES_PER_SET],
    }

    /// Value of `rows`: what is in force for an agent. Immutable once published; the word in
    /// `agents` is what flips. Other versions read the policy id: it stays the first word.
    pub struct AgentRow {
        /// Policy id: the `space` of its scope.
        pub policy: u64,
        /// Boot time in nanoseconds before which everything is `not_yet_valid`.
        pub not_before: u64,
        /// Boot time in nanoseconds from which everything is `expired`.
        pub deadline: u64,
        /// A [`super::State`].
        pub state: u8,
        /// A [`super::Mode`].
        pub mode: u8,
        /// A [`super::Loopback`].
        pub loopback: u8,
        /// [`SOCKETS_ICMP`] and [`SOCKETS_ANY`].
        pub sockets: u8,
        /// [`FLAG_SERVES`] and [`FLAG_NAMES`].
        pub flags: u8,
        /// Zero.
        pub pad: [u8; 3],
        /// Zero; makes the value wider, for tests of migration.
        #[cfg(feature = "abi-next")]
        pub next: u64,
    }

    /// Value of `cache`: the verdicts that share a place. Two, or of a few dozen live destinations
    /// some pair would always be in each other's way.
    pub struct Slots {
        /// Remembered verdicts.
        pub slots: [Slot; 2],
    }

    /// One remembered allow, or refusal.
    pub struct Slot {
        /// The cgroup that asked; 0 is an empty slot.
        pub cgroup: u64,
        /// Peer.
        pub addr: Addr,
        /// The agent's word at the time (see `agents`): any change of the agent makes this stale.
        pub row: u64,
        /// The attribution epoch at the time.
        pub epoch: u64,
        /// Boot time in nanoseconds at which the slot ends.
        pub deadline: u64,
        /// The kernel's tick (`jiffies`) during which `deadline` is known not to come.
        pub tick: u64,
        /// What passed by it: bytes, and from [`super::PACKET`] up, packets. It holds a second's worth.
        pub passed: u64,
        /// The agent.
        pub agent: u32,
        /// Odd while the slot is being written: a task can be preempted, or a softirq can come in
        /// between, on the CPU that owns the slot.
        pub sequence: u32,
        /// IP protocol and, in the lower half, the peer's port; the highest bit says that this is a
        /// refusal.
        pub flow: u32,
        /// Of an allow: connections that began by it. Of a refusal: the count of leases at the time, its
        /// lower half.
        pub extra: u32,
    }

    /// Value of `access`: what an agent sent to a destination since the daemon last took it. Also
    /// that of `beyond`, per CPU: what found no room there, of all agents, since the map was made.
    pub struct Access {
        /// Bytes, IP headers included.
        pub bytes: u64,
        /// Packets, as the stack hands them to the device: one may be cut into many.
        pub packets: u64,
        /// Connections.
        pub connections: u64,
    }

    /// Record in `used`: what was used of one destination, as [`Access`] of `access` has it.
    pub struct Usage {
        /// Who, and which destination.
        pub key: AccessKey,
        /// How much.
        pub used: Access,
    }

    /// Value of `homes`, per CPU: whose a cgroup was found to be.
    pub struct Home {
        /// The cgroup; 0 is an empty slot.
        pub cgroup: u64,
        /// The attribution epoch at the time.
        pub epoch: u64,
        /// The kernel's tick (`jiffies`) at the time.
        pub tick: u64,
        /// The agent.
        pub agent: u32,
        /// As in [`Slot::sequence`].
        pub sequence: u32,
    }

    /// Value of `counters`, per CPU: never lost, whatever becomes of events. Other versions read
    /// it too: first the word of what was let through, then one for each reason twice, then at
    /// most one word more.
    pub struct Counters {
        /// Attempts let through.
        pub allowed: u64,
        /// Attempts refused, by [`super::Reason`].
        pub denied: [u64; REASONS],
        /// Attempts that monitor mode let through, by [`super::Reason`].
        pub monitored: [u64; REASONS],
        /// Zero; makes the value wider, for tests of migration.
        #[cfg(feature = "abi-next")]
        pub next: u64,
    }

    /// Value of `folds`, per CPU: a refusal seen lately, so that repeats only count.
    pub struct Fold {
        /// Repeats, cumulative within `generation`, the first included.
        pub seen: u64,
        /// Boot time in nanoseconds of the last event.
        pub emitted: u64,
        /// Cgroup of the socket.
        pub cgroup: u64,
        /// Peer.
        pub addr: Addr,
        /// The agent.
        pub agent: u32,
        /// Goes up with each new tenant of the slot.
        pub generation: u32,
        /// Process.
        pub pid: u32,
        /// The entry that decided.
        pub entry: u32,
        /// Peer's port.
        pub port: u16,
        /// IP protocol.
        pub protocol: u8,
        /// A [`super::Hook`].
        pub hook: u8,
        /// A [`super::Verdict`].
        pub verdict: u8,
        /// A [`super::Reason`].
        pub reason: u8,
        /// Zero.
        pub pad: [u8; 2],
    }

    /// Value of `budgets`, per CPU: a token bucket of events for one agent.
    pub struct Budget {
        /// Boot time in nanoseconds of the last refill.
        pub refilled: u64,
        /// Events left.
        pub tokens: u64,
    }

    /// Value of `names`: which agent an index is, so that the kernel's state explains itself to a
    /// daemon that adopts it.
    pub struct AgentName {
        /// The id, zero-padded; ids have at most 63 bytes.
        pub bytes: [u8; 64],
    }

    /// Value of `tags`, in socket storage: whose a bound socket is.
    pub struct Tag {
        /// The agent.
        pub agent: u32,
        /// Zero.
        pub pad: u32,
    }

    /// Value of `owners`: who made or connected a socket, and what connect judged.
    pub struct Owner {
        /// The socket's cookie; 0 while the slot is empty or being written.
        pub cookie: u64,
        /// Address that connect let through; zero when it was not asked.
        pub addr: Addr,
        /// Name of the task, on kernels where a packet hook cannot ask for it.
        pub comm: [u8; 16],
        /// Process (thread group) id.
        pub pid: u32,
        /// User id, on the same kernels.
        pub uid: u32,
        /// Port that connect let through.
        pub port: u16,
        /// 1 once connect let something through.
        pub connected: u8,
        /// Zero.
        pub pad: [u8; 5],
    }
}

/// [`AgentRow::sockets`]: some entry grants ICMP, so raw ICMP sockets have a use.
pub const SOCKETS_ICMP: u8 = 1;
/// [`AgentRow::sockets`]: some entry grants every protocol, so any socket type has a use.
pub const SOCKETS_ANY: u8 = 2;
/// [`AgentRow::flags`]: the scope has clients to answer.
pub const FLAG_SERVES: u8 = 1;
/// [`AgentRow::flags`]: the scope uses names, so lookups go to the DNS guard.
pub const FLAG_NAMES: u8 = 2;
/// [`Rule::flags`]: a lease, which an answer of the DNS guard made.
pub const RULE_LEASED: u8 = 1;

impl Rule {
    /// Fills the slots of a block that are not in use: its interval is empty, so it never matches.
    pub const UNUSED: Self = Self {
        deadline: 0,
        entry: super::NO_ENTRY,
        low: 1,
        high: 0,
        class: 0,
        effect: 0,
        flags: 0,
        pad: 0,
        tail: 0,
    };
}

impl RuleSet {
    /// A block without rules.
    pub const EMPTY: Self = Self {
        len: 0,
        next: 0,
        rules: [Rule::UNUSED; RULES_PER_SET],
    };
}
