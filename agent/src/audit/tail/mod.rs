//! Reads a log as it grows, over rotation, whoever rotates: the open file is followed by its
//! inode, and when the path names another one the old is read to its end first.
//!
//! Lines that do not parse (a write cut short by a crash) are skipped and counted.

mod repeats;
#[cfg(test)]
mod tests;
mod wake;

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use super::{files::beside, span};
use crate::policy::tables::UnixMillis;

pub use repeats::Repeats;
pub use wake::Wake;

/// Bytes read at once.
const CHUNK: u64 = 256 << 10;
/// Files that are known to have been read.
const REMEMBERED: usize = 64;
/// Times that the names of a log's files are gone through at most.
const SCANS: usize = 8;
/// Files that are looked at once more after they were left.
const LINGERING: usize = 4;

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
    /// Files that were left last, still open: whoever writes may have looked at the path before it
    /// was moved, and write after.
    left: VecDeque<Current>,
    /// Files read to their end of late: device and inode, and when they were last written to.
    read: VecDeque<((u64, u64), SystemTime)>,
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

/// A file of the log.
#[derive(Debug)]
struct Aged {
    path: PathBuf,
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    /// When it was last written to.
    modified: SystemTime,
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
            left: VecDeque::new(),
            read: VecDeque::new(),
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
        let late = self.late()?;
        if !late.is_empty() {
            return Ok(late);
        }
        loop {
            if self.current.is_none() && !self.advance()? {
                return Ok(Vec::new());
            }
            let Some(current) = &mut self.current else {
                return Ok(Vec::new());
            };
            // Asked before reading: what is written between the two is in the old file.
            let moved = !self.queue.is_empty() || is_moved(&self.path, current.identity);
            let news = current.read(&self.filter);
            let Some((lines, skipped)) = news.map_err(|source| TailError {
                path: self.path.clone(),
                source,
            })?
            else {
                if !moved {
                    return Ok(Vec::new());
                }
                self.leave();
                continue;
            };
            self.skipped += skipped;
            if !lines.is_empty() {
                return Ok(lines);
            }
        }
    }

    /// What was written to files after they were left.
    fn late(&mut self) -> Result<Vec<Line>, TailError> {
        let mut late = Vec::new();
        for left in &mut self.left {
            let news = left.read(&self.filter).map_err(|source| TailError {
                path: self.path.clone(),
                source,
            })?;
            if let Some((lines, skipped)) = news {
                late.extend(lines);
                self.skipped += skipped;
            }
        }
        Ok(late)
    }

    /// Lines that did not parse, since the last call.
    pub fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }

    /// Opens the next file; false if there is none.
    fn advance(&mut self) -> Result<bool, TailError> {
        if self.queue.is_empty() {
            self.queue = self.written_later()?;
        }
        let Some(file) = self.queue.pop() else {
            return Ok(false);
        };
        let meta = file.metadata().map_err(|source| self.error(source))?;
        self.current = Some(Current {
            file,
            identity: (meta.dev(), meta.ino()),
            partial: Vec::new(),
        });
        Ok(true)
    }

    /// The files that were written to after those read so far, the next one to read last: whoever
    /// rotated, however often meanwhile, and however they are named now. All are opened at once, so
    /// that further rotation does not change what is read.
    fn written_later(&self) -> Result<Vec<File>, TailError> {
        let Some(left) = self.left_at() else {
            return match open(&self.path) {
                Ok(file) => Ok(vec![file]),
                // Between a rotation and the next line there is no file.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(source) => Err(self.error(source)),
            };
        };
        let mut files = by_age(&self.path)?;
        files.retain(|file| {
            // The number of a file that was removed may be another's now, but not its time as well,
            // and not while it is open.
            let was_read = self.left.iter().any(|left| left.identity == file.identity)
                || self.read.contains(&(file.identity, file.modified));
            !was_read && (file.path == self.path || file.modified >= left)
        });
        files.reverse();
        Ok(files.into_iter().map(|file| file.file).collect())
    }

    /// Done with a file that is hardly going to grow.
    fn leave(&mut self) {
        let Some(current) = self.current.take() else {
            return;
        };
        self.left.push_back(current);
        if self.left.len() <= LINGERING {
            return;
        }
        let Some(left) = self.left.pop_front() else {
            return;
        };
        self.skipped += u64::from(!left.partial.is_empty());
        let meta = left.file.metadata();
        if let Ok(modified) = meta.and_then(|meta| meta.modified()) {
            self.read.push_back((left.identity, modified));
            if self.read.len() > REMEMBERED {
                self.read.pop_front();
            }
        }
    }

    /// When the file that was left last was written to.
    fn left_at(&self) -> Option<SystemTime> {
        match self.left.back() {
            // One whose time cannot be had was written to at some time.
            Some(left) => Some(left.modified().unwrap_or(UNIX_EPOCH)),
            None => self.read.back().map(|(_, modified)| *modified),
        }
    }

    /// Opens the rotated files that were written to since then, whoever rotated them. They are
    /// opened now, so that further rotation does not change what is read.
    fn queue_since(&mut self, since: UnixMillis) -> Result<(), TailError> {
        let since = UNIX_EPOCH + Duration::from_millis(since.max(0).unsigned_abs());
        let mut files = by_age(&self.path)?;
        files.retain(|file| file.path == self.path || file.modified >= since);
        self.queue = files.into_iter().map(|file| file.file).collect();
        self.queue.reverse();
        Ok(())
    }

    fn error(&self, source: io::Error) -> TailError {
        TailError {
            path: self.path.clone(),
            source,
        }
    }
}

