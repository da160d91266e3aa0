//! What agents reach, and how much: counted in the slots of the allow cache, where a hit has just
//! been, and carried from there to a map when the slot goes to another tenant or is written anew,
//! which is once a second for a flow that lasts.
//!
//! A hit adds without a lock: of two contexts of a CPU that meet within a nanosecond one packet may
//! go uncounted or be counted to the slot's next tenant. That is the price of costing nothing;
//! decisions (`counters`) are exact.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use agent_ebpf::abi::{Access, AccessKey, Addr, PACKET, Slot};

use super::{
    cache::{REFUSAL, get, set},
    maps::{ACCESS, BEYOND},
};

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

/// Carries what the tenant of a slot used to the map. The slot is being written: nobody adds.
#[inline(never)]
pub fn carry(slot: *mut Slot) -> i32 {
    let (passed, connections) = (get!(slot.passed), get!(slot.extra));
    if get!(slot.flow) & REFUSAL != 0 || (passed == 0 && connections == 0) {
        return 0;
    }
    let key = AccessKey {
        agent: get!(slot.agent),
        flow: get!(slot.flow),
        addr: Addr {
            words: [
                get!(slot.addr.words[0]),
                get!(slot.addr.words[1]),
                get!(slot.addr.words[2]),
                get!(slot.addr.words[3]),
            ],
        },
    };
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
    add(unsafe { &raw mut (*place).bytes }, passed & (PACKET - 1));
    // SAFETY: as above.
    add(unsafe { &raw mut (*place).packets }, passed / PACKET);
    // SAFETY: as above.
    let began = unsafe { &raw mut (*place).connections };
    add(began, u64::from(connections));
    0
}

#[inline(always)]
fn add(word: *mut u64, more: u64) {
    // SAFETY: an aligned word of a checked map value, only ever changed atomically here.
    let _before = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, more) };
}
