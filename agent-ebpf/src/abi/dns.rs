//! What the hooks and the daemon tell each other about lookups.

use super::{Addr, shared};

shared! {
    /// Key of `endpoints`.
    pub struct EndpointKey {
        /// Cookie of a network namespace.
        pub netns: u64,
        /// The agent.
        pub agent: u32,
        /// Zero.
        pub pad: u32,
    }

    /// Value of `endpoints`: where the DNS guard listens for an agent in a network namespace, on
    /// 127.0.0.1 and ::1, with the same port for UDP and TCP.
    pub struct Endpoint {
        /// Number of the endpoint; no two ever have the same.
        pub id: u64,
        /// Port on 127.0.0.1.
        pub v4: u16,
        /// Port on ::1; 0 where the namespace has no IPv6.
        pub v6: u16,
        /// Zero.
        pub pad: u32,
    }

    /// Value of `guards`, in the storage of the guard's own sockets: written by the daemon alone,
    /// so that no other socket at the same port can stand in for one.
    pub struct Guardian {
        /// The endpoint that the socket is of.
        pub endpoint: u64,
        /// The agent whose questions it takes.
        pub agent: u32,
        /// Zero.
        pub pad: u32,
    }

    /// Value of `asked`, in the storage of a socket whose questions were turned to the guard, and of
    /// `askers`.
    pub struct Asked {
        /// The resolver that was asked.
        pub addr: Addr,
        /// Name of the task; hostile bytes.
        pub comm: [u8; 16],
        /// The endpoint that it was turned to.
        pub endpoint: u64,
        /// Cgroup of the task.
        pub cgroup: u64,
        /// Boot time in nanoseconds of the socket's last packet; 0 before there is one.
        pub time: u64,
        /// The agent.
        pub agent: u32,
        /// Process (thread group) id.
        pub pid: u32,
        /// User id.
        pub uid: u32,
        /// Port of the resolver.
        pub port: u16,
        /// Port of the guard.
        pub at: u16,
    }

    /// Key of `askers`: the socket that a packet to an endpoint came from.
    pub struct Asker {
        /// The endpoint.
        pub endpoint: u64,
        /// Source address.
        pub addr: Addr,
        /// Source port.
        pub port: u16,
        /// IP protocol.
        pub protocol: u8,
        /// Zero.
        pub pad: [u8; 5],
    }
}

/// The port that is turned to the guard.
pub const DNS_PORT: u16 = 53;
/// Packets to endpoints whose senders are remembered. An LRU map: a sender that is lost gets its
/// question refused, and asks again. At 100,000 questions a second it lasts for half a second, and
/// the daemon looks a sender up within milliseconds.
pub const ASKERS: u32 = 65_536;
