//! The embedded object: what it must contain, how its maps are sized, and loading it.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use agent_ebpf::abi::{
    ACCESS_ENTRIES, ASKERS, Access, AccessKey, AgentName, AgentRow, Answer, Asked, Asker, Budget,
    CACHE_PLACES, Counters, Endpoint, EndpointKey, FOLD_SLOTS, Fold, Guardian, HOMES, Home, Leaf,
    OWNERS, Owner, Question, RING_BYTES, RuleSet, ScopeKey, Slots, Tag, USED_BYTES,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapInfo, MapType},
    programs::{Program, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use nix::{
    sched::{self, CloneFlags},
    unistd,
};

use super::{Capacity, OpenError, Tuning, pins::map_at};

/// The object as built beside this binary.
pub static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/agent-ebpf"));

/// A program, and the hook it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// The programs that turn lookups to the DNS guard, beside what connect and egress do. They are
/// attached while some agent uses names.
pub const DNS_HOOKS: [Expected; 6] = [
    Expected {
        program: "remit_sendmsg4",
        hook: "cgroup/sendmsg4",
        attach_type: 14,
    },
    Expected {
        program: "remit_sendmsg6",
        hook: "cgroup/sendmsg6",
        attach_type: 15,
    },
    Expected {
        program: "remit_recvmsg4",
        hook: "cgroup/recvmsg4",
        attach_type: 19,
    },
    Expected {
        program: "remit_recvmsg6",
        hook: "cgroup/recvmsg6",
        attach_type: 20,
    },
    Expected {
        program: "remit_peer4",
        hook: "cgroup/getpeername4",
        attach_type: 29,
    },
    Expected {
        program: "remit_peer6",
        hook: "cgroup/getpeername6",
        attach_type: 30,
    },
];

/// Every hook of a fence, the DNS guard's last.
pub fn all_hooks() -> impl Iterator<Item = Expected> {
    HOOKS.into_iter().chain(DNS_HOOKS)
}

/// The unattached program that answers questions.
pub const JUDGE: &str = "remit_judge";

/// All programs of the object, those that the verifier takes longest for first.
const LOADED: [&str; 13] = [
    "remit_egress",
    JUDGE,
    "remit_connect4",
    "remit_connect6",
    "remit_create",
    "remit_bind4",
    "remit_bind6",
    "remit_sendmsg4",
    "remit_sendmsg6",
    "remit_recvmsg4",
    "remit_recvmsg6",
    "remit_peer4",
    "remit_peer6",
];

/// A map: name, size of key and value in the kernel, entries.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Name.
    pub name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    entries: Option<u32>,
    /// Whether the daemon chooses how many entries it has; a pinned one keeps its own.
    is_sized: bool,
}

/// The maps whose entries follow from the registry's size.
const SIZED: [&str; 10] = [
    "claims",
    "agents",
    "names",
    "rows",
    "exacts",
    "prefixes",
    "rulesets",
    "counters",
    "budgets",
    "endpoints",
];

