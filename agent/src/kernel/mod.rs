//! The kernel side as the daemon sees it, and the only module that names aya.
//!
//! [`Enforcer::open`] loads the object, compares every map with this binary's own layout, has the
//! loaded object state its layout, and adopts what is pinned. [`Enforcer::apply`] changes what is
//! in force in one transaction. [`Enforcer::fence`] attaches to a root. Nothing here lifts
//! anything unless it is asked to by name: when this process dies, pins keep the fence up.

mod attach;
mod error;
mod object;
mod sets;
mod sys;
mod table;

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    time::Instant,
};

use agent_ebpf::abi::{
    ABI_VERSION, Answer, Counters, Event, FINGERPRINT, FOLD_SLOTS, Fold, LAYOUT_QUESTION, Question,
};
use aya::{
    Ebpf,
    maps::{Array, MapData, PerCpuArray, RingBuf},
    programs::Program,
};
use zerocopy::FromBytes as _;

pub use attach::{Fence, Guard, pin_name};
pub use error::{ApplyError, AttachError, OpenError};
pub use object::{EMBEDDED, HOOKS};
pub use sys::{CgroupLink, boot_nanos};
pub use table::Image;

/// Entries that the maps are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Agents, the pseudo-agent included.
    pub agents: u32,
    /// Rows: each agent's present one and those not yet retired.
    pub rows: u32,
    /// Claimed cgroups.
    pub claims: u32,
    /// Exact addresses, of all scopes together.
    pub addresses: u32,
    /// Prefixes, of all scopes together.
    pub prefixes: u32,
    /// Blocks of rules.
    pub rule_sets: u32,
}

impl Capacity {
    /// Room for these images twice over, since a reload holds old and new side by side, and some
    /// to grow; at least what a host with a handful of agents needs.
    pub fn for_images(images: &[Image]) -> Self {
        let size = |count: usize, least: u32| {
            u32::try_from(count.saturating_mul(3))
                .unwrap_or(u32::MAX)
                .max(least)
        };
        let placed = || {
            images
                .iter()
                .flat_map(|image| image.reach.iter().chain(&image.serve))
        };
        let exact = placed().filter(|(prefix, _)| prefix.len == 128).count();
        Self {
            agents: size(images.len(), 256),
            rows: size(images.len() * 2, 1024),
            claims: size(images.len() * 4, 4096),
            addresses: size(exact, 65_536),
            prefixes: size(placed().count() - exact, 65_536),
            rule_sets: size(placed().count(), 4096).min(65_536),
        }
    }
}

/// What the object is told at load.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Level of the kernel side's own debugging log, as aya-log counts: 0 off, 4 debug.
    pub kernel_log: u8,
    /// Events a second that one agent may emit on one CPU.
    pub events_per_second: u32,
}

/// The object in the kernel, its maps and the fences on roots.
pub struct Enforcer {
    ebpf: Ebpf,
    tables: table::Tables,
    events: RingBuf<MapData>,
    counters: PerCpuArray<MapData, Counters>,
    folds: PerCpuArray<MapData, Fold>,
    question: Array<MapData, Question>,
    answer: Array<MapData, Answer>,
    fences: HashMap<String, Fence>,
    directory: PathBuf,
    adopted: bool,
    // Last, so that all else is closed when it looks.
    _pins: Pins,
}

/// The pin directory in use. Maps that no link holds up are nobody's, and go with their process,
/// also when a start fails half-way; those behind a fence stay.
struct Pins(PathBuf);

/// Magic number of bpffs in `statfs(2)`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The C libraries disagree about the type of a file system's number.
fn is_bpf_magic<N: TryInto<u64>>(number: N) -> bool {
    number
        .try_into()
        .is_ok_and(|number: u64| number == BPF_FS_MAGIC)
}

