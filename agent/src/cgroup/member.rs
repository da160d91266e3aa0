//! In which cgroup a process is, by `/proc/PID/cgroup`.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _, path::PathBuf};

use super::{CgroupPath, Error, Hierarchy};

impl Hierarchy {
    /// The cgroup of a process.
    ///
    /// # Errors
    /// When the process is gone, or lives in a cgroup that the mount does not show.
    pub fn cgroup_of(&self, pid: u32) -> Result<CgroupPath, Error> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read(&file).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Error::Gone(pid),
            _ => Error::io("read", &file, error),
        })?;
        let Some(path) = membership(&text) else {
            return Err(Error::NoMembership(pid));
        };
        let shown = self.below_mount(path).ok_or_else(|| Error::NotShown {
            pid,
            path: path.to_string_lossy().into_owned(),
            mount: self.mount.point.clone(),
        })?;
        // A live process keeps its cgroup; of a zombie the kernel says `/path (deleted)`.
        if path.as_bytes().ends_with(b" (deleted)") && !self.exists(&shown) {
            return Err(Error::Gone(pid));
        }
        Ok(shown)
    }

    /// A path as `/proc/PID/cgroup` has it, made one below the mount.
    fn below_mount(&self, path: &OsStr) -> Option<CgroupPath> {
        let root = CgroupPath::new(&self.mount.root).ok()?;
        let path = CgroupPath::new(path).ok()?;
        if !path.is_within(&root) {
            return None;
        }
        if root.is_root() {
            return Some(path);
        }
        let rest = path.as_os_str().as_bytes().get(root.as_os_str().len()..)?;
        match rest {
            b"" => Some(CgroupPath::root()),
            rest => CgroupPath::new(OsStr::from_bytes(rest)).ok(),
        }
    }

    /// The path that `/proc/PID/cgroup` shows for processes in this cgroup.
    pub fn proc_path(&self, path: &CgroupPath) -> Vec<u8> {
        let root = self.mount.root.as_bytes();
        match (root, path.is_root()) {
            (b"/", _) => path.as_os_str().as_bytes().to_vec(),
            (_, true) => root.to_vec(),
            (_, false) => [root, path.as_os_str().as_bytes()].concat(),
        }
    }
}

/// The v2 path in the text of `/proc/PID/cgroup`. A hybrid host has a line for each controller
/// too; v2's is the one with hierarchy 0 and no controllers (cgroups(7)).
fn membership(text: &[u8]) -> Option<&OsStr> {
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"0::"))
        .map(OsStr::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Mount;

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
    fn the_v2_line_is_found_among_the_controllers() {
        let hybrid = b"9:name=systemd:/\n4:memory:/x/0::/y\n1:cpu,cpuacct:/\n0::/a:b/c\n";
        assert_eq!(membership(hybrid), Some(OsStr::new("/a:b/c")));
        assert_eq!(membership(b"0::/\n"), Some(OsStr::new("/")));
        assert_eq!(membership(b"10::/x\n1:cpu:/\n"), None);
        assert_eq!(membership(b""), None);
    }

    #[test]
    fn proc_paths_are_seen_from_the_mounts_root() {
        let whole = hierarchy("/");
        assert_eq!(whole.below_mount(OsStr::new("/a/b")), Some(path("/a/b")));
        let part = hierarchy("/docker/1");
        assert_eq!(
            part.below_mount(OsStr::new("/docker/1/b")),
            Some(path("/b"))
        );
        assert_eq!(part.below_mount(OsStr::new("/docker/1")), Some(path("/")));
        assert_eq!(part.below_mount(OsStr::new("/docker/12")), None);
        assert_eq!(whole.below_mount(OsStr::new("/../other")), None);
        assert_eq!(part.proc_path(&path("/b")), b"/docker/1/b");
        assert_eq!(part.proc_path(&path("/")), b"/docker/1");
        assert_eq!(whole.proc_path(&path("/b")), b"/b");
    }
}
