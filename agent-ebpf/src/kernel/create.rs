//! `socket(2)` in the internet families: refuses types that the scope gives no use for, and
//! remembers who made the socket.

use agent_ebpf::{
    abi::{Cause, Hook, Reason},
    decide::socket::may_create,
};
use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_socket_cookie},
    macros::cgroup_sock,
    programs::SockContext,
};

use super::{cache, emit, identity, maps, verdict::Ruling};

const PASS: i32 = 1;
const REFUSE: i32 = 0;

/// `cgroup/sock_create`.
#[cgroup_sock(sock_create)]
pub fn remit_create(ctx: SockContext) -> i32 {
    let kind = field!(ctx.sock, type_);
    let protocol = field!(ctx.sock, protocol);
    let family = field!(ctx.sock, family);
    // SAFETY: as above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };

    let agent = identity::of_current();
    let mut ruling = Ruling::fault(Cause::NoRow);
    let mut policy = 0;
    if let Some(row) = maps::row(maps::word(agent)) {
        if may_create(row, kind, protocol) {
            emit::remember_maker(cookie);
            return PASS;
        }
        ruling = Ruling::deny(Reason::SocketType);
        policy = row.policy;
    }
    // SAFETY: no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let mut event = emit::blank(Hook::SockCreate, agent, cgroup, cache::boot_now());
    ruling.fill(&mut event);
    event.policy = policy;
    event.protocol = protocol as u8;
    event.socket_type = kind as u8;
    event.family = family as u8;
    emit::name_current(&mut event);
    emit::report(&mut event);
    aya_log_ebpf::debug!(&ctx, "create: agent {} refused type {}", agent, kind);
    REFUSE
}
