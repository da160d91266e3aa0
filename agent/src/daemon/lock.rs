//! One daemon at a time: two would fight over one fence. A file in the run directory says so for
//! one set of settings, the directory of each root for all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use tracing::warn;

use crate::cgroup::{CgroupPath, Hierarchy};

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A daemon holds it.
    #[error("another daemon runs (it holds `{}`); stop it first", .0.display())]
    Held(PathBuf),
    /// A daemon with other settings governs the root.
    #[error(
        "another daemon, process {pid}, governs root `{root}`; stop it first, or give this one \
         other `enforcement.roots`"
    )]
    Governed {
        /// The root.
        root: String,
        /// The other daemon.
        pid: u32,
    },
    /// The file cannot be used.
    #[error("cannot lock `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The lock, for as long as it lives. The kernel gives it back when the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock in the run directory.
    pub fn take(run: &Path) -> Result<Self, LockError> {
        let path = run.join("remit.lock");
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(run).map_err(failed)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(LockError::Held(path)),
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        // For people who look into it; nothing reads it.
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// The lock on a root, for as long as it lives.
#[derive(Debug)]
pub struct RootLock {
    root: CgroupPath,
    id: u64,
    _directory: Option<Flock<File>>,
}

impl RootLock {
    /// Takes the lock on a root's directory. Whoever may read the directory could hold it, so a
    /// holder counts only if it is root's and outside of `roots`: an agent must not be able to keep
    /// the daemon from starting.
    pub fn take(
        hierarchy: &Hierarchy,
        root: &CgroupPath,
        roots: &[CgroupPath],
    ) -> Result<Self, LockError> {
        let path = hierarchy.directory(root);
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let directory = File::open(&path).map_err(failed)?;
        let found = directory.metadata().map_err(failed)?;
        let directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Some(directory),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let locks = fs::read("/proc/locks").map_err(failed)?;
                for pid in holders(&locks, found.dev(), found.ino()) {
                    if counts(hierarchy, roots, pid) {
                        return Err(LockError::Governed {
                            root: root.to_string(),
                            pid,
                        });
                    }
                    warn!(
                        message = "A process that is no daemon holds the lock on a root.",
                        %root,
                        pid
                    );
                }
                None
            }
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        Ok(Self {
            root: root.clone(),
            id: found.ino(),
            _directory: directory,
        })
    }

    /// Whether it is for this root as it is now, and not for one that was removed.
    pub fn is_for(&self, root: &CgroupPath, id: u64) -> bool {
        self.root == *root && self.id == id
    }
}

/// Whether a holder can be a daemon: it runs as root, and no root governs it. One that cannot be
/// looked at counts.
fn counts(hierarchy: &Hierarchy, roots: &[CgroupPath], pid: u32) -> bool {
    let of_root = fs::metadata(format!("/proc/{pid}")).map_or(true, |process| process.uid() == 0);
    let governed = hierarchy
        .cgroup_of(pid)
        .is_ok_and(|cgroup| roots.iter().any(|root| cgroup.is_within(root)));
    of_root && !governed
}

/// Who holds a flock(2) on a file, by `/proc/locks` (proc(5)).
fn holders(locks: &[u8], dev: u64, ino: u64) -> Vec<u32> {
    let (major, minor) = (nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    let file = format!("{major:02x}:{minor:02x}:{ino}");
    String::from_utf8_lossy(locks)
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [_, "FLOCK", _, _, pid, of, ..] if *of == file => pid.parse().ok(),
                _ => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_found_by_their_file() {
        let locks = b"1: FLOCK  ADVISORY  WRITE 21713 00:26:25 0 EOF\n\
                      1: -> FLOCK  ADVISORY  WRITE 5 00:26:25 0 EOF\n\
                      2: POSIX  ADVISORY  READ 77 00:26:25 0 EOF\n\
                      3: FLOCK  ADVISORY  READ 78 00:26:26 0 EOF\n";
        let dev = nix::sys::stat::makedev(0, 0x26);
        assert_eq!(holders(locks, dev, 25), [21713]);
        assert!(holders(locks, dev, 27).is_empty());
    }

    #[test]
    #[ignore = "needs root"]
    fn a_root_is_governed_by_one_and_an_agent_cannot_hold_it() {
        let hierarchy = Hierarchy::find(None).unwrap();
        let root = CgroupPath::new(format!("/remit-lock-{}", std::process::id())).unwrap();
        hierarchy.create(&root).unwrap();
        let roots = std::slice::from_ref(&root);
        let held = RootLock::take(&hierarchy, &root, roots).unwrap();
        let second = RootLock::take(&hierarchy, &root, roots);
        drop(held);
        let third = RootLock::take(&hierarchy, &root, roots).map(drop);
        hierarchy.remove(&root).unwrap();
        assert!(
            matches!(second, Err(LockError::Governed { pid, .. }) if pid == std::process::id())
        );
        third.unwrap();
    }

    #[test]
    fn only_one_holds_it() {
        let run = tempfile::tempdir().unwrap();
        let held = Lock::take(run.path()).unwrap();
        assert!(matches!(Lock::take(run.path()), Err(LockError::Held(_))));
        drop(held);
        Lock::take(run.path()).unwrap();
    }
}