/// Sees to it that `directory` exists and lies on a BPF file system; mounts one there otherwise,
/// for hosts that have none.
pub fn prepare_bpffs(directory: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Pins {
        path: directory.to_owned(),
        source,
    };
    let is_bpffs = |path: &Path| {
        nix::sys::statfs::statfs(path).is_ok_and(|fs| is_bpf_magic(fs.filesystem_type().0))
    };
    // A bpffs makes directories but no mount points of its own: look at the nearest that exists.
    let existing = directory
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    if is_bpffs(existing) {
        return fs::create_dir_all(directory).map_err(failed);
    }
    let standard = Path::new("/sys/fs/bpf");
    let mount_point = if directory.starts_with(standard) {
        standard
    } else {
        directory
    };
    if mount_point == directory {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    nix::mount::mount(
        Some("bpf"),
        mount_point,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        Some("mode=0700"),
    )
    .map_err(|errno| failed(io::Error::from(errno)))?;
    fs::create_dir_all(directory).map_err(failed)
}

impl Enforcer {
    /// Loads `object` (normally [`EMBEDDED`]) with its pins below `directory`.
    pub fn open(
        object: &[u8],
        directory: &Path,
        capacity: Capacity,
        tuning: &Tuning,
    ) -> Result<Self, OpenError> {
        prepare_bpffs(directory)?;
        let directory = directory.join(format!("v{ABI_VERSION}"));
        let maps = directory.join("maps");
        // A process that was killed before it fenced anything may have left maps.
        let unusable = |source| OpenError::Pins {
            path: directory.clone(),
            source,
        };
        if !has_pins(&directory.join("links")).map_err(unusable)? {
            remove_pins(&directory).map_err(unusable)?;
        }
        let pins = Pins(directory.clone());
        fs::create_dir_all(&maps).map_err(|source| OpenError::Pins {
            path: maps.clone(),
            source,
        })?;
        let adopted = maps.join("agents").exists();
        let capacity = object::sizes(capacity, &maps)?;
        let mut ebpf = object::load(object, &maps, &capacity, tuning)?;
        let events = typed(&mut ebpf, "events")?;
        let counters = typed(&mut ebpf, "counters")?;
        let folds = typed(&mut ebpf, "folds")?;
        let mut question = typed(&mut ebpf, "question")?;
        let mut answer = typed(&mut ebpf, "answer")?;
        // Before the tables are taken over: read by another layout they would look like nobody's.
        let layout = Question {
            agent: LAYOUT_QUESTION,
            ..Question::zeroed()
        };
        let said = judge(&ebpf, &mut question, &mut answer, layout)?;
        if said.row != FINGERPRINT || said.entry != ABI_VERSION {
            return Err(OpenError::Fingerprint {
                found: said.row,
                found_abi: said.entry,
                wanted: FINGERPRINT,
                wanted_abi: ABI_VERSION,
            });
        }
        let tables = table::Tables::open(&mut ebpf, capacity)?;
        Ok(Self {
            ebpf,
            tables,
            events,
            counters,
            folds,
            question,
            answer,
            fences: HashMap::new(),
            directory,
            adopted,
            _pins: pins,
        })
    }

    /// The object, for `aya-log`.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Puts these agents in force, all or none, and takes every other one out.
    pub fn apply(&mut self, images: Vec<Image>) -> Result<Vec<String>, ApplyError> {
        self.tables.apply(images)
    }

    /// Puts one agent in force, and leaves all others as they are.
    pub fn apply_one(&mut self, image: Image) -> Result<(), ApplyError> {
        self.tables.apply_one(image)
    }

    /// Removes what has been out of force for over a second. To be called now and then.
    pub fn sweep(&mut self) {
        self.tables.sweep(Instant::now());
    }

    /// Makes the attributions equal to `wanted`: cgroup id to agent id. Agents that have no index
    /// are left out. Returns how many attributions changed.
    pub fn attribute(&mut self, wanted: &[(u64, &str)]) -> Result<usize, ApplyError> {
        let wanted = wanted
            .iter()
            .filter_map(|(cgroup, id)| self.tables.index_of(id).map(|index| (*cgroup, index)))
            .collect();
        self.tables.attribute(&wanted)
    }

    /// The same by index.
    pub fn attribute_indices(&mut self, wanted: &[(u64, u32)]) -> Result<usize, ApplyError> {
        self.tables.attribute(&wanted.iter().copied().collect())
    }

    /// Whether the maps were there before this process: an earlier daemon's fence was taken over.
    pub fn born_before_us(&self) -> bool {
        self.adopted
    }

    /// When the counters were made, in milliseconds since the Unix epoch.
    pub fn born(&self) -> Option<i64> {
        let made = fs::metadata(self.directory.join("maps/counters"))
            .ok()?
            .modified()
            .ok()?;
        let since = made.duration_since(std::time::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_millis()).ok()
    }

    /// Cgroup id to agent index, as in force.
    pub fn attributed(&self) -> &HashMap<u64, u32> {
        self.tables.attributed()
    }

    /// The index that stands for an agent in the kernel.
    pub fn index_of(&self, id: &str) -> Option<u32> {
        self.tables.index_of(id)
    }

    /// Every agent that has an index, also one no longer in force.
    pub fn indices(&self) -> Vec<(String, u32)> {
        self.tables
            .indices()
            .map(|(id, index)| (id.to_owned(), index))
            .collect()
    }

    /// The policy id in force for an agent.
    pub fn policy_of(&self, agent: u32) -> Option<u64> {
        self.tables.policy_of(agent)
    }

    /// Attaches all hooks to the root cgroup `root` (a path below the v2 mount), whose directory
    /// is `directory`.
    pub fn fence(&mut self, root: &str, directory: &Path) -> Result<(), AttachError> {
        let pins = self.directory.join("links").join(pin_name(root));
        let fence = Fence::raise(&mut self.ebpf, directory, &pins)?;
        self.fences.insert(root.to_owned(), fence);
        Ok(())
    }

    /// The fences by root.
    pub fn fences(&self) -> impl Iterator<Item = (&str, &Fence)> {
        self.fences
            .iter()
            .map(|(root, fence)| (root.as_str(), fence))
    }

    /// Puts a question to the loaded programs' own verdict.
    pub fn judge(&mut self, question: Question) -> Result<Answer, OpenError> {
        judge(&self.ebpf, &mut self.question, &mut self.answer, question)
    }

    /// A descriptor that becomes readable when a CPU wakes the reader of the ring.
    pub fn ring(&self) -> io::Result<OwnedFd> {
        self.events.as_fd().try_clone_to_owned()
    }

    /// Takes up to `most` records out of the ring.
    pub fn drain(&mut self, most: usize) -> Vec<Event> {
        let mut drained = Vec::new();
        while drained.len() < most {
            let Some(record) = self.events.next() else {
                break;
            };
            // The ring holds records of one type; another size means another ABI, which `open`
            // has excluded.
            if let Ok(event) = Event::read_from_bytes(&record) {
                drained.push(event);
            }
        }
        drained
    }

    /// An agent's counters, summed over the CPUs.
    pub fn counters(&self, agent: u32) -> Option<Counters> {
        let values = self.counters.get(&agent, 0).ok()?;
        let mut sum = Counters::zeroed();
        for value in values.iter() {
            sum.allowed += value.allowed;
            for (total, part) in sum.denied.iter_mut().zip(value.denied) {
                *total += part;
            }
            for (total, part) in sum.monitored.iter_mut().zip(value.monitored) {
                *total += part;
            }
        }
        Some(sum)
    }

    /// Every fold slot in use: CPU, slot, content.
    pub fn folds(&self) -> Vec<(u32, u32, Fold)> {
        let mut found = Vec::new();
        for slot in 0..FOLD_SLOTS {
            let Ok(values) = self.folds.get(&slot, 0) else {
                continue;
            };
            for (cpu, fold) in values.iter().enumerate() {
                if fold.generation != 0 {
                    found.push((u32::try_from(cpu).unwrap_or(0), slot, *fold));
                }
            }
        }
        found
    }

    /// Takes every fence down and removes all pins: the only way to stop enforcing.
    pub fn detach_all(self) -> io::Result<()> {
        for (_, fence) in self.fences {
            fence.lift()?;
        }
        remove_pins(&self.directory)
    }
}

// === impl Pins ===

impl Drop for Pins {
    fn drop(&mut self) {
        let removed = match has_pins(&self.0.join("links")) {
            Ok(true) => Ok(()),
            Ok(false) => remove_pins(&self.0),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(message = "Pins that hold no fence could not be removed.", %error);
        }
    }
}

/// Runs the judge on one question.
fn judge(
    ebpf: &Ebpf,
    questions: &mut Array<MapData, Question>,
    answers: &mut Array<MapData, Answer>,
    question: Question,
) -> Result<Answer, OpenError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        OpenError::SelfTest(format!("cannot {what}: {error}"))
    };
    answers
        .set(0, Answer::zeroed(), 0)
        .map_err(|error| failed("clear the answer", &error))?;
    questions
        .set(0, question, 0)
        .map_err(|error| failed("put the question", &error))?;
    let Some(Program::CgroupSkb(judge)) = ebpf.program(object::JUDGE) else {
        return Err(OpenError::HookMissing {
            program: object::JUDGE,
        });
    };
    let program = judge
        .fd()
        .map_err(|error| failed("find the judge", &error))?;
    sys::test_run(program.as_fd(), &[0; 64]).map_err(|error| failed("run the judge", &error))?;
    let answer = answers
        .get(&0, 0)
        .map_err(|error| failed("read the answer", &error))?;
    if answer.verdict == 0 {
        return Err(OpenError::SelfTest("the judge gave no answer".to_owned()));
    }
    Ok(answer)
}

