//! `connect(2)` on internet sockets: the first line. A refusal is EPERM at once, before a packet
//! exists; at egress a refused TCP opening would only hang.

use agent_ebpf::{
    abi::{Addr, Hook},
    decide::{Attempt, decide},
};
use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_socket_cookie},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use super::{
    cache, emit, identity,
    maps::{self, Tables},
    peer::ByTag,
    verdict::{Outcome, settle},
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// IPv4.
#[cgroup_sock_addr(connect4)]
pub fn remit_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context as the kernel gave it.
    let word = unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() };
    judge(&ctx, Addr::from_v4_word(word), Hook::Connect4, 2)
}

/// IPv6, which IPv4-mapped destinations come through as well.
#[cgroup_sock_addr(connect6)]
pub fn remit_connect6(ctx: SockAddrContext) -> i32 {
    // One word at a time: the verifier refuses a copy of, or a loop over, context memory.
    // SAFETY: the context as the kernel gave it.
    let a = unsafe { (&raw const (*ctx.sock_addr).user_ip6[0]).read_volatile() };
    // SAFETY: as above.
    let b = unsafe { (&raw const (*ctx.sock_addr).user_ip6[1]).read_volatile() };
    // SAFETY: as above.
    let c = unsafe { (&raw const (*ctx.sock_addr).user_ip6[2]).read_volatile() };
    // SAFETY: as above.
    let d = unsafe { (&raw const (*ctx.sock_addr).user_ip6[3]).read_volatile() };
    judge(
        &ctx,
        Addr {
            words: [a, b, c, d],
        },
        Hook::Connect6,
        10,
    )
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, addr: Addr, hook: Hook, family: u8) -> i32 {
    let addr = addr.effective();
    // SAFETY: the context as the kernel gave it.
    let port = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    // SAFETY: as above.
    let protocol = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() };
    let port = u16::from_be(port as u16);
    // MPTCP (262) does not fit a byte; its packets are TCP.
    let protocol = if protocol == 262 { 6 } else { protocol as u8 };
    // A ping socket's "port" is its identifier.
    let port = if matches!(protocol, 1 | 58) { 0 } else { port };

    // SAFETY: no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the context as the kernel gave it.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let question = cache::Question {
        cgroup,
        addr: &addr,
        port,
        protocol,
    };
    if let Some(agent) = cache::hit(&question) {
        emit::remember_owner(cookie, Some((&addr, port)));
        emit::allowed(agent);
        return ALLOW;
    }

    let epoch = maps::epoch();
    let agent = identity::of_current();
    let word = maps::word(agent);
    let now = cache::boot_now();
    let attempt = Attempt {
        addr,
        port,
        local_port: 0,
        protocol,
        hook,
        opening: false,
        now,
    };
    let (decision, policy) = match maps::row(word) {
        Some(row) => {
            let tables = Tables {
                peer: ByTag {
                    context: ctx,
                    agent,
                },
            };
            (decide(&tables, row, &attempt), row.policy)
        }
        None => super::verdict::no_row(),
    };
    let mut event = emit::blank(hook, agent, cgroup, now);
    match settle(decision, &mut event) {
        Outcome::Pass { until, cacheable } => {
            if cacheable {
                cache::remember(&question, agent, word, epoch, now, until);
            }
            emit::remember_owner(cookie, Some((&addr, port)));
            emit::allowed(agent);
            ALLOW
        }
        outcome => {
            event.policy = policy;
            event.addr = addr;
            event.port = port;
            event.protocol = protocol;
            event.family = family;
            emit::name_current(&mut event);
            emit::report(&mut event);
            if matches!(outcome, Outcome::PassReported) {
                emit::remember_owner(cookie, Some((&addr, port)));
                return ALLOW;
            }
            aya_log_ebpf::debug!(
                ctx,
                "{}: agent {} refused, reason {}",
                hook as u8,
                agent,
                event.reason
            );
            DENY
        }
    }
}
