//! One state file: a header line, then JSON. The header names the format, what is in the file and
//! the SHA-256 of all that follows it, so a file that was torn, cut or changed is told from a whole
//! one. It does not prove who wrote it: the folder's rights do that.
//!
//! A file is replaced whole: written beside, synced, renamed over, and the folder synced. After a
//! crash at any point there is the old file or the new one.

use std::{
    fmt::{self, Write as _},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

/// The format; a reader takes no other.
const VERSION: u32 = 1;
const MAGIC: &str = "remit-state";

/// What a file holds, and how long it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// Its word in the header.
    pub word: &'static str,
    /// Bytes at most, the header included.
    pub max: u64,
}

/// A state file that does not say what it should, so that what it held is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file, or the folder if that could not be read.
    pub path: PathBuf,
    /// The agent that it was about, if one.
    pub agent: Option<String>,
    /// What is wrong, and what follows from it.
    pub why: String,
    /// Where the damaged file lies now, if it was moved aside.
    pub aside: Option<PathBuf>,
}

/// Why something was not written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An operation failed.
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        /// `write`, `remove`, `sync`, ….
        operation: &'static str,
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No agent has such an id, and no file shall.
    #[error("`{}` is no agent's id", .0.escape_default())]
    Id(String),
    /// Longer than what would be read again.
    #[error("`{}` would be {length} bytes long, and {max} are read", path.display())]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The most that is read, in bytes.
        max: u64,
    },
    /// Not expressible as JSON.
    #[error("cannot encode `{}`", path.display())]
    Encode {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A file's content, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    /// Header and body.
    pub bytes: Vec<u8>,
    /// SHA-256 of the body in hex.
    pub digest: String,
}

/// A file that was read and is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded<T> {
    /// What it says.
    pub value: T,
    /// SHA-256 of the body in hex.
    pub digest: String,
}

// === impl Damage ===

impl Damage {
    pub(super) fn new(path: &Path, why: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            agent: None,
            why: why.into(),
            aside: None,
        }
    }

    pub(super) fn of(self, agent: &str) -> Self {
        Self {
            agent: Some(agent.to_owned()),
            ..self
        }
    }

    pub(super) fn so(mut self, consequence: &str) -> Self {
        self.why.push_str("; ");
        self.why.push_str(consequence);
        self
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.why)?;
        match &self.aside {
            Some(aside) => write!(f, " (kept as `{}`)", aside.display()),
            None => Ok(()),
        }
    }
}

impl StateError {
    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }
}

// === reading ===

/// Reads a file; none when there is none.
///
/// # Errors
/// Anything but a whole file of this kind.
pub(super) fn read<T: DeserializeOwned>(
    path: &Path,
    kind: Kind,
) -> Result<Option<Decoded<T>>, Damage> {
    match bytes(path, kind.max) {
        Ok(bytes) => decode(&bytes, kind)
            .map(Some)
            .map_err(|why| Damage::new(path, why)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Damage::new(path, format!("cannot be read: {error}"))),
    }
}

fn bytes(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    // No links: nothing here is ever one. Not blocking: a pipe would wait for a writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len().min(max)).unwrap_or(0));
    file.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::other(format!("longer than {max} bytes")));
    }
    Ok(bytes)
}

/// What a file's bytes say. The header is compared with the one that the body should have, so
/// there is nothing in it that is read loosely.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8], kind: Kind) -> Result<Decoded<T>, String> {
    if bytes.is_empty() {
        return Err("is empty".to_owned());
    }
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let Some((head, body)) = end.and_then(|end| bytes.split_at_checked(end + 1)) else {
        return Err("is cut off in its first line".to_owned());
    };
    let digest = digest(body);
    if head != header(kind, &digest).as_bytes() {
        return Err(wrong_header(head, kind));
    }
    let value = serde_json::from_slice(body).map_err(|error| format!("says nothing: {error}"))?;
    Ok(Decoded { value, digest })
}

fn header(kind: Kind, digest: &str) -> String {
    format!("{MAGIC} {VERSION} {} sha256:{digest}\n", kind.word)
}

fn wrong_header(head: &[u8], kind: Kind) -> String {
    let head = String::from_utf8_lossy(head);
    let words: Vec<&str> = head.split_ascii_whitespace().collect();
    match words.as_slice() {
        [MAGIC, version, ..] if *version != VERSION.to_string() => format!(
            "has format {}; this Remit reads {VERSION}",
            version.escape_debug()
        ),
        [MAGIC, _, word, _] if *word != kind.word => format!("is no {} file", kind.word),
        [MAGIC, _, _, _] => "is not what was written: its checksum differs".to_owned(),
        _ => "is no state file".to_owned(),
    }
}

