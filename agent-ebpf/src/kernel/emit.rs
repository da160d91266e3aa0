//! Counting and reporting. Every attempt is counted, exactly, per CPU and atomically (a task can
//! be preempted between load and store). Refusals are also reported, unless a fold slot has told
//! of the same one within the last second, the agent's budget is used up, or the ring is full;
//! the daemon squares its lines with the counters and writes down what is missing.
//!
//! The record is submitted before the counter moves. So whatever the daemon finds in a counter it
//! either finds in the ring too, or it was folded or dropped.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    mem::MaybeUninit,
};

use agent_ebpf::abi::{
    Addr, Budget, Event, FOLD_NANOS, FOLD_SLOTS, Fold, Hook, OWNERS, Owner, REASONS, Verdict,
};
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
    generated::{bpf_get_current_comm, bpf_get_smp_processor_id},
};

use super::{
    cache::set,
    maps::{BUDGETS, COUNTERS, EVENTS, FOLDS, OWNERS_MAP, WAKES, event_rate, skb_current},
    wipe::wiped,
};

/// Flags of a record: do not wake the reader, or do.
const BPF_RB_NO_WAKEUP: u64 = 1;
const BPF_RB_FORCE_WAKEUP: u64 = 2;
/// A CPU wakes the reader at most this often, in nanoseconds.
const WAKE_NANOS: u64 = 1_000_000;

/// Adds one to a word of a map value, whatever else runs on this CPU.
#[inline(always)]
fn increment(word: *mut u64) {
    // The intrinsic itself, because core offers `fetch_add` only where compare-and-swap exists too.
    // SAFETY: an aligned word of a checked map value, only ever changed atomically here.
    let _before = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, 1) };
}

/// Counts an attempt that was let through.
#[inline(always)]
pub fn allowed(agent: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(agent) {
        // SAFETY: a field of a checked map value.
        increment(unsafe { &raw mut (*counters).allowed });
    }
}

/// Remembers that the running task made the socket with this cookie.
#[inline(always)]
pub fn remember_maker(cookie: u64) {
    remember(cookie, &Addr::UNKNOWN, 0, 0);
}

/// Remembers that the running task connected the socket with this cookie, and where to.
#[inline(always)]
pub fn remember_connected(cookie: u64, addr: &Addr, port: u16) {
    remember(cookie, addr, port, 1);
}

/// Two CPUs that write one slot at a time mix up two sockets whose cookies are a multiple of the
/// table's size apart: a wrong name in a log line, never a verdict.
#[inline(always)]
fn remember(cookie: u64, addr: &Addr, port: u16, connected: u8) {
    let Some(owner) = OWNERS_MAP.get_ptr_mut(cookie as u32 & (OWNERS - 1)) else {
        return;
    };
    // The cookie goes first and comes last: whoever reads meanwhile finds nothing.
    set!(owner.cookie = 0);
    set!(owner.addr = *addr);
    set!(owner.pid = pid());
    if skb_current() < 2 {
        name_at_birth(owner);
    }
    set!(owner.port = port);
    set!(owner.connected = connected);
    set!(owner.cookie = cookie);
}

/// Name and user, on kernels where a packet hook cannot ask for them later. A function of its own:
/// elsewhere nobody runs it.
#[inline(never)]
fn name_at_birth(owner: *mut Owner) {
    set!(owner.uid = bpf_get_current_uid_gid() as u32);
    // SAFETY: a field of a checked map value of 16 bytes.
    current_comm(unsafe { &raw mut (*owner).comm });
}

/// Writes the running task's name where it belongs: through a copy, the frames of a way to here
/// would be more than the 512 bytes that Linux 6.1 has for all of them.
#[inline(always)]
fn current_comm(place: *mut [u8; 16]) {
    // SAFETY: a valid place of that size. A task that has no name leaves zeroes.
    let _unnamed = unsafe { bpf_get_current_comm(place.cast(), 16) };
}

/// The running task's process id.
#[inline(always)]
pub fn pid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// What is remembered of the socket with this cookie.
#[inline(always)]
pub fn owner_of(cookie: u64) -> Option<&'static Owner> {
    let owner = OWNERS_MAP.get(cookie as u32 & (OWNERS - 1))?;
    (owner.cookie == cookie).then_some(owner)
}

/// How an event gets its process's name and user, which takes longer than all else and is done
/// only for events that are told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// It has them, or nobody can tell.
    Done,
    /// They are the running task's.
    Current,
}

