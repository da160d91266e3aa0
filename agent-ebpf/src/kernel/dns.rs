//! Lookups. What an agent with names in its scope sends to port 53, of whatever resolver, is turned
//! to the DNS guard's socket for that agent in that network namespace; answers come back from the
//! address that was asked.
//!
//! - [`turn`] at connect and sendmsg: the destination becomes the guard's, and the socket remembers
//!   which resolver it meant. That the guard's own socket is there is looked up and told by its
//!   storage, which only the daemon writes: while the daemon is down the call is refused at once,
//!   and whoever takes the port meanwhile gets nothing.
//! - [`carries`] at egress: the only way to an endpoint. It notes whose socket the packet is from,
//!   for an unbound socket has no port before.
//! - [`spare`] closes the endpoints to what loopback would let through besides.
//! - recvmsg and getpeername put back the address that was asked.
//!
//! The sendmsg, recvmsg and getpeername programs are attached while some agent uses names: sendmsg
//! costs every unconnected UDP send of the host.

use core::mem::MaybeUninit;

use agent_ebpf::{
    abi::{
        Addr, AgentRow, Asked, Asker, Cause, DNS_PORT, EndpointKey, FLAG_NAMES, Guardian, Hook,
        LOOPBACK_ENTRY, Loopback, Reason, State, Witness,
    },
    decide::{Attempt, packet::Packet},
    verifier::{hide_addr, hide16, hide32},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::{
        bpf_get_current_comm, bpf_get_current_uid_gid,
        generated::{
            bpf_get_netns_cookie, bpf_set_retval, bpf_sk_fullsock, bpf_sk_release,
            bpf_sk_storage_get, bpf_skb_cgroup_id,
        },
    },
    macros::cgroup_sock_addr,
    programs::{SkBuffContext, SockAddrContext},
};

use super::{
    cache,
    emit::{self, Naming},
    identity,
    maps::{self, ASKED, ASKERS_MAP, ENDPOINTS, GUARDS},
    peer::look_up,
    verdict::{ALLOW, Ruling},
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const ECONNREFUSED: i32 = 111;
/// TCP flags (RFC 9293, section 3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Of [`turn`]: it goes where it was sent.
pub const ELSEWHERE: u32 = 0;
/// Of [`turn`]: it would go to the guard, and there is none.
pub const UNGUARDED: u32 = 1 << 16;

/// Whether the agent's lookups are turned to the guard now. One that may reach nothing is refused
/// for that reason where it meant to go.
#[inline(always)]
fn is_served(row: &AgentRow, now: u64) -> bool {
    row.flags & FLAG_NAMES != 0
        && row.state == State::Active as u8
        && now >= row.not_before
        && now < row.deadline
}

/// Whether `sk`, a socket that was looked up, is the guard's for `agent` at `endpoint`; releases it.
#[inline(always)]
fn is_guards(sk: *mut bpf_sock, endpoint: u64, agent: u32) -> bool {
    let mut is = false;
    let tag = guardian(sk);
    if !tag.is_null() {
        // SAFETY: checked for null; the storage lives as long as the referenced socket.
        let of = unsafe { (*tag).endpoint };
        // SAFETY: as above.
        let whose = unsafe { (*tag).agent };
        is = of == endpoint && whose == agent;
    }
    // SAFETY: the reference from the look-up, given back once.
    unsafe { bpf_sk_release(sk.cast()) };
    is
}

/// The daemon's mark on a referenced socket, or null.
#[inline(always)]
fn guardian(sk: *mut bpf_sock) -> *mut Guardian {
    let map = (&raw const GUARDS).cast_mut().cast();
    // SAFETY: a referenced socket and a socket-storage map; no value is created.
    unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), 0) }.cast()
}

/// An attempt at `addr` and `port`, as the look-up of sockets wants it.
#[inline(always)]
fn at(addr: Addr, port: u16, local_port: u16, protocol: u8) -> Attempt {
    Attempt {
        addr,
        port,
        local_port,
        protocol,
        hook: Hook::Egress,
        tcp_flags: 0,
        now: 0,
    }
}

