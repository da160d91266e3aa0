//! Every packet that leaves a governed socket: the second line. It judges what connect never saw
//! (unconnected UDP, raw, ICMP, SCTP, replies) and what has changed since connect did.

use agent_ebpf::{
    abi::{Addr, Cause, Event, Hook, Reason, Witness},
    decide::{
        Attempt, Decision, decide,
        packet::{self, Bytes, Packet},
    },
};
use aya_ebpf::{
    EbpfContext as _,
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{bpf_get_current_cgroup_id, bpf_get_socket_cookie, bpf_skb_cgroup_id},
    },
    macros::cgroup_skb,
    programs::SkBuffContext,
};

use super::{
    cache, emit, identity,
    maps::{self, OWNERS_MAP, Tables, skb_current},
    peer::ByCgroup,
    verdict::{self, Outcome, settle},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// The packet's linear part, by direct access: a fraction of a nanosecond a read.
struct Linear {
    data: usize,
    end: usize,
}

impl Bytes for Linear {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.data + offset;
        if start + N > self.end {
            return None;
        }
        // SAFETY: within the linear part by the check above, which the verifier insists on.
        Some(unsafe { (start as *const [u8; N]).read_unaligned() })
    }
}

/// The same through the helper, for headers that lie in fragments.
struct Paged<'a>(&'a SkBuffContext);

impl Bytes for Paged<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset).ok()
    }
}

#[inline(always)]
fn read(ctx: &SkBuffContext) -> Result<Packet, Cause> {
    // SAFETY: the context as the kernel gave it.
    let data = unsafe { (&raw const (*ctx.skb.skb).data).read_volatile() } as usize;
    // SAFETY: as above.
    let end = unsafe { (&raw const (*ctx.skb.skb).data_end).read_volatile() } as usize;
    match packet::parse(&Linear { data, end }) {
        Err(Cause::ShortPacket) => packet::parse(&Paged(ctx)),
        told => told,
    }
}

/// `cgroup_skb/egress`.
#[cgroup_skb(egress)]
pub fn remit_egress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context as the kernel gave it.
    let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
    let packet = match read(&ctx) {
        Ok(packet) => packet,
        Err(cause) => return refuse_unread(&ctx, cgroup, cause),
    };
    let question = cache::Question {
        cgroup,
        addr: &packet.destination,
        port: packet.port,
        protocol: packet.protocol,
    };
    if let Some(agent) = cache::hit(&question) {
        emit::allowed(agent);
        return PASS;
    }

    let epoch = maps::epoch();
    let agent = identity::of_skb(skb);
    let word = maps::word(agent);
    let now = cache::boot_now();
    let attempt = Attempt {
        addr: packet.destination.effective(),
        port: packet.port,
        local_port: packet.source_port,
        protocol: packet.protocol,
        hook: Hook::Egress,
        opening: packet.opening,
        now,
    };
    let (decision, policy) = match maps::row(word) {
        Some(row) => {
            let peer = ByCgroup {
                context: &ctx,
                agent,
                source: packet.source,
            };
            (decide(&Tables { peer }, row, &attempt), row.policy)
        }
        None => verdict::no_row(),
    };
    let mut event = emit::blank(Hook::Egress, agent, cgroup, now);
    match settle(decision, &mut event) {
        Outcome::Pass { until, cacheable } => {
            if cacheable {
                cache::remember(&question, agent, word, epoch, now, until);
            }
            emit::allowed(agent);
            PASS
        }
        outcome => {
            event.policy = policy;
            event.addr = packet.destination;
            event.source = packet.source;
            event.port = packet.port;
            event.local_port = packet.source_port;
            event.protocol = packet.protocol;
            event.family = if packet.destination.is_v4() { 2 } else { 10 };
            let refused = matches!(outcome, Outcome::Refuse);
            report(&ctx, &mut event, refused);
            if refused { DROP } else { PASS }
        }
    }
}

/// Refuses a packet whose destination cannot be told.
#[inline(always)]
fn refuse_unread(ctx: &SkBuffContext, cgroup: u64, cause: Cause) -> i32 {
    let agent = identity::of_skb(ctx.skb.skb);
    let mut event = emit::blank(Hook::Egress, agent, cgroup, cache::boot_now());
    let Outcome::Refuse = settle(Decision::Fault(cause), &mut event) else {
        return DROP;
    };
    // What was read is not trusted, but the destination field helps whoever reads the log.
    if let Some([version]) = Paged(ctx).read::<1>(0) {
        if version >> 4 == 4 {
            event.family = 2;
            if let Some(octets) = Paged(ctx).read::<4>(16) {
                event.addr = Addr::v4(octets);
            }
        } else if let Some(octets) = Paged(ctx).read::<16>(24) {
            event.family = 10;
            event.addr = Addr::from_octets(octets);
        }
    }
    report(ctx, &mut event, true);
    DROP
}

/// Names the process as well as this kernel allows, tells translation apart, and reports.
#[inline(always)]
fn report(ctx: &SkBuffContext, event: &mut Event, refused: bool) {
    // SAFETY: the context as the kernel gave it.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the value is read at once; an LRU slot that is reused meanwhile gives a wrong name
    // at worst.
    if let Some(owner) = unsafe { OWNERS_MAP.get(cookie) } {
        emit::name_owner(event, owner);
        // A TCP socket sends only where connect let it go, unless its packets are translated on
        // output. UDP cannot be told apart from a `sendto` elsewhere.
        let moved = owner.connected == 1
            && event.protocol == 6
            && (owner.port != event.port
                || owner.addr.words[3] != event.addr.words[3]
                || owner.addr.words[2] != event.addr.words[2]
                || owner.addr.words[1] != event.addr.words[1]
                || owner.addr.words[0] != event.addr.words[0]);
        if moved && refused && event.reason == Reason::OutOfScope as u8 {
            event.reason = Reason::Translated as u8;
        }
    }
    name_sender(event);
    emit::report(event);
    aya_log_ebpf::debug!(ctx, "egress: agent {} reason {}", event.agent, event.reason);
}

/// Names the running task where the kernel lets a packet hook ask, and it is the sender: in a
/// softirq it is whoever was interrupted, so its cgroup must be the socket's.
#[inline(always)]
fn name_sender(event: &mut Event) {
    let level = skb_current();
    if level == 0 {
        return;
    }
    // SAFETY: no arguments.
    if unsafe { bpf_get_current_cgroup_id() } != event.cgroup {
        return;
    }
    let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    if pid != event.pid {
        event.comm = [0; 16];
    }
    event.pid = pid;
    event.witness = Witness::Current as u8;
    if level >= 2 {
        event.uid = bpf_get_current_uid_gid() as u32;
        event.comm = bpf_get_current_comm().unwrap_or([0; 16]);
    }
}