/// Reports and counts an attempt that was refused or that monitor mode let through.
#[inline(never)]
pub fn report(event: &mut Event, naming: Naming) {
    if fold(event) && within_budget(event.agent, event.time) {
        if naming == Naming::Current {
            event.uid = bpf_get_current_uid_gid() as u32;
            current_comm(&raw mut event.comm);
        }
        // A full ring drops the record; the counter below still tells.
        let _dropped = EVENTS.output::<Event>(&*event, wake(event.time));
    }
    let Some(counters) = COUNTERS.get_ptr_mut(event.agent) else {
        return;
    };
    let reason = event.reason as usize;
    if reason >= REASONS {
        return;
    }
    let first = if event.verdict == Verdict::Monitored as u8 {
        // SAFETY: a field of a checked map value; nothing is read.
        unsafe { &raw mut (*counters).monitored }
    } else {
        // SAFETY: as above.
        unsafe { &raw mut (*counters).denied }
    }
    .cast::<u64>();
    // SAFETY: within the array by the check above.
    let word = unsafe { first.add(reason) };
    increment(word);
}

/// Whether a record submitted now wakes the reader, who wants to see a process before it is gone.
#[inline(always)]
fn wake(now: u64) -> u64 {
    let Some(last) = WAKES.get_ptr_mut(0) else {
        return BPF_RB_NO_WAKEUP;
    };
    // SAFETY: a checked map value of this CPU; interleaving costs a wake-up.
    let before = unsafe { last.read_volatile() };
    if now < before + WAKE_NANOS {
        return BPF_RB_NO_WAKEUP;
    }
    // SAFETY: as above.
    unsafe { last.write_volatile(now) };
    BPF_RB_FORCE_WAKEUP
}

/// Finds or takes the fold slot of an event, fills in `fold`, `generation` and `seen`, and says
/// whether a record is due.
#[inline(always)]
fn fold(event: &mut Event) -> bool {
    let words = &event.addr.words;
    let mut hash = u64::from(words[3]) << 32 | u64::from(words[1] ^ words[0]);
    hash ^= u64::from(event.agent) << 20 ^ u64::from(event.pid) << 40;
    hash ^= u64::from(event.port) << 8 | u64::from(event.hook) | u64::from(event.reason) << 4;
    hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let index = (hash >> 40) as u32 & (FOLD_SLOTS - 1);
    let Some(slot) = FOLDS.get_ptr_mut(index) else {
        return true;
    };
    // SAFETY: no arguments.
    event.fold = unsafe { bpf_get_smp_processor_id() } << 16 | index;
    // SAFETY: a checked map value of this CPU. Another context on it may interleave; then a detail
    // of a folded line is off, and the counters still square.
    let slot: &mut Fold = unsafe { &mut *slot };
    let same = slot.generation != 0
        && slot.agent == event.agent
        && slot.addr.words[3] == words[3]
        && slot.addr.words[2] == words[2]
        && slot.addr.words[1] == words[1]
        && slot.addr.words[0] == words[0]
        && slot.port == event.port
        && slot.pid == event.pid
        && slot.protocol == event.protocol
        && slot.hook == event.hook
        && slot.verdict == event.verdict
        && slot.reason == event.reason;
    if same {
        increment(&raw mut slot.seen);
        event.seen = slot.seen;
        event.generation = slot.generation;
        if event.time < slot.emitted + FOLD_NANOS {
            return false;
        }
        slot.emitted = event.time;
        return true;
    }
    slot.generation = if slot.generation == u32::MAX {
        1
    } else {
        slot.generation + 1
    };
    slot.seen = 1;
    slot.emitted = event.time;
    slot.cgroup = event.cgroup;
    slot.addr = event.addr;
    slot.agent = event.agent;
    slot.pid = event.pid;
    slot.entry = event.entry;
    slot.port = event.port;
    slot.protocol = event.protocol;
    slot.hook = event.hook;
    slot.verdict = event.verdict;
    slot.reason = event.reason;
    event.seen = 1;
    event.generation = slot.generation;
    true
}

/// Takes a token from the agent's bucket on this CPU: a second's worth at most, refilled a second
/// at a time.
#[inline(always)]
fn within_budget(agent: u32, now: u64) -> bool {
    let Some(budget) = BUDGETS.get_ptr_mut(agent) else {
        return true;
    };
    // SAFETY: a checked map value of this CPU; interleaving costs a token or a record, and records
    // that are not sent are counted.
    let budget: &mut Budget = unsafe { &mut *budget };
    if now >= budget.refilled + 1_000_000_000 {
        budget.refilled = now;
        budget.tokens = event_rate();
    }
    if budget.tokens == 0 {
        return false;
    }
    budget.tokens -= 1;
    true
}

/// A blank event for `hook`, in a `place` on the caller's stack.
#[inline(always)]
pub fn blank(
    place: &mut MaybeUninit<Event>,
    hook: Hook,
    agent: u32,
    cgroup: u64,
    time: u64,
) -> &mut Event {
    let event = wiped(place);
    event.hook = hook as u8;
    event.agent = agent;
    event.cgroup = cgroup;
    event.time = time;
    event
}
