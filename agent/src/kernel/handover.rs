//! Fences, and the way from one set of maps to another: links move first, then what the old maps
//! counted is taken over, and only then do the old pins go.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{ABI_VERSION, Counters};

use super::{
    AttachError, Capacity, Enforcer, Fence, Image, OpenError,
    attach::{self, Raising, pin_name},
    pins::{Dir, Guardian, Survey, remove_pins},
    succession::{self, SUMS},
    sys,
    tally::{self, Tally},
};

/// Longer than any program runs, should the kernel not say when the last one has ended.
const PROGRAM: Duration = Duration::from_millis(20);

impl Enforcer {
    /// Attaches all hooks to the root cgroup `root` (a path below the v2 mount), whose directory
    /// is `directory`. Links that are pinned already, by whatever version, get this process's
    /// programs in place of theirs; see [`Fence::found_foreign`].
    pub fn fence(&mut self, root: &str, directory: &Path) -> Result<(), AttachError> {
        let name = pin_name(root);
        let own = self.own_version();
        let elsewhere: Vec<PathBuf> = Survey::read(&self.pinned.base)
            .map_err(|source| AttachError::Open {
                path: self.pinned.base.clone(),
                source,
            })?
            .versions
            .into_iter()
            .filter(|(_, path)| *path != own)
            .map(|(_, path)| path.join("links").join(&name))
            .collect();
        self.guardian.in_use();
        let raising = Raising {
            ebpf: &self.ebpf,
            hooks: &self.hooks(),
            known: &self.known,
            pins: &own.join("links").join(&name),
            elsewhere: &elsewhere,
            standing: self.fences.get(root),
        };
        let raised = Fence::raise(&raising, directory);
        self.moved = Some(Instant::now());
        self.fences.insert(root.to_owned(), raised?);
        Ok(())
    }

    fn own_version(&self) -> PathBuf {
        self.pinned.base.join(format!("v{ABI_VERSION}"))
    }

    /// Ends a start, or a change of the set of maps: to be called once every root is fenced. Links
    /// of roots that are governed no more move too (they go on denying); what the old maps counted
    /// is taken over; then the old pins are removed. Until it has succeeded, the old sets stay and
    /// count, and the next start builds a set anew.
    pub fn settle_in(&mut self) -> io::Result<()> {
        self.move_strays()?;
        if !self.old.is_empty() {
            self.await_old_programs();
            self.take_sums()?;
            // Whatever fails below, they are taken over.
            self.old.clear();
        }
        let own = self.own_version();
        let survey = Survey::read(&self.pinned.base)?;
        for dir in &survey.sets {
            if dir.path != self.pinned.set {
                remove_pins(&dir.path)?;
            }
        }
        for dir in &survey.programs {
            if dir.path != self.pinned.programs {
                remove_pins(&dir.path)?;
            }
        }
        let linked: HashSet<u32> = survey.links.iter().map(|pin| pin.version).collect();
        for (version, path) in survey.versions {
            if path != own && !linked.contains(&version) {
                remove_pins(&path)?;
            }
        }
        Ok(())
    }

    /// Links of roots that this process does not govern.
    fn move_strays(&mut self) -> io::Result<()> {
        let own = self.own_version();
        let ours: HashSet<PathBuf> = self
            .fences
            .values()
            .flat_map(|fence| fence.programs().map(|program| fence.pins().join(program)))
            .collect();
        for pin in Survey::read(&self.pinned.base)?.links {
            if ours.contains(&pin.path) {
                continue;
            }
            let to = own.join("links").join(&pin.root).join(&pin.program);
            self.moved = Some(Instant::now());
            self.guardian.in_use();
            attach::move_stray(&self.ebpf, &pin.program, &pin.path, &to)
                .map_err(io::Error::other)?;
            // Goes with its last pin.
            if let Some(folder) = pin.path.parent() {
                drop(fs::remove_dir(folder));
            }
        }
        Ok(())
    }