/// SHA-256 in hex.
pub(super) fn digest(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

// === writing ===

/// The content of a file.
///
/// # Errors
/// What can't be encoded, or would be too long to be read again.
pub(super) fn encode<T: Serialize>(
    path: &Path,
    kind: Kind,
    value: &T,
) -> Result<Encoded, StateError> {
    let mut body = serde_json::to_vec(value).map_err(|source| StateError::Encode {
        path: path.to_owned(),
        source,
    })?;
    body.push(b'\n');
    let digest = digest(&body);
    let mut bytes = header(kind, &digest).into_bytes();
    bytes.append(&mut body);
    let length = bytes.len() as u64;
    if length > kind.max {
        return Err(StateError::TooLong {
            path: path.to_owned(),
            length,
            max: kind.max,
        });
    }
    Ok(Encoded { bytes, digest })
}

/// Replaces a file, durably.
pub(super) fn replace(path: &Path, encoded: &Encoded) -> Result<(), StateError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut batch = Batch::new(folder)?;
    batch.stage(path, encoded)?;
    batch.commit()
}

/// Files of one folder that are replaced together: each is the old one or the new one after a
/// crash, and some may be old while others are new.
#[derive(Debug)]
pub(super) struct Batch {
    // Opened before anything is written: a failure to write back is told to whoever was there.
    folder: File,
    path: PathBuf,
    staged: Vec<PathBuf>,
}

/// So many files are synced one by one; for more it is cheaper to sync the file system (5 ms a file
/// on the disk where this was measured, so 5 s for a thousand agents).
const ONE_BY_ONE: usize = 4;

impl Batch {
    pub(super) fn new(folder: &Path) -> Result<Self, StateError> {
        Ok(Self {
            folder: File::open(folder).map_err(StateError::io("open", folder))?,
            path: folder.to_owned(),
            staged: Vec::new(),
        })
    }

    /// Writes a file beside its place.
    pub(super) fn stage(&mut self, path: &Path, encoded: &Encoded) -> Result<(), StateError> {
        let beside = beside(path);
        self.staged.push(path.to_owned());
        write(&beside, &encoded.bytes).map_err(StateError::io("write", &beside))
    }

    /// Puts all in place, durably.
    pub(super) fn commit(mut self) -> Result<(), StateError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        if self.staged.len() <= ONE_BY_ONE {
            for path in &self.staged {
                let beside = beside(path);
                File::open(&beside)
                    .and_then(|file| file.sync_all())
                    .map_err(StateError::io("sync", &beside))?;
            }
        } else {
            nix::unistd::syncfs(&self.folder)
                .map_err(io::Error::from)
                .map_err(StateError::io("sync", &self.path))?;
        }
        while let Some(path) = self.staged.last() {
            fs::rename(beside(path), path).map_err(StateError::io("replace", path))?;
            self.staged.pop();
        }
        self.folder
            .sync_all()
            .map_err(StateError::io("sync", &self.path))
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for path in &self.staged {
            // The next write would remove it as well.
            let _ = fs::remove_file(beside(path));
        }
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)
}

/// Removes a file, durably; one that is not there is removed.
pub(super) fn remove(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(StateError::io("remove", path)(source)),
        Ok(()) => sync_folder(path),
    }
}

/// Syncs the folder that `path` lies in.
pub(super) fn sync_folder(path: &Path) -> Result<(), StateError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(StateError::io("sync", folder))
}

/// Makes a folder that only its owner may enter, and those above it that are missing.
pub(super) fn make_folder(path: &Path) -> Result<(), StateError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(StateError::io("create", path))?;
    sync_folder(path)
}

/// The name under which a file is written before it takes its place. Hidden, so that nobody reads
/// half of one.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp"))
}

/// The file that a leftover of a [`Batch`] was to become.
pub(super) fn unfinished(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".tmp")
}

/// Moves a damaged file aside, for people to look at.
pub(super) fn move_aside(damage: &mut Damage, now_ms: i64) {
    let aside = aside(&damage.path, now_ms);
    if fs::rename(&damage.path, &aside).is_ok() {
        damage.aside = Some(aside);
    }
}

/// Gives a damaged file a second name, so that it can be replaced without being lost, nor its
/// place ever empty.
pub(super) fn link_aside(damage: &mut Damage, now_ms: i64) {
    let aside = aside(&damage.path, now_ms);
    if fs::hard_link(&damage.path, &aside).is_ok() {
        damage.aside = Some(aside);
    }
}

fn aside(path: &Path, now_ms: i64) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.damaged-{now_ms}"))
}

