//! Every packet that leaves a governed socket: the second line. It judges what connect never saw
//! (unconnected UDP, raw, ICMP, SCTP, replies) and what has changed since connect did.

use agent_ebpf::{
    abi::{Addr, Cause, Event, Hook, Reason, UNREGISTERED, Verdict, Witness},
    decide::{
        Attempt,
        packet::{self, Bytes, Packet},
    },
    verifier::{hide, hide_addr, hide8, hide16, hide32},
};
use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_socket_cookie, bpf_skb_cgroup_id},
    macros::cgroup_skb,
    programs::SkBuffContext,
};

use super::{
    access, cache, dns,
    emit::{self, Naming},
    identity,
    maps::{self, Tables, skb_current},
    peer::ByCgroup,
    verdict::{ALLOW, Ruling, rule},
    wipe::{place, wiped},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// The packet's linear part, by direct access: a fraction of a nanosecond a read.
struct Linear {
    data: usize,
    end: usize,
}

impl Bytes for Linear {
    const WALKS: bool = false;

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.data + offset;
        if start + N > self.end {
            return None;
        }
        // SAFETY: within the linear part by the check above, which the verifier insists on.
        Some(unsafe { (start as *const [u8; N]).read_unaligned() })
    }

    #[inline(always)]
    fn word(&self, offset: usize) -> Option<u32> {
        let start = self.data + offset;
        if start + 4 > self.end {
            return None;
        }
        // As one load: by bytes it would be ten instructions.
        // SAFETY: as above. Network headers lie at multiples of four, as the stack itself reads
        // them; where one did not, the processor loads it all the same, or the verifier refuses
        // the program (CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS).
        Some(unsafe { (start as *const u32).read_volatile() })
    }
}

/// The same through the helper, for headers that lie in fragments.
struct Paged<'a>(&'a SkBuffContext);

impl Bytes for Paged<'_> {
    const WALKS: bool = true;

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset).ok()
    }
}

/// Reads the headers into `packet`; returns 0, or why they cannot be told.
#[inline(never)]
fn read(ctx: &SkBuffContext, packet: &mut Packet) -> u32 {
    let data = field!(ctx.skb.skb, data) as usize;
    let end = field!(ctx.skb.skb, data_end) as usize;
    match packet::parse(&Linear { data, end }, packet) {
        Err(Cause::ShortPacket) => read_paged(ctx, packet),
        read => settle(read, packet),
    }
}

/// The same, slowly.
#[inline(never)]
fn read_paged(ctx: &SkBuffContext, packet: &mut Packet) -> u32 {
    settle(packet::parse(&Paged(ctx), packet), packet)
}

/// Hands out what was read so that it looks the same to the verifier for every kind of packet.
#[inline(always)]
fn settle(read: Result<(), Cause>, packet: &mut Packet) -> u32 {
    packet.source = hide_addr(packet.source);
    packet.destination = hide_addr(packet.destination.effective());
    packet.protocol = hide8(packet.protocol);
    packet.source_port = hide16(packet.source_port);
    packet.port = hide16(packet.port);
    packet.tcp_flags = hide8(packet.tcp_flags);
    match read {
        Ok(()) => hide32(0),
        Err(cause) => hide32(cause as u32),
    }
}

/// `cgroup_skb/egress`.
#[cgroup_skb(egress)]
pub fn remit_egress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context as the kernel gave it.
    let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
    let data = field!(skb, data) as usize;
    let end = field!(skb, data_end) as usize;
    let bytes = Linear { data, end };
    let mut headers = place();
    let packet: &mut Packet = wiped(&mut headers);
    let mut is_told = false;
    if packet::glance(&bytes, packet) {
        let question = cache::Question {
            cgroup,
            addr: &packet.destination,
            port: packet.port,
            protocol: packet.protocol,
        };
        if let Some(hit) = cache::hit(&question) {
            access::passed(hit.slot, field!(skb, len));
            emit::allowed(hit.agent);
            return PASS;
        }
        is_told = packet::complete(&bytes, packet);
    }
    let cause = if is_told {
        settle(Ok(()), packet)
    } else {
        read(&ctx, packet)
    };
    slowly(&ctx, cgroup, packet, cause)
}

/// What the cache does not know. Inlined: its frame would be one too many for Linux 6.1, which has
/// 512 bytes of stack for all frames of a way.
#[inline(always)]
fn slowly(ctx: &SkBuffContext, cgroup: u64, packet: &mut Packet, cause: u32) -> i32 {
    let mut who = Who {
        agent: UNREGISTERED,
        cgroup,
        policy: hide(0),
        now: hide(0),
        // Read before the tables are: if any of them changes meanwhile, what is remembered is
        // stale.
        epoch: maps::epoch(),
        word: hide(0),
    };
    let mut ruling = Ruling::fault(Cause::NoRow);
    if cause == 0 {
        if dns::carries(ctx, packet) != 0 {
            return PASS;
        }
        judge(ctx, packet, &mut who, &mut ruling);
    } else {
        ruling.cause = cause as u8;
        who.agent = identity::of_skb(ctx.skb.skb, cgroup);
        who.now = cache::boot_now();
        glimpse(ctx, packet);
    }
    if ruling.verdict == ALLOW {
        if ruling.cacheable != 0 {
            remember(ctx, packet, &who, ruling.until);
        }
        emit::allowed(who.agent);
        return PASS;
    }
    report(ctx, packet, &ruling, &who);
    log(ctx, who.agent, ruling.reason);
    if ruling.verdict == Verdict::Monitored as u8 {
        PASS
    } else {
        DROP
    }
}

