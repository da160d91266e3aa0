//! The kernel side as the daemon sees it, and the only module that names aya.
//!
//! [`Enforcer::open`] loads the object, compares every map with this binary's own layout, has the
//! loaded object state its layout, and adopts what is pinned. [`Enforcer::apply`] changes what is
//! in force in one transaction. [`Enforcer::fence`] attaches to a root. Nothing here lifts
//! anything unless it is asked to by name: when this process dies, pins keep the fence up.

mod access;
mod attach;
mod bulk;
mod drift;
mod endpoints;
mod error;
mod evidence;
mod handover;
mod image;
mod object;
mod observer;
mod others;
mod pins;
mod sets;
mod standing;
mod succession;
mod sys;
mod table;
mod tally;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use agent_ebpf::abi::{
    ABI_VERSION, Addr, Answer, Asked, Counters, Event, FINGERPRINT, FOLD_SLOTS, Fold,
    LAYOUT_QUESTION, Question, RULES_PER_SET, Rule,
};
use aya::{
    Ebpf,
    maps::{Array, MapData, PerCpuArray, RingBuf},
    programs::Program,
};
use zerocopy::FromBytes as _;

use self::{
    endpoints::Endpoints,
    object::Expected,
    pins::{Dir, Guardian, Known, Survey, dir_name, next_serial},
    succession::Plan,
    tally::Tally,
};

pub use access::{Accesses, Remembered, add as add_access};
pub use attach::{Fence, ForeignProgram, Guard, pin_name};
pub use drift::{Drift, DriftKind, Repair};
pub use error::{ApplyError, AttachError, OpenError};
pub use evidence::{RingState, run_pinned};
pub use image::{DEADLINE_SLACK, Image};
pub use object::{DNS_HOOKS, EMBEDDED, HOOKS};
pub use observer::{OBSERVER, Observer, ObserverError, Seat};
pub use others::programs_on;
pub use pins::{detach_pinned, prepare_bpffs, remove_pins};
pub use standing::standing;
pub use succession::Succession;
pub use sys::{CgroupLink, boot_nanos};
pub use table::{Difference, Loan, Usage};

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
    /// The larger of both, map by map.
    pub fn max(self, other: Self) -> Self {
        Self {
            agents: self.agents.max(other.agents),
            rows: self.rows.max(other.rows),
            claims: self.claims.max(other.claims),
            addresses: self.addresses.max(other.addresses),
            prefixes: self.prefixes.max(other.prefixes),
            rule_sets: self.rule_sets.max(other.rule_sets),
        }
    }

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
        // Unlike keys, blocks take their memory whether they are used or not, and equal rules share
        // them: so only what differs counts, twice and an eighth.
        let mut seen = HashSet::new();
        let blocks: usize = placed()
            .filter(|(_, rules)| seen.insert(image::shared(rules).0))
            .map(|(_, rules)| rules.len().div_ceil(RULES_PER_SET).max(1))
            .sum();
        let blocks = blocks.saturating_mul(2) + blocks / 8;
        Self {
            agents: size(images.len(), 256),
            rows: size(images.len() * 2, 1024),
            claims: size(images.len() * 4, 4096),
            addresses: size(exact, 65_536),
            prefixes: size(placed().count() - exact, 65_536),
            rule_sets: u32::try_from(blocks).unwrap_or(u32::MAX).max(4096),
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
    /// Whether what agents reach is counted for [`Enforcer::accesses`].
    pub accounts: bool,
}

/// The object in the kernel, its maps and the fences on roots.
pub struct Enforcer {
    ebpf: Ebpf,
    tables: table::Tables,
    endpoints: Endpoints,
    events: RingBuf<MapData>,
    counters: PerCpuArray<MapData, Counters>,
    folds: PerCpuArray<MapData, Fold>,
    question: Array<MapData, Question>,
    answer: Array<MapData, Answer>,
    accesses: Accesses,
    fences: HashMap<String, Fence>,
    pinned: Pinned,
    /// What was counted elsewhere than in `counters`.
    tallies: Vec<Tally>,
    succession: Succession,
    /// Sets of maps that this one replaces, until it has.
    old: Vec<Dir>,
    known: Known,
    born: Option<SystemTime>,
    /// When a link was last given another program.
    moved: Option<Instant>,
    /// Whether the fences have the DNS guard's hooks.
    names: bool,
    object: Vec<u8>,
    tuning: Tuning,
    // Last, so that all else is closed when it looks.
    guardian: Guardian,
}

