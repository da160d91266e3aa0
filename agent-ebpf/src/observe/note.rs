//! Who reached what, in a map of bounded size. The first look is at the address: a process that
//! reaches none of the watched ones costs that look alone.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use agent_ebpf::abi::{Addr, EXEMPT, MAX_LEVELS, NOTES, Seen, SeenKey, WATCHED};
use aya_ebpf::{
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::{
            bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm,
            bpf_ktime_get_boot_ns,
        },
    },
    macros::map,
    maps::{Array, HashMap, LruHashMap},
};

/// Only where there is none yet.
const BPF_NOEXIST: u64 = 1;

/// Addresses of model APIs. Written by the daemon as names resolve.
#[map(name = "watched")]
static WATCHED_MAP: HashMap<Addr, u32> = HashMap::with_max_entries(WATCHED, 0);

/// Ids of the roots' cgroups. Written by the daemon. What is below them is somebody's registered
/// agent, or refused anyway, and would push the strays out of the notes.
#[map(name = "exempt")]
static EXEMPT_MAP: HashMap<u64, u32> = HashMap::with_max_entries(EXEMPT, 0);

/// The notes. Read by the daemon.
#[map(name = "seen")]
static SEEN_MAP: LruHashMap<SeenKey, Seen> = LruHashMap::with_max_entries(NOTES, 0);

/// How many notes were begun: while it stands still, the daemon need not look for new cgroups.
#[map(name = "begun")]
static BEGUN: Array<u64> = Array::with_max_entries(1, 0);

/// Notes that the running task reaches `addr`, if that is watched and the task below no root.
#[inline(always)]
pub fn note(addr: &Addr, port: u16, protocol: u8) {
    // SAFETY: nothing is read from the value.
    if unsafe { WATCHED_MAP.get(addr) }.is_none() || is_exempt() {
        return;
    }
    // SAFETY: no arguments.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let key = SeenKey {
        cgroup,
        addr: *addr,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        port,
        protocol,
        pad: 0,
    };
    if again(&key, now) {
        return;
    }
    let mut seen = Seen {
        count: 1,
        first: now,
        last: now,
        comm: [0; 16],
        uid: bpf_get_current_uid_gid() as u32,
        pad: 0,
    };
    // SAFETY: a place of 16 bytes. Where the helper fails, the name stays empty.
    let _unnamed = unsafe { bpf_get_current_comm((&raw mut seen.comm).cast(), 16) };
    match SEEN_MAP.insert(key, seen, BPF_NOEXIST) {
        Ok(()) => {
            if let Some(begun) = BEGUN.get_ptr_mut(0) {
                add_one(begun);
            }
        }
        // Another thread of the process has begun it meanwhile, or there is no room on this
        // processor: then the note is lost.
        Err(_) => {
            let _lost = again(&key, now);
        }
    }
}

/// Adds to a note that is there.
#[inline(always)]
fn again(key: &SeenKey, now: u64) -> bool {
    let Some(seen) = SEEN_MAP.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: a field of a checked map value.
    add_one(unsafe { &raw mut (*seen).count });
    // SAFETY: as above.
    let last = unsafe { &raw mut (*seen).last };
    // SAFETY: an aligned word; of two threads at once either time is as good.
    unsafe { last.write_volatile(now) };
    true
}

/// Whether the running task is in a root or below one.
#[inline(always)]
fn is_exempt() -> bool {
    for level in 1..=MAX_LEVELS as i32 {
        // SAFETY: the helper takes a number and has no other demands.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            break;
        }
        // SAFETY: nothing is read from the value.
        if unsafe { EXEMPT_MAP.get(cgroup) }.is_some() {
            return true;
        }
    }
    false
}

/// Adds one to a word of a map value, whatever else runs.
#[inline(always)]
fn add_one(word: *mut u64) {
    // The intrinsic itself, because core offers `fetch_add` only where compare-and-swap exists too.
    // SAFETY: an aligned word of a checked map value, only ever changed atomically.
    let _before = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, 1) };
}
