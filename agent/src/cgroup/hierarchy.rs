//! The v2 hierarchy on disk: find, create, remove, list, identify. A cgroup's id is the inode
//! number of its directory, the same that `bpf_get_current_cgroup_id()` returns.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    CgroupPath, Error,
    mount::{self, Mount},
};

/// A walk goes no deeper. The kernel lets cgroups nest without end and an agent that may create
/// some could try; what is deeper stays where it is, fenced.
const WALK_DEPTH: u32 = 512;
/// Inode number, and so id, of the hierarchy's real root (`kernfs_create_root`).
const REAL_ROOT: u64 = 1;
/// `FILEID_KERNFS` of include/linux/exportfs.h: a handle that is just the node's id.
const FILEID_KERNFS: i32 = 0xfe;

/// The mounted cgroup v2 hierarchy.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    pub(super) mount: Mount,
}

/// What [`Hierarchy::create`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Id of the cgroup.
    pub id: u64,
    /// The directories that were not there before, outermost first.
    pub made: Vec<CgroupPath>,
}

// === impl Hierarchy ===

impl Hierarchy {
    /// Finds the hierarchy: at `setting` when there is one, else the best mount in
    /// `/proc/self/mountinfo`.
    ///
    /// # Errors
    /// When there is none, or `setting` is none.
    pub fn find(setting: Option<&Path>) -> Result<Self, Error> {
        let mountinfo = Path::new("/proc/self/mountinfo");
        let text = fs::read(mountinfo).map_err(|error| Error::io("read", mountinfo, error))?;
        let mounts = mount::mounts(&text);
        // A mount further up may hide one that the text still lists: ask the directory itself.
        let visible = |mount: &&Mount| {
            statfs(&mount.point).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC)
        };
        let best = mounts.iter().find(visible);
        let Some(setting) = setting else {
            return match best {
                Some(mount) => Ok(Self {
                    mount: mount.clone(),
                }),
                None => Err(Error::NoMount),
            };
        };
        let path = fs::canonicalize(setting).map_err(|error| Error::io("find", setting, error))?;
        match mount::at(&mounts, &path).filter(visible) {
            Some(mount) => Ok(Self {
                mount: mount.clone(),
            }),
            None => Err(Error::NotAMount {
                path: setting.to_owned(),
                instead: best.map(|mount| mount.point.clone()),
            }),
        }
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount.point
    }

    /// Whether cgroups can be created and processes moved through this mount.
    pub fn is_writable(&self) -> bool {
        self.mount.writable
    }

    /// Whether the mount shows the whole hierarchy. In a container with a cgroup namespace it
    /// does not, and then no depth below the mount is a level of the kernel's.
    ///
    /// # Errors
    /// When the mount can't be read.
    pub fn is_whole(&self) -> Result<bool, Error> {
        Ok(self.id(&CgroupPath::root())? == REAL_ROOT)
    }

    /// The kernel's level of a cgroup, as `bpf_get_current_ancestor_cgroup_id()` counts: the real
    /// root is 0. None where the mount does not show the whole hierarchy.
    ///
    /// # Errors
    /// When the mount can't be read.
    pub fn level(&self, path: &CgroupPath) -> Result<Option<u32>, Error> {
        Ok(self.is_whole()?.then(|| path.depth()))
    }

    /// The directory of a cgroup.
    pub fn directory(&self, path: &CgroupPath) -> PathBuf {
        self.mount.point.join(path.relative())
    }

    /// The path below the mount of a directory, if it lies there. The text alone is looked at.
    pub fn path_below(&self, directory: &Path) -> Option<CgroupPath> {
        let relative = directory.strip_prefix(&self.mount.point).ok()?;
        CgroupPath::new(Path::new("/").join(relative)).ok()
    }

    /// Whether the cgroup exists.
    pub fn exists(&self, path: &CgroupPath) -> bool {
        self.id(path).is_ok()
    }

    /// The cgroup's id.
    ///
    /// # Errors
    /// When there is no such cgroup.
    pub fn id(&self, path: &CgroupPath) -> Result<u64, Error> {
        let directory = self.directory(path);
        let metadata = fs::symlink_metadata(&directory)
            .map_err(|error| Error::io("find", &directory, error))?;
        if metadata.is_dir() {
            Ok(metadata.ino())
        } else {
            let source = io::Error::from_raw_os_error(libc::ENOTDIR);
            Err(Error::io("find", directory, source))
        }
    }

    /// The path of the cgroup with this id; none when there is no such cgroup (any more) below
    /// the mount. Without CAP_DAC_READ_SEARCH all of them are looked through.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn path_of(&self, id: u64) -> Result<Option<CgroupPath>, Error> {
        /// `struct file_handle` with its eight bytes.
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            id: u64,
        }
        let mount = fs::File::open(&self.mount.point)
            .map_err(|error| Error::io("open", &self.mount.point, error))?;
        let mut handle = Handle {
            bytes: 8,
            kind: FILEID_KERNFS,
            id,
        };
        // SAFETY: `handle` has the layout of `struct file_handle` with `handle_bytes` = 8, and
        // both it and `mount` outlive the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ESTALE | libc::ENOENT) => Ok(None),
                Some(libc::EPERM) => self.search(id),
                _ => Err(Error::io("find by id in", &self.mount.point, error)),
            };
        };
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let link = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let target = fs::read_link(&link).map_err(|error| Error::io("read", link, error))?;
        Ok(self.path_below(&target))
    }

    /// The slow way of [`Self::path_of`]; what lies deeper than a walk goes is not found.
    fn search(&self, id: u64) -> Result<Option<CgroupPath>, Error> {
        let mut open = vec![CgroupPath::root()];
        while let Some(path) = open.pop() {
            if self.id(&path).is_ok_and(|found| found == id) {
                return Ok(Some(path));
            }
            if path.depth() < WALK_DEPTH {
                open.extend(self.children(&path)?.unwrap_or_default());
            }
        }
        Ok(None)
    }

    /// Creates the cgroup and those above it that are missing. What was made is removed again
    /// when a later step fails.
    ///
    /// # Errors
    /// When a directory can't be made.
    pub fn create(&self, path: &CgroupPath) -> Result<Created, Error> {
        let mut made = Vec::new();
        for step in path.below(&CgroupPath::root()) {
            let directory = self.directory(&step);
            match fs::create_dir(&directory) {
                Ok(()) => {
                    made.push(step);
                    // Whatever the umask: what runs inside reads its own limits there.
                    let mode = fs::Permissions::from_mode(0o755);
                    if let Err(error) = fs::set_permissions(&directory, mode) {
                        self.undo(&made);
                        return Err(Error::io("set the mode of cgroup", directory, error));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    self.undo(&made);
                    return Err(Error::io("create cgroup", directory, error));
                }
            }
        }
        match self.id(path) {
            Ok(id) => Ok(Created { id, made }),
            Err(error) => {
                self.undo(&made);
                Err(error)
            }
        }
    }

    fn undo(&self, made: &[CgroupPath]) {
        for step in made.iter().rev() {
            // Somebody may have moved in meanwhile; then it is theirs.
            if fs::remove_dir(self.directory(step)).is_err() {
                return;
            }
        }
    }

    /// Removes the cgroup and all below it, leaves first, and says how many went. A cgroup that
    /// is gone already counts as removed; one with processes in it stays, with what is above it.
    ///
    /// # Errors
    /// When a cgroup is populated or the kernel refuses otherwise.
    pub fn remove(&self, path: &CgroupPath) -> Result<usize, Error> {
        let mut tree = self.subtree(path)?;
        tree.reverse();
        let mut removed = 0;
        for step in tree {
            let directory = self.directory(&step);
            match fs::remove_dir(&directory) {
                Ok(()) => removed += 1,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("remove cgroup", directory, error)),
            }
        }
        Ok(removed)
    }

    /// The cgroup and all below it, parents before their children; empty when it is gone.
    ///
    /// # Errors
    /// When a directory can't be read, or they nest too deeply.
    pub fn subtree(&self, path: &CgroupPath) -> Result<Vec<CgroupPath>, Error> {
        let limit = path.depth() + WALK_DEPTH;
        let mut found = Vec::new();
        let mut open = vec![path.clone()];
        while let Some(next) = open.pop() {
            let Some(children) = self.children(&next)? else {
                continue;
            };
            if next.depth() >= limit && !children.is_empty() {
                return Err(Error::TooDeep(next));
            }
            open.extend(children);
            found.push(next);
        }
        Ok(found)
    }

    /// The cgroups directly below; none when the cgroup itself is gone.
    pub(super) fn children(&self, path: &CgroupPath) -> Result<Option<Vec<CgroupPath>>, Error> {
        let directory = self.directory(path);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("list", directory, error)),
        };
        let mut children = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("list", &directory, error))?;
            // The type comes with the listing; what vanished meanwhile has none.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                children.push(path.child(entry.file_name())?);
            }
        }
        Ok(Some(children))
    }

    /// The processes in the cgroup and, when `recursive`, below it, sorted.
    ///
    /// # Errors
    /// When the cgroup is not there or can't be read.
    pub fn processes(&self, path: &CgroupPath, recursive: bool) -> Result<Vec<u32>, Error> {
        let mut pids = self.members(path)?;
        if recursive {
            for below in self.subtree(path)?.iter().filter(|below| *below != path) {
                match self.members(below) {
                    Ok(more) => pids.extend(more),
                    Err(error) if error.is_missing() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    fn members(&self, path: &CgroupPath) -> Result<Vec<u32>, Error> {
        let file = self.directory(path).join("cgroup.procs");
        match fs::read_to_string(&file) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            // A threaded cgroup: its processes are listed where its domain starts, further up.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
            Err(error) => Err(Error::io("read", file, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, process};

    use super::*;
    use crate::cgroup::testing::Sandbox;

    fn hierarchy(root: &str) -> Hierarchy {
        Hierarchy {
            mount: Mount {
                point: "/cg".into(),
                root: root.into(),
                writable: true,
            },
        }
    }

    fn path(text: &str) -> CgroupPath {
        text.parse().unwrap()
    }

    #[test]
    fn directories_map_to_paths_and_back() {
        let whole = hierarchy("/");
        assert_eq!(whole.directory(&path("/a/b")), Path::new("/cg/a/b"));
        assert_eq!(whole.directory(&path("/")), Path::new("/cg/"));
        assert_eq!(whole.path_below(Path::new("/cg/a/b")), Some(path("/a/b")));
        assert_eq!(whole.path_below(Path::new("/cg")), Some(path("/")));
        assert_eq!(whole.path_below(Path::new("/cgx/a")), None);
    }

    #[test]
    fn a_directory_that_is_no_mount_is_refused_with_the_mend() {
        let Err(error) = Hierarchy::find(Some(Path::new("/proc"))) else {
            panic!("/proc was taken for a cgroup mount");
        };
        let text = error.to_string();
        assert!(text.starts_with("`/proc` is no cgroup v2 mount"), "{text}");
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn create_reports_what_it_made_and_remove_takes_it_away() {
        let sandbox = Sandbox::new("create");
        let hierarchy = &sandbox.hierarchy;
        let leaf = sandbox.child("a").child("b").unwrap();
        let created = hierarchy.create(&leaf).unwrap();
        assert_eq!(created.made, [sandbox.child("a"), leaf.clone()]);
        assert_eq!(created.id, hierarchy.id(&leaf).unwrap());
        let again = hierarchy.create(&leaf).unwrap();
        assert_eq!((again.id, again.made), (created.id, Vec::new()));

        if hierarchy.is_whole().unwrap() {
            assert_eq!(hierarchy.level(&leaf).unwrap(), Some(leaf.depth()));
        }
        assert_eq!(hierarchy.path_of(created.id).unwrap(), Some(leaf.clone()));
        assert_eq!(hierarchy.search(created.id).unwrap(), Some(leaf.clone()));
        assert_eq!(hierarchy.remove(&sandbox.child("a")).unwrap(), 2);
        assert_eq!(hierarchy.path_of(created.id).unwrap(), None);
        assert_eq!(hierarchy.remove(&sandbox.child("a")).unwrap(), 0);
        assert!(hierarchy.id(&leaf).unwrap_err().is_missing());
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn names_that_are_not_utf8_are_removed_too() {
        let sandbox = Sandbox::new("bytes");
        let odd = sandbox.path.child(OsStr::from_bytes(b"\xff x")).unwrap();
        sandbox.hierarchy.create(&odd).unwrap();
        assert!(
            sandbox
                .hierarchy
                .subtree(&sandbox.path)
                .unwrap()
                .contains(&odd)
        );
        assert_eq!(sandbox.hierarchy.remove(&odd).unwrap(), 1);
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn processes_are_found_below_and_keep_their_cgroup_from_removal() {
        let sandbox = Sandbox::new("procs");
        let (hierarchy, leaf) = (&sandbox.hierarchy, sandbox.child("leaf"));
        hierarchy.create(&leaf).unwrap();
        let mut sleeper = process::Command::new("sleep").arg("60").spawn().unwrap();
        let file = hierarchy.directory(&leaf).join("cgroup.procs");
        fs::write(file, sleeper.id().to_string()).unwrap();

        assert_eq!(hierarchy.cgroup_of(sleeper.id()).unwrap(), leaf);
        assert_eq!(
            hierarchy.processes(&sandbox.path, false).unwrap(),
            Vec::<u32>::new()
        );
        assert_eq!(
            hierarchy.processes(&sandbox.path, true).unwrap(),
            [sleeper.id()]
        );
        let error = hierarchy.remove(&sandbox.path).unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(libc::EBUSY)),
            "{error:?}"
        );
        assert!(hierarchy.exists(&leaf));

        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(matches!(
            hierarchy.cgroup_of(sleeper.id()),
            Err(Error::Gone(_))
        ));
    }
}
