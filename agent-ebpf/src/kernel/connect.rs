//! `connect(2)` on internet sockets: the first line. A refusal is EPERM at once, before a packet
//! exists; at egress a refused TCP opening would only hang.

use agent_ebpf::{
    abi::{Addr, Cause, DNS_PORT, Hook, Reason, UNREGISTERED, Verdict, Witness},
    decide::Attempt,
    verifier::{hide_addr, hide8, hide16, hide32},
};
use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use super::{
    access, cache, dns,
    emit::{self, Naming},
    identity,
    maps::{self, Tables},
    peer::ByTag,
    verdict::{ALLOW, Ruling, rule},
    wipe::place,
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;

/// IPv4.
#[cgroup_sock_addr(connect4)]
pub fn remit_connect4(ctx: SockAddrContext) -> i32 {
    let word = field!(ctx.sock_addr, user_ip4);
    judge(&ctx, Addr::from_v4_word(word), Hook::Connect4)
}

/// IPv6, which IPv4-mapped destinations come through as well.
#[cgroup_sock_addr(connect6)]
pub fn remit_connect6(ctx: SockAddrContext) -> i32 {
    // One word at a time: the verifier refuses a copy of, or a loop over, context memory.
    let a = field!(ctx.sock_addr, user_ip6[0]);
    let b = field!(ctx.sock_addr, user_ip6[1]);
    let c = field!(ctx.sock_addr, user_ip6[2]);
    let d = field!(ctx.sock_addr, user_ip6[3]);
    judge(
        &ctx,
        Addr {
            words: [a, b, c, d],
        },
        Hook::Connect6,
    )
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, addr: Addr, hook: Hook) -> i32 {
    let addr = hide_addr(addr.effective());
    let port = field!(ctx.sock_addr, user_port);
    let protocol = field!(ctx.sock_addr, protocol);
    let port = u16::from_be(port as u16);
    // MPTCP (262) does not fit a byte; its packets are TCP.
    let protocol = hide8(if protocol == 262 { 6 } else { protocol as u8 });
    // A ping socket's "port" is its identifier.
    let port = hide16(if matches!(protocol, 1 | 58) { 0 } else { port });
    let protocol = hide8(protocol);

    let cgroup = identity::current_cgroup();
    let question = cache::Question {
        cgroup,
        addr: &addr,
        port,
        protocol,
    };
    if let Some(hit) = cache::hit(&question) {
        access::connected(hit.slot);
        remember(ctx, &addr, port);
        emit::allowed(hit.agent);
        return PASS;
    }
    if port == DNS_PORT {
        match dns::look_up(ctx, &addr, hook) {
            dns::ELSEWHERE => {}
            dns::UNGUARDED => return REFUSE,
            _ => return PASS,
        }
    }
    // Here it would be known to be 53, or not to be, and all that follows be verified twice.
    let port = hide16(port);
    slowly(ctx, addr, port, protocol, hook, cgroup)
}

/// Remembers who connected the socket, and where to.
#[inline(always)]
fn remember(ctx: &SockAddrContext, addr: &Addr, port: u16) {
    // SAFETY: the context as the kernel gave it.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    emit::remember_connected(cookie, addr, port);
}

/// What the cache does not allow.
#[inline(always)]
fn slowly(
    ctx: &SockAddrContext,
    addr: Addr,
    port: u16,
    protocol: u8,
    hook: Hook,
    cgroup: u64,
) -> i32 {
    let mut who = Who {
        agent: UNREGISTERED,
        cgroup,
        policy: 0,
    };
    let mut attempt = Attempt {
        addr,
        port,
        local_port: 0,
        protocol,
        hook,
        tcp_flags: 0,
        now: cache::boot_now(),
    };
    let mut ruling = Ruling::fault(Cause::NoRow);
    if again(&attempt, &mut who) != 0 {
        ruling = Ruling::deny(Reason::OutOfScope);
    } else if ask(ctx, &mut attempt, &mut who, &mut ruling) != 0 {
        return REFUSE;
    }
    if ruling.verdict == ALLOW {
        remember(ctx, &addr, port);
        emit::allowed(who.agent);
        return PASS;
    }
    report(&attempt, &ruling, &who);
    if ruling.verdict == Verdict::Monitored as u8 {
        remember(ctx, &addr, port);
        return PASS;
    }
    log(ctx, who.agent, ruling.reason);
    REFUSE
}

/// Whether this was refused a moment ago, and whom.
#[inline(never)]
fn again(attempt: &Attempt, who: &mut Who) -> u32 {
    let question = question(attempt, who.cgroup);
    let Some(agent) = cache::refusal(&question, attempt.now) else {
        return hide32(0);
    };
    who.agent = hide32(agent);
    if let Some(row) = maps::row(maps::word(agent)) {
        who.policy = row.policy;
    }
    hide32(1)
}

#[inline(always)]
fn question(attempt: &Attempt, cgroup: u64) -> cache::Question<'_> {
    cache::Question {
        cgroup,
        addr: &attempt.addr,
        port: attempt.port,
        protocol: attempt.protocol,
    }
}

/// For debugging; a function of its own for the sake of the stack.
#[inline(never)]
fn log(ctx: &SockAddrContext, agent: u32, reason: u8) {
    aya_log_ebpf::debug!(ctx, "connect: agent {} refused, reason {}", agent, reason);
}

/// Whose attempt it is.
struct Who {
    agent: u32,
    cgroup: u64,
    policy: u64,
}

/// Asks the tables, and remembers what may be. Returns 0: of a function without a result, or whose
/// result nobody uses, the compiler may leave an address of the stack in the register for it, which
/// the verifier refuses.
#[inline(never)]
fn ask(ctx: &SockAddrContext, attempt: &mut Attempt, who: &mut Who, ruling: &mut Ruling) -> u32 {
    // Read before the tables are: if any of them changes meanwhile, what is remembered is stale.
    let (epoch, leases) = (maps::epoch(), maps::leases());
    who.agent = identity::of_current(who.cgroup);
    let word = maps::word(who.agent);
    let Some(row) = maps::row(word) else {
        return hide32(0);
    };
    who.policy = row.policy;
    let tables = Tables {
        peer: ByTag {
            context: ctx,
            agent: who.agent,
        },
    };
    rule(&tables, row, attempt, ruling);
    let _ = dns::spare(ctx, row, attempt, ruling);
    let basis = cache::Basis {
        agent: who.agent,
        leases,
        word,
        epoch,
        now: attempt.now,
    };
    if ruling.cacheable != 0 {
        cache::remember(
            &question(attempt, who.cgroup),
            &basis,
            ruling.until,
            access::Use::CONNECTION,
        );
    } else if ruling.reason == Reason::OutOfScope as u8 && ruling.verdict == Verdict::Denied as u8 {
        cache::remember_refusal(&question(attempt, who.cgroup), &basis, row.deadline);
    }
    hide32(0)
}

/// Reports what was not plainly allowed.
#[inline(never)]
fn report(attempt: &Attempt, ruling: &Ruling, who: &Who) {
    let mut record = place();
    let event = emit::blank(
        &mut record,
        attempt.hook,
        who.agent,
        who.cgroup,
        attempt.now,
    );
    ruling.fill(event);
    event.policy = who.policy;
    event.addr = attempt.addr;
    event.port = attempt.port;
    event.protocol = attempt.protocol;
    event.family = if matches!(attempt.hook, Hook::Connect4) {
        2
    } else {
        10
    };
    event.pid = emit::pid();
    event.witness = Witness::Current as u8;
    emit::report(event, Naming::Current);
}
