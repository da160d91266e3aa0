//! The allow cache in front of the tables: one array look-up for traffic that was judged within
//! the last second. It holds allow verdicts only, of TCP and UDP only, and its key has all that
//! such a verdict depends on. A slot is void when the agent's word or the attribution epoch has
//! moved on since *before* its verdict was reached, or its time is up.

use agent_ebpf::abi::{Addr, CACHE_NANOS, CACHE_SLOTS, Slot};
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;

use super::maps::{CACHE, epoch, word};

/// What a verdict is remembered by.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    pub cgroup: u64,
    pub addr: &'a Addr,
    pub port: u16,
    pub protocol: u8,
}

/// Boot time in nanoseconds; it runs on during suspend, as deadlines must.
#[inline(always)]
pub fn boot_now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
fn slot(question: &Question<'_>) -> Option<*mut Slot> {
    let words = &question.addr.words;
    let mut hash = question.cgroup ^ (u64::from(words[3]) << 32 | u64::from(words[1]));
    hash ^= (u64::from(words[2]) << 32) ^ u64::from(words[0]);
    hash ^= u64::from(question.port) << 16 | u64::from(question.protocol);
    hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    CACHE.get_ptr_mut((hash >> 40) as u32 & (CACHE_SLOTS - 1))
}

macro_rules! get {
    ($slot:ident . $($field:tt)+) => {{
        // SAFETY: a checked map value; nothing is read yet.
        let place = unsafe { &raw const (*$slot).$($field)+ };
        // SAFETY: a field of it; volatile, for a softirq on this CPU may write it meanwhile.
        unsafe { place.read_volatile() }
    }};
}

macro_rules! set {
    ($slot:ident . $field:ident = $value:expr) => {{
        // SAFETY: a checked map value of this CPU; nothing is written yet.
        let place = unsafe { &raw mut (*$slot).$field };
        // SAFETY: a field of it; see `get`.
        unsafe { place.write_volatile($value) }
    }};
}

/// The agent that may, if the cache knows.
#[inline(always)]
pub fn hit(question: &Question<'_>) -> Option<u32> {
    let slot = slot(question)?;
    let sequence = get!(slot.sequence);
    if sequence & 1 != 0
        || get!(slot.cgroup) != question.cgroup
        || get!(slot.addr.words[3]) != question.addr.words[3]
        || get!(slot.addr.words[2]) != question.addr.words[2]
        || get!(slot.addr.words[1]) != question.addr.words[1]
        || get!(slot.addr.words[0]) != question.addr.words[0]
        || get!(slot.port) != question.port
        || get!(slot.protocol) != question.protocol
    {
        return None;
    }
    let agent = get!(slot.agent);
    if get!(slot.row) != word(agent)
        || get!(slot.epoch) != epoch()
        || boot_now() >= get!(slot.deadline)
        // Last: nothing was overwritten while the fields were read one by one.
        || get!(slot.sequence) != sequence
    {
        return None;
    }
    Some(agent)
}

/// Remembers an allow. `row` and `epoch` are those read before the tables were.
#[inline(always)]
pub fn remember(question: &Question<'_>, agent: u32, row: u64, epoch: u64, now: u64, until: u64) {
    let Some(slot) = slot(question) else { return };
    let sequence = get!(slot.sequence);
    if sequence & 1 != 0 {
        // Another context on this CPU was interrupted while it wrote the slot: leave it alone.
        return;
    }
    let end = now + CACHE_NANOS;
    set!(slot.sequence = sequence.wrapping_add(1));
    set!(slot.cgroup = question.cgroup);
    set!(slot.addr = *question.addr);
    set!(slot.row = row);
    set!(slot.epoch = epoch);
    set!(slot.deadline = if until < end { until } else { end });
    set!(slot.agent = agent);
    set!(slot.port = question.port);
    set!(slot.protocol = question.protocol);
    set!(slot.sequence = sequence.wrapping_add(2));
}
