//! Reads the files of the registry: agents, sets, floor. Nothing is parsed here. What can't be
//! read is told, never skipped: a file that is missing from a registry takes an agent's policy, or
//! a denial, away.

use std::{
    fmt, fs,
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::settings::{Paths, Settings};
use crate::policy::{Names, Source, SourceKind};

/// The longest file of an agent or of the floor, in bytes. A hundred thousand grants, each with a
/// short reason, are about a quarter of it.
pub const MAX_FILE: u64 = 32 << 20;
/// The longest file of a set. A million prefixes, each with a short reason, are about two thirds.
pub const MAX_SET: u64 = 128 << 20;

/// The longest file of this kind.
const fn longest(kind: SourceKind) -> u64 {
    match kind {
        SourceKind::Set => MAX_SET,
        SourceKind::Agent | SourceKind::Floor => MAX_FILE,
    }
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry {
    /// The files, sorted by name within their folder; set folders in the order of the settings.
    pub sources: Vec<Source>,
    /// What could not be read.
    pub unread: Vec<Unread>,
}

/// A file or folder that could not be read, and so whose content is not known. An unread agent's
/// file leaves its agent's last good entry in force; an unread folder of agents, those of all its
/// agents; an unread floor means that no new state may come into force, for it would lack denials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// Which.
    pub path: PathBuf,
    /// What is in it.
    pub kind: SourceKind,
    /// Whether it is a folder.
    pub folder: bool,
    /// Why.
    pub why: String,
}

/// Whether grants of names lead anywhere under these settings.
pub const fn names(settings: &Settings) -> Names {
    if settings.dns.enabled {
        Names::Guarded
    } else {
        Names::Unguarded("the settings turn the DNS guard off (`dns.enabled = false`)")
    }
}

/// Reads all that the settings name. The folder of agents must be there. Folders of sets and the
/// floor's file need not be, the latter only at its default place: a floor that was put elsewhere
/// and is missing there is a mistake.
pub fn read(paths: &Paths) -> Registry {
    let mut registry = Registry::default();
    registry.folder(&paths.registry, SourceKind::Agent, true);
    for folder in &paths.sets {
        registry.folder(folder, SourceKind::Set, false);
    }
    let moved = paths.floor != Paths::default().floor;
    registry.floor(&paths.floor, moved);
    registry
}

/// Reads these files, or what these folders hold, and what belongs to it: the sets and floor that
/// the settings name, then those beside the given (`../sets/`, and `../floor.toml` where the
/// settings' floor is not there). So a checkout can be tried on any machine.
///
/// A folder with a folder `agents` or `agents.d` in it stands for that. What is given is agents'
/// files, unless its place says otherwise: `floor.toml`, and what is in a folder of sets.
pub fn read_given(given: &[PathBuf], paths: &Paths) -> Registry {
    let mut registry = Registry::default();
    let mut neighbours: Vec<PathBuf> = Vec::new();
    for path in given {
        let inner = ["agents", "agents.d"].map(|name| path.join(name));
        let path = inner.iter().find(|inner| inner.is_dir()).unwrap_or(path);
        let kind = kind_of(path, paths);
        let folder = if path.is_dir() {
            registry.folder(path, kind, true);
            path.as_path()
        } else {
            registry.file(path, kind);
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            }
        };
        // By name where there is one, so that messages say `policies/sets/x.toml`.
        let above = match (kind, folder.file_name(), folder.parent()) {
            (SourceKind::Floor, _, _) => folder.to_owned(),
            (_, Some(_), Some(parent)) => parent.to_owned(),
            _ => folder.join(".."),
        };
        if !neighbours.contains(&above) {
            neighbours.push(above);
        }
    }
    for folder in &paths.sets {
        registry.folder(folder, SourceKind::Set, false);
    }
    for above in &neighbours {
        registry.folder(&above.join("sets"), SourceKind::Set, false);
    }
    if registry.has(SourceKind::Floor) {
        return registry;
    }
    let beside = neighbours.iter().map(|above| above.join("floor.toml"));
    let moved = paths.floor != Paths::default().floor;
    match beside.into_iter().find(|floor| floor.exists()) {
        Some(floor) if !moved && !paths.floor.exists() => registry.floor(&floor, true),
        _ => registry.floor(&paths.floor, moved),
    }
    registry
}