/// Asks the tables.
#[inline(never)]
fn judge(ctx: &SkBuffContext, packet: &Packet, who: &mut Who, ruling: &mut Ruling) {
    who.agent = identity::of_skb(ctx.skb.skb, who.cgroup);
    who.word = maps::word(who.agent);
    who.now = cache::boot_now();
    let Some(row) = maps::row(who.word) else {
        return;
    };
    who.policy = row.policy;
    let attempt = Attempt {
        addr: packet.destination,
        port: packet.port,
        local_port: packet.source_port,
        protocol: packet.protocol,
        hook: Hook::Egress,
        tcp_flags: packet.tcp_flags,
        now: who.now,
    };
    let peer = ByCgroup {
        context: ctx,
        agent: who.agent,
        source: &packet.source,
    };
    rule(&Tables { peer }, row, &attempt, ruling);
    let _ = dns::spare_packet(ctx, row, &attempt, &packet.source, ruling);
}

/// Remembers an allow.
#[inline(never)]
fn remember(ctx: &SkBuffContext, packet: &Packet, who: &Who, until: u64) {
    let question = cache::Question {
        cgroup: who.cgroup,
        addr: &packet.destination,
        port: packet.port,
        protocol: packet.protocol,
    };
    let basis = cache::Basis {
        agent: who.agent,
        leases: 0,
        word: who.word,
        epoch: who.epoch,
        now: who.now,
    };
    let used = access::Use::packet(field!(ctx.skb.skb, len));
    cache::remember(&question, &basis, until, used);
}

/// For debugging; a function of its own for the sake of the stack.
#[inline(never)]
fn log(ctx: &SkBuffContext, agent: u32, reason: u8) {
    aya_log_ebpf::debug!(
        ctx,
        "egress: agent {} not allowed, reason {}",
        agent,
        reason
    );
}

/// Whose packet it is, and when.
struct Who {
    agent: u32,
    cgroup: u64,
    policy: u64,
    now: u64,
    epoch: u64,
    word: u64,
}

/// Reads what can be had of a packet whose destination cannot be told. It is not trusted, but the
/// destination field helps whoever reads the log.
#[inline(never)]
fn glimpse(ctx: &SkBuffContext, packet: &mut Packet) {
    if let Some([version]) = Paged(ctx).read::<1>(0) {
        if version >> 4 == 4 {
            if let Some(octets) = Paged(ctx).read::<4>(16) {
                packet.destination = Addr::v4(octets);
            }
        } else if let Some(octets) = Paged(ctx).read::<16>(24) {
            packet.destination = Addr::from_octets(octets);
        }
    }
}

/// Names the process as well as this kernel allows, tells translation apart, and reports.
#[inline(never)]
fn report(ctx: &SkBuffContext, packet: &Packet, ruling: &Ruling, who: &Who) {
    let mut record = place();
    let event = emit::blank(&mut record, Hook::Egress, who.agent, who.cgroup, who.now);
    ruling.fill(event);
    event.policy = who.policy;
    event.addr = packet.destination;
    event.source = packet.source;
    event.port = packet.port;
    event.local_port = packet.source_port;
    event.protocol = packet.protocol;
    event.family = if packet.destination.is_v4() { 2 } else { 10 };
    // SAFETY: the context as the kernel gave it.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some(owner) = emit::owner_of(cookie) {
        event.pid = owner.pid;
        event.uid = owner.uid;
        event.comm = owner.comm;
        event.witness = Witness::Owner as u8;
        // A TCP socket sends only where connect let it go, unless its packets are translated on
        // output. UDP cannot be told apart from a `sendto` elsewhere.
        let moved = owner.connected == 1
            && event.protocol == 6
            && (owner.port != event.port
                || owner.addr.words[3] != event.addr.words[3]
                || owner.addr.words[2] != event.addr.words[2]
                || owner.addr.words[1] != event.addr.words[1]
                || owner.addr.words[0] != event.addr.words[0]);
        if moved
            && event.verdict == Verdict::Denied as u8
            && event.reason == Reason::OutOfScope as u8
        {
            event.reason = Reason::Translated as u8;
        }
    }
    let naming = name_sender(event);
    emit::report(event, naming);
}

/// Takes the owner's name out again.
#[inline(always)]
fn unname(event: &mut Event) {
    for byte in &mut event.comm {
        // SAFETY: a byte of the event; volatile, or the compiler would call `memset`.
        unsafe { core::ptr::from_mut(byte).write_volatile(0) };
    }
}

/// Names the running task where the kernel lets a packet hook ask, and it is the sender: in a
/// softirq it is whoever was interrupted, so its cgroup must be the socket's.
#[inline(always)]
fn name_sender(event: &mut Event) -> Naming {
    let level = skb_current();
    if level == 0 || identity::current_cgroup() != event.cgroup {
        return Naming::Done;
    }
    let pid = emit::pid();
    if pid != event.pid {
        unname(event);
    }
    event.pid = pid;
    event.witness = Witness::Current as u8;
    if level >= 2 {
        Naming::Current
    } else {
        Naming::Done
    }
}
