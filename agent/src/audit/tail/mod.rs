//! Reads a log as it grows, over rotation, whoever rotates: the open file is followed by its
//! inode, and when the path names another one the old is read to its end first.
//!
//! Lines that do not parse (a write cut short by a crash) are skipped and counted.

mod repeats;
#[cfg(test)]
mod tests;
mod wake;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use serde_json::Value;

use super::{
    files::beside,
    span,
    writer::{numbered, rotated},
};
use crate::policy::tables::UnixMillis;

pub use repeats::Repeats;
pub use wake::Wake;

/// Bytes read at once.
const CHUNK: u64 = 256 << 10;

/// Which lines are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Those of this agent (`ai_agent.uid`).
    pub agent: Option<String>,
    /// Those from this time on; rotated files are read too.
    pub since: Option<UnixMillis>,
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// As it stands in the file, without its end.
    pub raw: String,
    /// What it says.
    pub event: Value,
}

/// Why `--since` cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a duration such as \"10m\" nor a time such as \"2026-11-24T18:00:00Z\"")]
pub struct SinceError(String);

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read log `{}`", path.display())]
pub struct TailError {
    /// Which file.
    path: PathBuf,
    /// Why.
    #[source]
    source: io::Error,
}

/// A reader of one log.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    filter: Filter,
    /// Files to read before the one at the path, the next one last.
    queue: Vec<File>,
    current: Option<Current>,
    skipped: u64,
}

/// The file being read.
#[derive(Debug)]
struct Current {
    file: File,
    identity: (u64, u64),
    /// The beginning of a line whose end is not there yet.
    partial: Vec<u8>,
}

/// `10m` before `now`, or the time that the text names.
pub fn since(text: &str, now: UnixMillis) -> Result<UnixMillis, SinceError> {
    if let Ok(length) = span::parse(text) {
        let millis = i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
        return Ok(now.saturating_sub(millis));
    }
    text.parse::<jiff::Timestamp>()
        .map(|time| time.as_millisecond())
        .map_err(|_| SinceError(text.to_owned()))
}

// === impl Tail ===

impl Tail {
    /// Starts at the beginning of the current file, or with [`Filter::since`] at that of the
    /// oldest one that can have such lines. A log that is not there yet is an empty one.
    pub fn open(path: &Path, filter: Filter) -> Result<Self, TailError> {
        let mut tail = Self {
            path: path.to_owned(),
            filter,
            queue: Vec::new(),
            current: None,
            skipped: 0,
        };
        if let Some(since) = tail.filter.since {
            tail.queue_since(since)?;
        }
        Ok(tail)
    }

    /// The lines that are there now and wanted, in order; empty at the end of the log. To follow
    /// it, ask again. Returns after about a quarter of a mebibyte, so that a large log passes
    /// through little memory.
    pub fn read(&mut self) -> Result<Vec<Line>, TailError> {
        loop {
            if self.current.is_none() && !self.advance()? {
                return Ok(Vec::new());
            }
            let Some(current) = &mut self.current else {
                return Ok(Vec::new());
            };
            // Asked before reading: what is written between the two is in the old file.
            let moved = !self.queue.is_empty() || is_moved(&self.path, current.identity);
            let mut bytes = Vec::new();
            let mut part = (&current.file).take(CHUNK);
            part.read_to_end(&mut bytes).map_err(|source| TailError {
                path: self.path.clone(),
                source,
            })?;
            if bytes.is_empty() {
                if !moved {
                    return Ok(Vec::new());
                }
                self.leave();
                continue;
            }
            let lines = self.split(&bytes);
            if !lines.is_empty() {
                return Ok(lines);
            }
        }
    }

    /// Lines that did not parse, since the last call.
    pub fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }

    /// Opens the next file; false if there is none.
    fn advance(&mut self) -> Result<bool, TailError> {
        let file = match self.queue.pop() {
            Some(file) => file,
            None => match open(&self.path) {
                Ok(file) => file,
                // Between a rotation and the next line there is no file.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(source) => return Err(self.error(source)),
            },
        };
        let meta = file.metadata().map_err(|source| self.error(source))?;
        self.current = Some(Current {
            file,
            identity: (meta.dev(), meta.ino()),
            partial: Vec::new(),
        });
        Ok(true)
    }

    /// Done with a file that will not grow. Others may have come and gone since it was current.
    fn leave(&mut self) {
        let Some(current) = self.current.take() else {
            return;
        };
        self.skipped += u64::from(!current.partial.is_empty());
        if !self.queue.is_empty() {
            return;
        }
        let Ok(mut files) = rotated(&self.path) else {
            return;
        };
        files.sort_unstable_by_key(|(number, _)| *number);
        let at = files
            .iter()
            .position(|(_, meta)| (meta.dev(), meta.ino()) == current.identity);
        // Where the file is not found, logrotate named it otherwise or it is removed; what came
        // between is then unknown.
        let younger = files.iter().take(at.unwrap_or(0));
        self.queue = younger
            .filter_map(|(n, _)| open(&numbered(&self.path, *n)).ok())
            .collect();
        // Number 1 is the youngest and read last: the queue ends with the next one to read.
    }

    /// Opens the rotated files that were written to since then, whoever rotated them. They are
    /// opened now, so that further rotation does not change what is read.
    fn queue_since(&mut self, since: UnixMillis) -> Result<(), TailError> {
        let mut files = beside(&self.path).map_err(|error| TailError {
            path: error.path,
            source: error.source,
        })?;
        let since = UNIX_EPOCH + Duration::from_millis(since.max(0).unsigned_abs());
        files.reverse();
        for path in files {
            match open(&path) {
                Ok(file) => {
                    let modified = file.metadata().and_then(|meta| meta.modified());
                    let too_old = modified.is_ok_and(|modified| modified < since);
                    if too_old && path != self.path {
                        break;
                    }
                    self.queue.push(file);
                }
                // The oldest may be pruned at any time.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(TailError { path, source }),
            }
        }
        Ok(())
    }

    fn split(&mut self, bytes: &[u8]) -> Vec<Line> {
        let Some(current) = &mut self.current else {
            return Vec::new();
        };
        let mut lines = Vec::new();
        let mut pieces = bytes.split(|&byte| byte == b'\n');
        let last = pieces.next_back().unwrap_or_default();
        for piece in pieces {
            current.partial.extend_from_slice(piece);
            let whole = std::mem::take(&mut current.partial);
            match parse(whole) {
                Some(line) if self.filter.wants(&line.event) => lines.push(line),
                Some(_) => {}
                None => self.skipped += 1,
            }
        }
        current.partial.extend_from_slice(last);
        lines
    }

    fn error(&self, source: io::Error) -> TailError {
        TailError {
            path: self.path.clone(),
            source,
        }
    }
}

impl Filter {
    fn wants(&self, event: &Value) -> bool {
        let agent = self
            .agent
            .as_deref()
            .is_none_or(|agent| event["ai_agent"]["uid"] == agent);
        let since = self
            .since
            .is_none_or(|since| event["time"].as_i64().is_some_and(|time| time >= since));
        agent && since
    }
}

fn parse(bytes: Vec<u8>) -> Option<Line> {
    let raw = String::from_utf8(bytes).ok()?;
    let event = serde_json::from_str(&raw).ok()?;
    Some(Line { raw, event })
}

fn is_moved(path: &Path, identity: (u64, u64)) -> bool {
    match fs::symlink_metadata(path) {
        Ok(meta) => (meta.dev(), meta.ino()) != identity,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}