/// Where this process has pinned what, with descriptors to pin it again.
struct Pinned {
    /// Above all versions.
    base: PathBuf,
    set: PathBuf,
    programs: PathBuf,
    maps: Vec<(&'static str, u32, OwnedFd)>,
}

impl Enforcer {
    /// Loads `object` (normally [`EMBEDDED`]) with its pins below `directory`. Pinned maps are
    /// taken over if they can be used as they are, and then keep their sizes; otherwise a set with
    /// room for `capacity` is made beside them (see [`Self::succession`]). Nothing that is in
    /// force changes.
    pub fn open(
        object: &[u8],
        directory: &Path,
        capacity: Capacity,
        tuning: &Tuning,
    ) -> Result<Self, OpenError> {
        prepare_bpffs(directory)?;
        let unusable = |source| OpenError::Pins {
            path: directory.to_owned(),
            source,
        };
        let mut survey = Survey::read(directory).map_err(unusable)?;
        if survey.links.is_empty() {
            // A process that was killed before it fenced anything may have left maps.
            for (_, path) in &survey.versions {
                remove_pins(path).map_err(unusable)?;
            }
            survey = Survey::default();
        }
        let known = survey.known();
        let plan = succession::plan(directory, &survey, &known);
        let serial = next_serial(&survey.programs);
        let guardian = Guardian::new(directory);
        Self::carry_out(
            plan, object, directory, capacity, tuning, known, serial, guardian,
        )
    }

