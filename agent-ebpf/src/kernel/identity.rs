//! Which agent a task, a packet's socket or a peer's socket belongs to: the outermost claimed
//! cgroup among its ancestors. Levels count from the top of the hierarchy, so the first hit is the
//! outermost. No claim means the pseudo-agent [`UNREGISTERED`].
//!
//! The walk costs 50 to 100 ns a level, so what it found is remembered per CPU and cgroup until
//! any attribution changes (the epoch), and for a second or so at most.

use agent_ebpf::{
    abi::{HOME_TICKS, HOMES, Home, MAX_LEVELS, UNREGISTERED},
    verifier::hide32,
};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_sk_ancestor_cgroup_id,
        bpf_skb_ancestor_cgroup_id,
    },
};

use super::{
    cache::{get, mix, set, tick},
    maps::{CLAIMS, HOMES_MAP, epoch},
};

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

#[inline(always)]
fn home(cgroup: u64) -> Option<*mut Home> {
    HOMES_MAP.get_ptr_mut((mix(cgroup) >> 48) as u32 & (HOMES - 1))
}

/// The agent of `cgroup`, if it was found lately.
#[inline(always)]
fn remembered(cgroup: u64) -> Option<u32> {
    let home = home(cgroup)?;
    let sequence = get!(home.sequence);
    if sequence & 1 != 0
        || get!(home.cgroup) != cgroup
        || get!(home.epoch) != epoch()
        || tick().wrapping_sub(get!(home.tick)) > HOME_TICKS
    {
        return None;
    }
    let agent = get!(home.agent);
    (get!(home.sequence) == sequence).then_some(agent)
}

/// Remembers what was found; `epoch` was read before.
#[inline(always)]
fn remember(cgroup: u64, epoch: u64, agent: u32) {
    let Some(home) = home(cgroup) else { return };
    let sequence = get!(home.sequence);
    if sequence & 1 != 0 {
        return;
    }
    set!(home.sequence = sequence.wrapping_add(1));
    set!(home.cgroup = cgroup);
    set!(home.epoch = epoch);
    set!(home.tick = tick());
    set!(home.agent = agent);
    set!(home.sequence = sequence.wrapping_add(2));
}

/// The cgroup of the running task.
#[inline(always)]
pub fn current_cgroup() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The agent of the running task, which is in `cgroup`.
#[inline(always)]
pub fn of_current(cgroup: u64) -> u32 {
    match remembered(cgroup) {
        Some(agent) => hide32(agent),
        None => walk_current(cgroup),
    }
}

#[inline(never)]
fn walk_current(cgroup: u64) -> u32 {
    let epoch = epoch();
    // SAFETY: the helper takes a number and has no other demands.
    let agent = outermost(|level| unsafe { bpf_get_current_ancestor_cgroup_id(level) });
    // The task may have been moved between the looks: what was found is then of another cgroup.
    if current_cgroup() == cgroup {
        remember(cgroup, epoch, agent);
    }
    hide32(agent)
}

/// The agent of the socket that sends `skb`, which is in `cgroup`.
#[inline(always)]
pub fn of_skb(skb: *mut __sk_buff, cgroup: u64) -> u32 {
    match remembered(cgroup) {
        Some(agent) => hide32(agent),
        None => walk_skb(skb, cgroup),
    }
}

#[inline(never)]
fn walk_skb(skb: *mut __sk_buff, cgroup: u64) -> u32 {
    let epoch = epoch();
    // SAFETY: the context pointer as the kernel gave it.
    let agent = outermost(|level| unsafe { bpf_skb_ancestor_cgroup_id(skb, level) });
    remember(cgroup, epoch, agent);
    hide32(agent)
}

/// The agent of a socket that was looked up and is still referenced.
#[inline(always)]
pub fn of_sock(sk: *mut bpf_sock) -> u32 {
    // SAFETY: the caller holds a reference.
    outermost(|level| unsafe { bpf_sk_ancestor_cgroup_id(sk.cast(), level) })
}