/// [`is_guards`] of the socket at an address, in a function of its own for the sake of the stack.
#[inline(never)]
fn is_guarded(ctx: &SockAddrContext, attempt: &Attempt, endpoint: u64, agent: u32) -> u32 {
    let sk: *mut bpf_sock = look_up!(ctx.as_ptr(), attempt, &attempt.addr);
    if sk.is_null() {
        return hide32(0);
    }
    hide32(is_guards(sk, endpoint, agent) as u32)
}

/// Turns a call to `addr` and port 53 to the guard if it is a lookup of an agent with names, or
/// refuses it if there is no guard; else it goes [`ELSEWHERE`]. A function of its own for the sake
/// of the hook's stack.
#[inline(never)]
pub fn look_up(ctx: &SockAddrContext, addr: &Addr, hook: Hook) -> u32 {
    let mut agent = 0;
    let port = turn(ctx, addr, &mut agent);
    if port == ELSEWHERE {
        return hide32(ELSEWHERE);
    }
    if port == UNGUARDED {
        let protocol = field!(ctx.sock_addr, protocol);
        let _ = report(addr, agent, hook, protocol as u8);
        return hide32(UNGUARDED);
    }
    redirect(ctx, addr, hook, port);
    emit::allowed(agent);
    hide32(port)
}

/// Whether a call to `addr` and port 53 is a lookup to be turned: the guard's port to go to instead,
/// [`ELSEWHERE`] or [`UNGUARDED`]. The socket remembers what it asked.
#[inline(never)]
fn turn(ctx: &SockAddrContext, addr: &Addr, who: &mut u32) -> u32 {
    let protocol = field!(ctx.sock_addr, protocol);
    // MPTCP sends from other sockets than the one that connects; nothing resolves over it.
    if protocol != IPPROTO_TCP as u32 && protocol != IPPROTO_UDP as u32 {
        return hide32(ELSEWHERE);
    }
    let agent = identity::of_current(identity::current_cgroup());
    *who = agent;
    let Some(row) = maps::row(maps::word(agent)) else {
        return hide32(ELSEWHERE);
    };
    if !is_served(row, cache::boot_now()) {
        return hide32(ELSEWHERE);
    }
    let key = EndpointKey {
        // SAFETY: the context as the kernel gave it.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        agent,
        pad: 0,
    };
    // SAFETY: plain integers, copied at once; the daemon replaces values whole.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(key) }) else {
        return hide32(UNGUARDED);
    };
    let id = endpoint.id;
    let (to, port) = if addr.is_v4() {
        (Addr::LOOPBACK_V4, endpoint.v4)
    } else {
        (Addr::LOOPBACK_V6, endpoint.v6)
    };
    let (to, port) = (hide_addr(to), hide16(port));
    if port == 0 || is_guarded(ctx, &at(to, port, 0, protocol as u8), id, agent) == 0 {
        return hide32(UNGUARDED);
    }
    hide32(remember(ctx, addr, id, (agent as u64) << 16 | port as u64))
}

