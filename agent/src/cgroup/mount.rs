//! Where the cgroup v2 hierarchy is mounted, read from the text of `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)). Pure.
//!
//! The mount is never assumed: `/sys/fs/cgroup` is a tmpfs on hybrid hosts, with v2 at
//! `/sys/fs/cgroup/unified`, and a container may show a subtree only.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// One cgroup v2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// What of the hierarchy it shows, seen from this process's cgroup namespace: `/` is all.
    pub root: OsString,
    /// Whether it can be written.
    pub writable: bool,
}

/// The cgroup v2 mounts, best first: those that show the whole hierarchy, then the writable ones,
/// then in the order of the text.
pub fn mounts(mountinfo: &[u8]) -> Vec<Mount> {
    let mut found: Vec<Mount> = Vec::new();
    for line in mountinfo.split(|byte| *byte == b'\n') {
        let Some(entry) = parse(line) else { continue };
        // A later mount on the same point hides the earlier one, whatever its type.
        found.retain(|other| other.point != entry.mount.point);
        if entry.kind == b"cgroup2" {
            found.push(entry.mount);
        }
    }
    found.sort_by_key(|mount| (mount.root != "/", !mount.writable));
    found
}

struct Entry<'a> {
    mount: Mount,
    kind: &'a [u8],
}

/// One line: `36 35 98:0 /root /point opts tag… - type source superopts`.
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (root, point, options) = (fields.nth(3)?, fields.next()?, fields.next()?);
    // Any number of optional fields, ended by a lone hyphen.
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    let writable = options
        .split(|byte| *byte == b',')
        .any(|flag| flag == b"rw");
    Some(Entry {
        mount: Mount {
            point: PathBuf::from(unescape(point)),
            root: unescape(root),
            writable,
        },
        kind,
    })
}

/// Undoes the kernel's `\ooo` escapes of space, tab, line feed and backslash (`mangle_path`).
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().and_then(|digits| octal(*digits));
        match octal.filter(|_| *first == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

fn octal(digits: [u8; 3]) -> Option<u8> {
    let mut value = 0_u16;
    for digit in digits {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        value = value * 8 + u16::from(digit - b'0');
    }
    u8::try_from(value).ok()
}

/// The mount at `point`, if v2 is mounted there.
pub fn at<'a>(mounts: &'a [Mount], point: &Path) -> Option<&'a Mount> {
    mounts.iter().find(|mount| mount.point == point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(text: &str) -> Vec<String> {
        mounts(text.as_bytes())
            .into_iter()
            .map(|mount| mount.point.display().to_string())
            .collect()
    }

    #[test]
    fn a_unified_host_has_it_at_the_top() {
        let text = "\
23 29 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
31 23 0:27 / /sys/fs/pstore rw,nosuid,nodev,noexec,relatime shared:10 - pstore pstore rw
";
        let found = mounts(text.as_bytes());
        assert_eq!(
            found,
            [Mount {
                point: "/sys/fs/cgroup".into(),
                root: "/".into(),
                writable: true
            }]
        );
    }

    #[test]
    fn a_hybrid_host_has_it_beside_the_controllers() {
        let text = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        assert_eq!(points(text), ["/sys/fs/cgroup/unified"]);
    }

    #[test]
    fn the_whole_hierarchy_and_a_writable_mount_come_first() {
        let text = "\
50 1 0:26 /docker/4f2c /mnt/part rw,relatime - cgroup2 cgroup rw
51 1 0:26 / /mnt/ro ro,relatime - cgroup2 cgroup rw
52 1 0:26 / /mnt/rw rw,relatime master:1 propagate_from:2 - cgroup2 cgroup rw
53 1 0:26 /../.. /mnt/above ro - cgroup2 cgroup rw
";
        assert_eq!(
            points(text),
            ["/mnt/rw", "/mnt/ro", "/mnt/part", "/mnt/above"]
        );
    }

    #[test]
    fn a_hidden_mount_does_not_count() {
        let text = "\
30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
60 30 0:44 / /sys/fs/cgroup rw - tmpfs none rw
";
        assert_eq!(points(text), Vec::<String>::new());
    }

    #[test]
    fn octal_escapes_are_undone() {
        let text = r"70 1 0:26 /a\134x2db /mnt/with\040space\011tab rw - cgroup2 cg\040roup rw";
        let found = mounts(text.as_bytes());
        assert_eq!(found[0].point, Path::new("/mnt/with space\ttab"));
        assert_eq!(found[0].root, r"/a\x2db");
        assert_eq!(unescape(br"a\9b\04"), r"a\9b\04");
        assert_eq!(unescape(br"\777"), r"\777");
    }

    #[test]
    fn broken_lines_are_skipped() {
        for text in [
            "",
            "x",
            "1 2 3 /",
            "1 2 3 / /mnt rw",
            "1 2 3 / /mnt rw shared:1 -",
        ] {
            assert_eq!(points(text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn a_type_named_in_the_source_field_does_not_deceive() {
        let text = "80 1 0:50 / /tmp/x rw - tmpfs cgroup2 rw\n";
        assert_eq!(points(text), Vec::<String>::new());
    }
}
