//! A fence without a daemon, for one command: `remit run --policy FILE -- CMD`.
//!
//! The command gets a cgroup tree of its own: a root, fenced before anything runs in it, and in
//! it the agent's cgroup. Where systemd is process 1 they are where it would put a slice and a scope in
//! it, and the caller has it [take them over](Standalone::scope). When the command ends, what is left in the tree is killed and seen empty
//! before the fence is lifted. If this process dies first, the pinned fence stays, and a later
//! remit command [sweeps](sweep) it once the tree is empty.
//!
//! An agent with names gets the DNS guard in this process ([`super::watch`]), in force before the
//! command starts. When this process dies the guard is gone, and what is left of the command
//! resolves nothing any more.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    DaemonError, core, force,
    names::{self, Names},
    recorder::{Recorder, Sink},
    selftest,
    settings::Settings,
    time::Offset,
    watch::{Post, Watch},
};
use crate::{
    cgroup::{self, CgroupPath, Hierarchy, Populated},
    kernel,
    launch::{self, Scope},
    policy::{AgentTables, Compilation},
};

/// Below the v2 mount; each run has a root of its own in it where systemd is not process 1.
const BARE: &str = "/remit.run";
/// The same where it is.
const SLICE: &str = "remit";
/// How long killed processes may take to be gone.
const EMPTY_WITHIN: Duration = Duration::from_secs(30);
/// How often the common parent may go while a run's cgroups are made below it.
const MAKE_TRIES: usize = 100;

/// A fence that is up, with nothing in it yet.
pub struct Standalone {
    hierarchy: Hierarchy,
    place: Place,
    pins: PathBuf,
    watch: Watch,
}

/// Where a run has its cgroups.
struct Place {
    root: CgroupPath,
    agent: CgroupPath,
    /// What systemd knows the root as, if it is told.
    slice: Option<String>,
}

impl Standalone {
    /// Raises a fence for `tables`, and proves it, before anything runs.
    pub fn raise(
        settings: &Settings,
        compilation: &Compilation,
        tables: &AgentTables,
    ) -> Result<Self, DaemonError> {
        let hierarchy = core::hierarchy(settings)?;
        let name = name(&tables.id).map_err(|source| DaemonError::System {
            what: "read /proc/self/stat",
            source,
        })?;
        let place = Place::of(&name, launch::is_managed())?;
        let pins = settings.paths.bpffs.join("run").join(&name);
        let raised = Self::raise_at(settings, &hierarchy, compilation, tables, &place, &pins);
        match raised {
            Ok(watch) => Ok(Self {
                hierarchy,
                place,
                pins,
                watch,
            }),
            Err(error) => {
                // Nothing ran in it yet, so nothing is unfenced by this.
                drop(kernel::remove_pins(&pins));
                drop(hierarchy.remove(&place.root));
                Err(error)
            }
        }
    }

    fn raise_at(
        settings: &Settings,
        hierarchy: &Hierarchy,
        compilation: &Compilation,
        tables: &AgentTables,
        place: &Place,
        pins: &Path,
    ) -> Result<Watch, DaemonError> {
        let offset = Offset::read();
        let clock = offset.clock();
        let all = [
            Arc::new(compilation.unregistered.clone()),
            Arc::new(tables.clone()),
        ];
        let [unregistered, tables] = &all;
        let (guard, asked) = Names::start(settings, offset);
        let mut image = force::image(tables, &clock);
        let uses_names = names::mark(&guard, tables, &mut image);
        let images = [force::image(unregistered, &clock), image];
        place.make(hierarchy)?;
        let Place { root, agent, .. } = place;
        // Where there is no bpffs yet, one is mounted for all runs, not for this one.
        kernel::prepare_bpffs(&settings.paths.bpffs)?;
        let rate = settings.log.per_agent_rate;
        let mut enforcer = core::open_alone(pins, &images, rate)?;
        enforcer.guard_names(uses_names)?;
        enforcer.apply(&images)?;
        let id = hierarchy.id(agent)?;
        enforcer.attribute(&[(id, &tables.id)])?;
        enforcer.fence(&root.to_string(), &hierarchy.directory(root))?;
        selftest::ask(&mut enforcer, tables, &clock, selftest::Extent::one_of(1))
            .map_err(DaemonError::SelfTest)?;

        let allowance = core::allowance(settings);
        let sink = Sink::Memory(Vec::new());
        let mut recorder = Recorder::new(sink, allowance, hierarchy.clone(), offset);
        recorder.learn(&enforcer, 1, &all);
        Watch::start(Post {
            enforcer,
            recorder,
            names: (guard, asked),
            tables: Arc::clone(tables),
            hierarchy: hierarchy.clone(),
            root: root.clone(),
            agent: (agent.clone(), id),
        })
    }

