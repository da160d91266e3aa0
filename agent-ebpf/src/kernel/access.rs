//! What agents reach, and how much: counted in the slots of the allow cache, where a hit has just
//! been, and carried from there to the daemon when the slot goes to another tenant or is written
//! anew, which is once a second for a flow that lasts.
//!
//! A hit adds without a lock: of two contexts of a CPU that meet within a nanosecond one packet may
//! go uncounted or be counted to the slot's next tenant. That is the price of costing nothing;
//! decisions (`counters`) are exact.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use agent_ebpf::abi::{Access, AccessKey, Addr, PACKET, Slot, Usage};

use super::{
    cache::{REFUSAL, get, set},
    maps::{ACCESS, BEYOND, USED, accounts},
};

/// The daemon comes by itself.
const NO_WAKEUP: u64 = 1;
/// A value that is there already is left alone.
const BPF_NOEXIST: u64 = 1;

/// What one use of a slot adds.
#[derive(Clone, Copy)]
pub struct Use {
    /// For [`Slot::passed`].
    pub passed: u64,
    /// For [`Slot::extra`].
    pub connections: u32,
}

impl Use {
    /// A connection.
    pub const CONNECTION: Self = Self {
        passed: 0,
        connections: 1,
    };

    /// A packet of this length.
    #[inline(always)]
    pub const fn packet(length: u32) -> Self {
        Self {
            passed: PACKET | length as u64,
            connections: 0,
        }
    }
}

/// Counts a packet that passed by a slot.
#[inline(always)]
pub fn passed(slot: *mut Slot, length: u32) {
    let passed = get!(slot.passed).wrapping_add(PACKET | u64::from(length));
    set!(slot.passed = passed);
}

/// Counts a connection that began by a slot.
#[inline(always)]
pub fn connected(slot: *mut Slot) {
    let connections = get!(slot.extra).wrapping_add(1);
    set!(slot.extra = connections);
}

/// Carries what the tenant of a slot used to the daemon. The slot is being written: nobody adds.
#[inline(never)]
pub fn carry(slot: *mut Slot) -> i32 {
    let (passed, connections) = (get!(slot.passed), get!(slot.extra));
    let flow = get!(slot.flow);
    if flow & REFUSAL != 0 || (passed == 0 && connections == 0) || !accounts() {
        return 0;
    }
    let usage = Usage {
        key: AccessKey {
            agent: get!(slot.agent),
            flow,
            addr: Addr {
                words: [
                    get!(slot.addr.words[0]),
                    get!(slot.addr.words[1]),
                    get!(slot.addr.words[2]),
                    get!(slot.addr.words[3]),
                ],
            },
        },
        used: Access {
            bytes: passed & (PACKET - 1),
            packets: passed / PACKET,
            connections: u64::from(connections),
        },
    };
    match USED.reserve::<Usage>(0) {
        Some(mut record) => {
            record.write(usage);
            record.submit(NO_WAKEUP);
            0
        }
        None => sum_up(&usage),
    }
}

/// The way without room in the ring.
#[inline(never)]
fn sum_up(usage: &Usage) -> i32 {
    let key = &usage.key;
    let place = match ACCESS.get_ptr_mut(key) {
        Some(place) => Some(place),
        None => {
            // Another CPU may have been first, or there is no room: the look-up tells.
            let _known = ACCESS.insert(key, Access::zeroed(), BPF_NOEXIST).is_err();
            ACCESS.get_ptr_mut(key)
        }
    };
    let place = match place {
        Some(place) => place,
        None => match BEYOND.get_ptr_mut(0) {
            Some(place) => place,
            None => return 0,
        },
    };
    // SAFETY: a field of a checked map value.
    add(unsafe { &raw mut (*place).bytes }, usage.used.bytes);
    // SAFETY: as above.
    add(unsafe { &raw mut (*place).packets }, usage.used.packets);
    // SAFETY: as above.
    let began = unsafe { &raw mut (*place).connections };
    add(began, usage.used.connections);
    0
}

#[inline(always)]
fn add(word: *mut u64, more: u64) {
    // SAFETY: an aligned word of a checked map value, only ever changed atomically here.
    let _before = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, more) };
}
