//! The closed sets of words that cross the boundary as bytes.

/// Declares a byte-sized enum with its names; an unknown byte is `None`.
macro_rules! words {
    ($($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $value:literal $text:literal,)* })*) => {$(
        $(#[$meta])*
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$variant_meta])* $variant = $value,)* }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word for a byte from a map or a record.
            pub const fn from_byte(byte: u8) -> Option<Self> {
                match byte { $($value => Some(Self::$variant),)* _ => None }
            }

            /// The name in logs, JSON and messages.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    )*};
}

words! {
    /// Why an attempt was refused (or would have been, in monitor mode).
    pub enum Reason {
        /// No entry of the scope matches.
        OutOfScope = 1 "out_of_scope",
        /// A `[[scope.deny]]` entry matches.
        Denied = 2 "denied",
        /// A host-wide denial matches.
        Floor = 3 "floor",
        /// The agent or the only matching grants are past their expiry.
        Expired = 4 "expired",
        /// The agent's `not_before` lies ahead.
        NotYetValid = 5 "not_yet_valid",
        /// The agent is suspended.
        Suspended = 6 "suspended",
        /// The agent is revoked.
        Revoked = 7 "revoked",
        /// The agent is a draft.
        Draft = 8 "draft",
        /// No agent claims the process's cgroup.
        Unregistered = 9 "unregistered",
        /// The name is outside the scope (DNS guard).
        NameNotInScope = 10 "name_not_in_scope",
        /// A loopback peer that is not the agent's own.
        LoopbackForeign = 11 "loopback_foreign",
        /// A unix socket outside the scope (containment).
        UnixNotInScope = 12 "unix_not_in_scope",
        /// A socket type that the scope gives no use for.
        SocketType = 13 "socket_type",
        /// The address was leased for a name once, and no longer.
        LeaseExpired = 14 "lease_expired",
        /// In scope at connect, out of scope after address translation on output.
        Translated = 15 "translated",
        /// A guard against leaving the fence sideways.
        Containment = 16 "containment",
        /// The kernel side could not tell, so it denied.
        Fault = 17 "fault",
    }

    /// Where in the kernel an attempt was judged.
    pub enum Hook {
        /// `cgroup/connect4`.
        Connect4 = 1 "cgroup/connect4",
        /// `cgroup/connect6`.
        Connect6 = 2 "cgroup/connect6",
        /// `cgroup_skb/egress`.
        Egress = 3 "cgroup_skb/egress",
        /// `cgroup/sock_create`.
        SockCreate = 4 "cgroup/sock_create",
        /// `cgroup/sendmsg4`.
        SendMsg4 = 5 "cgroup/sendmsg4",
        /// `cgroup/sendmsg6`.
        SendMsg6 = 6 "cgroup/sendmsg6",
    }

    /// What came of an attempt, in events.
    pub enum Verdict {
        /// Refused.
        Denied = 1 "denied",
        /// Let through because the agent is in monitor mode.
        Monitored = 2 "monitored",
    }

    /// An agent's lifecycle state. Zero is no state: a row never written denies as a fault.
    pub enum State {
        /// May reach its scope.
        Active = 1 "active",
        /// Registered, not approved.
        Draft = 2 "draft",
        /// Stopped for now.
        Suspended = 3 "suspended",
        /// Stopped for good.
        Revoked = 4 "revoked",
        /// The pseudo-agent of processes that no agent claims.
        Unregistered = 5 "unregistered",
    }

    /// Whether refusals bite.
    pub enum Mode {
        /// They do.
        Enforce = 1 "enforce",
        /// `out_of_scope` and `denied` are reported only.
        Monitor = 2 "monitor",
    }

    /// What an agent may reach on loopback without a grant.
    pub enum Loopback {
        /// Nothing.
        None = 1 "none",
        /// Its own sockets.
        Own = 2 "own",
        /// Everything there.
        Any = 3 "any",
    }

    /// What a matching rule does.
    pub enum Effect {
        /// Lets through until the rule's deadline.
        Allow = 1 "allow",
        /// Refuses as `denied`.
        Deny = 2 "deny",
        /// Refuses as `floor`.
        Floor = 3 "floor",
    }

    /// The protocols that rules tell apart.
    pub enum Class {
        /// TCP, also as MPTCP.
        Tcp = 1 "tcp",
        /// UDP.
        Udp = 2 "udp",
        /// ICMP and ICMPv6.
        Icmp = 3 "icmp",
        /// Everything else: UDP-Lite, SCTP, DCCP, ESP, GRE, ….
        Other = 4 "other",
    }

    /// How the process named in an event was found.
    pub enum Witness {
        /// It was not.
        Unknown = 0 "unknown",
        /// It was the running task, inside the socket's cgroup.
        Current = 1 "current",
        /// It made the socket, or connected it last.
        Owner = 2 "owner",
    }

    /// Why the kernel side could not tell.
    pub enum Cause {
        /// No fault.
        Nothing = 0 "nothing",
        /// The agent has no row, or one with an unknown word in it.
        NoRow = 1 "no_row",
        /// A row points to a rule set that is not there.
        NoRuleSet = 2 "no_rule_set",
        /// The packet is too short for its headers.
        ShortPacket = 3 "short_packet",
        /// Neither IPv4 nor IPv6.
        UnknownFamily = 4 "unknown_family",
        /// A source route, or an option or extension header that could carry one.
        SourceRoute = 5 "source_route",
        /// More IPv6 extension headers than are looked at.
        ExtensionHeaders = 6 "extension_headers",
        /// A later fragment, which has no ports.
        Fragment = 7 "fragment",
        /// No socket of the DNS guard takes questions of this agent in this network namespace:
        /// the daemon is down, or has not been there yet.
        NoGuard = 8 "no_guard",
    }
}

/// Number of reason codes, with zero: the length of a counter array.
pub const REASONS: usize = 18;

impl Class {
    /// The class of each IP protocol number, as a byte: a look-up has no branches for the verifier
    /// to follow.
    pub const TABLE: &'static [u8; 256] = &CLASSES;

    /// The class of an IP protocol number.
    pub const fn of(protocol: u8) -> Self {
        match protocol {
            6 => Self::Tcp,
            17 => Self::Udp,
            1 | 58 => Self::Icmp,
            _ => Self::Other,
        }
    }

    /// Whether rules of this class have ports.
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

static CLASSES: [u8; 256] = {
    let mut table = [0; 256];
    let mut protocol = 0;
    while protocol < 256 {
        table[protocol] = Class::of(protocol as u8) as u8;
        protocol += 1;
    }
    table
};
