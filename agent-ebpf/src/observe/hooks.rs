//! The hooks: `connect` for TCP, and for UDP that is connected; `sendmsg` for UDP that is not. Each
//! reads where it goes, has it noted, and lets it pass.

use agent_ebpf::abi::Addr;
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use super::note::note;

/// The only answer there is.
const PASS: i32 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// MPTCP, which does not fit a byte; its packets are TCP.
const MPTCP: u32 = 262;

/// IPv4.
#[cgroup_sock_addr(connect4)]
pub fn seen_connect4(ctx: SockAddrContext) -> i32 {
    look(&ctx, v4(&ctx))
}

/// IPv6, which IPv4-mapped destinations come through as well.
#[cgroup_sock_addr(connect6)]
pub fn seen_connect6(ctx: SockAddrContext) -> i32 {
    look(&ctx, v6(&ctx))
}

/// IPv4, and mapped destinations of IPv6 sockets: of these also what is sent on a connected one, for
/// the kernel puts the address back (`udpv6_sendmsg`).
#[cgroup_sock_addr(sendmsg4)]
pub fn seen_sendmsg4(ctx: SockAddrContext) -> i32 {
    look(&ctx, v4(&ctx))
}

/// IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn seen_sendmsg6(ctx: SockAddrContext) -> i32 {
    look(&ctx, v6(&ctx))
}

#[inline(always)]
fn v4(ctx: &SockAddrContext) -> Addr {
    Addr::from_v4_word(field!(ctx.sock_addr, user_ip4))
}

#[inline(always)]
fn v6(ctx: &SockAddrContext) -> Addr {
    // One word at a time: the verifier refuses a copy of, or a loop over, context memory.
    let a = field!(ctx.sock_addr, user_ip6[0]);
    let b = field!(ctx.sock_addr, user_ip6[1]);
    let c = field!(ctx.sock_addr, user_ip6[2]);
    let d = field!(ctx.sock_addr, user_ip6[3]);
    Addr {
        words: [a, b, c, d],
    }
}

#[inline(always)]
fn look(ctx: &SockAddrContext, addr: Addr) -> i32 {
    let port = u16::from_be(field!(ctx.sock_addr, user_port) as u16);
    let protocol = match field!(ctx.sock_addr, protocol) {
        6 | MPTCP => TCP,
        17 => UDP,
        _ => return PASS,
    };
    // Port 0 is reached by nobody: resolvers connect there to have addresses sorted.
    if port != 0 {
        note(&addr, port, protocol);
    }
    PASS
}
