//! One daemon at a time: two would fight over one fence.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A daemon holds it.
    #[error("another daemon runs (it holds `{}`); stop it first", .0.display())]
    Held(PathBuf),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holds_it() {
        let run = tempfile::tempdir().unwrap();
        let held = Lock::take(run.path()).unwrap();
        assert!(matches!(Lock::take(run.path()), Err(LockError::Held(_))));
        drop(held);
        Lock::take(run.path()).unwrap();
    }
}
