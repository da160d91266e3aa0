//! Where registry and kernel disagree. The kernel side is read anew, the other is what this
//! process has put there; whatever else a root user writes by hand shows as a difference.

use std::{fs, io, os::fd::AsFd as _, path::Path};

use super::{
    Enforcer, Fence, Pinned,
    attach::{self, Fault},
    object::{Expected, all_hooks},
    pins::{map_at, program_at, replace_pin},
    table::Spot,
};

/// In which way something differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DriftKind {
    /// Not there, or not to be read.
    Missing,
    /// There, and nobody put it there.
    Extra,
    /// Other than it was written.
    Changed,
    /// A link that holds no cgroup any more, or a program that the kernel does not run there.
    Detached,
    /// A link of ours with a program that is not ours.
    ForeignProgram,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// In which way.
    pub kind: DriftKind,
    /// Map and key, or hook and root.
    pub what: String,
    /// The agent that it is about, where it is about one.
    pub agent: Option<String>,
    /// What the kernel has.
    pub found: String,
    /// What it must have.
    pub wanted: String,
    pub(super) target: Target,
}

/// What a repair has to touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Table(Spot),
    /// The fence of this root.
    Root(String),
    /// The pin of this map.
    MapPin(&'static str),
    /// The pin of this program.
    ProgramPin(Expected),
}

/// What came of a repair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The difference.
    pub drift: Drift,
    /// None: it was put right. Else why not.
    pub failed: Option<String>,
}

impl DriftKind {
    /// The name in logs, JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Changed => "changed",
            Self::Detached => "detached",
            Self::ForeignProgram => "foreign_program",
        }
    }
}

impl Drift {
    /// The root that it is about, where it is about one.
    pub fn root(&self) -> Option<String> {
        match &self.target {
            Target::Root(root) => Some(root.clone()),
            Target::Table(_) | Target::MapPin(_) | Target::ProgramPin(_) => None,
        }
    }
}

impl Drift {
    /// What a repair does.
    pub const fn remedy(&self) -> &'static str {
        match &self.target {
            Target::Table(Spot::Claim(_) | Spot::Epoch) => "attributes the cgroup anew",
            Target::Table(Spot::Unreadable) => "nothing that helps a map which cannot be read",
            Target::Table(_) => {
                "removes what is too much, and writes the agent under a new policy, to which its \
                 word flips"
            }
            Target::Root(_) => "attaches and pins the link anew, with remit's own program",
            Target::MapPin(_) | Target::ProgramPin(_) => "pins it anew",
        }
    }
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.what)?;
        if let Some(agent) = &self.agent {
            write!(f, " of {agent}")?;
        }
        write!(f, ": found {}, wanted {}", self.found, self.wanted)
    }
}

impl Enforcer {
    /// What differs between the kernel and what this process has put there: in the policy maps, in
    /// the links of every fence, and in the pins. Only reads. A root whose cgroup is gone has
    /// nothing to be fenced and is not looked at.
    pub fn inspect(&mut self) -> Vec<Drift> {
        let mut drifts = self.tables.inspect();
        let mut roots: Vec<_> = self.fences.iter().collect();
        roots.sort_unstable_by_key(|(root, _)| *root);
        for (root, fence) in roots {
            inspect_fence(root, fence, &mut drifts);
        }
        self.inspect_pins(&mut drifts);
        drifts
    }

    /// How many things [`Self::inspect`] compares.
    pub fn compared(&self) -> u64 {
        self.tables.compared() as u64 + self.links()
    }

    /// Puts right what [`Self::inspect`] found. Nothing is open meanwhile that was not open by what
    /// was found: what is too much goes first, and each agent that was touched flips from what is
    /// there to what must be there in one step. One repair that fails leaves the others alone;
    /// inspect again to see that all is well.
    pub fn repair(&mut self, drifts: &[Drift]) -> Vec<Repair> {
        let mut results: Vec<Option<Result<(), String>>> = vec![None; drifts.len()];
        let (mut spots, mut at) = (Vec::new(), Vec::new());
        for (index, drift) in drifts.iter().enumerate() {
            if let Target::Table(spot) = drift.target {
                spots.push(spot);
                at.push(index);
            }
        }
        for (index, result) in at.into_iter().zip(self.tables.repair(&spots)) {
            if let Some(slot) = results.get_mut(index) {
                *slot = Some(result);
            }
        }
        let mut roots: Vec<(&str, Result<(), String>)> = Vec::new();
        drifts
            .iter()
            .zip(results)
            .map(|(drift, done)| {
                let result = match (&drift.target, done) {
                    (Target::Table(_), done) => done.unwrap_or(Ok(())),
                    (Target::Root(root), _) => {
                        match roots.iter().find(|(known, _)| known == root) {
                            Some((_, result)) => result.clone(),
                            None => {
                                let result = self.mend_fence(root);
                                roots.push((root.as_str(), result.clone()));
                                result
                            }
                        }
                    }
                    (Target::MapPin(name), _) => {
                        self.pin_map(name).map_err(|error| error.to_string())
                    }
                    (Target::ProgramPin(hook), _) => {
                        self.pin_program(*hook).map_err(|error| error.to_string())
                    }
                };
                Repair {
                    drift: drift.clone(),
                    failed: result.err(),
                }
            })
            .collect()
    }

