//! Cgroups that vanish with their guard.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// A cgroup made by a test. Dropping it kills what is inside and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// The cgroup v2 mount. On hybrid hosts it is not the mount at the top.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        let Some((place, kind)) = line.split_once(" - ") else {
            continue;
        };
        if kind.starts_with("cgroup2 ")
            && let Some(target) = place.split(' ').nth(4)
        {
            return Ok(PathBuf::from(target));
        }
    }
    bail!("no cgroup v2 mount")
}

/// Cgroups below `root` whose path contains `name`, outermost only.
pub fn find(root: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root) else {
        return found;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(name) {
            found.push(path);
        } else {
            found.extend(find(&path, name));
        }
    }
    found
}

/// Kills what is in the tree and removes it, leaves first; gives up after two seconds.
pub fn remove(path: &Path) {
    // Since 5.14; the processes may be gone already.
    drop(fs::write(path.join("cgroup.kill"), "1"));
    for _ in 0..100 {
        remove_tree(path);
        if !path.exists() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
}

fn remove_tree(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path());
        }
    }
    drop(fs::remove_dir(path));
}

// === impl Cgroup ===

impl Cgroup {
    /// Makes `path` (below the v2 mount) and its parents.
    pub fn create(path: &str) -> Result<Self> {
        let full = mount()?.join(path.trim_start_matches('/'));
        fs::create_dir_all(&full).with_context(|| format!("cannot create cgroup {path}"))?;
        Ok(Self { path: full })
    }

    /// Where it is in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Moves a process in.
    pub fn enter(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move {pid} into {}", self.path.display()))
    }

    /// A cgroup below.
    pub fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Removes it and makes it anew, with a new id.
    pub fn recreate(&self) -> Result<()> {
        fs::remove_dir(&self.path)
            .with_context(|| format!("cannot remove {}", self.path.display()))?;
        fs::create_dir(&self.path)?;
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}