/// Has the socket remember which resolver it asked.
#[inline(never)]
fn remember(ctx: &SockAddrContext, addr: &Addr, endpoint: u64, agent_and_port: u64) -> u32 {
    // SAFETY: the context's own socket.
    let sk = field!(ctx.sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() {
        return hide32(UNGUARDED);
    }
    let mut asked = Asked::zeroed();
    asked.addr = *addr;
    asked.comm = bpf_get_current_comm().unwrap_or([0; 16]);
    asked.endpoint = endpoint;
    asked.cgroup = identity::current_cgroup();
    asked.agent = (agent_and_port >> 16) as u32;
    asked.pid = emit::pid();
    asked.uid = bpf_get_current_uid_gid() as u32;
    asked.port = DNS_PORT;
    asked.at = agent_and_port as u16;
    let map = (&raw const ASKED).cast_mut().cast();
    // SAFETY: the socket of the context, a socket-storage map and a value on the stack.
    let stored = unsafe {
        bpf_sk_storage_get(
            map,
            sk.cast(),
            (&raw mut asked).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    }
    .cast::<Asked>();
    if stored.is_null() {
        return hide32(UNGUARDED);
    }
    // One that was there before is not replaced by the call above.
    // SAFETY: checked for null; the storage lives as long as the socket. What another thread that
    // uses the same socket reads meanwhile is one of the addresses that it asked.
    unsafe { stored.write(asked) };
    hide32(asked.at as u32)
}

/// Writes a field of the context.
macro_rules! set {
    ($context:expr, $field:ident $([$at:literal])?, $value:expr) => {{
        let value = $value;
        // SAFETY: the context as the kernel gave it; nothing is written yet.
        let place = unsafe { &raw mut (*$context).$field $([$at])? };
        // SAFETY: a field that the kernel lets this kind of program write.
        unsafe { place.write_volatile(value) };
    }};
}

/// Sends the call to the guard at `port` instead.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, addr: &Addr, hook: Hook, port: u32) {
    let to = if addr.is_v4() {
        Addr::LOOPBACK_V4
    } else {
        Addr::LOOPBACK_V6
    };
    put(
        ctx,
        &to,
        matches!(hook, Hook::Connect6 | Hook::SendMsg6),
        port as u16,
    );
}

/// Writes address and port of the context.
#[inline(always)]
fn put(ctx: &SockAddrContext, addr: &Addr, is_v6: bool, port: u16) {
    let [a, b, c, d] = addr.words;
    if is_v6 {
        set!(ctx.sock_addr, user_ip6[0], a);
        set!(ctx.sock_addr, user_ip6[1], b);
        set!(ctx.sock_addr, user_ip6[2], c);
        set!(ctx.sock_addr, user_ip6[3], d);
    } else {
        set!(ctx.sock_addr, user_ip4, d);
    }
    set!(ctx.sock_addr, user_port, port.to_be() as u32);
}

/// The ruling on a lookup for which there is no guard. The caller sees what it would at a host
/// where no resolver runs: resolvers give up at once.
#[inline(always)]
fn unguarded() -> Ruling {
    // SAFETY: a plain number.
    let _before = unsafe { bpf_set_retval(-ECONNREFUSED) };
    Ruling::fault(Cause::NoGuard)
}

/// Whether a packet is one that [`turn`] sent on its way: then its sender is noted, it is counted,
/// and it may pass.
#[inline(never)]
pub fn carries(ctx: &SkBuffContext, packet: &Packet) -> u32 {
    if !packet.destination.is_loopback() || !matches!(packet.protocol, IPPROTO_TCP | IPPROTO_UDP) {
        return hide32(0);
    }
    let sk = field!(ctx.skb.skb, __bindgen_anon_2.sk);
    if sk.is_null() {
        return hide32(0);
    }
    // SAFETY: the packet's socket, checked for null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return hide32(0);
    }
    let map = (&raw const ASKED).cast_mut().cast();
    // SAFETY: a full socket that the packet holds, and a socket-storage map; no value is created.
    let asked =
        unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), 0) }.cast::<Asked>();
    if asked.is_null() {
        return hide32(0);
    }
    let place = asked;
    // SAFETY: checked for null; the storage lives as long as the socket.
    let asked: &Asked = unsafe { &*place };
    // SAFETY: the context as the kernel gave it.
    let cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
    let agent = identity::of_skb(ctx.skb.skb, cgroup);
    if asked.at != packet.port || asked.agent != agent {
        return hide32(0);
    }
    let now = cache::boot_now();
    let Some(row) = maps::row(maps::word(agent)) else {
        return hide32(0);
    };
    if !is_served(row, now) {
        return hide32(0);
    }
    // Later segments can only reach what the first one did.
    let opens = packet.protocol == IPPROTO_UDP || packet.tcp_flags & (SYN | ACK) == SYN;
    let endpoint = asked.endpoint;
    if opens && is_guarded_skb(ctx, packet, endpoint, agent) == 0 {
        return hide32(0);
    }
    emit::allowed(agent);
    let _ = note(packet, place, now);
    hide32(1)
}

