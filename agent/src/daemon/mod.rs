//! The daemon: the only place where the other modules meet.
//!
//! Start order, each step before the next and all before `READY=1`: settings, lock, registry
//! compiled, object loaded and its layout compared, tables filled and read back, cgroups
//! attributed, roots fenced and read back, the kernel's own verdict compared with memory's, logs
//! open, control socket bound. Whatever fails ends the start; what an earlier daemon left in force
//! stays in force.
//!
//! One task, [`core::Core`], owns the kernel side and all state; the control server and the
//! watchers only send to it.

mod access;
mod advice;
mod answers;
mod attribution;
mod carried;
mod closing;
mod core;
mod detach;
mod differences;
mod endings;
mod evidence;
mod explaining;
pub mod fence;
mod files;
pub mod force;
mod ground;
mod keeping;
mod laps;
mod leased;
mod lifecycle;
mod lock;
mod lookups;
mod metering;
mod myself;
mod names;
mod naming;
mod observer;
mod placing;
mod posture;
mod probe;
mod reconcile;
mod recorder;
pub mod registry;
mod reload;
mod running;
mod self_asked;
mod selftest;
pub mod settings;
pub mod standalone;
mod time;
mod watch;
mod watchdog;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tracing::{info, warn};

use self::{core::Core, files::Files, settings::Settings, watchdog::Watchdog};
use crate::{
    audit::{LogError, TrailError, mask::PatternError},
    cgroup::{self, Watcher},
    control,
    kernel::{self, ApplyError, AttachError, OpenError},
};

pub use self::{core::hierarchy, evidence::places};
pub use force::{Unusable, image};
pub use lock::{Lock, LockError};
pub use probe::helper::serve as serve_probe;
pub use time::wall_millis;

/// What a start is told beside the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The BPF object; normally [`kernel::EMBEDDED`]. Tests hand in broken ones.
    pub object: std::borrow::Cow<'static, [u8]>,
    /// Level of the kernel side's own debugging log: 0 off, 1 error to 5 trace.
    pub kernel_log: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            object: kernel::EMBEDDED.into(),
            kernel_log: 0,
        }
    }
}

/// Why the daemon did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another one runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// `containment = "require"`.
    #[error(
        "`enforcement.containment` is \"require\", and this build has no containment guards yet; \
         \"auto\" starts without them and says so in `remit status`"
    )]
    Containment,
    /// The registry may not come into force.
    #[error(transparent)]
    Registry(#[from] Unusable),
    /// The kernel side.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Filling the tables.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Fencing a root.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// A root's name.
    #[error("root `{0}` is no cgroup path: {1}")]
    Root(String, cgroup::PathError),
    /// Selectors of the registry.
    #[error(transparent)]
    Selectors(#[from] cgroup::SelectorError),
    /// A fence that does not read back as it should.
    #[error("the fence does not stand: {0}")]
    Fence(String),
    /// The kernel's verdict is not memory's.
    #[error("self-test: {0}; nothing is declared ready on such grounds")]
    SelfTest(String),
    /// The DNS guard of a fence without a daemon.
    #[error("the DNS guard cannot be started: {0}")]
    Names(String),
    /// A log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A pattern of `log.mask`.
    #[error(transparent)]
    Mask(#[from] PatternError),
    /// The audit trail.
    #[error(transparent)]
    Trail(#[from] TrailError),
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] control::server::BindError),
    /// The address of the metrics.
    #[error("cannot serve metrics at {address}, which `metrics.listen` names")]
    Metrics {
        /// Which address.
        address: std::net::SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something of the operating system.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Runs the daemon until it is told to stop. On SIGTERM and SIGINT the fence stays.
pub fn run(settings: Settings, options: Options) -> Result<(), DaemonError> {
    // One thread: a lookup asks the daemon's task twice before it is answered, and nothing here can
    // go on without that task for long. Two would wake each other four times for each lookup.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| DaemonError::System {
            what: "start the runtime",
            source,
        })?;
    runtime.block_on(serve(settings, options))
}

/// Takes the whole fence down: the only way to stop enforcing. Returns the directories that were
/// removed.
pub fn detach_all(settings: &Settings) -> Result<Vec<PathBuf>, DaemonError> {
    let _lock = Lock::take(&settings.paths.run)?;
    let removed = detach::detach_all(settings)?;
    Ok(removed)
}

/// Lets this process open as many files as it may: each endpoint of the DNS guard takes four, and
/// each question that is asked upstream one.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(message = "The limit of open files could not be raised.", %error);
    }
}