    /// The hierarchy that [`Self::cgroup`] is in.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// Where the command is to run.
    pub fn cgroup(&self) -> &CgroupPath {
        &self.place.agent
    }

    /// What systemd would have made of that cgroup; none where systemd is not process 1.
    pub fn scope(&self) -> Option<Scope> {
        Scope::at(&self.place.agent).filter(|_| self.place.slice.is_some())
    }

    /// Kills what is left, sees the tree empty, lifts the fence and removes the tree. Returns the
    /// violations, as the log would have them.
    ///
    /// # Errors
    /// When something could not be killed: then the fence stays.
    pub fn end(self) -> Result<Vec<Value>, DaemonError> {
        let root = &self.place.root;
        self.hierarchy.kill(root)?;
        if !self
            .hierarchy
            .wait_empty(root, Instant::now() + EMPTY_WITHIN)?
        {
            return Err(DaemonError::System {
                what: "see the command's cgroup empty; its fence stays",
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        let (enforcer, lines) = self.watch.finish();
        let lift = |source| DaemonError::System {
            what: "lift the fence",
            source,
        };
        if let Some(enforcer) = enforcer {
            enforcer.detach_all().map_err(lift)?;
        }
        kernel::remove_pins(&self.pins).map_err(lift)?;
        self.place.clear(&self.hierarchy)?;
        Ok(lines)
    }
}

// === impl Place ===

impl Place {
    /// Of the run of this [`name`].
    fn of(name: &str, managed: bool) -> Result<Self, DaemonError> {
        let path = |text: String| {
            CgroupPath::new(&text).map_err(|why| DaemonError::Root(text.clone(), why))
        };
        if !managed {
            return Ok(Self {
                root: path(format!("{BARE}/{name}"))?,
                agent: path(format!("{BARE}/{name}/agent"))?,
                slice: None,
            });
        }
        // A dash in a slice's name is a slice above it, and a unit's name has no plus
        // (systemd.slice(5), systemd.unit(5)).
        let unit = name.replace('-', "_").replace('+', ".");
        let slice = format!("{SLICE}-{unit}.slice");
        let root = format!("/{SLICE}.slice/{slice}");
        Ok(Self {
            agent: path(format!("{root}/{unit}.scope"))?,
            root: path(root)?,
            slice: Some(slice),
        })
    }

    /// Removes the cgroups, in which nothing runs any more.
    fn clear(&self, hierarchy: &Hierarchy) -> Result<(), cgroup::Error> {
        // What is systemd's goes by systemd, or it waits for a cgroup that is gone. It knows nothing of
        // it where it was not asked to take it over.
        if let Some(slice) = &self.slice
            && launch::stop(slice).is_ok()
        {
            return Ok(());
        }
        hierarchy.remove(&self.root)?;
        // The common parent goes with the last of them, and only if it is empty: another run may be
        // about to start in its own part of it.
        if let Some(parent) = self.root.parent() {
            drop(fs::remove_dir(hierarchy.directory(&parent)));
        }
        Ok(())
    }

    /// Makes the cgroups. Another run that ends may take the common parent away in between.
    fn make(&self, hierarchy: &Hierarchy) -> Result<(), cgroup::Error> {
        let mut tries = 0..MAKE_TRIES;
        loop {
            match hierarchy.create(&self.agent) {
                Err(error) if cgroup::Error::is_missing(&error) && tries.next().is_some() => {}
                made => return made.map(drop),
            }
        }
    }
}

/// A name that no other run has: the agent, this process, and when it started, so that a later
/// process with the same id is not taken for it. Without dots, which bpffs refuses.
fn name(id: &str) -> io::Result<String> {
    let pid = std::process::id();
    let started = started(pid)?;
    Ok(format!("{}-{pid}-{started}", id.replace('.', "+")))
}

/// When a process started, in clock ticks since boot (field 22 of proc(5) stat). One that has died
/// and is not yet reaped enforces nothing any more: it is as good as gone.
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    stat.rsplit_once(')')
        .filter(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
        .and_then(|(_, rest)| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat"))
}

/// Whether the process that made a run of this name is still there.
fn is_alive(name: &str) -> bool {
    let mut parts = name.rsplitn(3, '-');
    let (Some(start), Some(pid)) = (parts.next(), parts.next()) else {
        return false;
    };
    let (Ok(start), Ok(pid)) = (start.parse::<u64>(), pid.parse::<u32>()) else {
        return false;
    };
    started(pid).is_ok_and(|found| found == start)
}

/// Loads the real programs and attaches them to an empty cgroup of its own, then takes all of it
/// away again. Returns each hook, and whether the kernel lists it there.
pub fn try_fence(settings: &Settings) -> Result<Vec<(&'static str, bool)>, DaemonError> {
    let hierarchy = core::hierarchy(settings)?;
    let name = name("doctor").map_err(|source| DaemonError::System {
        what: "read /proc/self/stat",
        source,
    })?;
    // Nothing will run in it: nothing for systemd to know.
    let place = Place::of(&name, false)?;
    let pins = settings.paths.bpffs.join("run").join(&name);
    let tried = try_fence_at(settings, &hierarchy, &place.root, &pins);
    // Nothing ran in it, so nothing is unfenced by this; what cannot be removed now is swept by a
    // later command.
    drop(kernel::remove_pins(&pins));
    drop(place.clear(&hierarchy));
    tried
}

fn try_fence_at(
    settings: &Settings,
    hierarchy: &Hierarchy,
    root: &CgroupPath,
    pins: &Path,
) -> Result<Vec<(&'static str, bool)>, DaemonError> {
    hierarchy.create(root)?;
    kernel::prepare_bpffs(&settings.paths.bpffs)?;
    let mut enforcer = core::open_alone(pins, &[], settings.log.per_agent_rate)?;
    let name = root.to_string();
    enforcer.fence(&name, &hierarchy.directory(root))?;
    let found = enforcer
        .fences()
        .flat_map(|(_, fence)| fence.guards())
        .map(|guard| (guard.hook, guard.listed))
        .collect();
    enforcer
        .detach_all()
        .map_err(|source| DaemonError::System {
            what: "take the trial away",
            source,
        })?;
    Ok(found)
}

/// Removes the fences of runs whose remit has died and whose tree is empty. Returns their names.
/// Those that still hold processes stay.
pub fn sweep(settings: &Settings) -> Vec<String> {
    let folder = settings.paths.bpffs.join("run");
    let Ok(entries) = fs::read_dir(&folder) else {
        return Vec::new();
    };
    let Ok(hierarchy) = core::hierarchy(settings) else {
        return Vec::new();
    };
    let mut swept = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if is_alive(&name) {
            continue;
        }
        // Of a trial, or from before systemd was there, it is a bare one.
        let places: Result<Vec<_>, _> = [false, true]
            .into_iter()
            .map(|managed| Place::of(&name, managed))
            .collect();
        let Ok(places) = places else {
            continue;
        };
        let empty = |place: &Place| is_empty(&hierarchy, &place.root);
        if places.iter().all(empty) && kernel::remove_pins(&entry.path()).is_ok() {
            let there = |place: &&Place| hierarchy.exists(&place.root);
            for place in places.iter().filter(there) {
                drop(place.clear(&hierarchy));
            }
            swept.push(name);
        }
    }
    swept
}

/// Whether nothing runs in a tree. One that cannot be told is not empty.
fn is_empty(hierarchy: &Hierarchy, root: &CgroupPath) -> bool {
    match hierarchy.populated(root) {
        Ok(Populated::No | Populated::Gone) => true,
        Ok(Populated::Yes) => false,
        Err(error) => cgroup::Error::is_missing(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_would_put_a_run_where_it_is() {
        let place = Place::of("billing+recon-17-4711", true).unwrap();
        let scope = Scope::at(&place.agent).unwrap();
        assert_eq!(scope.name, "billing.recon_17_4711.scope");
        assert_eq!(Some(scope.slice), place.slice);
        assert_eq!(place.agent.parent().as_ref(), Some(&place.root));
        let bare = Place::of("billing+recon-17-4711", false).unwrap();
        assert_eq!(Scope::at(&bare.agent), None);
    }

    #[test]
    fn a_name_tells_whether_its_maker_lives() {
        let mine = name("billing.recon").unwrap();
        assert!(mine.starts_with("billing+recon-"));
        assert!(is_alive(&mine));
        let (rest, _) = mine.rsplit_once('-').unwrap();
        assert!(
            !is_alive(&format!("{rest}-1")),
            "another process with the same id"
        );
        assert!(!is_alive("nonsense"));
    }
}
