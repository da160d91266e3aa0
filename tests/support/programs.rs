//! What the kernel tells of loaded programs.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramInfo, loaded_programs};

/// Ids of the programs that a process holds, itself or through links.
pub fn held_by(pid: u32) -> Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    let folder = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))? {
        // A descriptor may be closed meanwhile.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        if let Some(id) = id {
            ids.insert(id.trim().parse()?);
        }
    }
    Ok(ids)
}

/// What the kernel tells of these programs; of those that are gone nothing.
pub fn infos(ids: &BTreeSet<u32>) -> Vec<ProgramInfo> {
    loaded_programs()
        // Others' programs come and go while the list is read.
        .filter_map(Result::ok)
        .filter(|info| ids.contains(&info.id()))
        .collect()
}
