//! Empty programs on the hooks that Remit uses: what calling any program there costs. No design on
//! these hooks can be cheaper.

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr},
    programs::{SkBuffContext, SockAddrContext, SockContext},
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;

/// Allows.
#[cgroup_sock_addr(connect4)]
pub fn floor_connect4(_: SockAddrContext) -> i32 {
    PASS
}

/// Allows.
#[cgroup_sock_addr(connect6)]
pub fn floor_connect6(_: SockAddrContext) -> i32 {
    PASS
}

/// Allows.
#[cgroup_skb(egress)]
pub fn floor_egress(_: SkBuffContext) -> i32 {
    PASS
}

/// Allows.
#[cgroup_sock(sock_create)]
pub fn floor_create(_: SockContext) -> i32 {
    PASS
}

/// Allows.
#[cgroup_sock(post_bind4)]
pub fn floor_bind4(_: SockContext) -> i32 {
    PASS
}

/// Allows.
#[cgroup_sock(post_bind6)]
pub fn floor_bind6(_: SockContext) -> i32 {
    PASS
}

/// Refuses: the cheapest denial there can be.
#[cgroup_sock_addr(connect4)]
pub fn deny_connect4(_: SockAddrContext) -> i32 {
    REFUSE
}

/// Refuses.
#[cgroup_sock_addr(connect6)]
pub fn deny_connect6(_: SockAddrContext) -> i32 {
    REFUSE
}
