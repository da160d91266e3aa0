//! Which agent a task, a packet's socket or a peer's socket belongs to: the outermost claimed
//! cgroup among its ancestors. Levels count from the top of the hierarchy, so the first hit is the
//! outermost. No claim means the pseudo-agent [`UNREGISTERED`].

use agent_ebpf::{
    abi::{MAX_LEVELS, UNREGISTERED},
    verifier::hide32,
};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_sk_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id,
    },
};

use super::maps::CLAIMS;

/// Walks the levels with `ancestor` until a claimed cgroup or the end.
#[inline(always)]
fn outermost(ancestor: impl Fn(i32) -> u64) -> u32 {
    let mut found = UNREGISTERED;
    for level in 1..=MAX_LEVELS as i32 {
        let cgroup = ancestor(level);
        if cgroup == 0 {
            break;
        }
        // SAFETY: the value is a plain integer, copied at once.
        if let Some(agent) = unsafe { CLAIMS.get(cgroup) } {
            found = *agent;
            break;
        }
    }
    hide32(found)
}

/// The agent of the running task.
#[inline(never)]
pub fn of_current() -> u32 {
    // SAFETY: the helper takes a number and has no other demands.
    outermost(|level| unsafe { bpf_get_current_ancestor_cgroup_id(level) })
}

/// The agent of the socket that sends `skb`.
#[inline(never)]
pub fn of_skb(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context pointer as the kernel gave it.
    outermost(|level| unsafe { bpf_skb_ancestor_cgroup_id(skb, level) })
}

/// The agent of a socket that was looked up and is still referenced.
#[inline(always)]
pub fn of_sock(sk: *mut bpf_sock) -> u32 {
    // SAFETY: the caller holds a reference.
    outermost(|level| unsafe { bpf_sk_ancestor_cgroup_id(sk.cast(), level) })
}