const DRAIN_EVERY: Duration = Duration::from_millis(5);
const SETTLE_EVERY: Duration = Duration::from_secs(1);

async fn serve(settings: Settings, options: Options) -> Result<(), DaemonError> {
    let system = |what| move |source| DaemonError::System { what, source };
    let _lock = Lock::take(&settings.paths.run)?;
    raise_open_files();
    let (mut core, mut lookups) = Core::start(&settings, &options)?;
    if options.kernel_log > 0 {
        core.log_kernel();
    }
    let listener = control::server::Listener::bind(&settings.socket(), READERS)?;
    let (calls, mut requests) = mpsc::channel(64);
    let roots = core.roots_in_proc();
    let scrape = metering::listen(&settings, calls.clone())?;
    let server = tokio::spawn(control::server::serve(listener, roots, calls));

    let mut terminate = signal(SignalKind::terminate()).map_err(system("catch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("catch SIGINT"))?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(system("catch SIGHUP"))?;
    let mut reopen = signal(SignalKind::user_defined1()).map_err(system("catch SIGUSR1"))?;

    let mut watcher = Watcher::new(
        core.hierarchy().clone(),
        core.roots().to_vec(),
        core.selectors(),
    )?;
    let mut files = Files::watch(&settings.paths).map_err(system("watch the registry"))?;
    let ring = core.ring().map_err(system("watch the ring"))?;
    // SAFETY: an `OwnedFd` keeps its descriptor until it is dropped, with the `AsyncFd` around it.
    let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
        .map_err(|error| system("watch the ring")(error.into()))?;
    let mut drain = interval(DRAIN_EVERY);
    drain.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut settle = interval(SETTLE_EVERY);
    settle.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reconcile = interval(posture::compare_every(&settings));
    reconcile.set_missed_tick_behavior(MissedTickBehavior::Delay);

    let (steps, mut probing) = mpsc::channel(16);
    let worker = probe::Worker::start(steps).map_err(system("start a thread for probes"))?;
    core.set_probe_worker(worker);

    core.started();
    core.compare_first();
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(message = "The service manager could not be told.", %error);
    }
    info!(message = "Enforcing.", revision = core.revision());
    core.observe();
    let mut watchdog = Watchdog::start();

    let reason = loop {
        let mut selectors = None;
        tokio::select! {
            biased;
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            changes = watcher.changes() => {
                match changes {
                    Ok(changes) => core.cgroups_changed(&changes),
                    Err(error) => {
                        warn!(message = "Cgroups are not watched any more; polling.", %error);
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        core.survey();
                    }
                }
            }
            Some(step) = probing.recv() => core.probe_step(step),
            Some(call) = requests.recv() => {
                if matches!(call.request, control::Request::Reload(..)) {
                    files.read();
                }
                let reloaded = core.answer(call);
                if reloaded {
                    selectors = Some(core.selectors());
                }
            }
            Some(request) = lookups.recv() => core.lookup(request),
            woken = ring.readable() => {
                if let Ok(mut guard) = woken {
                    guard.clear_ready();
                }
                core.drain();
            }
            _ = drain.tick(), if core.hears() => core.drain(),
            _ = settle.tick() => {
                if core.settle() {
                    selectors = Some(core.selectors());
                }
                watchdog.feed(&core, &[("control server", server.is_finished())]);
            }
            _ = reconcile.tick() => {
                core.mend();
                if files.differ() {
                    files.read();
                    // What came of it is in the log and in `status`.
                    drop(core.reload());
                    selectors = Some(core.selectors());
                }
            }
            _ = hang_up.recv() => {
                files.read();
                // What came of it is in the log and in `status`.
                drop(core.reload());
                selectors = Some(core.selectors());
            }
            _ = reopen.recv() => core.reopen_logs(),
            () = files.changed() => {
                files.read();
                // What came of it is in the log and in `status`.
                drop(core.reload());
                selectors = Some(core.selectors());
            }
        }
        if let Some(selectors) = selectors
            && let Err(error) = watcher.replace(core.roots().to_vec(), Arc::clone(&selectors))
        {
            warn!(message = "Cgroups are watched with the old selectors; polling.", %error);
        }
    };
    server.abort();
    if let Some(scrape) = scrape {
        scrape.abort();
    }
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
        warn!(message = "The service manager could not be told.", %error);
    }
    core.stop(reason);
    Ok(())
}

/// The group that may read the control socket.
const READERS: &str = "remit";
