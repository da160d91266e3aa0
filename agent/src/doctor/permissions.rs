//! What a user may do with a file, by its owner, mode and access control list (acl(5)).

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use super::users::User;

/// Where the kernel keeps an access control list.
const ACL: &str = "system.posix_acl_access";
/// Its version: `POSIX_ACL_XATTR_VERSION`.
const VERSION: u32 = 2;
const READ: u32 = 4;
const WRITE: u32 = 2;

/// Who may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Permissions {
    owner: (u32, u32),
    group: (u32, u32),
    others: u32,
    /// Of an access control list: users and groups by number, and what of theirs and of the group's
    /// counts.
    users: Vec<(u32, u32)>,
    groups: Vec<(u32, u32)>,
    mask: Option<u32>,
}

impl User {
    /// Whether it may write to `path`. Where a permission is in doubt it counts as given.
    pub fn may_write(&self, path: &Path) -> bool {
        self.may(path, WRITE)
    }

    /// Whether it may read `path`.
    pub fn may_read(&self, path: &Path) -> bool {
        self.may(path, READ)
    }

    fn may(&self, path: &Path, wanted: u32) -> bool {
        let Ok(meta) = fs::metadata(path) else {
            return false;
        };
        let acl = xattr::get_deref(path, ACL).ok().flatten();
        let permissions = Permissions::new(meta.uid(), meta.gid(), meta.mode(), acl.as_deref());
        self.uid == 0 || permissions.of(self) & wanted != 0
    }
}

// === impl Permissions ===

impl Permissions {
    fn new(uid: u32, gid: u32, mode: u32, acl: Option<&[u8]>) -> Self {
        let by_mode = Self {
            owner: (uid, mode >> 6 & 7),
            group: (gid, mode >> 3 & 7),
            others: mode & 7,
            ..Self::default()
        };
        acl.and_then(|acl| by_mode.clone().with(acl))
            .unwrap_or(by_mode)
    }

    /// With a list as the kernel hands it out: a version, then tag, permissions and id of each.
    fn with(mut self, acl: &[u8]) -> Option<Self> {
        let (version, entries) = acl.split_at_checked(4)?;
        if u32::from_le_bytes(version.try_into().ok()?) != VERSION {
            return None;
        }
        for entry in entries.chunks_exact(8) {
            let [a, b, c, d, id @ ..] = entry else {
                return None;
            };
            let tag = u16::from_le_bytes([*a, *b]);
            let bits = u32::from(u16::from_le_bytes([*c, *d]));
            let id = u32::from_le_bytes(id.try_into().ok()?);
            match tag {
                0x01 => self.owner.1 = bits,
                0x02 => self.users.push((id, bits)),
                // The mode's group bits are the mask where there is a list.
                0x04 => self.group.1 = bits,
                0x08 => self.groups.push((id, bits)),
                0x10 => self.mask = Some(bits),
                0x20 => self.others = bits,
                _ => return None,
            }
        }
        Some(self)
    }

    /// What the user may do. One who is several counts as the one who may most.
    fn of(&self, user: &User) -> u32 {
        let mask = self.mask.unwrap_or(7);
        let mut bits = self.others;
        if self.owner.0 == user.uid {
            bits |= self.owner.1;
        }
        let named = self.users.iter().filter(|(id, _)| *id == user.uid);
        let groups = std::iter::once(&self.group).chain(&self.groups);
        let groups = groups.filter(|(id, _)| user.groups.contains(id));
        for (_, granted) in named.chain(groups) {
            bits |= granted & mask;
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32, groups: &[u32]) -> User {
        User {
            uid,
            groups: groups.iter().copied().collect(),
            ..User::default()
        }
    }

    /// Tag, permissions, id.
    fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, bits, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(bits.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_mode_alone_is_as_it_says() {
        let permissions = Permissions::new(0, 30, 0o660, None);
        assert_eq!(permissions.of(&user(1000, &[1000])), 0);
        assert_eq!(permissions.of(&user(1000, &[30])), 6);
    }

    #[test]
    fn a_list_gives_what_its_mask_leaves() {
        const NOBODY: u32 = u32::MAX;
        let acl = list(&[
            (0x01, 6, NOBODY),
            (0x02, 6, 1000),
            (0x04, 0, NOBODY),
            (0x08, 7, 40),
            (0x10, 4, NOBODY),
            (0x20, 0, NOBODY),
        ]);
        let permissions = Permissions::new(0, 30, 0o640, Some(&acl));
        assert_eq!(permissions.of(&user(1000, &[1000])), 4);
        assert_eq!(permissions.of(&user(1001, &[40])), 4);
        // The mode's middle digit is the mask, and not the group's.
        assert_eq!(permissions.of(&user(1001, &[30])), 0);
        let without = Permissions::new(0, 30, 0o640, Some(b"garbage"));
        assert_eq!(without.of(&user(1001, &[30])), 4);
    }

    /// Every local file system that Linux keeps temporary files on has lists.
    #[test]
    fn a_list_on_a_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("socket");
        fs::write(&file, "").unwrap();
        let stranger = user(4_000_000, &[4_000_000]);
        let mode = fs::metadata(&file).unwrap().mode();
        assert_eq!(stranger.may_read(&file), mode & 4 != 0);
        let acl = list(&[
            (0x01, 6, u32::MAX),
            (0x02, 2, 4_000_000),
            (0x04, 0, u32::MAX),
            (0x10, 6, u32::MAX),
            (0x20, 0, u32::MAX),
        ]);
        xattr::set(&file, ACL, &acl).unwrap();
        assert!(stranger.may_write(&file) && !stranger.may_read(&file));
    }
}