/// [`is_guarded`] of a packet's destination.
#[inline(never)]
fn is_guarded_skb(ctx: &SkBuffContext, packet: &Packet, endpoint: u64, agent: u32) -> u32 {
    let attempt = at(
        packet.destination,
        packet.port,
        packet.source_port,
        packet.protocol,
    );
    let sk: *mut bpf_sock = look_up!(ctx.as_ptr(), &attempt, &packet.source);
    if sk.is_null() {
        return hide32(0);
    }
    hide32(is_guards(sk, endpoint, agent) as u32)
}

/// Notes whose socket a packet to an endpoint is from.
#[inline(never)]
fn note(packet: &Packet, asked: *mut Asked, now: u64) -> u32 {
    // SAFETY: the storage of a socket that the packet holds; other packets of it write the same.
    let time = unsafe { &raw mut (*asked).time };
    // SAFETY: as above.
    unsafe { time.write_volatile(now) };
    // SAFETY: as above.
    let asked: &Asked = unsafe { &*asked };
    let asker = Asker {
        endpoint: asked.endpoint,
        addr: packet.source,
        port: packet.source_port,
        protocol: packet.protocol,
        pad: [0; 5],
    };
    // From storage to map without a copy on the stack, of which 6.1 has too little.
    // Where it cannot be noted the question is nobody's, and refused.
    let _lost = ASKERS_MAP.insert(asker, asked, 0);
    hide32(0)
}

/// Refuses what loopback would let through to a socket of the guard: only [`carries`] leads there.
#[inline(always)]
fn closes(row: &AgentRow, attempt: &Attempt, ruling: &Ruling) -> bool {
    // The agent's own sockets are not the guard's.
    let by_own = ruling.entry == LOOPBACK_ENTRY && row.loopback == Loopback::Own as u8;
    ruling.verdict == ALLOW
        && !by_own
        && attempt.addr.is_loopback()
        && matches!(attempt.protocol, IPPROTO_TCP | IPPROTO_UDP)
}

/// At connect; see [`closes`].
#[inline(never)]
pub fn spare(ctx: &SockAddrContext, row: &AgentRow, attempt: &Attempt, ruling: &mut Ruling) -> u32 {
    if !closes(row, attempt, ruling) {
        return hide32(0);
    }
    let sk: *mut bpf_sock = look_up!(ctx.as_ptr(), attempt, &attempt.addr);
    if sk.is_null() {
        return hide32(0);
    }
    settle(sk, ruling);
    hide32(0)
}

/// At egress; see [`closes`].
#[inline(never)]
pub fn spare_packet(
    ctx: &SkBuffContext,
    row: &AgentRow,
    attempt: &Attempt,
    source: &Addr,
    ruling: &mut Ruling,
) -> u32 {
    if !closes(row, attempt, ruling) {
        return hide32(0);
    }
    let sk: *mut bpf_sock = look_up!(ctx.as_ptr(), attempt, source);
    if sk.is_null() {
        return hide32(0);
    }
    settle(sk, ruling);
    hide32(0)
}

#[inline(always)]
fn settle(sk: *mut bpf_sock, ruling: &mut Ruling) {
    let is_guards = !guardian(sk).is_null();
    // SAFETY: the reference from the look-up, given back once.
    unsafe { bpf_sk_release(sk.cast()) };
    if is_guards {
        *ruling = Ruling::deny(Reason::LoopbackForeign);
    }
}

// === sendmsg ===

/// `cgroup/sendmsg4`.
#[cgroup_sock_addr(sendmsg4)]
pub fn remit_sendmsg4(ctx: SockAddrContext) -> i32 {
    let word = field!(ctx.sock_addr, user_ip4);
    send(&ctx, Addr::from_v4_word(word), Hook::SendMsg4)
}

