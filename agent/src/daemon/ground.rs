//! What a fence stands on, for the daemon's start and for `remit fence`: the registry that shall be
//! in force, the roots, and the kernel's tables filled. Nothing is attached here; what an earlier
//! daemon left in force stays until it is.

use std::time::Instant;

use tokio::sync::mpsc;
use tracing::warn;

use super::{
    DaemonError, Options,
    core::{self, capacity, stance},
    force::{self, Force, Stance},
    keeping::clocks_before,
    laps::Laps,
    lock::RootLock,
    names::{self, Names},
    registry::{self, Registry},
    settings::{Containment, Settings, Unregistered},
    time::{Offset, wall_millis},
};
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    dns::server::Request,
    kernel::{ApplyError, Capacity, Enforcer, Tuning},
    policy,
    state::{Loaded, Store},
};

/// What becomes of a registry that cannot be used, and of which no last good state is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// An error.
    Fail,
    /// Nobody reaches anything.
    DenyAll,
}

/// Everything up to the attachment.
pub(super) struct Ground {
    pub(super) hierarchy: Hierarchy,
    pub(super) roots: Vec<CgroupPath>,
    pub(super) locks: Vec<RootLock>,
    pub(super) store: Store,
    pub(super) loaded: Loaded,
    pub(super) offset: Offset,
    pub(super) force: Force,
    pub(super) names: Names,
    pub(super) lookups: mpsc::Receiver<Request>,
    pub(super) enforcer: Enforcer,
    /// Whether the maps were there before.
    pub(super) adopted: bool,
    /// When filling the tables began; it has just ended.
    pub(super) began: Instant,
    pub(super) laps: Laps,
    pub(super) memory: policy::Memory,
}

impl Ground {
    /// Compiles the registry, creates the roots, loads the object and fills its tables.
    pub(super) fn lay(
        settings: &Settings,
        options: &Options,
        otherwise: Otherwise,
    ) -> Result<Self, DaemonError> {
        if settings.enforcement.containment == Containment::Require {
            return Err(DaemonError::Containment);
        }
        let mut laps = Laps::start();
        let hierarchy = core::hierarchy(settings)?;
        let mut store = Store::open(&settings.paths.state, &settings.paths.registry);
        let loaded = store.load(wall_millis());
        let offset = Offset::resume(&clocks_before(loaded.clock.as_ref(), settings));
        laps.done("state");
        let mut memory = policy::Memory::default();
        let force = wanted(settings, &loaded, &mut memory, otherwise, &mut laps)?;
        let (names, lookups) = Names::start(settings, offset);
        let mut images = force.images(&offset.clock());
        let mut uses_names = false;
        for image in &mut images {
            if let Some(agent) = force.agents.get(&image.id) {
                uses_names |= names::mark(&names, &agent.tables, image);
            }
            // Whoever is not there to look after leases takes none over.
            image.fresh = otherwise == Otherwise::DenyAll;
        }
        laps.done("images");

        let tuning = Tuning {
            kernel_log: options.kernel_log,
            events_per_second: settings.log.per_agent_rate,
            accounts: settings.log.access.is_some(),
        };
        let capacity = capacity(settings, &images);
        let roots = create_roots(settings, &hierarchy)?;
        let mut locks = Vec::new();
        for root in &roots {
            locks.push(RootLock::take(&hierarchy, root, &roots)?);
        }
        let mut enforcer =
            Enforcer::open(&options.object, &settings.paths.bpffs, capacity, &tuning)?;
        laps.done("load");
        let adopted = enforcer.born_before_us();
        enforcer.guard_names(uses_names)?;
        let began = Instant::now();
        match enforcer.apply(&images) {
            Err(ApplyError::Full { .. }) if enforcer.capacity() != larger(&enforcer, capacity) => {
                enforcer.outgrow(&images, larger(&enforcer, capacity))?;
            }
            applied => drop(applied?),
        }
        laps.done("tables");
        Ok(Self {
            hierarchy,
            roots,
            locks,
            store,
            loaded,
            offset,
            force,
            names,
            lookups,
            enforcer,
            adopted,
            began,
            laps,
            memory,
        })
    }
}

/// The registry that shall be in force.
fn wanted(
    settings: &Settings,
    loaded: &Loaded,
    memory: &mut policy::Memory,
    otherwise: Otherwise,
    laps: &mut Laps,
) -> Result<Force, DaemonError> {
    let files = registry::read(&settings.paths);
    laps.done("files");
    let whether = registry::names(settings);
    let compiled = memory.compile(&files.sources, wall_millis(), whether);
    laps.done("compile");
    let last = loaded.registry.as_ref();
    let force = force::start(&files, compiled, last, &loaded.holds, stance(settings));
    laps.done("merge");
    match force {
        Err(unusable) if otherwise == Otherwise::DenyAll => {
            warn!(
                message = "The registry cannot be used, and there is no earlier one: nobody reaches \
                           anything.",
                error = %unusable
            );
            let nothing = policy::Memory::default().compile(&[], wall_millis(), whether);
            let deny = Stance {
                unregistered: Unregistered::Deny,
                ..stance(settings)
            };
            let none = Registry::default();
            Ok(force::start(&none, nothing, None, &loaded.holds, deny)?)
        }
        force => Ok(force?),
    }
}

/// The roots that the settings name, created where they are missing.
pub(super) fn create_roots(
    settings: &Settings,
    hierarchy: &Hierarchy,
) -> Result<Vec<CgroupPath>, DaemonError> {
    let mut roots = Vec::new();
    for root in &settings.enforcement.roots {
        let path = CgroupPath::new(root).map_err(|why| DaemonError::Root(root.clone(), why))?;
        hierarchy.create(&path)?;
        roots.push(path);
    }
    Ok(roots)
}

/// At least the room that there is.
fn larger(enforcer: &Enforcer, wanted: Capacity) -> Capacity {
    enforcer.capacity().max(wanted)
}
