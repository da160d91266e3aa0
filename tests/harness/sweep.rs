//! What the runner does behind a case, however it ended: kill what it left running, remove its
//! cgroups and files. Returns what there was, for a case that passed must leave nothing.

use std::{fs, path::Path, thread::sleep, time::Duration};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::support::cgroup;

/// Makes orphans of any depth children of the runner, so that none gets away.
pub fn adopt_orphans() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Kills and reaps every child that is left; the names of those that still ran.
pub fn kill_children() -> Vec<String> {
    let mut found = Vec::new();
    for _ in 0..200 {
        let children = children();
        if children.is_empty() {
            break;
        }
        for (pid, name, alive) in children {
            if alive {
                found.push(format!("process {name} ({pid})"));
                // It may have gone since; that is as good.
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        sleep(Duration::from_millis(10));
    }
    found.sort();
    found.dedup();
    found
}

/// Our children: pid, name, and whether it still runs.
fn children() -> Vec<(Pid, String, bool)> {
    let ours = std::process::id().to_string();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let (head, tail) = stat.rsplit_once(')')?;
            let mut fields = tail.split_ascii_whitespace();
            let state = fields.next()?;
            let parent = fields.next()?;
            let name = head.split_once('(')?.1.to_owned();
            (parent == ours).then(|| (Pid::from_raw(pid), name, state != "Z"))
        })
        .collect()
}

/// Removes the cgroups and files that carry the case's name.
pub fn remove_traces(unique: &str, dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    if let Ok(root) = cgroup::mount() {
        for path in cgroup::find(&root, unique) {
            found.push(format!("cgroup {}", path.display()));
            cgroup::remove(&path);
        }
    }
    if dir.exists() {
        drop(fs::remove_dir_all(dir));
    }
    found
}
