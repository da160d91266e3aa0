//! Whose socket a loopback attempt would reach.
//!
//! At connect the kernel tells nothing of a found socket but its storage, so the tag set at bind
//! decides, and an untagged socket is foreign. At egress it tells the socket's cgroup as well,
//! which needs no tag and also knows sockets that were bound before Remit came.

use agent_ebpf::{
    abi::{Addr, Tag},
    decide::{Attempt, Peer},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::generated::{bpf_sk_release, bpf_sk_storage_get},
    programs::{SkBuffContext, SockAddrContext},
};

use super::{
    identity,
    maps::{FindPeer, tags},
};

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// Looks up the socket that a packet from `source` to the attempt's destination would reach.
/// Null where there is none; otherwise the caller must release it.
macro_rules! look_up {
    ($context:expr, $attempt:expr, $source:expr) => {{
        let attempt: &Attempt = $attempt;
        let source: &Addr = $source;
        let sport = attempt.local_port.to_be();
        let dport = attempt.port.to_be();
        // SAFETY: all-zero bytes are a valid tuple of either family.
        let mut tuple: aya_ebpf::bindings::bpf_sock_tuple = unsafe { core::mem::zeroed() };
        let size = if attempt.addr.is_v4() {
            // SAFETY: the union's IPv4 arm lies within it; plain integers are written.
            let v4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
            v4.saddr = source.words[3];
            v4.daddr = attempt.addr.words[3];
            v4.sport = sport;
            v4.dport = dport;
            12_u32
        } else {
            // SAFETY: the union's IPv6 arm lies within it; plain integers are written.
            let v6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
            v6.saddr = source.words;
            v6.daddr = attempt.addr.words;
            v6.sport = sport;
            v6.dport = dport;
            36_u32
        };
        let netns = aya_ebpf::bindings::BPF_F_CURRENT_NETNS as u64;
        if attempt.protocol == IPPROTO_TCP {
            // SAFETY: the context as the kernel gave it, a tuple on the stack and its size.
            unsafe {
                aya_ebpf::helpers::generated::bpf_sk_lookup_tcp(
                    $context,
                    &raw mut tuple,
                    size,
                    netns,
                    0,
                )
            }
        } else {
            // SAFETY: as above.
            unsafe {
                aya_ebpf::helpers::generated::bpf_sk_lookup_udp(
                    $context,
                    &raw mut tuple,
                    size,
                    netns,
                    0,
                )
            }
        }
    }};
}

pub(super) use look_up;

/// By tag, at connect.
pub struct ByTag<'a> {
    pub context: &'a SockAddrContext,
    pub agent: u32,
}

// Functions of their own, so that their tuples do not weigh on the stack of the tables' look-ups.
impl FindPeer for ByTag<'_> {
    #[inline(never)]
    fn find(&self, attempt: &Attempt) -> Peer {
        if !matches!(attempt.protocol, IPPROTO_TCP | IPPROTO_UDP) {
            return Peer::Foreign;
        }
        // The source is not chosen yet; a listener does not depend on it.
        let sk: *mut bpf_sock = look_up!(self.context.as_ptr(), attempt, &attempt.addr);
        if sk.is_null() {
            return Peer::Nobody;
        }
        // SAFETY: a referenced socket and a socket-storage map; no value is created.
        let tag = unsafe { bpf_sk_storage_get(tags(), sk.cast(), core::ptr::null_mut(), 0) }
            .cast::<Tag>();
        let mut peer = Peer::Foreign;
        if !tag.is_null() {
            // SAFETY: checked for null; the storage lives as long as the referenced socket.
            let agent = unsafe { (*tag).agent };
            if agent == self.agent {
                peer = Peer::Own;
            }
        }
        // SAFETY: the reference from the look-up, given back once.
        unsafe { bpf_sk_release(sk.cast()) };
        peer
    }
}

/// By cgroup, at egress.
pub struct ByCgroup<'a> {
    pub context: &'a SkBuffContext,
    pub agent: u32,
    pub source: &'a Addr,
}

impl FindPeer for ByCgroup<'_> {
    #[inline(never)]
    fn find(&self, attempt: &Attempt) -> Peer {
        if !matches!(attempt.protocol, IPPROTO_TCP | IPPROTO_UDP) {
            return Peer::Foreign;
        }
        let sk: *mut bpf_sock = look_up!(self.context.as_ptr(), attempt, self.source);
        if sk.is_null() {
            return Peer::Nobody;
        }
        let agent = identity::of_sock(sk);
        // SAFETY: the reference from the look-up, given back once.
        unsafe { bpf_sk_release(sk.cast()) };
        if agent == self.agent {
            Peer::Own
        } else {
            Peer::Foreign
        }
    }
}

/// As the question says, for the judge.
pub struct Told(pub Peer);

impl FindPeer for Told {
    #[inline(always)]
    fn find(&self, _: &Attempt) -> Peer {
        self.0
    }
}
