//! The allow cache in front of the tables: one array look-up for traffic that was judged within
//! the last second. It holds allow verdicts only, of TCP and UDP only, and its key has all that
//! such a verdict depends on. A slot is void when the agent's word or the attribution epoch has
//! moved on since *before* its verdict was reached, or its time is up.
//!
//! Refusals are remembered here too, for connect alone, so that a program that tries again and again
//! costs little. Only `out_of_scope`, which nothing but a change of the agent, of attribution or of
//! its leases turns into an allow; each of the three voids the slot.
//!
//! Reading the clock costs more than all the rest of a hit (41 ns), so a slot whose end is not near
//! has it compared once a tick. The tick stands still while the machine is suspended, the clock
//! does not: what ended meanwhile passes for the rest of one tick afterwards.

use agent_ebpf::abi::{Addr, CACHE_NANOS, CACHE_PLACES, Slot, Slots, TICK_NANOS};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_boot_ns};

use super::{
    access::{self, Use},
    maps::{CACHE, epoch, leases, word},
};

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

/// The kernel's tick: a plain load (`bpf_jiffies64` is inlined, Linux 5.6).
#[inline(always)]
pub fn tick() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_jiffies64() }
}

/// Spreads a number over the upper bits.
#[inline(always)]
pub const fn mix(value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// An address as two words.
#[inline(always)]
fn halves(addr: &Addr) -> (u64, u64) {
    let [a, b, c, d] = addr.words;
    (
        u64::from(a) | u64::from(b) << 32,
        u64::from(c) | u64::from(d) << 32,
    )
}

/// Bit of [`Slot::flow`]: the slot is a refusal.
pub const REFUSAL: u32 = 1 << 31;

impl Question<'_> {
    #[inline(always)]
    fn flow(&self) -> u32 {
        u32::from(self.protocol) << 16 | u32::from(self.port)
    }

    #[inline(always)]
    fn place(&self) -> Option<*mut Slots> {
        let (high, low) = halves(self.addr);
        let hash = mix(self.cgroup ^ high) ^ low ^ u64::from(self.flow());
        CACHE.get_ptr_mut((mix(hash) >> 48) as u32 & (CACHE_PLACES - 1))
    }
}

macro_rules! get {
    ($slot:ident . $($field:tt)+) => {{
        // SAFETY: a checked map value; nothing is read yet.
        let place = unsafe { &raw const (*$slot).$($field)+ };
        // SAFETY: a field of it; volatile, for a softirq on this CPU may write it meanwhile.
        unsafe { place.read_volatile() }
    }};
}
pub(super) use get;

macro_rules! set {
    ($slot:ident . $field:ident = $value:expr) => {{
        // SAFETY: a checked map value of this CPU; nothing is written yet.
        let place = unsafe { &raw mut (*$slot).$field };
        // SAFETY: a field of it; see `get`.
        unsafe { place.write_volatile($value) }
    }};
}
pub(super) use set;

/// One of the two slots of a place.
#[inline(always)]
fn slot(place: *mut Slots, number: usize) -> *mut Slot {
    // SAFETY: a checked map value; nothing is read.
    let slots = unsafe { &raw mut (*place).slots }.cast::<Slot>();
    // SAFETY: callers ask for the first or the second.
    unsafe { slots.add(number) }
}

/// Whether a slot is about this question, whatever it says.
#[inline(always)]
fn is_about(slot: *mut Slot, question: &Question<'_>, flow: u32) -> bool {
    let (high, low) = halves(question.addr);
    // SAFETY: a checked map value; nothing is read yet.
    let addr = unsafe { &raw const (*slot).addr }.cast::<u64>();
    // SAFETY: the address lies at a multiple of eight within the slot; see `get`.
    let first = unsafe { addr.read_volatile() };
    // SAFETY: its other half.
    let second = unsafe { addr.add(1) };
    // SAFETY: as above.
    let second = unsafe { second.read_volatile() };
    get!(slot.cgroup) == question.cgroup
        && second == low
        && first == high
        && get!(slot.flow) == flow
}

const _: () = assert!(core::mem::offset_of!(Slot, addr).is_multiple_of(8));

/// An allow that is remembered.
pub struct Hit {
    /// The agent that may.
    pub agent: u32,
    /// The slot that says so.
    pub slot: *mut Slot,
}

