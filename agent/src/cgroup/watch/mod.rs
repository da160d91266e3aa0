//! Births and deaths of cgroups below the roots, as inotify tells them.
//!
//! An event is only a hint to look: what is announced is the difference between what was known of
//! a path and what is there now. So a cgroup that is removed and made again between two looks is
//! announced as one death and one birth, a lost event costs a look at everything, and nothing is
//! announced twice. A claimed cgroup is not entered: what an agent creates below its own changes
//! nothing, and its floods are not heard.
//!
//! cgroupfs tells of a directory's end only to those who watch its parent: the watch on the
//! directory itself gets neither IN_DELETE_SELF nor IN_IGNORED (measured on 6.18) and has to be
//! taken back by hand. So the parents of the roots are watched too.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    io,
    path::Path,
    sync::Arc,
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};

use super::{CgroupPath, Claimant, Error, Hierarchy, Selectors};

/// Bytes read at once: some hundred events.
const BUFFER: usize = 64 * 1024;
/// Directories watched at most; the kernel takes about 1 KiB for each.
const WATCHES: usize = 65_536;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A cgroup is there that was not.
    Created {
        /// Where.
        path: CgroupPath,
        /// Its id.
        id: u64,
        /// Who claims it; nothing above it is claimed.
        claimant: Claimant,
    },
    /// A cgroup is gone.
    Deleted {
        /// Where it was.
        path: CgroupPath,
        /// The id that it had.
        id: u64,
    },
    /// A root is gone, and its programs with it.
    RootDeleted(CgroupPath),
    /// A root is there again, without programs.
    RootCreated {
        /// Where.
        path: CgroupPath,
        /// Its id.
        id: u64,
    },
    /// A directory can't be watched (`fs.inotify.max_user_watches`, or too many of them): what is
    /// born in it is only found by the next survey.
    Unwatched(CgroupPath),
}

/// Watches the roots. It lives on a tokio runtime with I/O enabled.
pub struct Watcher {
    hierarchy: Hierarchy,
    /// With the id, while it is there.
    roots: BTreeMap<CgroupPath, Option<u64>>,
    selectors: Arc<Selectors>,
    inotify: AsyncFd<Inotify>,
    directories: HashMap<WatchDescriptor, CgroupPath>,
    descriptors: HashMap<CgroupPath, WatchDescriptor>,
    /// What was announced and not taken back, by path: parents sort before their children.
    known: BTreeMap<CgroupPath, u64>,
    pending: Vec<Change>,
    overflows: u64,
}

/// What inotify said, without its borrows.
struct Hint {
    descriptor: WatchDescriptor,
    mask: EventMask,
    name: Option<OsString>,
}

// === impl Watcher ===

impl Watcher {
    /// Starts watching. All that is there already comes as the first changes.
    ///
    /// # Errors
    /// When inotify is not to be had, a root is missing, or there is no tokio runtime with I/O.
    pub fn new(
        hierarchy: Hierarchy,
        roots: Vec<CgroupPath>,
        selectors: Arc<Selectors>,
    ) -> Result<Self, Error> {
        let mut watcher = Self {
            inotify: open()?,
            hierarchy,
            roots: roots.into_iter().map(|root| (root, None)).collect(),
            selectors,
            directories: HashMap::new(),
            descriptors: HashMap::new(),
            known: BTreeMap::new(),
            pending: Vec::new(),
            overflows: 0,
        };
        watcher.enter_roots()?;
        Ok(watcher)
    }

    /// Replaces roots and selectors. All that is there comes again as [`Change::Created`], with
    /// who claims it now; changes not yet handed out are dropped with the old selectors.
    ///
    /// # Errors
    /// As [`Self::new`]; the watcher then is as it was.
    pub fn replace(
        &mut self,
        roots: Vec<CgroupPath>,
        selectors: Arc<Selectors>,
    ) -> Result<(), Error> {
        *self = Self {
            overflows: self.overflows,
            ..Self::new(self.hierarchy.clone(), roots, selectors)?
        };
        Ok(())
    }

