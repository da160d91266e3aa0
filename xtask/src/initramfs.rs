//! The VM's whole file system, as a cpio archive in the kernel's `newc` form. Written here, so
//! that a VM test needs no cpio program and the archive is the same for the same files.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const TEXT: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// What the kernel opens as the first process's standard streams.
const CONSOLE: (u32, u32) = (5, 1);

/// An archive under construction; finish it with [`Archive::finish`].
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<PathBuf>,
}

impl Archive {
    /// An archive with the folders and the console that an init expects.
    pub fn new() -> Result<Self> {
        let mut archive = Self::default();
        for folder in [
            "bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var",
        ] {
            archive.folder(Path::new(folder))?;
        }
        archive.entry("dev/console", CHARACTER_DEVICE, CONSOLE, &[])?;
        Ok(archive)
    }

    /// Adds the host's file `from` as the program `to`.
    pub fn program(&mut self, to: &str, from: &Path) -> Result<()> {
        self.file(to, from, PROGRAM)
    }

    /// Adds every file below the host's folder `from` under the folder `to`.
    pub fn tree(&mut self, to: &str, from: &Path) -> Result<()> {
        self.folder(Path::new(to))?;
        let mut entries = fs::read_dir(from)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("cannot list {}", from.display()))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            let name = name
                .to_str()
                .with_context(|| format!("{} is not UTF-8", entry.path().display()))?;
            let inside = format!("{to}/{name}");
            if entry.path().is_dir() {
                self.tree(&inside, &entry.path())?;
            } else {
                self.file(&inside, &entry.path(), TEXT)?;
            }
        }
        Ok(())
    }

    /// Closes the archive and hands out its bytes.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn file(&mut self, to: &str, from: &Path, mode: u32) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        if let Some(parent) = Path::new(to).parent() {
            self.folder(parent)?;
        }
        self.entry(to, mode, (0, 0), &content)
    }

    /// Adds a folder after its parents: the kernel makes none on its own.
    fn folder(&mut self, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        let name = path
            .to_str()
            .with_context(|| format!("{} is not UTF-8", path.display()))?;
        self.entry(name, DIRECTORY, (0, 0), &[])?;
        self.folders.insert(path.to_owned());
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len())
            .with_context(|| format!("{name} is larger than an archive member can be"))?;
        let name_size = u32::try_from(name.len() + 1)
            .with_context(|| format!("{name} is longer than a name can be"))?;
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let (major, minor) = device;
        // inode, mode, uid, gid, links, mtime, size, device, device of the node, name, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and contents, read back as the kernel does.
    fn members(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut members = Vec::new();
        let start = bytes.len();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1])
                .unwrap()
                .to_owned();
            let content_at =
                (start - bytes.len() + 110 + name_size).next_multiple_of(4) - (start - bytes.len());
            let content = bytes[content_at..content_at + size].to_vec();
            if name == "TRAILER!!!" {
                return members;
            }
            members.push((name, mode, content));
            bytes = &bytes[(content_at + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("agents")).unwrap();
        fs::write(folder.path().join("agents/a.toml"), "id").unwrap();
        let mut archive = Archive::new().unwrap();
        archive.tree("policies", folder.path()).unwrap();
        let members = members(&archive.finish().unwrap());
        let at = |name: &str| members.iter().position(|member| member.0 == name).unwrap();
        assert!(at("policies") < at("policies/agents"));
        assert!(at("policies/agents") < at("policies/agents/a.toml"));
        assert_eq!(members[at("policies/agents/a.toml")].2, b"id");
        assert_eq!(members[at("policies/agents")].1, DIRECTORY);
    }

    #[test]
    fn every_member_starts_on_a_multiple_of_four() {
        let folder = tempfile::tempdir().unwrap();
        for length in 0..5 {
            fs::write(folder.path().join(format!("f{length}")), vec![b'x'; length]).unwrap();
        }
        let mut archive = Archive::default();
        archive.tree("t", folder.path()).unwrap();
        let contents: Vec<_> = members(&archive.finish().unwrap())
            .into_iter()
            .map(|member| member.2.len())
            .collect();
        assert_eq!(contents, [0, 0, 1, 2, 3, 4]);
    }
}
