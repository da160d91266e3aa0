//! The head: where the chain is, kept outside the log, so that a log that was cut or put back is
//! noticed. Signed, so that a head that somebody else wrote is noticed too.
//!
//! It is written twice a record, each time whole (a new file, renamed): before the line, naming
//! the record that is about to come, and after it. Whenever the daemon dies, the log's last record
//! is the head's own or the one that it names as next, and nothing else.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    chain::{Hash, Position},
    keys::{PublicKey, Signer},
};

/// The file's name in the state directory.
pub const FILE: &str = "audit.head";
/// Longest head that is read, in bytes.
const MOST: u64 = 16 << 10;

/// Where the chain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The chain's id.
    pub chain: String,
    /// The last record written.
    pub last: Position,
    /// The record that was about to be written.
    pub next: Option<Position>,
    /// The last record that is known to be on the disk.
    pub synced: u64,
    /// Number of the last checkpoint.
    pub checkpoint: u64,
    /// The boot in which this was written.
    pub boot: String,
}

/// Why there is no head.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The file cannot be read or written.
    #[error("cannot {operation} the head `{}`", path.display())]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not as it was written, or somebody else signed it.
    #[error("the head `{}` cannot be trusted: {why}", path.display())]
    Untrusted {
        /// Which file.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    chain: String,
    record: u64,
    hash: String,
    type_uid: u64,
    next: Option<Next>,
    synced: u64,
    checkpoint: u64,
    boot: String,
    key: String,
    signature: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Next {
    record: u64,
    hash: String,
    type_uid: u64,
}

/// Where the head of the state directory `state` is.
pub fn path(state: &Path) -> PathBuf {
    state.join(FILE)
}

// === impl Head ===

impl Head {
    /// The head at `path`, none if there is no such file, with the key that signed it: whose key
    /// that is, is for the caller to know.
    pub fn read(path: &Path) -> Result<Option<(Self, PublicKey)>, HeadError> {
        let error = |source| HeadError::Io {
            operation: "read",
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        match File::open(path) {
            Ok(file) => {
                file.take(MOST).read_to_string(&mut text).map_err(error)?;
            }
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(error(source)),
        }
        Self::parse(&text)
            .map(Some)
            .map_err(|why| HeadError::Untrusted {
                path: path.to_owned(),
                why,
            })
    }

    fn parse(text: &str) -> Result<(Self, PublicKey), &'static str> {
        let document: Document =
            serde_json::from_str(text).map_err(|_| "it is torn or of another kind")?;
        if document.version != 1 {
            return Err("it is of another version");
        }
        let position = |record, hash: &str, type_uid| {
            hash.parse::<Hash>().ok().map(|hash| Position {
                record,
                hash,
                type_uid,
            })
        };
        let last =
            position(document.record, &document.hash, document.type_uid).ok_or("it has no hash")?;
        let next = match &document.next {
            None => None,
            Some(next) => {
                Some(position(next.record, &next.hash, next.type_uid).ok_or("it has no hash")?)
            }
        };
        let key = PublicKey::from_hex(&document.key).ok_or("it names no key")?;
        let head = Self {
            chain: document.chain,
            last,
            next,
            synced: document.synced,
            checkpoint: document.checkpoint,
            boot: document.boot,
        };
        if !key.verifies(&head.message(), &document.signature) {
            return Err("its signature is wrong");
        }
        Ok((head, key))
    }

    /// Writes the head to `path`, whole.
    pub fn write(&self, path: &Path, signer: &Signer, sync: bool) -> Result<(), HeadError> {
        let document = Document {
            version: 1,
            chain: self.chain.clone(),
            record: self.last.record,
            hash: self.last.hash.to_string(),
            type_uid: self.last.type_uid,
            next: self.next.map(|next| Next {
                record: next.record,
                hash: next.hash.to_string(),
                type_uid: next.type_uid,
            }),
            synced: self.synced,
            checkpoint: self.checkpoint,
            boot: self.boot.clone(),
            key: signer.public().to_string(),
            signature: signer.sign(&self.message()),
        };
        let error = |source| HeadError::Io {
            operation: "write",
            path: path.to_owned(),
            source,
        };
        let text = serde_json::to_string(&document).map_err(|source| error(source.into()))?;
        let new = path.with_extension("head.new");
        let mut file = match open(&new) {
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = path.parent() {
                    DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(dir)
                        .map_err(error)?;
                }
                open(&new).map_err(error)?
            }
            other => other.map_err(error)?,
        };
        file.write_all(text.as_bytes()).map_err(error)?;
        file.write_all(b"\n").map_err(error)?;
        if sync {
            file.sync_all().map_err(error)?;
        }
        fs::rename(&new, path).map_err(error)
    }

    /// What the signature covers.
    fn message(&self) -> String {
        let next = self.next.map_or_else(
            || "-".to_owned(),
            |next| format!("{} {} {}", next.record, next.hash, next.type_uid),
        );
        format!(
            "remit-audit-head-v1\n{}\n{} {} {}\n{next}\n{} {}\n{}\n",
            self.chain,
            self.last.record,
            self.last.hash,
            self.last.type_uid,
            self.synced,
            self.checkpoint,
            self.boot
        )
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::trail::chain::hash;

    fn head() -> Head {
        let position = |record| Position {
            record,
            hash: hash(&[record as u8]),
            type_uid: 600_203,
        };
        Head {
            chain: "c0ffee".to_owned(),
            last: position(7),
            next: Some(position(8)),
            synced: 5,
            checkpoint: 2,
            boot: "b".to_owned(),
        }
    }

    #[test]
    fn a_head_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("state"));
        assert!(Head::read(&path).unwrap().is_none());
        let signer = Signer::random().unwrap();
        let bare = Head {
            next: None,
            ..head()
        };
        for head in [head(), bare] {
            head.write(&path, &signer, true).unwrap();
            assert_eq!(Head::read(&path).unwrap(), Some((head, signer.public())));
        }
    }

    #[test]
    fn a_head_that_was_changed_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path());
        head()
            .write(&path, &Signer::random().unwrap(), false)
            .unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("\"record\":7", "\"record\":6"),
            ("\"synced\":5", "\"synced\":9"),
            ("\"checkpoint\":2", "\"checkpoint\":1"),
            ("c0ffee", "c0ffe0"),
            ("\"boot\":\"b\"", "\"boot\":\"c\""),
            ("\"version\":1", "\"version\":2"),
            ("\"next\":", "\"further\":null,\"next\":"),
            ("\n", ""),
        ] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text);
            fs::write(&path, &changed).unwrap();
            let read = Head::read(&path);
            if from == "\n" {
                assert!(read.is_ok(), "a line end is not the content");
            } else {
                assert!(matches!(read, Err(HeadError::Untrusted { .. })), "{to}");
            }
        }
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(Head::read(&path).is_err());
    }
}
