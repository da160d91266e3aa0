//! When the registry's files change. inotify tells at once; a look at what is there, now and then,
//! finds what it did not tell: a folder that was replaced, a mount, a queue that ran over.

use std::{
    ffi::OsStr,
    fs,
    io::{self, ErrorKind},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::PathBuf,
    time::Duration,
};

use inotify::{Inotify, WatchMask};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep_until},
};

use super::settings::Paths;

/// Files change in bursts; they are read once they have been quiet this long,
const QUIET: Duration = Duration::from_millis(200);
/// or when a burst goes on for this long.
const AT_MOST: Duration = Duration::from_secs(1);

/// What tells one state of a file from another: device, inode, size, and the times of its content
/// and of itself in nanoseconds.
type Look = Vec<(PathBuf, u64, u64, u64, i128, i128)>;

/// The files of the registry, watched.
pub struct Files {
    folders: Vec<PathBuf>,
    floor: PathBuf,
    inotify: AsyncFd<Inotify>,
    seen: Look,
    burst: Option<(Instant, Instant)>,
}

impl Files {
    /// Watches the folders that the settings name, as far as they are there.
    pub fn watch(paths: &Paths) -> io::Result<Self> {
        // SAFETY: the descriptor lives in the `Inotify` that is handed over, and nothing closes or
        // replaces it before the `AsyncFd` around it is dropped.
        let inotify = unsafe { AsyncFd::register(Inotify::init()?) }?;
        let mut files = Self {
            folders: std::iter::once(&paths.registry)
                .chain(&paths.sets)
                .cloned()
                .collect(),
            floor: paths.floor.clone(),
            inotify,
            seen: Vec::new(),
            burst: None,
        };
        files.renew()?;
        files.read();
        Ok(files)
    }

    /// Returns when files have changed and then been quiet, or when they don't stop changing. May
    /// be dropped at any time without losing a change.
    pub async fn changed(&mut self) {
        loop {
            let due = self
                .burst
                .map(|(first, last)| (last + QUIET).min(first + AT_MOST));
            let until = due.unwrap_or_else(Instant::now);
            tokio::select! {
                woken = self.inotify.readable_mut() => {
                    let Ok(mut guard) = woken else {
                        // Without inotify there still is the look now and then.
                        return std::future::pending().await;
                    };
                    let mut meant = false;
                    let mut buffer = [0; 4096];
                    while let Ok(events) = guard.get_inner_mut().read_events(&mut buffer) {
                        let mut some = false;
                        for event in events {
                            some = true;
                            meant |= event.name.is_none_or(is_meant);
                        }
                        if !some {
                            break;
                        }
                    }
                    guard.clear_ready();
                    if meant {
                        let now = Instant::now();
                        self.burst = Some((self.burst.map_or(now, |(first, _)| first), now));
                    }
                }
                () = sleep_until(until), if due.is_some() => {
                    self.burst = None;
                    return;
                }
            }
        }
    }

    /// The files are about to be read as they are now.
    pub fn read(&mut self) {
        self.seen = self.look();
    }

    /// Whether something has changed since they were last read, by their looks.
    pub fn differ(&mut self) -> bool {
        if let Err(error) = self.renew() {
            tracing::warn!(message = "The registry is not watched; it is looked at.", %error);
        }
        self.look() != self.seen
    }

    /// Watches what is there by now. A folder that is watched already stays so.
    fn renew(&mut self) -> io::Result<()> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::ATTRIB;
        let mut watches = self.inotify.get_ref().watches();
        // The floor is one file, which editors replace: its folder is watched.
        for folder in self
            .folders
            .iter()
            .map(PathBuf::as_path)
            .chain(self.floor.parent())
        {
            match watches.add(folder, mask) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn look(&self) -> Look {
        let mut look = Look::new();
        let entries = self
            .folders
            .iter()
            .flat_map(fs::read_dir)
            .flatten()
            .flatten();
        let files = entries
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(is_meant));
        for path in files.chain(std::iter::once(self.floor.clone())) {
            if let Ok(found) = fs::metadata(&path) {
                let nanos =
                    |secs: i64, nanos: i64| i128::from(secs) * 1_000_000_000 + i128::from(nanos);
                look.push((
                    path,
                    found.dev(),
                    found.ino(),
                    found.size(),
                    nanos(found.mtime(), found.mtime_nsec()),
                    nanos(found.ctime(), found.ctime_nsec()),
                ));
            }
        }
        look.sort();
        look
    }
}

/// Whether a name is one that the registry reads: editors' files and marks are not.
fn is_meant(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.ends_with(b".toml") && !name.starts_with(b".")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    fn paths(folder: &Path) -> Paths {
        fs::create_dir_all(folder.join("agents.d")).unwrap();
        Paths {
            registry: folder.join("agents.d"),
            sets: vec![folder.join("sets.d")],
            floor: folder.join("floor.toml"),
            ..Paths::default()
        }
    }

    #[tokio::test]
    async fn a_burst_is_told_once_and_marks_are_not() {
        let folder = TempDir::new().unwrap();
        let paths = paths(folder.path());
        let mut files = Files::watch(&paths).unwrap();
        fs::write(paths.registry.join("a.hold"), "mark").unwrap();
        fs::write(paths.registry.join(".a.toml.swp"), "editor").unwrap();
        assert!(
            timeout(Duration::from_millis(500), files.changed())
                .await
                .is_err()
        );
        for _ in 0..50 {
            fs::write(paths.registry.join("a.toml"), "text").unwrap();
        }
        timeout(Duration::from_secs(3), files.changed())
            .await
            .unwrap();
        assert!(
            timeout(Duration::from_millis(500), files.changed())
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn what_does_not_stop_is_told_all_the_same() {
        let folder = TempDir::new().unwrap();
        let paths = paths(folder.path());
        let mut files = Files::watch(&paths).unwrap();
        let began = Instant::now();
        let storm = async {
            loop {
                fs::write(paths.registry.join("a.toml"), "text").unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = files.changed() => {}
            () = storm => {}
        }
        assert!(began.elapsed() >= QUIET);
    }

    #[tokio::test]
    async fn a_look_finds_what_was_replaced() {
        let folder = TempDir::new().unwrap();
        let paths = paths(folder.path());
        let mut files = Files::watch(&paths).unwrap();
        assert!(!files.differ());
        fs::create_dir(&paths.sets[0]).unwrap();
        fs::write(paths.sets[0].join("s.toml"), "set").unwrap();
        assert!(files.differ());
        files.read();
        assert!(!files.differ());
        fs::write(&paths.floor, "floor").unwrap();
        assert!(files.differ());
    }
}
