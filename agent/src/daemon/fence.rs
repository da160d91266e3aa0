//! `remit fence`: the fence without a daemon, for the moment of a boot before anything runs in it.
//!
//! What stands is left as it is: an earlier daemon put it in force, and the next one takes it over.
//! What does not stand is raised, from the registry as a daemon would take it. Either way it is
//! read back, and outlives this process by its pins. Cgroups that are born before the daemon comes
//! belong to nobody yet, and so reach nothing.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    DaemonError, Options,
    core::{self, all},
    ground::{Ground, Otherwise, create_roots},
    lock::{Lock, LockError},
    selftest::{self, Extent},
    settings::Settings,
};
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    kernel,
};

/// How long a daemon that runs may take to fence a root that was made anew.
const DAEMON: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// How the fence came to stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stood {
    /// An earlier daemon's, as it was.
    Found,
    /// One that runs looks after it.
    Daemon,
    /// Raised just now.
    Raised {
        /// Agents in force.
        agents: usize,
        /// Why the registry in force is not the one on disk.
        fell_back: Option<String>,
    },
}

/// A fence that was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// The roots.
    pub roots: Vec<String>,
    /// How.
    pub stood: Stood,
}

/// Sees to it that a fence stands on every root.
///
/// # Errors
/// When it cannot be raised, or does not read back as it should: nothing may start behind it.
pub fn raise(settings: &Settings, options: &Options) -> Result<Fenced, DaemonError> {
    let (stood, hierarchy) = match Lock::take(&settings.paths.run) {
        Ok(lock) => {
            let stood = found_or_raised(settings, options)?;
            drop(lock);
            stood
        }
        Err(LockError::Held(_)) => {
            let hierarchy = core::hierarchy(settings)?;
            await_daemon(settings, &hierarchy)?;
            (Stood::Daemon, hierarchy)
        }
        Err(error) => return Err(error.into()),
    };
    // By the pins alone, as whoever comes next will find it.
    let roots = create_roots(settings, &hierarchy)?;
    stands(settings, &hierarchy, &roots).map_err(DaemonError::Fence)?;
    Ok(Fenced {
        roots: roots.iter().map(ToString::to_string).collect(),
        stood,
    })
}

fn found_or_raised(
    settings: &Settings,
    options: &Options,
) -> Result<(Stood, Hierarchy), DaemonError> {
    let hierarchy = core::hierarchy(settings)?;
    let roots = create_roots(settings, &hierarchy)?;
    match stands(settings, &hierarchy, &roots) {
        Ok(()) => return Ok((Stood::Found, hierarchy)),
        Err(why) => info!(message = "No fence stands; raising it.", why),
    }
    let mut ground = Ground::lay(settings, options, Otherwise::DenyAll)?;
    let selectors = core::selectors(&ground.force, &ground.enforcer)?;
    let mut claims = Vec::new();
    for root in &ground.roots {
        let survey = ground.hierarchy.claims(root, &selectors)?;
        claims.extend(survey.claims.iter().map(|claim| (claim.id, claim.agent)));
    }
    ground.enforcer.attribute_indices(&claims)?;
    for root in &ground.roots {
        let directory = ground.hierarchy.directory(root);
        ground.enforcer.fence(&root.to_string(), &directory)?;
    }
    if let Err(error) = ground.enforcer.settle_in() {
        warn!(message = "The maps of before could not be removed yet.", %error);
    }
    let clock = ground.offset.clock();
    let tables: Vec<_> = all(&ground.force).cloned().collect();
    let extent = Extent::one_of(tables.len());
    for tables in &tables {
        selftest::ask(&mut ground.enforcer, tables, &clock, extent)
            .map_err(DaemonError::SelfTest)?;
    }
    let stood = Stood::Raised {
        agents: ground.force.agents.len(),
        fell_back: ground.force.fell_back.clone(),
    };
    Ok((stood, hierarchy))
}

/// Waits for the daemon that holds the lock: it may be starting, or about to fence a root anew.
fn await_daemon(settings: &Settings, hierarchy: &Hierarchy) -> Result<(), DaemonError> {
    let until = Instant::now() + DAEMON;
    loop {
        let roots = create_roots(settings, hierarchy)?;
        match stands(settings, hierarchy, &roots) {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() >= until => return Err(DaemonError::Fence(why)),
            Err(_) => sleep(PAUSE),
        }
    }
}

/// Whether each root is fenced, by what is pinned; the error says what is missing.
fn stands(settings: &Settings, hierarchy: &Hierarchy, roots: &[CgroupPath]) -> Result<(), String> {
    for root in roots {
        let directory = hierarchy.directory(root);
        kernel::standing(&settings.paths.bpffs, &root.to_string(), &directory)
            .map_err(|why| format!("root `{root}`: {why}"))?;
    }
    Ok(())
}
