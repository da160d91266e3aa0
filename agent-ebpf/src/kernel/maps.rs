//! Every map: what it is for, who writes it, who reads it, and why it has its kind and size.
//! Sizes marked "set at load" are chosen by the daemon from the registry.

use core::ffi::c_void;

use agent_ebpf::{
    abi::{
        ACCESS_ENTRIES, ASKERS, Access, AccessKey, Addr, AgentName, AgentRow, Answer, Asked, Asker,
        Budget, CACHE_PLACES, Counters, Endpoint, EndpointKey, FOLD_SLOTS, Fold, Guardian, HOMES,
        Home, Leaf, OWNERS, Owner, Question, RING_BYTES, ROW_INDEX_BITS, RuleSet, SPACE_BITS,
        ScopeKey, Slots, Tag, USED_BYTES,
    },
    decide::{Attempt, Peer, Rules},
};
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
};

/// Cgroup id to agent. Written by the daemon as cgroups come and go; set at load.
#[map(name = "claims")]
pub static CLAIMS: HashMap<u64, u32> = HashMap::with_max_entries(1024, 0);

/// Two words. The first goes up when an attribution changes, which makes every cached verdict
/// stale; the second when a lease is added, which makes cached refusals stale.
#[map(name = "epoch")]
pub static EPOCH: Array<u64> = Array::with_max_entries(2, 0);

/// Agent to its word: the index of its row and a generation. One aligned store flips an agent to
/// a new state, so no hook ever sees half of one. Set at load.
#[map(name = "agents")]
pub static AGENTS: Array<u64> = Array::with_max_entries(1024, 0);

/// Agent to its id. No program reads it: it is for the next daemon, and for people with bpftool.
/// Set at load.
#[map(name = "names")]
pub static NAMES: Array<AgentName> = Array::with_max_entries(1024, 0);

/// Rows. Written before the word that points to them, reused a second after it moved on. Set at
/// load.
#[map(name = "rows")]
pub static ROWS: Array<AgentRow> = Array::with_max_entries(4096, 0);

/// Exact addresses to rule sets: a hash look-up is a tenth of a cold LPM one. Not preallocated:
/// most hosts use little of it. Set at load.
#[map(name = "exacts")]
pub static EXACTS: HashMap<ScopeKey, Leaf> = HashMap::with_max_entries(16384, BPF_F_NO_PREALLOC);

/// Prefixes to rule sets; the scope's id comes first and must match in full. Set at load.
#[map(name = "prefixes")]
pub static PREFIXES: LpmTrie<ScopeKey, Leaf> = LpmTrie::with_max_entries(16384, 0);

/// Rule sets, shared by all scopes that say the same of an address. Set at load.
#[map(name = "rulesets")]
pub static RULESETS: Array<RuleSet> = Array::with_max_entries(4096, 0);

/// Allow verdicts of the last second.
#[map(name = "cache")]
pub static CACHE: PerCpuArray<Slots> = PerCpuArray::with_max_entries(CACHE_PLACES, 0);

/// What agents sent to which destination, for the daemon to take. A record costs a twentieth of
/// what a cold hash look-up does, and flows that come and go are all cold.
#[map(name = "used")]
pub static USED: RingBuf = RingBuf::with_byte_size(USED_BYTES, 0);

/// The same summed up, of what found no room in the ring: nobody has taken from it for a while. Not
/// preallocated: most hosts use little of it.
#[map(name = "access")]
pub static ACCESS: HashMap<AccessKey, Access> =
    HashMap::with_max_entries(ACCESS_ENTRIES, BPF_F_NO_PREALLOC);

/// What found no room in `access`.
#[map(name = "beyond")]
pub static BEYOND: PerCpuArray<Access> = PerCpuArray::with_max_entries(1, 0);

/// Whose the cgroups of late are, so that their ancestors need not be walked.
#[map(name = "homes")]
pub static HOMES_MAP: PerCpuArray<Home> = PerCpuArray::with_max_entries(HOMES, 0);

/// What was decided, per agent; only the programs write. Set at load.
#[map(name = "counters")]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1024, 0);

/// Refusals of late, so that repeats only count; the daemon reads what has settled.
#[map(name = "folds")]
pub static FOLDS: PerCpuArray<Fold> = PerCpuArray::with_max_entries(FOLD_SLOTS, 0);

/// Events each agent may still emit, so that one cannot drown another. Set at load.
#[map(name = "budgets")]
pub static BUDGETS: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1024, 0);

/// The processes behind the sockets of late, by socket cookie: an array, since an LRU hash takes
/// 300 ns for each new socket.
#[map(name = "owners")]
pub static OWNERS_MAP: Array<Owner> = Array::with_max_entries(OWNERS, 0);

/// Agent of each bound socket, for `loopback = "own"`.
#[btf_map(name = "tags")]
pub static TAGS: SkStorage<Tag> = SkStorage::new();

/// Where the DNS guard listens for each agent in each network namespace. Written by the daemon;
/// sized as `claims` is. Set at load.
#[map(name = "endpoints")]
pub static ENDPOINTS: HashMap<EndpointKey, Endpoint> =
    HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Which sockets are the DNS guard's own; only the daemon writes.