    fn mend_fence(&mut self, root: &str) -> Result<(), String> {
        let fence = self.fences.get(root).ok_or("it is not fenced")?;
        let directory = fence.directory.clone();
        self.fence(root, &directory)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    }

    fn inspect_pins(&self, drifts: &mut Vec<Drift>) {
        let Pinned {
            set,
            programs,
            maps,
            ..
        } = &self.pinned;
        for (name, id, _) in maps {
            let found = map_at(&set.join(name))
                .and_then(|map| Ok(map.info().map_err(io::Error::other)?.id()));
            let wanted = format!("map {id}");
            let what = format!("pin of map {name}");
            let target = Target::MapPin(name);
            drifts.extend(pin_drift(found, *id, "map", what, wanted, target));
        }
        for hook in all_hooks() {
            let Some(id) = attach::program_id(&self.ebpf, hook.program) else {
                continue;
            };
            let found = program_at(&programs.join(hook.program)).map(|info| info.id());
            let wanted = format!("program {id}");
            let what = format!("pin of program {}", hook.program);
            let target = Target::ProgramPin(hook);
            drifts.extend(pin_drift(found, id, "program", what, wanted, target));
        }
    }

    fn pin_map(&self, name: &str) -> io::Result<()> {
        let handle = self.pinned.maps.iter().find(|(known, ..)| *known == name);
        let (_, _, map) = handle.ok_or(io::ErrorKind::NotFound)?;
        pin_in(&self.pinned.set, name, map.as_fd())
    }

    fn pin_program(&self, hook: Expected) -> io::Result<()> {
        let program = attach::program_fd(&self.ebpf, hook).ok_or(io::ErrorKind::NotFound)?;
        pin_in(&self.pinned.programs, hook.program, program)
    }
}

fn pin_in(folder: &Path, name: &str, object: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    replace_pin(object, &folder.join(name))
}

fn pin_drift(
    found: io::Result<u32>,
    id: u32,
    kind: &str,
    what: String,
    wanted: String,
    target: Target,
) -> Option<Drift> {
    let (kind, found) = match found {
        Ok(found) if found == id => return None,
        Ok(found) => (DriftKind::Changed, format!("{kind} {found}")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (DriftKind::Missing, "no pin".to_owned())
        }
        Err(error) => (DriftKind::Changed, error.to_string()),
    };
    Some(Drift {
        kind,
        what,
        agent: None,
        found,
        wanted,
        target,
    })
}

fn inspect_fence(root: &str, fence: &Fence, drifts: &mut Vec<Drift>) {
    let mut add = |kind, what: String, found: String, wanted: String| {
        drifts.push(Drift {
            kind,
            what,
            agent: None,
            found,
            wanted,
            target: Target::Root(root.to_owned()),
        });
    };
    if !fence.stands() {
        if fence.directory.exists() {
            add(
                DriftKind::Detached,
                format!("fence of {root}"),
                "another cgroup in its place".to_owned(),
                format!("cgroup {}", fence.cgroup),
            );
        }
        return;
    }
    for (hook, fault) in fence.faults() {
        let what = format!("{hook} on {root}");
        let attached = || format!("a link to cgroup {}", fence.cgroup);
        match fault {
            Fault::Detached(why) => add(DriftKind::Detached, what, why, attached()),
            Fault::NotListed => {
                let found = "a link whose program the kernel does not list there".to_owned();
                add(DriftKind::Detached, what, found, attached());
            }
            Fault::Foreign(found, wanted) => add(
                DriftKind::ForeignProgram,
                what,
                format!("program {found}"),
                format!("program {wanted}"),
            ),
            Fault::Pin(found) => add(
                DriftKind::Missing,
                format!("pin of {what}"),
                found,
                "a pin of its link".to_owned(),
            ),
        }
    }
}
