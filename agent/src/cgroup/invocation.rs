//! Which start of a systemd unit a cgroup belongs to.

use super::{CgroupPath, Hierarchy};

/// systemd puts the id of the start there (systemd.exec(5), `$INVOCATION_ID`). Of the two places
/// where it does, this is the one that the unit's own user cannot write to.
const ATTRIBUTE: &str = "trusted.invocation_id";

impl Hierarchy {
    /// The invocation id of the unit that `path` is, or is inside of; none where systemd started
    /// nothing, or it cannot be read.
    pub fn invocation(&self, path: &CgroupPath) -> Option<String> {
        let mut directory = self.directory(path);
        let top = self.mount();
        while directory != top && directory.starts_with(top) {
            if let Ok(Some(id)) = xattr::get(&directory, ATTRIBUTE) {
                let id = String::from_utf8(id).ok()?;
                let is_id = id.bytes().all(|byte| byte.is_ascii_hexdigit());
                return is_id.then_some(id);
            }
            directory.pop();
        }
        None
    }
}
