//! What is pinned, and where:
//!
//! ```text
//! BPFFS/vN/maps[-S]/MAP             a set of maps; N is the ABI version that laid them out
//! BPFFS/vN/programs[-S]/PROGRAM     the programs of one start
//! BPFFS/vN/links/ROOT/PROGRAM       the fence of a root
//! ```
//!
//! `S` goes up with each set, over all versions. One set is the normal state; several are an
//! unfinished change, of which the highest is the youngest.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    maps::MapData,
    programs::{ProgramError, ProgramInfo},
};

use super::{OpenError, sys};

/// Magic number of bpffs in `statfs(2)`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// A directory of maps or programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dir {
    /// The ABI version of those who made it.
    pub version: u32,
    /// Which one of those.
    pub serial: u32,
    /// Where.
    pub path: PathBuf,
}

/// A pin of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPin {
    /// The ABI version of those who made it.
    pub version: u32,
    /// The root, as [`super::pin_name`] writes it.
    pub root: String,
    /// The program that was attached.
    pub program: String,
    /// Where.
    pub path: PathBuf,
}

/// All that is pinned below a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Versions that have a directory.
    pub versions: Vec<(u32, PathBuf)>,
    /// Sets of maps, the youngest last.
    pub sets: Vec<Dir>,
    /// Sets of programs, the youngest last.
    pub programs: Vec<Dir>,
    /// Links.
    pub links: Vec<LinkPin>,
}

/// Programs that Remit attached, by their ids, with the maps that they use.
pub type Known = HashMap<u32, Vec<u32>>;

// === impl Survey ===

impl Survey {
    /// Reads the directories.
    pub fn read(base: &Path) -> io::Result<Self> {
        let mut survey = Self::default();
        for (name, path) in folders(base)? {
            let version = name.strip_prefix('v').and_then(|text| text.parse().ok());
            if let Some(version) = version {
                survey.versions.push((version, path.clone()));
                survey.read_version(version, &path)?;
            }
        }
        survey.versions.sort_unstable();
        survey.sets.sort_by_key(|dir| dir.serial);
        survey.programs.sort_by_key(|dir| dir.serial);
        survey.links.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(survey)
    }

    fn read_version(&mut self, version: u32, path: &Path) -> io::Result<()> {
        for (name, path) in folders(path)? {
            if let Some(serial) = serial(&name, "maps") {
                self.sets.push(Dir {
                    version,
                    serial,
                    path,
                });
            } else if let Some(serial) = serial(&name, "programs") {
                self.programs.push(Dir {
                    version,
                    serial,
                    path,
                });
            } else if name == "links" {
                for (root, path) in folders(&path)? {
                    self.read_root(version, &root, &path)?;
                }
            }
        }
        Ok(())
    }

    fn read_root(&mut self, version: u32, root: &str, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if let Ok(program) = entry.file_name().into_string() {
                self.links.push(LinkPin {
                    version,
                    root: root.to_owned(),
                    program,
                    path: entry.path(),
                });
            }
        }
        Ok(())
    }

    /// The programs that are pinned.
    pub fn known(&self) -> Known {
        let mut known = Known::new();
        for dir in &self.programs {
            // What cannot be read is not known, and so counts as foreign.
            for entry in fs::read_dir(&dir.path).into_iter().flatten().flatten() {
                if let Ok(info) = program_at(&entry.path()) {
                    let maps = info.map_ids().ok().flatten().unwrap_or_default();
                    known.insert(info.id(), maps);
                }
            }
        }
        known
    }
}

/// The directory of serial number `serial`.
pub fn dir_name(stem: &str, serial: u32) -> String {
    if serial == 1 {
        stem.to_owned()
    } else {
        format!("{stem}-{serial}")
    }
}

/// The serial number after all of these.
pub fn next_serial(dirs: &[Dir]) -> u32 {
    dirs.iter()
        .map(|dir| dir.serial)
        .max()
        .map_or(1, |last| last.saturating_add(1))
}

