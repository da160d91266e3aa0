//! `socket(2)` in the internet families: refuses types that the scope gives no use for, and
//! remembers who made the socket.

use agent_ebpf::{
    abi::{Cause, Hook, Reason, Witness},
    decide::socket::{SOCK_STREAM, is_plain, may_create},
};
use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock,
    programs::SockContext,
};

use super::{
    cache,
    emit::{self, Naming},
    identity, maps,
    verdict::Ruling,
    wipe::place,
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;

/// `cgroup/sock_create`.
#[cgroup_sock(sock_create)]
pub fn remit_create(ctx: SockContext) -> i32 {
    let kind = field!(ctx.sock, type_);
    let protocol = field!(ctx.sock, protocol);
    if is_plain(kind, protocol) {
        // A stream sends nothing before it is connected, and then connect remembers.
        if kind != SOCK_STREAM {
            remember(&ctx);
        }
        return PASS;
    }
    judge(&ctx, kind, protocol)
}

#[inline(always)]
fn remember(ctx: &SockContext) {
    // SAFETY: the context as the kernel gave it.
    emit::remember_maker(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
}

/// Asks the scope.
#[inline(never)]
fn judge(ctx: &SockContext, kind: u32, protocol: u32) -> i32 {
    let cgroup = identity::current_cgroup();
    let agent = identity::of_current(cgroup);
    let mut ruling = Ruling::fault(Cause::NoRow);
    let mut policy = 0;
    if let Some(row) = maps::row(maps::word(agent)) {
        if may_create(row, kind, protocol) {
            remember(ctx);
            return PASS;
        }
        ruling = Ruling::deny(Reason::SocketType);
        policy = row.policy;
    }
    let mut record = place();
    let event = emit::blank(
        &mut record,
        Hook::SockCreate,
        agent,
        cgroup,
        cache::boot_now(),
    );
    ruling.fill(event);
    event.policy = policy;
    event.protocol = protocol as u8;
    event.socket_type = kind as u8;
    event.family = field!(ctx.sock, family) as u8;
    event.pid = emit::pid();
    event.witness = Witness::Current as u8;
    emit::report(event, Naming::Current);
    aya_log_ebpf::debug!(ctx, "create: agent {} refused type {}", agent, kind);
    REFUSE
}