/// Every map of the object.
pub fn shapes(capacity: &Capacity) -> [Shape; 26] {
    let map = |name, kind, key, value, entries| Shape {
        name,
        kind,
        key,
        value,
        entries: Some(entries),
        is_sized: SIZED.contains(&name),
    };
    let storage = |name, value| Shape {
        name,
        kind: MapType::SkStorage,
        key: 4,
        value,
        entries: None,
        is_sized: false,
    };
    let scope = size_of::<ScopeKey>();
    use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray, RingBuf};
    [
        map("claims", Hash, 8, 4, capacity.claims),
        map("epoch", Array, 4, 8, 2),
        map("agents", Array, 4, 8, capacity.agents),
        map("names", Array, 4, size_of::<AgentName>(), capacity.agents),
        map("rows", Array, 4, size_of::<AgentRow>(), capacity.rows),
        map("exacts", Hash, scope, size_of::<Leaf>(), capacity.addresses),
        map(
            "prefixes",
            LpmTrie,
            4 + scope,
            size_of::<Leaf>(),
            capacity.prefixes,
        ),
        map(
            "rulesets",
            Array,
            4,
            size_of::<RuleSet>(),
            capacity.rule_sets,
        ),
        map("cache", PerCpuArray, 4, size_of::<Slots>(), CACHE_PLACES),
        map(
            "access",
            Hash,
            size_of::<AccessKey>(),
            size_of::<Access>(),
            ACCESS_ENTRIES,
        ),
        map("used", RingBuf, 0, 0, USED_BYTES),
        map("beyond", PerCpuArray, 4, size_of::<Access>(), 1),
        map("homes", PerCpuArray, 4, size_of::<Home>(), HOMES),
        map(
            "counters",
            PerCpuArray,
            4,
            size_of::<Counters>(),
            capacity.agents,
        ),
        map("folds", PerCpuArray, 4, size_of::<Fold>(), FOLD_SLOTS),
        map(
            "budgets",
            PerCpuArray,
            4,
            size_of::<Budget>(),
            capacity.agents,
        ),
        map("owners", Array, 4, size_of::<Owner>(), OWNERS),
        storage("tags", size_of::<Tag>()),
        map(
            "endpoints",
            Hash,
            size_of::<EndpointKey>(),
            size_of::<Endpoint>(),
            capacity.claims,
        ),
        storage("guards", size_of::<Guardian>()),
        storage("asked", size_of::<Asked>()),
        map(
            "askers",
            LruHash,
            size_of::<Asker>(),
            size_of::<Asked>(),
            ASKERS,
        ),
        map("wakes", PerCpuArray, 4, 8, 1),
        map("events", RingBuf, 0, 0, RING_BYTES),
        map("question", Array, 4, size_of::<Question>(), 1),
        map("answer", Array, 4, size_of::<Answer>(), 1),
    ]
}

/// The sizes that the maps of a set have that is taken over. A pinned map keeps its size, so a
/// registry that fits into it must not be refused for room to grow, and what lies past a smaller
/// capacity is in force all the same.
pub fn sizes(maps: &Path) -> Result<Capacity, OpenError> {
    let size = |name: &'static str| -> Result<u32, OpenError> {
        let path = maps.join(name);
        let unusable = |source| OpenError::Pins {
            path: path.clone(),
            source,
        };
        let map = map_at(&path).map_err(unusable)?;
        let info = map.info().map_err(|source| OpenError::Map {
            name,
            source: Box::new(source.into()),
        })?;
        Ok(info.max_entries())
    };
    Ok(Capacity {
        agents: size("agents")?,
        rows: size("rows")?,
        claims: size("claims")?,
        addresses: size("exacts")?,
        prefixes: size("prefixes")?,
        rule_sets: size("rulesets")?,
    })
}

impl Shape {
    /// Why this map cannot stand in, in words; nothing when it can. Of maps whose size follows
    /// from the registry any size will do, but where `agents` have to fit, for those by agent.
    pub fn misfit(&self, info: &MapInfo, agents: u32) -> Option<String> {
        let name = self.name;
        if info.map_type().ok() != Some(self.kind) {
            return Some(format!("map `{name}` is of another type"));
        }
        for (what, found, wanted) in [
            ("key", info.key_size(), self.key),
            ("value", info.value_size(), self.value),
        ] {
            if found as usize != wanted {
                return Some(format!(
                    "map `{name}` has a {what} of {found} bytes, not {wanted}"
                ));
            }
        }
        let has = info.max_entries();
        match self.entries {
            Some(_) if self.is_sized => {
                let is_by_agent = matches!(name, "agents" | "names" | "counters" | "budgets");
                (is_by_agent && has < agents)
                    .then(|| format!("map `{name}` holds {has} entries, not {agents}"))
            }
            Some(entries) if has != entries => {
                Some(format!("map `{name}` holds {has} entries, not {entries}"))
            }
            Some(_) | None => None,
        }
    }
}

