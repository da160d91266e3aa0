//! `remit fence`: the fence without a daemon, for the moment of a boot before anything runs in it.
//!
//! What stands is left as it is: an earlier daemon put it in force, and the next one takes it over.
//! What does not stand is raised, from the registry as a daemon would take it. Either way it is
//! read back, and outlives this process by its pins. Cgroups that are born before the daemon comes
//! belong to nobody yet, and so reach nothing.

use std::{
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt as _,
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

/// How long whoever holds the lock may take to fence a root that was made anew.
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

/// Makes what a fence needs and a service without the right to write just anywhere cannot make: the
/// roots, and the folder of the pins. It mounts nothing and raises nothing.
///
/// # Errors
/// When one of them is missing and cannot be made.
pub fn prepare(settings: &Settings) -> Result<(), DaemonError> {
    create_roots(settings, &core::hierarchy(settings)?)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&settings.paths.bpffs)
        .map_err(|source| DaemonError::System {
            what: "make the folder of the pins",
            source,
        })
}

/// Sees to it that a fence stands on every root.
///
/// # Errors
/// When it cannot be raised, or does not read back as it should: nothing may start behind it.
pub fn raise(settings: &Settings, options: &Options) -> Result<Fenced, DaemonError> {
    let until = Instant::now() + DAEMON;
    let (stood, hierarchy) = loop {
        match Lock::take(&settings.paths.run) {
            Ok(lock) => {
                let stood = found_or_raised(settings, options)?;
                drop(lock);
                break stood;
            }
            // By a daemon, which may be starting or about to fence a root anew, or by another of
            // these, which ends.
            Err(LockError::Held(_)) => {
                let hierarchy = core::hierarchy(settings)?;
                let roots = create_roots(settings, &hierarchy)?;
                match stands(settings, &hierarchy, &roots) {
                    Ok(()) => break (Stood::Daemon, hierarchy),
                    Err(why) if Instant::now() >= until => return Err(DaemonError::Fence(why)),
                    Err(_) => sleep(PAUSE),
                }
            }
            Err(error) => return Err(error.into()),
        }
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

/// Whether each root is fenced, by what is pinned; the error says what is missing.
fn stands(settings: &Settings, hierarchy: &Hierarchy, roots: &[CgroupPath]) -> Result<(), String> {
    for root in roots {
        let directory = hierarchy.directory(root);
        kernel::standing(&settings.paths.bpffs, &root.to_string(), &directory)
            .map_err(|why| format!("root `{root}`: {why}"))?;
    }
    Ok(())
}
