//! The plain design: every connect and every packet walks up the cgroups to find the agent, then
//! looks its destination up in a longest-prefix match. Nothing is remembered. It has the same hooks
//! and the same key as Remit, and checks protocol and port, but has no lifecycle, expiry, loopback
//! rule, counters or reports, so it does less than what it is compared with.

use agent_ebpf::abi::{Addr, SPACE_BITS, ScopeKey};
use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id, bpf_skb_load_bytes,
    },
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr, map},
    maps::{HashMap, LpmTrie, lpm_trie::Key},
    programs::{SkBuffContext, SockAddrContext, SockContext},
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;
/// As deep as Remit looks.
const LEVELS: i32 = agent_ebpf::abi::MAX_LEVELS as i32;

/// Cgroup id to scope. Written by the bench.
#[map(name = "pp_claims")]
static CLAIMS: HashMap<u64, u32> = HashMap::with_max_entries(16, 0);

/// Scope and prefix to the ports it may be reached at: first and last of TCP in the upper 32 bits,
/// of UDP in the lower. Written by the bench, and sized by it.
#[map(name = "pp_prefixes")]
static PREFIXES: LpmTrie<ScopeKey, u64> = LpmTrie::with_max_entries(1, 0);

/// Where an attempt goes.
struct To {
    addr: Addr,
    port: u16,
    protocol: u8,
}

/// IPv4.
#[cgroup_sock_addr(connect4)]
pub fn pp_connect4(ctx: SockAddrContext) -> i32 {
    let word = field!(ctx.sock_addr, user_ip4);
    connect(&ctx, Addr::from_v4_word(word))
}

/// IPv6.
#[cgroup_sock_addr(connect6)]
pub fn pp_connect6(ctx: SockAddrContext) -> i32 {
    let words = [
        field!(ctx.sock_addr, user_ip6[0]),
        field!(ctx.sock_addr, user_ip6[1]),
        field!(ctx.sock_addr, user_ip6[2]),
        field!(ctx.sock_addr, user_ip6[3]),
    ];
    connect(&ctx, Addr { words })
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, addr: Addr) -> i32 {
    let port = field!(ctx.sock_addr, user_port);
    let protocol = field!(ctx.sock_addr, protocol);
    let to = To {
        addr,
        port: u16::from_be(port as u16),
        protocol: protocol as u8,
    };
    // SAFETY: the helper takes a number and has no other demands.
    judge(&to, |level| unsafe {
        bpf_get_current_ancestor_cgroup_id(level)
    })
}

/// Every packet.
#[cgroup_skb(egress)]
pub fn pp_egress(ctx: SkBuffContext) -> i32 {
    let Some(to) = destination(&ctx) else {
        return REFUSE;
    };
    let skb = ctx.skb.skb;
    // SAFETY: the context as the kernel gave it.
    judge(&to, |level| unsafe {
        bpf_skb_ancestor_cgroup_id(skb, level)
    })
}

/// Sockets are not judged, but the hook is taken, as Remit takes it.
#[cgroup_sock(sock_create)]
pub fn pp_create(_: SockContext) -> i32 {
    PASS
}

#[inline(always)]
fn judge(to: &To, ancestor: impl Fn(i32) -> u64) -> i32 {
    let mut scope = 0;
    for level in 1..=LEVELS {
        let cgroup = ancestor(level);
        if cgroup == 0 {
            break;
        }
        // SAFETY: the value is a plain integer, copied at once.
        if let Some(found) = unsafe { CLAIMS.get(cgroup) } {
            scope = *found;
            break;
        }
    }
    let key = ScopeKey {
        space: scope.into(),
        addr: to.addr,
    };
    let Some(rule) = PREFIXES.get(Key::new(SPACE_BITS + 128, key)) else {
        return REFUSE;
    };
    let ports = match to.protocol {
        6 => rule >> 32,
        17 => *rule,
        _ => return REFUSE,
    };
    if (ports >> 16) as u16 <= to.port && to.port <= ports as u16 {
        PASS
    } else {
        REFUSE
    }
}

/// Destination of TCP and UDP over IPv4 without options and IPv6 without extensions: all that the
/// bench sends. Anything else is refused.
#[inline(always)]
fn destination(ctx: &SkBuffContext) -> Option<To> {
    // 20 bytes at once, which both families have: a check of a single one is compiled to a
    // comparison that the verifier learns nothing from.
    let head = read::<20>(ctx, 0)?;
    let (addr, protocol, ports) = match head[0] >> 4 {
        4 => (
            Addr::v4([head[16], head[17], head[18], head[19]]),
            head[9],
            20,
        ),
        6 => (Addr::from_octets(read::<16>(ctx, 24)?), head[6], 40),
        _ => return None,
    };
    let port = u16::from_be_bytes(read::<2>(ctx, ports + 2)?);
    Some(To {
        addr,
        port,
        protocol,
    })
}

/// By direct access, as Remit reads; headers in fragments by the helper.
#[inline(always)]
fn read<const N: usize>(ctx: &SkBuffContext, offset: usize) -> Option<[u8; N]> {
    let data = field!(ctx.skb.skb, data) as usize;
    let end = field!(ctx.skb.skb, data_end) as usize;
    let start = data + offset;
    if start + N <= end {
        // SAFETY: within the linear part by the check above, which the verifier insists on.
        return Some(unsafe { (start as *const [u8; N]).read_unaligned() });
    }
    let mut bytes = [0; N];
    // SAFETY: a context, and a buffer on the stack with its length.
    let read = unsafe {
        bpf_skb_load_bytes(
            ctx.as_ptr(),
            offset as u32,
            bytes.as_mut_ptr().cast(),
            N as u32,
        )
    };
    (read == 0).then_some(bytes)
}
