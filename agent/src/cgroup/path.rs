//! Paths of cgroups below the v2 mount: `/agents.slice/billing.service`. Pure; knows no disk.
//!
//! A name may be any bytes but `/`, NUL and the line feed, which the kernel refuses in `mkdir`
//! (`cgroup_mkdir` in kernel/cgroup/cgroup.c). So a path is bytes here, and lossy text only when
//! it is shown: a name that is not UTF-8 must neither hide a cgroup nor stop its removal.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    str::FromStr,
};

/// Longest name of one cgroup, in bytes (`NAME_MAX`).
const NAME_BYTES: usize = 255;
/// Longest path, in bytes: `PATH_MAX` with room for the mount point and a file name.
const PATH_BYTES: usize = 3584;

/// A cgroup's path below the v2 mount: starts with `/`, has no empty, `.` or `..` component and
/// no slash at the end. `/` itself is the mount.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupPath(OsString);

/// Why text is no cgroup path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not start at the mount.
    #[error("cgroup path `{0}` does not start with `/`")]
    Relative(String),
    /// Two slashes in a row, or one at the end.
    #[error("cgroup path `{0}` has an empty name in it")]
    EmptyName(String),
    /// A `.` or `..`, which would lead out of the tree.
    #[error("cgroup path `{0}` has `.` or `..` in it")]
    Dots(String),
    /// A byte that no cgroup's name has.
    #[error("cgroup path `{0}` has a line feed or a NUL in it")]
    Byte(String),
    /// Longer than the kernel takes.
    #[error("cgroup path `{0}` is longer than the kernel takes")]
    TooLong(String),
}

// === impl CgroupPath ===

impl CgroupPath {
    /// The mount itself.
    pub fn root() -> Self {
        Self(OsString::from("/"))
    }

    /// Checks a path.
    ///
    /// # Errors
    /// When it is not absolute, has an empty, `.` or `..` component, or is too long.
    pub fn new(path: impl AsRef<OsStr>) -> Result<Self, PathError> {
        let path = path.as_ref();
        let shown = || path.to_string_lossy().into_owned();
        let bytes = path.as_bytes();
        let Some(below) = bytes.strip_prefix(b"/") else {
            return Err(PathError::Relative(shown()));
        };
        if bytes.len() > PATH_BYTES {
            return Err(PathError::TooLong(shown()));
        }
        if below.is_empty() {
            return Ok(Self::root());
        }
        for name in below.split(|byte| *byte == b'/') {
            match name {
                b"" => return Err(PathError::EmptyName(shown())),
                b"." | b".." => return Err(PathError::Dots(shown())),
                _ if name.len() > NAME_BYTES => return Err(PathError::TooLong(shown())),
                _ if name.contains(&b'\n') || name.contains(&0) => {
                    return Err(PathError::Byte(shown()));
                }
                _ => {}
            }
        }
        Ok(Self(path.to_owned()))
    }

    /// The child with this name.
    ///
    /// # Errors
    /// When `name` is not one valid component.
    pub fn child(&self, name: impl AsRef<OsStr>) -> Result<Self, PathError> {
        let name = name.as_ref();
        if name.as_bytes().contains(&b'/') {
            return Err(PathError::EmptyName(name.to_string_lossy().into_owned()));
        }
        let mut path = if self.is_root() {
            Vec::new()
        } else {
            self.0.as_bytes().to_vec()
        };
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
        Self::new(OsString::from_vec(path))
    }

    /// The parent; none for the mount.
    pub fn parent(&self) -> Option<Self> {
        let bytes = self.0.as_bytes();
        let slash = bytes.iter().rposition(|byte| *byte == b'/')?;
        match bytes.get(..slash) {
            _ if self.is_root() => None,
            Some(b"") | None => Some(Self::root()),
            Some(above) => Some(Self(OsStr::from_bytes(above).to_owned())),
        }
    }

    /// Whether this is the mount itself.
    pub fn is_root(&self) -> bool {
        self.0.as_bytes() == b"/"
    }

    /// Steps below the mount: `/a/b` is 2. It is the kernel's level only where the mount shows
    /// the whole hierarchy; see [`super::Hierarchy::level`].
    pub fn depth(&self) -> u32 {
        let names = self.names().count();
        u32::try_from(names).unwrap_or(u32::MAX)
    }