fn typed<T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, OpenError> {
    let map = ebpf.take_map(name).ok_or(OpenError::MapMissing { name })?;
    T::try_from(map).map_err(|source| OpenError::Map {
        name,
        source: Box::new(source.into()),
    })
}

/// Removes what any version of the daemon pinned below `directory`: the links, which detaches
/// them, and the maps. Fences of `remit run` are not the daemon's. Returns what was removed.
pub fn detach_pinned(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        let version = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix('v'))
            .is_some_and(|version| version.parse::<u32>().is_ok());
        if version {
            remove_pins(&path)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Starts a thread that passes what the programs say (aya-log) on to this process's own log. For
/// debugging: see the daemon's `--kernel-log`.
pub fn log(ebpf: &mut Ebpf) -> Result<(), aya_log::Error> {
    let mut logger = aya_log::EbpfLogger::init(ebpf)?;
    std::thread::spawn(move || {
        loop {
            logger.flush();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    });
    Ok(())
}

/// Whether anything is pinned below `directory`. What cannot be read is an error, never a no: on a
/// no the pins are removed.
fn has_pins(directory: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || has_pins(&entry.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes a directory of pins and what is in it. bpffs has files and directories only.
pub fn remove_pins(directory: &Path) -> io::Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        debug_assert!(!entry.file_name().as_bytes().is_empty());
        if entry.file_type()?.is_dir() {
            remove_pins(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(directory)
}