/// Loads `object` into the kernel with its maps pinned in `maps`; maps already pinned there are
/// taken over, and the caller has compared their shapes (the library does not).
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
    let current: u8 = skb_current();
    let log_level: u8 = tuning.kernel_log;
    let accounts = u8::from(tuning.accounts);
    let event_rate = u64::from(tuning.events_per_second.max(1));
    let mut loader = loader();
    loader
        .override_global("SKB_CURRENT", &current, true)
        .override_global("EVENT_RATE", &event_rate, true)
        .override_global("ACCOUNTS", &accounts, true)
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
    load_programs(&mut ebpf)?;
    Ok(ebpf)
}

/// A loader that has not read the types of the running kernel. The library reads all of them for
/// each loader, which takes 60 ms, a third of `remit run --policy`; only relocations by type need
/// them, and Rust makes none. It cannot be told so, but it does without where it does not find
/// them: so it is made by a thread that sees an all but empty root directory and ends at once. Where that
/// is not allowed, it takes its time.
pub fn loader<'a>() -> EbpfLoader<'a> {
    let apart = thread::spawn(|| {
        // The thread gets a root of its own; no other thread's changes.
        let empty = "/proc/self/fdinfo";
        let alone = sched::unshare(CloneFlags::CLONE_FS).and_then(|()| unistd::chroot(empty));
        if let Err(error) = alone {
            tracing::debug!(message = "The kernel's types are read for nothing.", %error);
        }
        EbpfLoader::new()
    });
    apart.join().unwrap_or_else(|_| EbpfLoader::new())
}

/// Has the kernel verify and compile the programs, as many at a time as there are processors: it
/// takes nearly all of the time of a start. The verifier takes no lock for privileged callers.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), OpenError> {
    let mut waiting: Vec<(&'static str, &mut Program)> = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        let known = LOADED.iter().find(|known| **known == name);
        waiting.extend(known.map(|known| (*known, program)));
    }
    if let Some(missing) = LOADED
        .iter()
        .find(|known| waiting.iter().all(|(name, _)| name != *known))
    {
        return Err(OpenError::HookMissing { program: missing });
    }
    // The longest first, from the end.
    let rank = |name: &str| LOADED.iter().position(|known| *known == name);
    waiting.sort_by_key(|(name, _)| std::cmp::Reverse(rank(name)));
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let workers = workers.min(waiting.len());
    let queue = Mutex::new(waiting);
    let work = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((name, program)) = next else {
                return Ok(());
            };
            load_program(program, name)?;
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let own = work();
        let all = others.into_iter().map(|other| {
            other.join().unwrap_or_else(|_| {
                Err(OpenError::SelfTest(
                    "loading the programs failed".to_owned(),
                ))
            })
        });
        all.fold(own, Result::and)
    })
}

/// Has the kernel verify one program.
pub fn load_program(program: &mut Program, name: &'static str) -> Result<(), OpenError> {
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

/// Every map with its id, and a descriptor of its own.
pub fn handles(
    ebpf: &Ebpf,
    capacity: &Capacity,
) -> Result<Vec<(&'static str, u32, OwnedFd)>, OpenError> {
    let mut handles = Vec::new();
    for shape in shapes(capacity) {
        let name = shape.name;
        let map = ebpf.map(name).and_then(data);
        let map = map.ok_or(OpenError::MapMissing { name })?;
        let failed = |source: aya::maps::MapError| OpenError::Map {
            name,
            source: Box::new(source.into()),
        };
        let id = map.info().map_err(failed)?.id();
        let fd = map.fd().as_fd().try_clone_to_owned();
        let fd = fd.map_err(|source| OpenError::Pins {
            path: name.into(),
            source,
        })?;
        handles.push((name, id, fd));
    }
    Ok(handles)
}

/// The id of a map among these; 0, which no map has, for one that is not.
pub fn id_of(handles: &[(&'static str, u32, OwnedFd)], wanted: &str) -> u32 {
    handles
        .iter()
        .find(|(name, ..)| *name == wanted)
        .map_or(0, |(_, id, _)| *id)
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