/// What a file or folder that somebody named is, by its place.
fn kind_of(path: &Path, paths: &Paths) -> SourceKind {
    if path == paths.floor || path.file_name().is_some_and(|name| name == "floor.toml") {
        return SourceKind::Floor;
    }
    let of_sets = |folder: &Path| {
        let named = folder.file_name();
        paths.sets.iter().any(|sets| sets == folder)
            || named.is_some_and(|name| name == "sets" || name == "sets.d")
    };
    let folder = if path.is_dir() {
        Some(path)
    } else {
        path.parent()
    };
    match folder {
        Some(folder) if of_sets(folder) => SourceKind::Set,
        _ => SourceKind::Agent,
    }
}

// === impl Registry ===

impl Registry {
    fn folder(&mut self, folder: &Path, kind: SourceKind, required: bool) {
        let names = match list(folder) {
            Ok(names) => names,
            Err(error) if !required && error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                self.unread.push(Unread {
                    path: folder.to_owned(),
                    kind,
                    folder: true,
                    why: error.to_string(),
                });
                return;
            }
        };
        for path in names {
            self.file(&path, kind);
        }
    }

    fn floor(&mut self, path: &Path, required: bool) {
        match fs::symlink_metadata(path) {
            Err(error) if !required && error.kind() == io::ErrorKind::NotFound => {}
            _ => self.file(path, SourceKind::Floor),
        }
    }

    fn has(&self, kind: SourceKind) -> bool {
        self.sources.iter().any(|source| source.kind == kind)
            || self.unread.iter().any(|unread| unread.kind == kind)
    }

    /// A file that was named twice is read once.
    fn file(&mut self, path: &Path, kind: SourceKind) {
        let known = self.sources.iter().any(|source| source.path == path);
        if known || self.unread.iter().any(|unread| unread.path == path) {
            return;
        }
        match read_text(path, longest(kind)) {
            Ok(text) => self.sources.push(Source {
                path: path.to_owned(),
                text,
                kind,
            }),
            Err(error) => self.unread.push(Unread {
                path: path.to_owned(),
                kind,
                folder: false,
                why: error.to_string(),
            }),
        }
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: error: cannot read: {}",
            self.path.display(),
            self.why
        )
    }
}

