//! The reload: compile, merge, swap in, and what goes with it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use tracing::{error, info};

use super::{
    core::{Core, all, capacity, selectors, stance},
    force::{self, Force, Unusable},
    laps::Laps,
    registry,
    selftest::{self, Extent},
    time::wall_millis,
};
use crate::{
    audit::{Decision, Succession, Tables},
    kernel::{ApplyError, Image},
    policy::AgentTables,
};

/// What a reload changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Agents whose entry is new, different or gone.
    pub agents: Vec<String>,
    /// Connections that were left without a grant, and ended.
    pub closed: u64,
}

impl Core {
    /// Compiles the registry and swaps it in. Whatever cannot be used leaves in force what is.
    /// Returns the agents that changed, or why nothing did.
    pub fn reload(&mut self) -> Result<Changed, String> {
        let began = Instant::now();
        let result = self.try_reload();
        self.meter.applied(began);
        match &result {
            Ok(changed) => {
                info!(
                    message = "Registry in force.",
                    revision = self.force.revision,
                    changed = changed.agents.len(),
                    errors = self.force.errors
                );
                self.problems.remove("reload");
            }
            Err(why) => {
                error!(message = "The reload failed.", why);
                self.problems
                    .insert("reload", format!("the last reload failed: {why}"));
                let revision = self.force.revision;
                self.decide(Decision::Refused {
                    revision,
                    agents: Vec::new(),
                    errors: vec![why.clone()],
                    closed: 0,
                });
            }
        }
        result
    }

    fn try_reload(&mut self) -> Result<Changed, String> {
        let mut laps = Laps::start();
        self.read_holds();
        laps.done("holds");
        let files = registry::read(&self.settings.paths);
        laps.done("files");
        let names = registry::names(&self.settings);
        let compiled = self.memory.compile(&files.sources, wall_millis(), names);
        laps.done("compile");
        let next = force::merge(
            &files,
            compiled,
            Some(&self.force),
            &self.holds,
            stance(&self.settings),
        )
        .map_err(|unusable: Unusable| unusable.to_string())?;
        laps.done("merge");
        // What was held back a second ago for running programs can go now, and make room.
        self.enforcer.sweep();
        let images = self.images(&next);
        laps.done("images");
        // The numbers that the kernel knows agents by may be given to others.
        self.settle_access();
        if self.uses_names(&next) {
            // Before any lookup is turned, so that its answer finds the way back.
            self.guard_names(true);
        }
        let changed = self.put_all(&images)?;
        laps.done("tables");
        let before = std::mem::replace(&mut self.force, next);
        self.follow_names();
        self.expect_endings();
        let followed = self.follow(&changed, &before);
        drop(before);
        laps.done("follow");
        // All of them: what an agent that is gone has open is nobody's now.
        let closed = if changed.is_empty() {
            0
        } else {
            self.close_unreachable(None).closed as u64
        };
        laps.done("connections");
        self.decide_loaded(closed);
        self.keep();
        laps.done("keep");
        tracing::debug!(message = "Reloaded.", changed = changed.len(), took = %laps);
        followed.map_err(|why| format!("the new registry is in force, but {why}"))?;
        Ok(Changed {
            agents: changed,
            closed,
        })
    }

    /// Puts these in force, in larger maps where those in use have no room.
    pub(super) fn put_all(&mut self, images: &[Image]) -> Result<Vec<String>, String> {
        let words = |error: anyhow::Error| format!("{error:#}");
        let small = images.iter().any(Image::uses_names)
            && self.enforcer.capacity().rule_sets < capacity(&self.settings, images).rule_sets;
        let full = match self.enforcer.apply(images) {
            Err(full @ ApplyError::Full { .. }) => full,
            Ok(_) if small => ApplyError::Full {
                map: "rulesets",
                has: 0,
                needs: 0,
                limit: "rule_sets",
            },
            applied => return applied.map_err(|error| words(error.into())),
        };
        let had = self.enforcer.capacity();
        let larger = had.max(capacity(&self.settings, images));
        if larger == had {
            return Err(words(full.into()));
        }
        let changed = self
            .enforcer
            .outgrow(images, larger)
            .map_err(|error| words(error.into()))?;
        info!(
            message = "The registry outgrew its maps; larger ones are in force.",
            ?larger
        );
        if self.kernel_log {
            self.log_kernel();
        }
        self.decide(Decision::Succession(Succession {
            pid: std::process::id(),
            tables: Tables::Grown,
            links: self.enforcer.links(),
            rewritten: Vec::new(),
            revision: self.force.revision,
        }));
        Ok(changed)
    }

    /// What goes with new tables: whose records they are, which cgroups they claim, and whether the
    /// kernel understands them as memory does.
    fn follow(&mut self, changed: &[String], before: &Force) -> Result<(), String> {
        self.recorder
            .learn(&self.enforcer, self.force.revision, all(&self.force));
        let selectors =
            selectors(&self.force, &self.enforcer).map_err(|error| error.to_string())?;
        self.selectors = Arc::new(selectors);
        self.attribute()
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        self.self_test(Some(changed), Some(before))
            .map_err(|why| format!("the self-test fails: {why}"))
    }

    /// Compares the kernel's verdict with memory's, for these agents or for all; first where they
    /// differ from `before`.
    pub(super) fn self_test(
        &mut self,
        only: Option<&[String]>,
        before: Option<&Force>,
    ) -> Result<(), String> {
        let clock = self.offset.clock();
        let only: Option<HashSet<&String>> = only.map(|only| only.iter().collect());
        let tables: Vec<_> = all(&self.force)
            .filter(|tables| only.as_ref().is_none_or(|only| only.contains(&tables.id)))
            .cloned()
            .collect();
        let before: HashMap<&str, &AgentTables> = before
            .into_iter()
            .flat_map(all)
            .map(|tables| (tables.id.as_str(), &**tables))
            .collect();
        let extent = Extent::one_of(tables.len());
        let mut asked = 0;
        for tables in tables {
            let extent = extent.after(before.get(tables.id.as_str()).copied());
            asked += selftest::ask(&mut self.enforcer, &tables, &clock, extent)?;
        }
        tracing::debug!(message = "Kernel and memory agree.", questions = asked);
        Ok(())
    }
}