fn serial(name: &str, stem: &str) -> Option<u32> {
    match name.strip_prefix(stem)? {
        "" => Some(1),
        rest => rest
            .strip_prefix('-')?
            .parse()
            .ok()
            .filter(|serial| dir_name(stem, *serial) == name),
    }
}

/// The folders in a folder; one that is not there has none.
fn folders(path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let (true, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string()) {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// The map pinned at `path`.
pub fn map_at(path: &Path) -> io::Result<MapData> {
    let fd = sys::open_pin(path)?;
    if sys::kind(fd.as_fd())? != sys::Kind::Map {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no map"));
    }
    MapData::from_fd(fd).map_err(io::Error::other)
}

/// The program pinned at `path`.
pub fn program_at(path: &Path) -> io::Result<ProgramInfo> {
    let fd = sys::open_pin(path)?;
    if sys::kind(fd.as_fd())? != sys::Kind::Program {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no program"));
    }
    ProgramInfo::from_pin(path).map_err(|error: ProgramError| io::Error::other(error))
}

/// Pins `object` at `path`, whatever is pinned there, in one step.
pub fn replace_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push("-new");
    let beside = path.with_file_name(name);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    sys::pin(object, &beside)?;
    fs::rename(&beside, path)
}

/// The C libraries disagree about the type of a file system's number.
fn is_bpf_magic<N: TryInto<u64>>(number: N) -> bool {
    number
        .try_into()
        .is_ok_and(|number: u64| number == BPF_FS_MAGIC)
}

/// Sees to it that `directory` exists and lies on a BPF file system; mounts one there otherwise,
/// for hosts that have none.
pub fn prepare_bpffs(directory: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Pins {
        path: directory.to_owned(),
        source,
    };
    let is_bpffs = |path: &Path| {
        nix::sys::statfs::statfs(path).is_ok_and(|fs| is_bpf_magic(fs.filesystem_type().0))
    };
    // A bpffs makes directories but no mount points of its own: look at the nearest that exists.
    let existing = directory
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    if is_bpffs(existing) {
        return fs::create_dir_all(directory).map_err(failed);
    }
    let standard = Path::new("/sys/fs/bpf");
    let mount_point = if directory.starts_with(standard) {
        standard
    } else {
        directory
    };
    if mount_point == directory {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    nix::mount::mount(
        Some("bpf"),
        mount_point,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        Some("mode=0700"),
    )
    .map_err(|errno| failed(io::Error::from(errno)))?;
    fs::create_dir_all(directory).map_err(failed)
}

/// Removes what any version of the daemon pinned below `directory`: the links, which detaches
/// them, and the maps. Fences of `remit run` are not the daemon's. Returns what was removed.
pub fn detach_pinned(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (_, path) in Survey::read(directory)?.versions {
        // First, so that no fence is ever left without maps that the next daemon could adopt.
        remove_pins(&path.join("links"))?;
        remove_pins(&path)?;
        removed.push(path);
    }
    Ok(removed)
}

/// Removes a directory of pins and what is in it. bpffs has files and directories only.
pub fn remove_pins(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_pins(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// What this process has pinned, while nothing depends on it: a start that fails takes it along.
#[derive(Debug)]
pub struct Guardian {
    base: PathBuf,
    made: Vec<PathBuf>,
    is_in_use: bool,
    is_alone: bool,
}

// === impl Guardian ===

impl Guardian {
    /// Over the pins below `base`.
    pub fn new(base: &Path) -> Self {
        Self {
            base: base.to_owned(),
            made: Vec::new(),
            is_in_use: false,
            is_alone: true,
        }
    }

    /// The same where this process has other pins there, which are not this guardian's.
    pub fn beside_another(base: &Path) -> Self {
        let mut guardian = Self::new(base);
        guardian.is_alone = false;
        guardian
    }

    /// Makes a directory.
    pub fn make(&mut self, path: &Path) -> io::Result<()> {
        self.made.push(path.to_owned());
        fs::create_dir_all(path)
    }

    /// From now on a link may hold what was made.
    pub fn in_use(&mut self) {
        self.is_in_use = true;
    }

    /// No link holds what was made any more.
    pub fn out_of_use(&mut self) {
        self.is_in_use = false;
    }

    /// Puts what was made into the hands of whoever comes next.
    pub fn let_go(&mut self) {
        self.made.clear();
        self.is_in_use = true;
    }

    /// The other has gone.
    pub fn alone(&mut self) {
        self.is_alone = true;
    }

    fn sweep(&self) -> io::Result<()> {
        let survey = Survey::read(&self.base)?;
        if survey.links.is_empty() && self.is_alone {
            // Maps that no link holds up are nobody's, and go with their process.
            for (_, path) in survey.versions {
                remove_pins(&path)?;
            }
        } else if !self.is_in_use {
            for path in &self.made {
                remove_pins(path)?;
            }
        }
        Ok(())
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if self.is_in_use && self.made.is_empty() {
            return;
        }
        if let Err(error) = self.sweep() {
            tracing::warn!(message = "Pins that hold no fence could not be removed.", %error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_read_as_they_are_written() {
        for number in [1, 2, 10, u32::MAX] {
            assert_eq!(serial(&dir_name("maps", number), "maps"), Some(number));
        }
        for name in [
            "maps-1", "maps-02", "maps-", "maps-x", "mapsy", "map", "maps-+3",
        ] {
            assert_eq!(serial(name, "maps"), None, "{name}");
        }
    }

    #[test]
    fn a_survey_finds_every_version() {
        let base = tempfile::tempdir().unwrap();
        for path in [
            "v1/maps",
            "v1/links/agents+slice",
            "v2/maps-3",
            "v2/programs-9",
            "v10/links",
            "run/x/v1/maps",
            "version/maps",
        ] {
            fs::create_dir_all(base.path().join(path)).unwrap();
        }
        fs::write(base.path().join("v1/links/agents+slice/remit_egress"), "").unwrap();
        fs::write(base.path().join("v1/maps-7"), "a file").unwrap();
        let survey = Survey::read(base.path()).unwrap();
        let versions: Vec<u32> = survey
            .versions
            .iter()
            .map(|(version, _)| *version)
            .collect();
        assert_eq!(versions, [1, 2, 10]);
        let sets: Vec<_> = survey
            .sets
            .iter()
            .map(|dir| (dir.version, dir.serial))
            .collect();
        assert_eq!(sets, [(1, 1), (2, 3)]);
        assert_eq!(next_serial(&survey.sets), 4);
        assert_eq!(next_serial(&survey.programs), 10);
        let [link] = survey.links.as_slice() else {
            panic!("{:?}", survey.links)
        };
        assert_eq!((link.version, link.root.as_str()), (1, "agents+slice"));
        assert_eq!(
            Survey::read(&base.path().join("none")).unwrap(),
            Survey::default()
        );
    }

    #[test]
    fn a_start_that_fails_leaves_what_others_made() {
        let base = tempfile::tempdir().unwrap();
        let link = base.path().join("v1/links/root/remit_egress");
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        fs::write(&link, "").unwrap();
        let old = base.path().join("v1/maps");
        fs::create_dir_all(&old).unwrap();
        let new = base.path().join("v1/maps-2");
        let mut guardian = Guardian::new(base.path());
        guardian.make(&new).unwrap();
        drop(guardian);
        assert!(old.exists() && !new.exists());
        let mut guardian = Guardian::new(base.path());
        guardian.make(&new).unwrap();
        guardian.in_use();
        drop(guardian);
        assert!(old.exists() && new.exists());
        fs::remove_file(&link).unwrap();
        drop(Guardian::new(base.path()));
        assert!(!base.path().join("v1").exists());
    }
}