/// `cgroup/sendmsg6`; mapped destinations come through sendmsg4.
#[cgroup_sock_addr(sendmsg6)]
pub fn remit_sendmsg6(ctx: SockAddrContext) -> i32 {
    let a = field!(ctx.sock_addr, user_ip6[0]);
    let b = field!(ctx.sock_addr, user_ip6[1]);
    let c = field!(ctx.sock_addr, user_ip6[2]);
    let d = field!(ctx.sock_addr, user_ip6[3]);
    send(
        &ctx,
        Addr {
            words: [a, b, c, d],
        },
        Hook::SendMsg6,
    )
}

/// Turns lookups; all else is egress's to judge.
#[inline(always)]
fn send(ctx: &SockAddrContext, addr: Addr, hook: Hook) -> i32 {
    let port = field!(ctx.sock_addr, user_port);
    if port as u16 != DNS_PORT.to_be() {
        return PASS;
    }
    let addr = hide_addr(addr.effective());
    if look_up(ctx, &addr, hook) == UNGUARDED {
        REFUSE
    } else {
        PASS
    }
}

/// Reports a lookup for which there is no guard, and chooses the error.
#[inline(never)]
fn report(addr: &Addr, agent: u32, hook: Hook, protocol: u8) -> u32 {
    let cgroup = identity::current_cgroup();
    let mut record = MaybeUninit::uninit();
    let event = emit::blank(&mut record, hook, agent, cgroup, cache::boot_now());
    unguarded().fill(event);
    if let Some(row) = maps::row(maps::word(agent)) {
        event.policy = row.policy;
    }
    event.addr = *addr;
    event.port = DNS_PORT;
    event.protocol = protocol;
    event.family = if matches!(hook, Hook::Connect4 | Hook::SendMsg4) {
        2
    } else {
        10
    };
    event.pid = emit::pid();
    event.witness = Witness::Current as u8;
    emit::report(event, Naming::Current);
    hide32(0)
}

// === the way back ===

/// `cgroup/recvmsg4`.
#[cgroup_sock_addr(recvmsg4)]
pub fn remit_recvmsg4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, false)
}

/// `cgroup/recvmsg6`; answers to mapped destinations come through here.
#[cgroup_sock_addr(recvmsg6)]
pub fn remit_recvmsg6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, true)
}

/// `cgroup/getpeername4`.
#[cgroup_sock_addr(getpeername4)]
pub fn remit_peer4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, false)
}

/// `cgroup/getpeername6`.
#[cgroup_sock_addr(getpeername6)]
pub fn remit_peer6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, true)
}

/// Puts the resolver that was asked in place of the guard. These hooks must return 1.
#[inline(always)]
fn restore(ctx: &SockAddrContext, is_v6: bool) -> i32 {
    let sk = field!(ctx.sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() {
        return 1;
    }
    let map = (&raw const ASKED).cast_mut().cast();
    // SAFETY: the context's socket, and a socket-storage map; no value is created.
    let asked =
        unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), 0) }.cast::<Asked>();
    if asked.is_null() {
        return 1;
    }
    // SAFETY: checked for null; the storage lives as long as the socket.
    let asked: &Asked = unsafe { &*asked };
    let port = field!(ctx.sock_addr, user_port);
    if port as u16 != asked.at.to_be() {
        return 1;
    }
    let from = if is_v6 {
        let a = field!(ctx.sock_addr, user_ip6[0]);
        let b = field!(ctx.sock_addr, user_ip6[1]);
        let c = field!(ctx.sock_addr, user_ip6[2]);
        let d = field!(ctx.sock_addr, user_ip6[3]);
        Addr {
            words: [a, b, c, d],
        }
    } else {
        let word = field!(ctx.sock_addr, user_ip4);
        Addr::from_v4_word(word)
    };
    if from.is_loopback() && from.is_v4() == asked.addr.is_v4() {
        put(ctx, &asked.addr, is_v6, asked.port);
    }
    1
}
