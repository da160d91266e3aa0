//! The embedded object: what it must contain, how its maps are sized, and loading it.

use std::path::Path;

use agent_ebpf::abi::{
    AgentName, AgentRow, Answer, Budget, CACHE_SLOTS, Counters, FOLD_SLOTS, Fold, OWNERS, Owner,
    Question, RING_BYTES, RuleSet, ScopeKey, Slot, Tag,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapInfo},
    programs::{Program, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};

use super::{Capacity, OpenError, Tuning};

/// The object as built beside this binary.
pub static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/agent-ebpf"));

/// A program, and the hook it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Its name in the object and in the kernel.
    pub program: &'static str,
    /// The hook's name, as in events and `status`.
    pub hook: &'static str,
    /// `enum bpf_attach_type` of the kernel.
    pub attach_type: u32,
}

/// The programs that make a fence. All of them must load and attach.
pub const HOOKS: [Expected; 6] = [
    Expected {
        program: "remit_connect4",
        hook: "cgroup/connect4",
        attach_type: 10,
    },
    Expected {
        program: "remit_connect6",
        hook: "cgroup/connect6",
        attach_type: 11,
    },
    Expected {
        program: "remit_egress",
        hook: "cgroup_skb/egress",
        attach_type: 1,
    },
    Expected {
        program: "remit_create",
        hook: "cgroup/sock_create",
        attach_type: 2,
    },
    Expected {
        program: "remit_bind4",
        hook: "cgroup/post_bind4",
        attach_type: 12,
    },
    Expected {
        program: "remit_bind6",
        hook: "cgroup/post_bind6",
        attach_type: 13,
    },
];

/// The unattached program that answers questions.
pub const JUDGE: &str = "remit_judge";

/// A map: name, size of key and value in the kernel, entries.
struct Shape {
    name: &'static str,
    key: usize,
    value: usize,
    entries: Option<u32>,
}

fn shapes(capacity: &Capacity) -> [Shape; 18] {
    let map = |name, key, value, entries| Shape {
        name,
        key,
        value,
        entries: Some(entries),
    };
    [
        map("claims", 8, 4, capacity.claims),
        map("epoch", 4, 8, 1),
        map("agents", 4, 8, capacity.agents),
        map("names", 4, size_of::<AgentName>(), capacity.agents),
        map("rows", 4, size_of::<AgentRow>(), capacity.rows),
        map("exacts", size_of::<ScopeKey>(), 4, capacity.addresses),
        map("prefixes", 4 + size_of::<ScopeKey>(), 4, capacity.prefixes),
        map("rulesets", 4, size_of::<RuleSet>(), capacity.rule_sets),
        map("cache", 4, size_of::<Slot>(), CACHE_SLOTS),
        map("counters", 4, size_of::<Counters>(), capacity.agents),
        map("folds", 4, size_of::<Fold>(), FOLD_SLOTS),
        map("budgets", 4, size_of::<Budget>(), capacity.agents),
        map("owners", 8, size_of::<Owner>(), OWNERS),
        Shape {
            name: "tags",
            key: 4,
            value: size_of::<Tag>(),
            entries: None,
        },
        map("wakes", 4, 8, 1),
        map("events", 0, 0, RING_BYTES),
        map("question", 4, size_of::<Question>(), 1),
        map("answer", 4, size_of::<Answer>(), 1),
    ]
}

/// Loads `object` into the kernel with its maps pinned in `maps`; maps already pinned there are
/// taken over, after their shapes have been compared (the library does not).
pub fn load(
    object: &[u8],
    maps: &Path,
    capacity: &Capacity,
    tuning: &Tuning,
) -> Result<Ebpf, OpenError> {
    if object.is_empty() {
        return Err(OpenError::ObjectMissing);
    }
    let shapes = shapes(capacity);
    for shape in &shapes {
        let path = maps.join(shape.name);
        if path.exists() {
            let info = MapInfo::from_pin(&path).map_err(|source| OpenError::Map {
                name: shape.name,
                source: Box::new(source.into()),
            })?;
            check(shape, &info)?;
        }
    }

    let current: u8 = skb_current();
    let log_level: u8 = tuning.kernel_log;
    let event_rate = u64::from(tuning.events_per_second.max(1));
    let mut loader = EbpfLoader::new();
    loader
        .override_global("SKB_CURRENT", &current, true)
        .override_global("EVENT_RATE", &event_rate, true)
        .override_global("AYA_LOG_LEVEL", &log_level, false);
    for shape in &shapes {
        if let Some(entries) = shape.entries {
            loader.map_max_entries(shape.name, entries);
        }
        loader.map_pin_path(shape.name, maps.join(shape.name));
    }
    let mut ebpf = loader
        .load(object)
        .map_err(|source| OpenError::Load(Box::new(source)))?;

    for shape in &shapes {
        let map = ebpf
            .map(shape.name)
            .ok_or(OpenError::MapMissing { name: shape.name })?;
        let info = data(map)
            .ok_or(OpenError::MapMissing { name: shape.name })?
            .info()
            .map_err(|source| OpenError::Map {
                name: shape.name,
                source: Box::new(source.into()),
            })?;
        check(shape, &info)?;
    }
    for expected in &HOOKS {
        load_program(&mut ebpf, expected.program)?;
    }
    load_program(&mut ebpf, JUDGE)?;
    Ok(ebpf)
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), OpenError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(OpenError::HookMissing { program: name })?;
    let loaded = match program {
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => return Err(OpenError::HookMissing { program: name }),
    };
    loaded.map_err(|source| OpenError::Program {
        program: name,
        source: Box::new(source),
    })
}

/// Compares a map in the kernel with what this binary was built for.
fn check(shape: &Shape, info: &MapInfo) -> Result<(), OpenError> {
    let mismatch = |what, found: u32, wanted: usize| OpenError::Layout {
        name: shape.name,
        what,
        found,
        wanted,
    };
    // The kernel gives storage maps an `int` key, and rings none at all.
    if info.key_size() as usize != shape.key {
        return Err(mismatch("key", info.key_size(), shape.key));
    }
    if info.value_size() as usize != shape.value {
        return Err(mismatch("value", info.value_size(), shape.value));
    }
    match shape.entries {
        Some(entries) if info.max_entries() < entries => Err(OpenError::Capacity {
            name: shape.name,
            has: info.max_entries(),
            needs: entries,
        }),
        _ => Ok(()),
    }
}

/// The data behind a map of any kind the object has.
pub fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data) => Some(data),
        _ => None,
    }
}

/// How much of the current task a packet hook may ask this kernel for (see the object's
/// `SKB_CURRENT`). Without CAP_BPF the probe fails, and the answer is the least.
fn skb_current() -> u8 {
    let has = |helper| is_helper_supported(ProgramType::CgroupSkb, helper).unwrap_or(false);
    if !has(BpfHelper::BPF_FUNC_get_current_pid_tgid)
        || !has(BpfHelper::BPF_FUNC_get_current_cgroup_id)
    {
        return 0;
    }
    if has(BpfHelper::BPF_FUNC_get_current_comm) && has(BpfHelper::BPF_FUNC_get_current_uid_gid) {
        2
    } else {
        1
    }
}
