//! Map keys.

use super::{Addr, shared};

shared! {
    /// Key of `exacts`, and behind a prefix length, of `prefixes`.
    pub struct ScopeKey {
        /// Which scope: a policy id, with [`SERVE`] set for the clients it may answer.
        pub space: u64,
        /// The peer's address.
        pub addr: Addr,
    }
}

shared! {
    /// Key of `access`.
    pub struct AccessKey {
        /// The agent.
        pub agent: u32,
        /// IP protocol and, in the lower half, the peer's port.
        pub flow: u32,
        /// The peer's address.
        pub addr: Addr,
    }
}

/// Bit of [`ScopeKey::space`]: the entry is about clients to answer, and the ports of its rules
/// are local ones.
pub const SERVE: u64 = 1 << 63;

/// Bits of a prefix key before the address, which must match exactly.
pub const SPACE_BITS: u32 = 64;