    /// Waits until no program of the old sets can still be counting.
    fn await_old_programs(&self) {
        sys::await_running_programs();
        if let Some(moved) = self.moved {
            thread::sleep(PROGRAM.saturating_sub(moved.elapsed()));
        }
    }

    /// Writes down what was counted elsewhere. The pin of the sums is what says that the old sets
    /// are in them.
    fn take_sums(&mut self) -> io::Result<()> {
        if self.tallies.is_empty() {
            return Ok(());
        }
        let path = self.pinned.set.join(SUMS);
        let tallies = &self.tallies;
        let sums = tally::sums(self.tables.capacity().agents, |agent| {
            let mut sum = Counters::zeroed();
            for tally in tallies {
                tally::add(&mut sum, &tally.sum(agent)?);
            }
            Ok(sum)
        })?;
        sys::pin(sums.as_fd(), &path)?;
        self.tallies = Tally::open(&path)?.into_iter().collect();
        Ok(())
    }

    /// Puts `images` in force on a new set of maps with room for `capacity`, where the maps in use
    /// have become too small: the new set is filled first, then every fence moves to it, then the
    /// old goes. Returns the agents that changed. On an error what was in force stays. Where this
    /// process has fenced nothing yet, [`Self::fence`] and [`Self::settle_in`] do the rest.
    ///
    /// The programs are loaded anew: their own log has to be asked for again.
    pub fn outgrow(
        &mut self,
        images: &[Image],
        capacity: Capacity,
    ) -> Result<Vec<String>, OpenError> {
        let base = self.pinned.base.clone();
        let unusable = |source| OpenError::Pins {
            path: base.clone(),
            source,
        };
        let changed = self.tables.changes(images);
        let survey = Survey::read(&base).map_err(unusable)?;
        let ours = |dir: &&Dir| dir.path == self.pinned.set || self.old.contains(dir);
        let old: Vec<Dir> = survey.sets.iter().filter(ours).cloned().collect();
        let why = "the registry has outgrown its maps".to_owned();
        let mut plan = succession::replace(&base, &old, why);
        // Its number comes after all that are there.
        plan.set = succession::replace(&base, &survey.sets, String::new()).set;
        let serial = super::next_serial(&survey.programs);
        let known = survey.known();
        let mut next = Self::carry_out(
            plan,
            &self.object,
            &base,
            capacity,
            &self.tuning,
            known,
            serial,
            Guardian::beside_another(&base),
        )?;
        next.names = self.names;
        next.tables.apply(images)?;
        next.endpoints.take_over(&self.endpoints)?;
        let attributed = self.tables.attributed().clone();
        next.tables.attribute(&attributed)?;

        let standing: Vec<(String, PathBuf)> = self
            .fences
            .iter()
            .filter(|(_, fence)| fence.stands())
            .map(|(root, fence)| (root.clone(), fence.directory.clone()))
            .collect();
        let mut moved = Vec::new();
        for (root, directory) in standing {
            let fenced = next.fence(&root, &directory);
            moved.push((root, directory));
            if let Err(error) = fenced {
                // Back, to what was in force all the time for every other root.
                if let Ok(survey) = Survey::read(&base) {
                    self.known = survey.known();
                }
                let mut is_back = true;
                for (root, directory) in &moved {
                    is_back &= self.fence(root, directory).is_ok();
                }
                if is_back {
                    next.guardian.out_of_use();
                }
                return Err(error.into());
            }
        }
        std::mem::swap(self, &mut next);
        self.tables.remember(next.tables.take_differences());
        next.guardian.let_go();
        drop(next);
        self.guardian.alone();
        // Before it has fenced anything, a start settles in by itself later.
        if !self.fences.is_empty()
            && let Err(error) = self.settle_in()
        {
            tracing::warn!(message = "The old maps could not be removed yet.", %error);
        }
        Ok(changed)
    }
}