    /// The next changes, in order; never none. May be dropped at any time without losing any.
    ///
    /// # Errors
    /// When inotify fails.
    pub async fn changes(&mut self) -> Result<Vec<Change>, Error> {
        loop {
            if !self.pending.is_empty() {
                return Ok(std::mem::take(&mut self.pending));
            }
            for hint in self.hints().await? {
                self.take(&hint)?;
            }
        }
    }

    /// How often the kernel's queue overflowed. Nothing was missed but cgroups that lived
    /// shorter than the look at everything that followed.
    pub fn overflows(&self) -> u64 {
        self.overflows
    }

    /// All that inotify has to say, once it has something.
    async fn hints(&mut self) -> Result<Vec<Hint>, Error> {
        let mut buffer = vec![0; BUFFER];
        let mut hints = Vec::new();
        let mut ready = self.inotify.readable_mut().await.map_err(failed)?;
        loop {
            match ready.try_io(|fd| {
                let events = fd.get_mut().read_events(&mut buffer)?;
                hints.extend(events.map(|event| Hint {
                    descriptor: event.wd,
                    mask: event.mask,
                    name: event.name.map(ToOwned::to_owned),
                }));
                Ok(())
            }) {
                Ok(Ok(())) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(failed(error)),
                // Drained: what came together is handed out together.
                Err(_) => return Ok(hints),
            }
        }
    }

    fn take(&mut self, hint: &Hint) -> Result<(), Error> {
        if hint.mask.contains(EventMask::Q_OVERFLOW) {
            self.overflows += 1;
            return self.look_at_all();
        }
        let Some(directory) = self.directories.get(&hint.descriptor).cloned() else {
            return Ok(());
        };
        match &hint.name {
            Some(name) if hint.mask.contains(EventMask::ISDIR) => self.look(directory.child(name)?),
            _ => Ok(()),
        }
    }

    fn enter_roots(&mut self) -> Result<(), Error> {
        for root in self.roots.keys().cloned().collect::<Vec<_>>() {
            if let Some(parent) = root.parent() {
                self.watch(&parent)?;
            }
            // A root that is missing from the start is a mistake of the caller's.
            let id = self.hierarchy.id(&root)?;
            self.roots.insert(root.clone(), Some(id));
            self.enter(&root)?;
        }
        Ok(())
    }

    /// After a loss: everything known is looked at, deepest first, and everything listed.
    fn look_at_all(&mut self) -> Result<(), Error> {
        let known: Vec<CgroupPath> = self.known.keys().rev().cloned().collect();
        let roots: Vec<CgroupPath> = self.roots.keys().cloned().collect();
        for path in known.into_iter().chain(roots) {
            self.look(path)?;
        }
        let open: Vec<CgroupPath> = self.directories.values().cloned().collect();
        for directory in open {
            self.look_below(&directory)?;
        }
        Ok(())
    }

    /// Announces what has become of a path.
    fn look(&mut self, path: CgroupPath) -> Result<(), Error> {
        let now = match self.hierarchy.id(&path) {
            Ok(id) => Some(id),
            Err(error) if error.is_missing() => None,
            Err(error) => return Err(error),
        };
        if let Some(before) = self.roots.get(&path).copied() {
            return self.look_at_root(path, before, now);
        }
        // What else happens beside a root is nobody's business here.
        if !self.roots.keys().any(|root| path.is_within(root)) {
            return Ok(());
        }
        let before = self.known.get(&path).copied();
        if before == now {
            return Ok(());
        }
        if let Some(id) = before {
            self.forget(&path, id);
        }
        let Some(id) = now else { return Ok(()) };
        let claimant = self.selectors.claim(&path);
        let enter = claimant == Claimant::Nobody && path.depth() < self.selectors.depth();
        self.known.insert(path.clone(), id);
        self.pending.push(Change::Created {
            path: path.clone(),
            id,
            claimant,
        });
        if enter { self.enter(&path) } else { Ok(()) }
    }

