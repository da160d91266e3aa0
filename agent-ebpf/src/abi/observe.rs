//! What the observer of traffic to model APIs is told, and what it notes. Its maps are made anew by
//! each daemon and pinned nowhere, so neither [`super::FINGERPRINT`] nor [`super::ABI_VERSION`] has
//! to do with them: the object and the daemon that loads it are of one build.

use super::{Addr, shared};

/// Addresses that are watched at a time. Some forty names have some dozen each; those that answers
/// named last count.
pub const WATCHED: u32 = 2048;
/// Roots whose processes are left out. Settings name a few; one for each user of a shared host.
pub const EXEMPT: u32 = 1024;
/// Notes that are kept; those that were not added to for longest make room (the kernel's LRU is not
/// exact).
pub const NOTES: u32 = 4096;

shared! {
    /// Key of `seen`: who reached what.
    pub struct SeenKey {
        /// The task's cgroup at the time.
        pub cgroup: u64,
        /// The peer's address, IPv4 mapped.
        pub addr: Addr,
        /// Process (thread group) id in the initial namespace.
        pub tgid: u32,
        /// The peer's port.
        pub port: u16,
        /// 6 or 17.
        pub protocol: u8,
        /// Zero.
        pub pad: u8,
    }

    /// Value of `seen`.
    pub struct Seen {
        /// Connections, and datagrams that were sent without one (or on one to a mapped address).
        pub count: u64,
        /// Boot time in nanoseconds of the first.
        pub first: u64,
        /// Boot time in nanoseconds of the last.
        pub last: u64,
        /// Name of the task at the first.
        pub comm: [u8; 16],
        /// Its user.
        pub uid: u32,
        /// Zero.
        pub pad: u32,
    }
}