/// The `*.toml` of a folder, sorted. Hidden ones are editors' and never meant.
fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "toml")
        {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A whole text file, within bounds. Symbolic links are followed, to a file and not in circles.
fn read_text(path: &Path, longest: u64) -> io::Result<String> {
    // Not blocking: opening a pipe would wait for a writer, perhaps for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(longest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        return Err(io::Error::other(format!(
            "longer than {} MiB",
            longest >> 20
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::other(format!("not UTF-8 at byte {at}"))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn paths(folder: &TempDir) -> Paths {
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("agents.d")).unwrap();
        fs::create_dir_all(at("sets.d")).unwrap();
        Paths {
            registry: at("agents.d"),
            sets: vec![at("sets.d"), at("missing")],
            floor: at("floor.toml"),
            ..Paths::default()
        }
    }

    fn write(path: &Path, text: impl AsRef<[u8]>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn names(registry: &Registry) -> Vec<(String, SourceKind)> {
        let sources = registry.sources.iter();
        sources.map(|source| (source.stem(), source.kind)).collect()
    }

    #[test]
    fn everything_is_read_in_order() {
        let folder = TempDir::new().unwrap();
        let paths = paths(&folder);
        for name in ["b.toml", "a.toml", "a.toml.bak", ".hidden.toml", "README"] {
            write(&paths.registry.join(name), name);
        }
        write(&folder.path().join("sets.d/github.toml"), "");
        write(&paths.floor, "");
        let registry = read(&paths);
        assert_eq!(registry.unread, []);
        assert_eq!(
            names(&registry),
            [
                ("a".to_owned(), SourceKind::Agent),
                ("b".to_owned(), SourceKind::Agent),
                ("github".to_owned(), SourceKind::Set),
                ("floor".to_owned(), SourceKind::Floor),
            ]
        );
    }

    #[test]
    fn what_cannot_be_read_is_told_and_hinders_no_other() {
        let folder = TempDir::new().unwrap();
        let paths = paths(&folder);
        let at = |name: &str| paths.registry.join(name);
        write(&at("good.toml"), "fine");
        write(&at("binary.toml"), [b'a', 0xff]);
        write(&at("huge.toml"), vec![b'x'; MAX_FILE as usize + 1]);
        write(&at("largest.toml"), vec![b'x'; MAX_FILE as usize]);
        // Holes need no disk.
        let sets = folder.path().join("sets.d");
        for (name, size) in [("most.toml", MAX_SET), ("more.toml", MAX_SET + 1)] {
            fs::create_dir_all(&sets).unwrap();
            let file = fs::File::create(sets.join(name)).unwrap();
            file.set_len(size).unwrap();
        }
        fs::create_dir(at("folder.toml")).unwrap();
        symlink("loop.toml", at("loop.toml")).unwrap();
        symlink("nowhere", at("dangling.toml")).unwrap();
        nix::unistd::mkfifo(&at("pipe.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink(at("good.toml"), at("linked.toml")).unwrap();
        write(&paths.floor, "");

        let registry = read(&paths);
        let read: Vec<_> = registry.sources.iter().map(Source::stem).collect();
        assert_eq!(read, ["good", "largest", "linked", "most", "floor"]);
        let unread: Vec<_> = registry.unread.iter().map(ToString::to_string).collect();
        let expected = [
            ("binary.toml", "not UTF-8 at byte 1"),
            ("dangling.toml", "No such file"),
            ("folder.toml", "not a regular file"),
            ("huge.toml", "longer than 32 MiB"),
            ("loop.toml", "symbolic links"),
            ("pipe.toml", "not a regular file"),
            ("more.toml", "longer than 128 MiB"),
        ];
        assert_eq!(unread.len(), expected.len(), "{unread:?}");
        for (line, (name, why)) in unread.iter().zip(expected) {
            assert!(line.contains(name) && line.contains(why), "{line}");
        }
    }

    #[test]
    fn a_missing_folder_of_agents_and_a_missing_moved_floor_are_told() {
        let folder = TempDir::new().unwrap();
        let mut paths = paths(&folder);
        fs::remove_dir(&paths.registry).unwrap();
        let unread = read(&paths).unread;
        let kinds: Vec<_> = unread.iter().map(|one| (one.kind, one.folder)).collect();
        assert_eq!(
            kinds,
            [(SourceKind::Agent, true), (SourceKind::Floor, false)]
        );

        fs::create_dir(&paths.registry).unwrap();
        paths.floor = Paths::default().floor;
        if !paths.floor.exists() {
            assert_eq!(read(&paths), Registry::default());
        }
    }

    #[test]
    fn a_given_file_finds_the_sets_and_floor_beside_it() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        write(&at("policies/agents/coder.toml"), "a");
        write(&at("policies/agents/other.toml"), "b");
        write(&at("policies/sets/github.toml"), "beside");
        write(&at("policies/floor.toml"), "floor");
        write(&at("host/github.toml"), "host");
        let paths = Paths {
            sets: vec![at("host")],
            ..Paths::default()
        };
        let one = read_given(&[at("policies/agents/coder.toml")], &paths);
        assert_eq!(one.unread, []);
        let texts: Vec<_> = one
            .sources
            .iter()
            .map(|source| source.text.as_str())
            .collect();
        // The settings' set comes first, and so counts.
        if paths.floor.exists() {
            assert_eq!(texts[..3], ["a", "host", "beside"]);
        } else {
            assert_eq!(texts, ["a", "host", "beside", "floor"]);
        }

        for whole in ["policies/agents", "policies"] {
            let all = read_given(&[at(whole)], &paths);
            let agents = all
                .sources
                .iter()
                .filter(|source| source.kind == SourceKind::Agent);
            let agents: Vec<_> = agents.map(Source::stem).collect();
            assert_eq!(agents, ["coder", "other"], "{whole}");
        }
        let missing = read_given(&[at("nothing.toml")], &paths);
        assert_eq!(missing.unread.len(), 1);
    }

    #[test]
    fn sets_and_floors_are_known_by_their_place() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        write(&at("policies/sets/github.toml"), "set");
        write(&at("policies/floor.toml"), "floor");
        let paths = Paths {
            sets: Vec::new(),
            ..Paths::default()
        };
        let given = [at("policies/sets/github.toml"), at("policies/floor.toml")];
        let read = read_given(&given, &paths);
        assert_eq!(read.unread, []);
        assert_eq!(
            names(&read),
            [
                ("github".to_owned(), SourceKind::Set),
                ("floor".to_owned(), SourceKind::Floor),
            ]
        );
    }
}
