//! Ring-buffer records, and the questions that the daemon puts to the kernel.

use super::{Addr, shared};

shared! {
    /// One refusal (or one that monitor mode let through). Repeats are folded: `seen` says how
    /// many attempts of this kind the fold slot has counted so far.
    pub struct Event {
        /// Boot time in nanoseconds.
        pub time: u64,
        /// Policy in force (see [`super::AgentRow::policy`]).
        pub policy: u64,
        /// Cgroup of the socket (egress) or the task.
        pub cgroup: u64,
        /// Attempts of this kind in `generation` of slot `fold`, this one included.
        pub seen: u64,
        /// Destination.
        pub addr: Addr,
        /// Source; zero when not known yet.
        pub source: Addr,
        /// The agent.
        pub agent: u32,
        /// The entry that decided.
        pub entry: u32,
        /// Process (thread group) id; 0 when not known.
        pub pid: u32,
        /// User id.
        pub uid: u32,
        /// CPU in the upper half, slot of its fold table in the lower.
        pub fold: u32,
        /// Tenant of that slot.
        pub generation: u32,
        /// Destination port.
        pub port: u16,
        /// Source port; 0 when not known yet.
        pub local_port: u16,
        /// IP protocol.
        pub protocol: u8,
        /// A [`super::Hook`].
        pub hook: u8,
        /// A [`super::Verdict`].
        pub verdict: u8,
        /// A [`super::Reason`].
        pub reason: u8,
        /// A [`super::Cause`].
        pub cause: u8,
        /// A [`super::Witness`].
        pub witness: u8,
        /// Address family of the socket (`AF_INET`, `AF_INET6`).
        pub family: u8,
        /// Socket type (`SOCK_*`), at sock_create only.
        pub socket_type: u8,
        /// Zero.
        pub pad: [u8; 4],
        /// Name of the task; hostile bytes.
        pub comm: [u8; 16],
    }

    /// A question to the unattached judge program, which asks `decide` on the live maps.
    pub struct Question {
        /// Boot time in nanoseconds to judge at; 0 for now.
        pub now: u64,
        /// Destination.
        pub addr: Addr,
        /// The agent; [`super::LAYOUT_QUESTION`] asks for the layout instead.
        pub agent: u32,
        /// Destination port.
        pub port: u16,
        /// Local port.
        pub local_port: u16,
        /// IP protocol.
        pub protocol: u8,
        /// A [`super::Hook`].
        pub hook: u8,
        /// TCP's flags byte; 0 where there is none.
        pub tcp_flags: u8,
        /// Who owns the loopback peer: 0 nobody, 1 the agent itself, 2 somebody else.
        pub peer: u8,
        /// Zero.
        pub pad: [u8; 4],
    }

    /// The judge's answer.
    pub struct Answer {
        /// The agent's word at the time.
        pub row: u64,
        /// Deadline of an allow.
        pub deadline: u64,
        /// The entry that decided.
        pub entry: u32,
        /// 1 allow, 2 monitored, 3 deny, 4 fault; 0 when the judge did not run.
        pub verdict: u8,
        /// A [`super::Reason`], or 0.
        pub reason: u8,
        /// A [`super::Cause`].
        pub cause: u8,
        /// 1 when the verdict may be cached.
        pub cacheable: u8,
    }
}
