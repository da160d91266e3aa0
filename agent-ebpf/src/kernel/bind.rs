//! `bind(2)`: tags the socket with its agent, for `loopback = "own"`. Nothing is refused here.
//! Short outbound sockets never bind, so they never pay for the storage.

use agent_ebpf::abi::Tag;
use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE, helpers::generated::bpf_sk_storage_get,
    macros::cgroup_sock, programs::SockContext,
};

use super::{identity, maps::tags};

/// IPv4.
#[cgroup_sock(post_bind4)]
pub fn remit_bind4(ctx: SockContext) -> i32 {
    tag(&ctx)
}

/// IPv6.
#[cgroup_sock(post_bind6)]
pub fn remit_bind6(ctx: SockContext) -> i32 {
    tag(&ctx)
}

#[inline(always)]
fn tag(ctx: &SockContext) -> i32 {
    let agent = identity::of_current(identity::current_cgroup());
    let mut tag = Tag { agent, pad: 0 };
    // SAFETY: the socket of the context, a socket-storage map and a value on the stack.
    let stored = unsafe {
        bpf_sk_storage_get(
            tags(),
            ctx.sock.cast(),
            (&raw mut tag).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    }
    .cast::<Tag>();
    if !stored.is_null() {
        // A socket that is bound again (after an unconnect) by another agent changes hands.
        // SAFETY: checked for null; the storage lives as long as the socket.
        unsafe { (*stored).agent = agent };
    }
    1
}