#[btf_map(name = "guards")]
pub static GUARDS: SkStorage<Guardian> = SkStorage::new();

/// Which resolver each socket asked whose questions were turned to the guard.
#[btf_map(name = "asked")]
pub static ASKED: SkStorage<Asked> = SkStorage::new();

/// Whose socket each question came from, for the daemon.
#[map(name = "askers")]
pub static ASKERS_MAP: LruHashMap<Asker, Asked> = LruHashMap::with_max_entries(ASKERS, 0);

/// Boot time at which this CPU last woke the daemon.
#[map(name = "wakes")]
pub static WAKES: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Records for the daemon. Each CPU wakes it at most once a millisecond, and always says which:
/// a wake-up costs 8 µs, and one left to the kernel's judgement starves a reader that others do
/// not wake. The daemon drains every few milliseconds anyway.
#[map(name = "events")]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// The question that the judge answers; written by the daemon.
#[map(name = "question")]
pub static QUESTION: Array<Question> = Array::with_max_entries(1, 0);

/// The judge's answer; read by the daemon.
#[map(name = "answer")]
pub static ANSWER: Array<Answer> = Array::with_max_entries(1, 0);

/// How much of the current task a packet hook may ask the kernel for: 0 nothing (6.1), 1 its ids
/// (6.12), 2 also its name and user (6.18). Set at load by probing for the helpers.
#[unsafe(no_mangle)]
pub static SKB_CURRENT: u8 = 0;

/// Events a second that one agent may emit on one CPU. Set at load from `log.per_agent_rate`.
#[unsafe(no_mangle)]
pub static EVENT_RATE: u64 = 200;

/// Whether what agents reach is told to the daemon: 1, or 0. Set at load from `log.access`.
#[unsafe(no_mangle)]
pub static ACCOUNTS: u8 = 1;

/// Whether [`ACCOUNTS`] is set; volatile, as below.
#[inline(always)]
pub fn accounts() -> bool {
    // SAFETY: a static that lives for ever, frozen before the program runs.
    unsafe { core::ptr::read_volatile(&raw const ACCOUNTS) != 0 }
}

/// Value of [`SKB_CURRENT`]; volatile, since the loader changes it behind the compiler's back.
#[inline(always)]
pub fn skb_current() -> u8 {
    // SAFETY: a static that lives for ever, frozen before the program runs.
    unsafe { core::ptr::read_volatile(&raw const SKB_CURRENT) }
}

/// Value of [`EVENT_RATE`].
#[inline(always)]
pub fn event_rate() -> u64 {
    // SAFETY: a static that lives for ever, frozen before the program runs.
    unsafe { core::ptr::read_volatile(&raw const EVENT_RATE) }
}

/// The storage map as the helper wants it.
#[inline(always)]
pub fn tags() -> *mut c_void {
    (&raw const TAGS).cast_mut().cast()
}

/// The agent's word, or 0 where it has none.
#[inline(always)]
pub fn word(agent: u32) -> u64 {
    match AGENTS.get_ptr(agent) {
        // SAFETY: a checked map value; volatile, for the daemon may store at any time.
        Some(word) => unsafe { word.read_volatile() },
        None => 0,
    }
}

/// The row behind a word.
#[inline(always)]
pub fn row(word: u64) -> Option<&'static AgentRow> {
    if word == 0 {
        return None;
    }
    ROWS.get(word as u32 & ((1 << ROW_INDEX_BITS) - 1))
}

/// The attribution epoch.
#[inline(always)]
pub fn epoch() -> u64 {
    match EPOCH.get_ptr(0) {
        // SAFETY: a checked map value; volatile, for the daemon may store at any time.
        Some(epoch) => unsafe { epoch.read_volatile() },
        None => 0,
    }
}

/// The count of leases ever added, its lower half.
#[inline(always)]
pub fn leases() -> u32 {
    match EPOCH.get_ptr(1) {
        // SAFETY: as above.
        Some(leases) => unsafe { leases.read_volatile() as u32 },
        None => 0,
    }
}

/// The tables as [`Rules`], with `P` to tell whose a loopback peer is.
pub struct Tables<P> {
    pub peer: P,
}

/// Tells whose socket an attempt would reach; each hook has its own way.
pub trait FindPeer {
    fn find(&self, attempt: &Attempt) -> Peer;
}

impl<P: FindPeer> Rules for Tables<P> {
    #[inline(always)]
    fn rule_set_for(&self, space: u64, addr: &Addr) -> Option<Leaf> {
        let key = ScopeKey { space, addr: *addr };
        // SAFETY: the value is plain data, copied at once; an update replaces it whole.
        if let Some(leaf) = unsafe { EXACTS.get(key) } {
            return Some(*leaf);
        }
        PREFIXES.get(Key::new(SPACE_BITS + 128, key)).copied()
    }

    #[inline(always)]
    fn rule_set(&self, index: u32) -> Option<&RuleSet> {
        RULESETS.get(index)
    }

    #[inline(always)]
    fn peer(&self, attempt: &Attempt) -> Peer {
        self.peer.find(attempt)
    }
}
