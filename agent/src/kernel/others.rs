//! Programs that run on a cgroup, whoever attached them.

use std::{fs::File, io, os::fd::AsFd as _, path::Path};

use super::{object::HOOKS, sys};

/// The programs on a cgroup's own hooks that Remit uses: hook and id. For root.
///
/// # Errors
/// When the directory is not there, or the kernel does not tell.
pub fn programs_on(directory: &Path) -> io::Result<Vec<(&'static str, u32)>> {
    let cgroup = File::open(directory)?;
    let mut found = Vec::new();
    for expected in &HOOKS {
        let ids = sys::attached_programs(cgroup.as_fd(), expected.attach_type)?;
        found.extend(ids.into_iter().map(|id| (expected.hook, id)));
    }
    Ok(found)
}