    fn look_at_root(
        &mut self,
        root: CgroupPath,
        before: Option<u64>,
        now: Option<u64>,
    ) -> Result<(), Error> {
        if before == now {
            return Ok(());
        }
        self.roots.insert(root.clone(), now);
        if before.is_some() {
            self.forget_below(&root);
            self.unwatch(&root);
            self.pending.push(Change::RootDeleted(root.clone()));
        }
        let Some(id) = now else { return Ok(()) };
        let path = root.clone();
        self.pending.push(Change::RootCreated { path, id });
        self.enter(&root)
    }

    /// Announces the end of a path. A parent only goes after its children, so those that are
    /// still known below it, their events unread, are gone too: they go first.
    fn forget(&mut self, path: &CgroupPath, id: u64) {
        self.forget_below(path);
        self.forget_one(path.clone(), id);
    }

    fn forget_below(&mut self, path: &CgroupPath) {
        // Byte order keeps what starts with `path` together, though `/a-b` sorts between `/a`
        // and `/a/b`.
        let start = path.as_os_str().as_encoded_bytes();
        let below: Vec<(CgroupPath, u64)> = self
            .known
            .range(path.clone()..)
            .take_while(|(other, _)| other.as_os_str().as_encoded_bytes().starts_with(start))
            .filter(|(other, _)| *other != path && other.is_within(path))
            .map(|(other, id)| (other.clone(), *id))
            .collect();
        for (path, id) in below.into_iter().rev() {
            self.forget_one(path, id);
        }
    }

    fn forget_one(&mut self, path: CgroupPath, id: u64) {
        self.known.remove(&path);
        self.unwatch(&path);
        self.pending.push(Change::Deleted { path, id });
    }

    /// Watches a directory, then looks at what was in it before the watch.
    fn enter(&mut self, directory: &CgroupPath) -> Result<(), Error> {
        self.watch(directory)?;
        self.look_below(directory)
    }

    fn watch(&mut self, directory: &CgroupPath) -> Result<(), Error> {
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        let at = self.hierarchy.directory(directory);
        let added = if self.directories.len() < WATCHES {
            self.inotify.get_ref().watches().add(&at, mask)
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        };
        match added {
            Ok(descriptor) => {
                let same = descriptor.clone();
                self.directories.insert(descriptor, directory.clone());
                self.descriptors.insert(directory.clone(), same);
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // Gone again; the watch on its parent tells.
                Some(libc::ENOENT | libc::ENOTDIR) => Ok(()),
                Some(libc::ENOSPC) => {
                    self.pending.push(Change::Unwatched(directory.clone()));
                    Ok(())
                }
                _ => Err(Error::io("watch", at, error)),
            },
        }
    }

    fn unwatch(&mut self, directory: &CgroupPath) {
        let Some(descriptor) = self.descriptors.remove(directory) else {
            return;
        };
        self.directories.remove(&descriptor);
        // Where the kernel has dropped the watch itself, there is nothing left to take back.
        drop(self.inotify.get_ref().watches().remove(descriptor));
    }

    fn look_below(&mut self, directory: &CgroupPath) -> Result<(), Error> {
        for child in self.hierarchy.children(directory)?.unwrap_or_default() {
            self.look(child)?;
        }
        Ok(())
    }
}

fn open() -> Result<AsyncFd<Inotify>, Error> {
    let inotify = Inotify::init().map_err(failed)?;
    // Outside a runtime tokio panics here; an error is what the caller can report.
    tokio::runtime::Handle::try_current().map_err(|error| failed(io::Error::other(error)))?;
    // SAFETY: an `Inotify` owns its descriptor and keeps it open until it is dropped, which only
    // happens with the `AsyncFd` around it; nothing here closes or replaces it.
    let registered = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
    registered.map_err(|error| failed(error.into()))
}

fn failed(error: io::Error) -> Error {
    Error::io("watch cgroups by", Path::new("inotify"), error)
}

#[cfg(test)]
mod tests;
