//! Which cgroup is which: where the v2 hierarchy is, what its directories are, which of them an
//! agent claims, and what becomes of the processes inside. It knows no policy and no BPF.
//!
//! | file        | promises |
//! |-------------|----------|
//! | `path`      | a path below the mount is checked once, valid after; pure |
//! | `mount`     | the mount is found in mountinfo; pure |
//! | `hierarchy` | create, remove, list, identify |
//! | `member`    | in which cgroup a process is |
//! | `control`   | kill, freeze, wait until empty |
//! | `glob`      | which agent claims a directory: the outermost claim counts |
//! | `watch`     | births and deaths of directories, within a millisecond |

mod control;
mod glob;
mod hierarchy;
mod invocation;
mod member;
mod mount;
mod path;
mod watch;

use std::{io, path::PathBuf};

pub use control::Populated;
pub use glob::{Claim, Claimant, Dispute, Scan, SelectorError, Selectors, Survey};
pub use hierarchy::{Created, Hierarchy};
pub use mount::{Mount, mounts};
pub use path::{CgroupPath, PathError};
pub use watch::{Change, Watcher};

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable mount of the v2 hierarchy.
    #[error(
        "no cgroup v2 mount in /proc/self/mountinfo (mend: `mount -t cgroup2 none /sys/fs/cgroup`)"
    )]
    NoMount,
    /// The configured directory is no cgroup v2 mount.
    #[error("`{}` is no cgroup v2 mount{}", path.display(), found(.instead.as_ref()))]
    NotAMount {
        /// What the settings name.
        path: PathBuf,
        /// A mount that would do.
        instead: Option<PathBuf>,
    },
    /// A file or directory of the hierarchy.
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        /// What was tried: `create`, `read`, ….
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path that is none.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A process outside what the mount shows.
    #[error("process {pid} is in cgroup `{path}`, which the mount `{}` does not show", mount.display())]
    NotShown {
        /// The process.
        pid: u32,
        /// Its cgroup as `/proc` has it.
        path: String,
        /// The mount in use.
        mount: PathBuf,
    },
    /// A process without a v2 cgroup: the kernel has no unified hierarchy.
    #[error("process {0} has no cgroup v2 line in /proc/{0}/cgroup")]
    NoMembership(u32),
    /// The process ended, or its cgroup was removed.
    #[error("process {0} is gone")]
    Gone(u32),
    /// Killing or freezing the cgroup would stop this very process.
    #[error("refused to {operation} cgroup `{path}`: this process is inside it")]
    SelfInside {
        /// `kill` or `freeze`.
        operation: &'static str,
        /// The cgroup.
        path: CgroupPath,
    },
    /// It did not come to pass in time.
    #[error("cgroup `{path}` was not {state} in time")]
    Late {
        /// The cgroup.
        path: CgroupPath,
        /// What was waited for: `frozen`, `thawed`.
        state: &'static str,
    },
    /// Nested deeper than a walk follows.
    #[error("cgroup `{0}` is nested too deeply to walk")]
    TooDeep(CgroupPath),
    /// A selector that is no glob of cgroup paths.
    #[error(transparent)]
    Selector(#[from] SelectorError),
}

fn found(instead: Option<&PathBuf>) -> String {
    match instead {
        Some(mount) => format!("; one is at `{}` (or write `auto`)", mount.display()),
        None => String::new(),
    }
}

impl Error {
    fn io(operation: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            operation,
            path: path.into(),
            source: source.into(),
        }
    }

    /// Whether the kernel said that the file or directory is not there (any more).
    pub fn is_missing(&self) -> bool {
        match self {
            // A control file of a removed cgroup still opens once, and then says ENODEV.
            Self::Io { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR)
            ),
            Self::Gone(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A cgroup of a test's own, removed with all that is in it.

    use std::{
        process,
        sync::atomic::{AtomicU32, Ordering},
        time::{Duration, Instant},
    };

    use super::{CgroupPath, Hierarchy};

    static NEXT: AtomicU32 = AtomicU32::new(0);

    /// A fresh cgroup below the mount.
    pub(crate) struct Sandbox {
        pub(crate) hierarchy: Hierarchy,
        pub(crate) path: CgroupPath,
    }

    impl Sandbox {
        /// Panics where the test may not make cgroups: tests that need one are marked as ignored,
        /// and run by who can (`cargo xtask test` as root).
        pub(crate) fn new(test: &str) -> Self {
            let hierarchy = Hierarchy::find(None).unwrap();
            let serial = NEXT.fetch_add(1, Ordering::Relaxed);
            let path: CgroupPath = format!("/remit-test-{}-{serial}-{test}", process::id())
                .parse()
                .unwrap();
            hierarchy.create(&path).unwrap();
            Self { hierarchy, path }
        }

        pub(crate) fn child(&self, name: &str) -> CgroupPath {
            self.path.child(name).unwrap()
        }
    }

    impl Drop for Sandbox {
        fn drop(&mut self) {
            let deadline = Instant::now() + Duration::from_secs(5);
            let ended = self
                .hierarchy
                .kill(&self.path)
                .and_then(|()| self.hierarchy.wait_empty(&self.path, deadline))
                .and_then(|_| self.hierarchy.remove(&self.path));
            if let Err(error) = ended {
                eprintln!("left behind: {error:?}");
            }
        }
    }
}