/// The agent that may, if this slot says so.
#[inline(always)]
fn ask(slot: *mut Slot, question: &Question<'_>) -> Option<Hit> {
    let sequence = get!(slot.sequence);
    if sequence & 1 != 0 || !is_about(slot, question, question.flow()) {
        return None;
    }
    let agent = get!(slot.agent);
    if get!(slot.row) != word(agent) || get!(slot.epoch) != epoch() {
        return None;
    }
    let tick = tick();
    if get!(slot.tick) == tick {
        // Last: nothing was overwritten while the fields were read one by one.
        return (get!(slot.sequence) == sequence).then_some(Hit { agent, slot });
    }
    let now = boot_now();
    let deadline = get!(slot.deadline);
    if now >= deadline || get!(slot.sequence) != sequence {
        return None;
    }
    if deadline - now > TICK_NANOS {
        set!(slot.tick = tick);
    }
    Some(Hit { agent, slot })
}

/// The agent that may, if the cache knows.
#[inline(always)]
pub fn hit(question: &Question<'_>) -> Option<Hit> {
    let place = question.place()?;
    match ask(slot(place, 0), question) {
        Some(hit) => Some(hit),
        None => ask(slot(place, 1), question),
    }
}

/// The agent that may not, and that was told so within the last second, if this slot says so.
#[inline(always)]
fn ask_refusal(slot: *mut Slot, question: &Question<'_>, now: u64) -> Option<u32> {
    let sequence = get!(slot.sequence);
    if sequence & 1 != 0 || !is_about(slot, question, question.flow() | REFUSAL) {
        return None;
    }
    let agent = get!(slot.agent);
    if get!(slot.row) != word(agent)
        || get!(slot.epoch) != epoch()
        || get!(slot.extra) != leases()
        || now >= get!(slot.deadline)
        || get!(slot.sequence) != sequence
    {
        return None;
    }
    Some(agent)
}

/// The agent that may not, if the cache knows.
#[inline(always)]
pub fn refusal(question: &Question<'_>, now: u64) -> Option<u32> {
    let place = question.place()?;
    match ask_refusal(slot(place, 0), question, now) {
        Some(agent) => Some(agent),
        None => ask_refusal(slot(place, 1), question, now),
    }
}

/// What a verdict was reached from: all of it read before the tables were.
#[derive(Clone, Copy)]
pub struct Basis {
    /// The agent.
    pub agent: u32,
    /// Low half of the count of leases.
    pub leases: u32,
    /// The agent's word.
    pub word: u64,
    /// The attribution epoch.
    pub epoch: u64,
    /// Boot time.
    pub now: u64,
}

/// Remembers an allow, until `until` at most, and what was used of it at once.
#[inline(always)]
pub fn remember(question: &Question<'_>, basis: &Basis, until: u64, used: Use) {
    write(question, basis, until, question.flow(), used);
}

/// Remembers an `out_of_scope`.
#[inline(always)]
pub fn remember_refusal(question: &Question<'_>, basis: &Basis, until: u64) {
    // Of a refusal the word of the connections has another meaning.
    let used = Use {
        passed: 0,
        connections: basis.leases,
    };
    write(question, basis, until, question.flow() | REFUSAL, used);
}

#[inline(always)]
fn write(question: &Question<'_>, basis: &Basis, until: u64, flow: u32, used: Use) {
    let Some(place) = question.place() else {
        return;
    };
    let (first, second) = (slot(place, 0), slot(place, 1));
    // The slot that is about the same, else the one that ends sooner, which is the older one.
    let slot = if is_about(first, question, flow) {
        first
    } else if is_about(second, question, flow) || get!(second.deadline) < get!(first.deadline) {
        second
    } else {
        first
    };
    let sequence = get!(slot.sequence);
    if sequence & 1 != 0 {
        // Another context on this CPU was interrupted while it wrote the slot: leave it alone.
        return;
    }
    let end = basis.now + CACHE_NANOS;
    set!(slot.sequence = sequence.wrapping_add(1));
    let _done = access::carry(slot);
    set!(slot.passed = used.passed);
    set!(slot.cgroup = question.cgroup);
    set!(slot.addr = *question.addr);
    set!(slot.row = basis.word);
    set!(slot.epoch = basis.epoch);
    set!(slot.deadline = if until < end { until } else { end });
    // Of the past: the next hit compares the deadline.
    set!(slot.tick = tick().wrapping_sub(1));
    set!(slot.agent = basis.agent);
    set!(slot.flow = flow);
    set!(slot.extra = used.connections);
    set!(slot.sequence = sequence.wrapping_add(2));
}
