//! What systemd makes of `IPAddressDeny=any` with `IPAddressAllow=`: packets only, both ways, one
//! longest-prefix match on the bare address, loaded by the helper. After its source
//! (`src/core/bpf-firewall.c`); no ports, no protocols, no word on connect.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::bpf_skb_load_bytes,
    macros::{cgroup_skb, map},
    maps::{LpmTrie, lpm_trie::Key},
    programs::SkBuffContext,
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const ETH_P_IP: u16 = 0x0800;

/// Addresses that may be talked to. Written by the bench, and sized by it.
#[map(name = "af_allow")]
static ALLOW: LpmTrie<[u8; 4], u64> = LpmTrie::with_max_entries(1, 0);

/// Packets that leave.
#[cgroup_skb(egress)]
pub fn af_egress(ctx: SkBuffContext) -> i32 {
    judge(&ctx, DESTINATION)
}

/// Packets that arrive.
#[cgroup_skb(ingress)]
pub fn af_ingress(ctx: SkBuffContext) -> i32 {
    judge(&ctx, SOURCE)
}

#[inline(always)]
fn judge(ctx: &SkBuffContext, offset: u32) -> i32 {
    let protocol = field!(ctx.skb.skb, protocol);
    if protocol != u32::from(ETH_P_IP.to_be()) {
        return REFUSE;
    }
    let mut addr = [0_u8; 4];
    // SAFETY: a context, and a buffer on the stack with its length.
    let read = unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset, addr.as_mut_ptr().cast(), 4) };
    if read == 0 && ALLOW.get(Key::new(32, addr)).is_some() {
        PASS
    } else {
        REFUSE
    }
}