    /// The names on the way, outermost first.
    pub fn names(&self) -> impl Iterator<Item = &OsStr> {
        self.0
            .as_bytes()
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
            .map(OsStr::from_bytes)
    }

    /// Whether this is `other` or lies below it. `/ab` does not lie below `/a`.
    pub fn is_within(&self, other: &Self) -> bool {
        if other.is_root() {
            return true;
        }
        match self.0.as_bytes().strip_prefix(other.0.as_bytes()) {
            Some(rest) => rest.is_empty() || rest.starts_with(b"/"),
            None => false,
        }
    }

    /// The paths on the way from `root` (not itself) down to this one (itself), outermost first;
    /// empty when this does not lie below `root`.
    pub fn below(&self, root: &Self) -> Vec<Self> {
        if !self.is_within(root) {
            return Vec::new();
        }
        let mut chain = Vec::new();
        let mut at = Some(self.clone());
        while let Some(path) = at.filter(|path| path != root) {
            at = path.parent();
            chain.push(path);
        }
        chain.reverse();
        chain
    }

    /// The path as the kernel writes it.
    pub fn as_os_str(&self) -> &OsStr {
        &self.0
    }

    /// The path without its leading slash, to be joined to a directory.
    pub(super) fn relative(&self) -> &OsStr {
        let bytes = self.0.as_bytes();
        OsStr::from_bytes(bytes.strip_prefix(b"/").unwrap_or(bytes))
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_string_lossy())
    }
}

impl FromStr for CgroupPath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> CgroupPath {
        text.parse().unwrap()
    }

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        for text in [
            "/",
            "/a",
            "/agents.slice/dev\\x2dbox.service",
            "/a/...",
            "/a b/ü",
        ] {
            assert_eq!(path(text).to_string(), text);
        }
        let kind = |text: &str| CgroupPath::new(text).unwrap_err();
        assert!(matches!(kind(""), PathError::Relative(_)));
        assert!(matches!(kind("a/b"), PathError::Relative(_)));
        for text in ["//", "/a/", "/a//b", "//a"] {
            assert!(matches!(kind(text), PathError::EmptyName(_)), "{text}");
        }
        for text in ["/..", "/a/../b", "/./a", "/a/."] {
            assert!(matches!(kind(text), PathError::Dots(_)), "{text}");
        }
        assert!(matches!(kind("/a\nb"), PathError::Byte(_)));
        assert!(matches!(kind("/a\0b"), PathError::Byte(_)));
        assert!(matches!(
            kind(&format!("/{}", "x".repeat(256))),
            PathError::TooLong(_)
        ));
        assert!(matches!(
            kind(&"/abcdefg".repeat(500)),
            PathError::TooLong(_)
        ));
    }

    #[test]
    fn names_need_not_be_utf8() {
        let odd = CgroupPath::new(OsStr::from_bytes(b"/a/\xff")).unwrap();
        assert_eq!(odd.depth(), 2);
        assert_eq!(odd.to_string(), "/a/\u{fffd}");
        assert_eq!(odd.parent(), Some(path("/a")));
    }

    #[test]
    fn below_means_whole_names() {
        assert!(path("/a/b").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/")));
        assert!(!path("/ab").is_within(&path("/a")));
        assert!(!path("/a").is_within(&path("/a/b")));
        assert_eq!(
            path("/r/a/b").below(&path("/r")),
            [path("/r/a"), path("/r/a/b")]
        );
        assert_eq!(path("/r").below(&path("/r")), []);
        assert_eq!(path("/x/a").below(&path("/r")), []);
        assert_eq!(path("/x").below(&path("/")), [path("/x")]);
    }

    #[test]
    fn parents_and_children_are_inverse() {
        assert_eq!(path("/").parent(), None);
        assert_eq!(path("/a").parent(), Some(path("/")));
        assert_eq!(path("/a/b").parent(), Some(path("/a")));
        assert_eq!(path("/").child("a").unwrap(), path("/a"));
        assert_eq!(path("/a").child("b").unwrap(), path("/a/b"));
        for name in ["", "..", "b/c", "/"] {
            assert!(path("/a").child(name).is_err(), "{name}");
        }
    }

    #[test]
    fn depth_counts_names() {
        assert_eq!(path("/").depth(), 0);
        assert_eq!(path("/a/b/c").depth(), 3);
    }
}