impl Current {
    /// The lines that were added and are wanted, and how many do not parse; none if nothing was
    /// added.
    fn read(&mut self, filter: &Filter) -> io::Result<Option<(Vec<Line>, u64)>> {
        let mut bytes = Vec::new();
        (&self.file).take(CHUNK).read_to_end(&mut bytes)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let (mut lines, mut skipped) = (Vec::new(), 0);
        let mut pieces = bytes.split(|&byte| byte == b'\n');
        let last = pieces.next_back().unwrap_or_default();
        for piece in pieces {
            self.partial.extend_from_slice(piece);
            match parse(std::mem::take(&mut self.partial)) {
                Some(line) if filter.wants(&line.event) => lines.push(line),
                Some(_) => {}
                None => skipped += 1,
            }
        }
        self.partial.extend_from_slice(last);
        Ok(Some((lines, skipped)))
    }

    fn modified(&self) -> io::Result<SystemTime> {
        self.file.metadata()?.modified()
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

/// The files of a log, open, in the order in which they were last written to; the current one last.
/// Their names do not tell that: logrotate may name them by date, and others by number.
///
/// While the names are gone through, a rotation can give the file of one that comes next another
/// that has been. So they are gone through until nothing new is found.
fn by_age(path: &Path) -> Result<Vec<Aged>, TailError> {
    by_age_while(path, |_| {})
}

/// The same, with what happens before a file is opened.
fn by_age_while(path: &Path, mut happens: impl FnMut(&Path)) -> Result<Vec<Aged>, TailError> {
    let mut files: Vec<Aged> = Vec::new();
    for _ in 0..SCANS {
        if !scan(path, &mut files, &mut happens)? {
            break;
        }
    }
    // Those of one moment stay as they were found: in the order of their names.
    files.sort_by_key(|file| (file.path == path, file.modified));
    Ok(files)
}

/// Opens what is there; false if all of it was known.
fn scan(
    path: &Path,
    files: &mut Vec<Aged>,
    happens: &mut impl FnMut(&Path),
) -> Result<bool, TailError> {
    let beside = beside(path).map_err(|error| TailError {
        path: error.path,
        source: error.source,
    })?;
    let mut is_new = false;
    for path in beside {
        happens(&path);
        let opened = open(&path).and_then(|file| {
            let meta = file.metadata()?;
            Ok((file, (meta.dev(), meta.ino()), meta.modified()?))
        });
        match opened {
            Ok((file, identity, modified)) => {
                let known = files.iter_mut().find(|known| known.identity == identity);
                if let Some(known) = known {
                    // It may have another name by now.
                    known.path = path;
                    known.modified = modified;
                } else {
                    is_new = true;
                    files.push(Aged {
                        path,
                        file,
                        identity,
                        modified,
                    });
                }
            }
            // The oldest may be pruned at any time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(TailError { path, source }),
        }
    }
    Ok(is_new)
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
