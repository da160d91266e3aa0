//! Capacities and bounds, each with the reason for its number.

/// Rules in one block (a power of two). Disjoint port intervals of one address rarely exceed a
/// handful, and every look-up compares all slots of a block.
pub const RULES_PER_SET: usize = 8;
/// Blocks that one address may chain: 64 rules. The compiler refuses an address that needs more.
pub const SETS_PER_ADDRESS: usize = 8;
/// Ancestors looked at. `cgroup.max.depth` can be larger, but a selector this deep is refused.
pub const MAX_LEVELS: u32 = 32;
/// Places of the per-CPU allow cache (a power of two), two slots each: 80 KiB a CPU.
pub const CACHE_PLACES: u32 = 512;
/// One packet in [`super::Slot::passed`]. The bytes below it are 64 GiB and the packets above it 268
/// million, more than one processor sends in the second that a slot lives.
pub const PACKET: u64 = 1 << 36;
/// Bytes of the ring `used`: 4 MiB hold 74,000 records, which the daemon takes every few
/// milliseconds while there are any.
pub const USED_BYTES: u32 = 4 << 20;
/// Destinations of all agents together that found no room in that ring and that the daemon has not
/// taken yet: it does once a second. What finds no room here is counted.
pub const ACCESS_ENTRIES: u32 = 65_536;
/// Slots of the per-CPU memory of whose a cgroup is (a power of two): 8 KiB a CPU.
pub const HOMES: u32 = 256;
/// Ticks (`jiffies`) for which that memory is trusted: a quarter of a second at a tick of one
/// millisecond, two and a half seconds at ten.
pub const HOME_TICKS: u64 = 250;
/// A deadline nearer than this, in nanoseconds, is compared with the clock for every packet; one
/// farther off once a tick, which is ten milliseconds at most (`CONFIG_HZ` is 100 or more).
pub const TICK_NANOS: u64 = 20_000_000;
/// Slots of the per-CPU fold table (a power of two).
pub const FOLD_SLOTS: u32 = 256;
/// An allow verdict is trusted this long at most, in nanoseconds of boot time.
pub const CACHE_NANOS: u64 = 1_000_000_000;
/// Repeats within this time fold into one event, in nanoseconds.
pub const FOLD_NANOS: u64 = 1_000_000_000;
/// Bytes of the event ring: 16 MiB hold about 100,000 events, far beyond what the per-agent rate
/// lets through between two drains.
pub const RING_BYTES: u32 = 16 << 20;
/// Sockets whose owner is remembered, for naming the process behind a packet (a power of two). A
/// socket's place follows from its cookie, which the kernel counts up: the latest ones are known.
/// Losing an owner costs a name in a log line, never a verdict.
pub const OWNERS: u32 = 32_768;
/// The pseudo-agent of processes under a root that no agent claims.
pub const UNREGISTERED: u32 = 0;
/// `entry` of a verdict that no entry decided.
pub const NO_ENTRY: u32 = u32::MAX;
/// `entry` of a verdict that the loopback rule decided.
pub const LOOPBACK_ENTRY: u32 = u32::MAX - 1;
/// `entry` of a rule that has the one of the address it was found by ([`super::Leaf`]).
pub const INHERITED: u32 = u32::MAX - 2;
/// A deadline that never comes.
pub const NEVER: u64 = u64::MAX;
/// `agent` of a question that asks for the layout: the answer's `row` is [`super::FINGERPRINT`] and
/// its `entry` [`super::ABI_VERSION`], as the loaded object has them.
pub const LAYOUT_QUESTION: u32 = u32::MAX;
/// Bits of an agent's word (value of `agents`) that index `rows`; the rest is a generation, so that
/// no two states of an agent ever have the same word.
pub const ROW_INDEX_BITS: u32 = 24;