/// The names in a folder; none if it is missing.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// Who besides us could have written in a folder; none is nobody.
pub(super) fn exposed(folder: &Path) -> Option<String> {
    let metadata = fs::metadata(folder).ok()?;
    let (ours, our_group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if metadata.uid() != ours.as_raw() && metadata.uid() != 0 {
        return Some(format!("it belongs to user {}", metadata.uid()));
    }
    let group_writes = metadata.mode() & 0o020 != 0;
    if metadata.mode() & 0o002 != 0 {
        Some("everybody may write there".to_owned())
    } else if group_writes && metadata.gid() != 0 && metadata.gid() != our_group.as_raw() {
        Some(format!("group {} may write there", metadata.gid()))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const KIND: Kind = Kind {
        word: "test",
        max: 4096,
    };

    fn encoded(value: &Value) -> Encoded {
        encode(Path::new("x"), KIND, value).unwrap()
    }

    #[test]
    fn the_format_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        replace(&path, &encoded(&json!({"b": 1, "a": [true, "ü"]}))).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "remit-state 1 test \
             sha256:85d0b0e1d8205f302b30f773415c056fede53398ebb83ae088278234b692ef94\n\
             {\"b\":1,\"a\":[true,\"ü\"]}\n"
        );
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(names(folder.path()).unwrap(), ["a.json"]);
    }

    #[test]
    fn a_file_cut_anywhere_is_damaged() {
        let whole = encoded(&json!({"state": "revoked", "n": 17})).bytes;
        assert!(decode::<Value>(&whole, KIND).is_ok());
        for end in 0..whole.len() {
            assert!(decode::<Value>(&whole[..end], KIND).is_err(), "{end}");
        }
    }

    #[test]
    fn a_file_with_any_bit_flipped_is_damaged() {
        let whole = encoded(&json!({"state": "revoked", "n": 17})).bytes;
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert!(decode::<Value>(&flipped, KIND).is_err(), "{at}.{bit}");
            }
        }
    }

    #[test]
    fn damage_says_what_is_wrong() {
        let good = encoded(&json!(1)).bytes;
        let text = String::from_utf8(good).unwrap();
        for (text, why) in [
            (String::new(), "is empty"),
            ("remit-state 1".to_owned(), "cut off in its first line"),
            ("hello\nworld\n".to_owned(), "no state file"),
            (
                text.replace("remit-state 1", "remit-state 2"),
                "has format 2; this Remit reads 1",
            ),
            (text.replace("test", "hold"), "is no test file"),
            (text.replace("\n1", "\n2"), "its checksum differs"),
        ] {
            let told = decode::<Value>(text.as_bytes(), KIND).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
        let told = decode::<Vec<u8>>(&encoded(&json!({})).bytes, KIND).unwrap_err();
        assert!(told.contains("says nothing"), "{told}");
    }

    #[test]
    fn what_is_no_regular_short_file_is_damage_and_what_is_missing_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(read::<Value>(&at("nothing"), KIND), Ok(None));
        replace(&at("good"), &encoded(&json!(1))).unwrap();
        symlink(at("good"), at("link")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("long"), vec![b' '; 4097]).unwrap();
        for name in ["link", "folder", "pipe", "long"] {
            let damage = read::<Value>(&at(name), KIND).unwrap_err();
            assert!(damage.why.contains("cannot be read"), "{damage}");
        }
    }

    #[test]
    fn what_would_not_be_read_again_is_not_written() {
        let long = json!("x".repeat(4096));
        assert!(matches!(
            encode(Path::new("x"), KIND, &long),
            Err(StateError::TooLong { .. })
        ));
    }

    #[test]
    fn a_leftover_or_a_link_in_the_way_does_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("victim"), "untouched").unwrap();
        symlink(at("victim"), at(".a.json.tmp")).unwrap();
        replace(&at("a.json"), &encoded(&json!(1))).unwrap();
        assert_eq!(fs::read_to_string(at("victim")).unwrap(), "untouched");
        assert!(read::<Value>(&at("a.json"), KIND).unwrap().is_some());
        assert_eq!(unfinished(".a.json.tmp"), Some("a.json"));
        assert_eq!(unfinished("a.json"), None);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "").unwrap();
        let error = replace(&path, &encoded(&json!(1))).unwrap_err();
        assert!(error.to_string().starts_with("cannot replace"), "{error}");
        assert_eq!(names(folder.path()).unwrap(), ["a.json"]);
    }

    #[test]
    fn folders_that_others_may_write_in_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |mode| {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            exposed(folder.path())
        };
        assert_eq!(mode(0o755), None);
        assert!(mode(0o757).is_some_and(|why| why.contains("everybody")));
    }

    proptest! {
        #[test]
        fn every_value_comes_back(text: String, number: i64, flag: Option<bool>) {
            let value = json!({"text": text, "number": number, "flag": flag});
            let encoded = encode(Path::new("x"), KIND, &value);
            if let Ok(encoded) = encoded {
                let decoded = decode::<Value>(&encoded.bytes, KIND).unwrap();
                prop_assert_eq!(decoded.value, value);
                prop_assert_eq!(decoded.digest, encoded.digest);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            prop_assert!(decode::<Value>(&bytes, KIND).is_err());
        }
    }
}