    /// Loads `object` on the set that was planned for.
    #[expect(
        clippy::too_many_arguments,
        reason = "the two callers differ in each of them"
    )]
    fn carry_out(
        mut plan: Plan,
        object: &[u8],
        base: &Path,
        capacity: Capacity,
        tuning: &Tuning,
        known: Known,
        serial: u32,
        mut guardian: Guardian,
    ) -> Result<Self, OpenError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Pins { path, source }
        };
        let names = succession::names(&plan.old);
        let capacity = if plan.succession == Succession::Adopted {
            object::sizes(&plan.set)?
        } else {
            guardian.make(&plan.set).map_err(unusable(&plan.set))?;
            // Tags on sockets carry indices, so each has to have its place here too.
            let highest = names.last_key_value().map_or(0, |(index, _)| index + 1);
            let capacity = Capacity {
                agents: capacity.agents.max(highest),
                ..capacity
            };
            let left = succession::carry(&plan.old, &plan.set, &capacity);
            let left = left.map_err(unusable(&plan.set))?;
            if let Succession::Replaced { lost, .. } = &mut plan.succession {
                *lost = left;
            }
            capacity
        };
        let mut ebpf = object::load(object, &plan.set, &capacity, tuning)?;
        let programs = base
            .join(format!("v{ABI_VERSION}"))
            .join(dir_name("programs", serial));
        guardian.make(&programs).map_err(unusable(&programs))?;
        for hook in object::all_hooks() {
            let path = programs.join(hook.program);
            let program = attach::program_fd(&ebpf, hook).ok_or(OpenError::HookMissing {
                program: hook.program,
            })?;
            sys::pin(program, &path).map_err(unusable(&path))?;
        }
        let maps = object::handles(&ebpf, &capacity)?;
        let events = typed(&mut ebpf, "events")?;
        let counters = typed(&mut ebpf, "counters")?;
        let folds = typed(&mut ebpf, "folds")?;
        let taking = maps
            .iter()
            .find(|(name, ..)| *name == "access")
            .ok_or(OpenError::MapMissing { name: "access" })?;
        let taking = taking.2.try_clone().map_err(unusable(&plan.set))?;
        let accesses = Accesses::new(
            taking,
            typed(&mut ebpf, "used")?,
            typed(&mut ebpf, "access")?,
            typed(&mut ebpf, "beyond")?,
            (typed(&mut ebpf, "cache")?, object::id_of(&maps, "cache")),
        );
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
        let mut tables = table::Tables::open(&ebpf, capacity)?;
        tables.inherit(&names)?;
        tables.number_after(succession::last_policy(&plan.old));
        let endpoints = Endpoints::open(&mut ebpf)?;
        let own = object::id_of(&maps, "counters");
        let this = Dir {
            version: ABI_VERSION,
            serial: 0,
            path: plan.set.clone(),
        };
        let counted: Vec<Dir> = plan.old.iter().cloned().chain([this]).collect();
        let tallies = succession::tallies(&counted, own).map_err(unusable(&plan.set))?;
        let born = succession::born(counted.iter().map(|dir| dir.path.as_path()));
        if let Some(born) = born.filter(|_| !plan.old.is_empty()) {
            succession::predate(&plan.set, born).map_err(unusable(&plan.set))?;
        }
        Ok(Self {
            ebpf,
            tables,
            endpoints,
            events,
            counters,
            folds,
            question,
            answer,
            accesses,
            fences: HashMap::new(),
            pinned: Pinned {
                base: base.to_owned(),
                set: plan.set,
                programs,
                maps,
            },
            tallies,
            succession: plan.succession,
            old: plan.old,
            known,
            born,
            moved: None,
            names: false,
            object: object.to_vec(),
            tuning: *tuning,
            guardian,
        })
    }

    /// The object, for `aya-log`.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Puts these agents in force, all or none, and takes every other one out.
    pub fn apply(&mut self, images: &[Image]) -> Result<Vec<String>, ApplyError> {
        self.tables.apply(images)
    }

    /// How agents that were taken over differed from what [`Self::apply`] then put in force: what
    /// the kernel had was not what the registry says now. Each is told once.
    pub fn take_differences(&mut self) -> Vec<Difference> {
        self.tables.take_differences()
    }

    /// Entries that the maps in use are made for.
    pub fn capacity(&self) -> Capacity {
        self.tables.capacity()
    }

    /// How full the maps are that a registry can fill.
    pub fn usage(&self) -> Vec<Usage> {
        self.tables.usage()
    }

    /// How the maps in use came about.
    pub fn succession(&self) -> &Succession {
        &self.succession
    }

    /// Puts one agent in force, and leaves all others as they are.
    pub fn apply_one(&mut self, image: Image) -> Result<(), ApplyError> {
        self.tables.apply_one(&image)
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
        self.succession != Succession::Fresh
    }

    /// When the counters were made, in milliseconds since the Unix epoch.
    pub fn born(&self) -> Option<i64> {
        let since = self.born?.duration_since(UNIX_EPOCH).ok()?;
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

    /// The agent that an index stands for.
    pub fn id_of(&self, index: u32) -> Option<&str> {
        self.tables.id_of(index)
    }

    /// Whose socket the last packet to an endpoint of the DNS guard came from that was sent from
    /// this address.
    pub fn asker(&self, endpoint: u64, from: IpAddr, port: u16, protocol: u8) -> Option<Asked> {
        self.endpoints.asker(endpoint, from, port, protocol)
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

    /// Sees to it that every fence, also one that is raised later, has the DNS guard's hooks, or
    /// that none has: see [`DNS_HOOKS`]. Returns whether that was a change.
    ///
    /// # Errors
    /// When a fence could not be raised anew. What stood stands.
    pub fn guard_names(&mut self, wanted: bool) -> Result<bool, AttachError> {
        if self.names == wanted {
            return Ok(false);
        }
        self.names = wanted;
        let standing: Vec<(String, PathBuf)> = self
            .fences
            .iter()
            .filter(|(_, fence)| fence.stands())
            .map(|(root, fence)| (root.clone(), fence.directory.clone()))
            .collect();
        for (root, directory) in standing {
            if let Err(error) = self.fence(&root, &directory) {
                // To be tried again.
                self.names = !wanted;
                return Err(error);
            }
        }
        Ok(true)
    }

    fn hooks(&self) -> Vec<Expected> {
        let names = self.names.then_some(DNS_HOOKS);
        HOOKS
            .into_iter()
            .chain(names.into_iter().flatten())
            .collect()
    }

    /// Links that the fences have.
    pub fn links(&self) -> u64 {
        let each = self.fences.values().map(|fence| fence.programs().count());
        each.sum::<usize>() as u64
    }

    /// Where the DNS guard listens.
    pub fn endpoints(&mut self) -> &mut Endpoints {
        &mut self.endpoints
    }

    /// Puts leases of an agent in force, or ends them: at each address all its rules with the
    /// leases worked in; without any that is leased the scope's own are in force there again. Each
    /// is read back. Nothing that was remembered of the agent's is voided, for a lease opens only.
    pub fn lease(&mut self, agent: u32, leases: &[(Addr, Vec<Rule>)]) -> Result<(), ApplyError> {
        self.tables.lease(agent, leases)
    }

    /// The leases in the kernel: agent, address, all rules of the address.
    pub fn leases(&self) -> Vec<(u32, Addr, Vec<Rule>)> {
        self.tables.leases()
    }

    /// The leases of one agent in the kernel: address, all its rules.
    pub fn leases_of(&self, agent: u32) -> Vec<(Addr, Vec<Rule>)> {
        self.tables.leases_of(agent)
    }

    /// All rules of an address at which an agent has a lease, also one that has ended.
    pub fn leased_at(&self, agent: u32, addr: Addr) -> Option<Vec<Rule>> {
        self.tables.leased_at(agent, addr)
    }

    /// The agents with a lease that was over between these boot times, open connections included.
    pub fn leases_over(&self, since: u64, now: u64) -> Vec<u32> {
        self.tables.leases_over(since, now)
    }

    /// Removes leases that ended longer than `kept` ago and that no connection goes on with: until
    /// then they say why an address is refused.
    pub fn drop_leases(&mut self, now: u64, kept: u64) {
        self.tables.drop_leases(now, kept);
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

    /// An agent's counters, summed over the CPUs, with those of maps that these have replaced.
    pub fn counters(&self, agent: u32) -> Option<Counters> {
        let values = self.counters.get(&agent, 0).ok()?;
        let mut sum = Counters::zeroed();
        for value in values.iter() {
            tally::add(&mut sum, value);
        }
        for tally in &self.tallies {
            tally::add(&mut sum, &tally.sum(agent).ok()?);
        }
        Some(sum)
    }

    /// What agents reached, and how much.
    pub fn accesses(&mut self) -> &mut Accesses {
        &mut self.accesses
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
        detach_pinned(&self.pinned.base).map(drop)
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
