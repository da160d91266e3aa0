//! When there may be something new to read: at once where the system tells, now and then in any case.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use inotify::{Inotify, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Room for what is told at a time; what it says is of no interest.
const TOLD: usize = 16 << 10;

/// Waits for changes in a log's folder.
#[derive(Debug)]
pub struct Wake {
    folder: PathBuf,
    inotify: Option<Inotify>,
}

// === impl Wake ===

impl Wake {
    /// Watches the folder of the log at `path` from now on. Make it before the first reading, so
    /// that nothing falls between the two.
    pub fn new(path: &Path) -> Self {
        let mut wake = Self {
            folder: path.parent().unwrap_or(Path::new("/")).to_owned(),
            inotify: None,
        };
        wake.watch();
        wake
    }

    /// Returns when something changed, or after `most`.
    pub fn wait(&mut self, most: Duration) {
        if self.inotify.is_none() {
            // The folder is not there yet, or the system has no watches left.
            thread::sleep(most);
            self.watch();
        } else if self.poll(most).is_err() {
            self.inotify = None;
        }
    }

    fn watch(&mut self) {
        let watched = || -> io::Result<Inotify> {
            let inotify = Inotify::init()?;
            let mask = WatchMask::MODIFY
                | WatchMask::CREATE
                | WatchMask::MOVED_TO
                | WatchMask::DELETE_SELF
                | WatchMask::MOVE_SELF;
            inotify.watches().add(&self.folder, mask)?;
            Ok(inotify)
        };
        self.inotify = watched().ok();
    }

    fn poll(&mut self, most: Duration) -> io::Result<()> {
        let Some(inotify) = &mut self.inotify else {
            return Ok(());
        };
        let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut told = [0; TOLD];
        let gone = inotify.read_events(&mut told)?.any(|event| {
            event.mask.intersects(
                inotify::EventMask::IGNORED
                    | inotify::EventMask::DELETE_SELF
                    | inotify::EventMask::MOVE_SELF,
            )
        });
        if gone {
            self.inotify = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_was_written_before_the_wait_ends_it_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let mut wake = Wake::new(&path);
        let began = Instant::now();
        fs::write(&path, "{}\n").unwrap();
        wake.wait(LONG);
        assert!(began.elapsed() < LONG / 2);
        fs::rename(dir.path().join("a.jsonl"), dir.path().join("a.jsonl.1")).unwrap();
        wake.wait(LONG);
        assert!(began.elapsed() < LONG / 2);
        assert!(wake.inotify.is_some());
    }

    #[test]
    fn a_folder_may_come_later_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("log");
        let mut wake = Wake::new(&folder.join("a.jsonl"));
        assert!(wake.inotify.is_none());
        fs::create_dir(&folder).unwrap();
        wake.wait(Duration::from_millis(1));
        assert!(wake.inotify.is_some());
        fs::remove_dir(&folder).unwrap();
        wake.wait(LONG);
        assert!(wake.inotify.is_none());
    }
}
