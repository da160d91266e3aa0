//! Appends events to a log file: one object a line, one `write(2)` a line on an `O_APPEND`
//! descriptor, numbered without gaps from 1 in each file.
//!
//! The file may be renamed or removed under us at any time (logrotate): before each line the path
//! is compared with what is open, which costs a microsecond. On its own the log rotates by rename
//! when the file is full: `violations.jsonl` becomes `.1`, `.1` becomes `.2`, and so on.
//!
//! A line that cannot be written leaves nothing behind: not half of it, nor a gap in the numbers.
//! The caller counts it and writes the count when the disk has room again.
//!
//! Of the disk the logs together have `max_total` and the two files being written. When it is full
//! the oldest violations go first; `audit.jsonl` loses its oldest file only by age, or when it fills
//! the whole of it alone.

pub(super) mod disk;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::Value;

use self::disk::{bytes_of, identity, last_sequence, numbered, rotated};
use super::ocsf::LogName;

/// Mode of log files: the owner writes, the group (`adm`, by a setgid folder) reads.
const MODE: u32 = 0o640;
/// Longest line that is written. The parts that agents choose are bounded far below; this keeps a
/// mistake of ours from filling the disk.
const LINE_BYTES: usize = 256 << 10;

/// When files are rotated and when they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one file.
    pub max_size: u64,
    /// Bytes of all rotated files together; the oldest go first.
    pub max_total: u64,
    /// Age at which a rotated file goes.
    pub retention: Duration,
}

/// Why a line was not written, or a log not opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// An operation failed.
    #[error("cannot {operation} log `{}`", path.display())]
    Io {
        /// `open`, `write`, `rotate`, ….
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel took only part of the line; that part was taken back.
    #[error("cannot write log `{}`: {written} of {length} bytes were taken", path.display())]
    Short {
        /// Which file.
        path: PathBuf,
        /// Bytes taken.
        written: usize,
        /// Bytes of the line.
        length: usize,
    },
    /// The line is longer than any should be.
    #[error("cannot write log `{}`: a line of {length} bytes exceeds {LINE_BYTES}", path.display())]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Bytes of the line.
        length: usize,
    },
}

/// A log that this process alone writes.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    /// Whether lines are numbered; else they are only text.
    numbered: bool,
    /// The log whose room this one leaves to it.
    first: Option<PathBuf>,
    limits: Limits,
    open: Open,
    torn: u64,
    fragments: Vec<Vec<u8>>,
    trouble: Option<LogError>,
}

/// The file that is open.
#[derive(Debug)]
struct Open {
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    size: u64,
    /// Number of the next line.
    next: u64,
    /// The file ends in the middle of a line.
    torn: bool,
}

// === impl Log ===

impl Log {
    /// Opens or creates the log `name` in `dir`, and the folder if it is missing. A file that
    /// ends in the middle of a line gets a line end first: see [`Self::take_torn`].
    pub fn open(dir: &Path, name: LogName, limits: Limits) -> Result<Self, LogError> {
        Self::open_at(dir, name.file(), true, limits)
    }

    /// Like [`Self::open`], for lines that have no number: forms of the logs' events for others to
    /// read.
    pub(super) fn open_unnumbered(
        dir: &Path,
        file: &str,
        limits: Limits,
    ) -> Result<Self, LogError> {
        Self::open_at(dir, file, false, limits)
    }

    fn open_at(dir: &Path, file: &str, numbered: bool, limits: Limits) -> Result<Self, LogError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(dir)
            .map_err(|source| LogError::Io {
                operation: "create the folder of",
                path: dir.to_owned(),
                source,
            })?;
        let path = dir.join(file);
        let open = Open::at(&path, numbered)?;
        // Everything else gives way to the audit trail, and not the other way round.
        let audit = LogName::Audit.file();
        let mut log = Self {
            path,
            numbered,
            first: (file != audit).then(|| dir.join(audit)),
            limits,
            open,
            torn: 0,
            fragments: Vec::new(),
            trouble: None,
        };
        log.mend_or_note();
        Ok(log)
    }

    /// Appends one event. `build` gets the line's number and returns the value that carries it.
    /// Returns the bytes of the line. After an error the number is still free and the file as it
    /// was.
    pub fn append(&mut self, build: impl FnOnce(u64) -> Value) -> Result<usize, LogError> {
        self.make_room();
        self.append_line(|sequence| {
            let mut line = build(sequence).to_string().into_bytes();
            line.push(b'\n');
            line
        })
    }

    /// Appends a line of text, without its end.
    pub(super) fn append_text(&mut self, text: String) -> Result<usize, LogError> {
        self.make_room();
        self.append_line(|_| {
            let mut line = text.into_bytes();
            line.push(b'\n');
            line
        })
    }

    /// Rotates a full file. One that grows too long is better than a line that is not there.
    fn make_room(&mut self) {
        if self.is_full() {
            let kept = self.rotate().and_then(|()| self.prune());
            self.trouble = kept.err().or(self.trouble.take());
        }
    }

    /// Like [`Self::append`], but `build` returns the line with its end, and nothing is rotated.
    pub(super) fn append_line(
        &mut self,
        build: impl FnOnce(u64) -> Vec<u8>,
    ) -> Result<usize, LogError> {
        self.ready()?;
        let line = build(self.open.next);
        if line.len() > LINE_BYTES {
            return Err(LogError::TooLong {
                path: self.path.clone(),
                length: line.len(),
            });
        }
        self.write(&line)?;
        self.open.next += 1;
        Ok(line.len())
    }

    /// Opens the file anew if the path names another one, and ends a line that was cut short.
    pub(super) fn ready(&mut self) -> Result<(), LogError> {
        if !self.is_in_place() {
            self.reopen()?;
        }
        self.mend()
    }

    /// Whether the open file is as long as it was left: nobody else wrote to it or cut it.
    pub(super) fn is_as_left(&self) -> bool {
        let length = self.open.file.metadata().map(|meta| meta.len());
        length.is_ok_and(|length| length == self.open.size)
    }

    /// Whether it is time to rotate.
    pub(super) fn is_full(&self) -> bool {
        self.open.size >= self.limits.max_size && self.is_in_place()
    }

    /// Opens the file at the path anew, as after a rotation by somebody else. The numbers go on
    /// where that file's end.
    pub fn reopen(&mut self) -> Result<(), LogError> {
        self.open = Open::at(&self.path, self.numbered)?;
        self.mend_or_note();
        Ok(())
    }

    /// How many files were found to end in the middle of a line since the last call: a crash or a
    /// full disk, worth a warning. What was there is kept, as a line that does not parse.
    pub fn take_torn(&mut self) -> u64 {
        std::mem::take(&mut self.torn)
    }

    /// What stood in the lines that were cut short, since the last call; nothing of those that are
    /// longer than any line of ours.
    pub(super) fn take_fragments(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.fragments)
    }

    /// Why rotation or the removal of old files failed last, if it has since the last call. Lines
    /// are written all the same.
    pub fn take_trouble(&mut self) -> Option<LogError> {
        self.trouble.take()
    }

    /// The file that lines go to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hands what was written to the disk.
    pub fn sync(&self) -> Result<(), LogError> {
        self.open
            .file
            .sync_data()
            .map_err(|source| self.error("sync", source))
    }

    /// Whether the path still names the open file.
    fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|meta| identity(&meta) == self.open.identity)
    }

    /// One write, all or nothing.
    fn write(&mut self, line: &[u8]) -> Result<(), LogError> {
        let result = loop {
            match self.open.file.write(line) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let written = match result {
            Ok(written) => written,
            Err(source) => return Err(self.error("write", source)),
        };
        if written == line.len() {
            self.open.size += written as u64;
            return Ok(());
        }
        // Nobody else writes here, so the end is ours to cut. If it cannot be cut, the next line
        // must not be glued to it.
        if self.open.file.set_len(self.open.size).is_err() {
            self.open.torn = true;
            self.open.size += written as u64;
        }
        Err(LogError::Short {
            path: self.path.clone(),
            written,
            length: line.len(),
        })
    }

    /// Ends a line that was cut short.
    fn mend(&mut self) -> Result<(), LogError> {
        if self.open.torn {
            // One that cannot be read back is not accounted for, and ended all the same.
            let fragment = self.open.fragment().ok().flatten();
            self.write(b"\n")?;
            self.fragments.extend(fragment);
            self.open.torn = false;
            self.torn += 1;
        }
        Ok(())
    }

    /// Like [`Self::mend`]. On a full disk the end waits until the next line, for which there is no
    /// room either: no reason not to open.
    fn mend_or_note(&mut self) {
        if let Err(error) = self.mend() {
            self.trouble = Some(error);
        }
    }

    /// Renames the file and those before it by one, and starts a new one.
    pub(super) fn rotate(&mut self) -> Result<(), LogError> {
        let rename = |from: &Path, to: &Path| {
            fs::rename(from, to).map_err(|source| LogError::Io {
                operation: "rotate",
                path: from.to_owned(),
                source,
            })
        };
        let mut numbers: Vec<u32> = rotated(&self.path)
            .map_err(|source| self.error("list the rotated files of", source))?
            .into_iter()
            .map(|(number, _)| number)
            .collect();
        numbers.sort_unstable_by_key(|number| std::cmp::Reverse(*number));
        for number in numbers {
            rename(
                &numbered(&self.path, number),
                &numbered(&self.path, number.saturating_add(1)),
            )?;
        }
        rename(&self.path, &numbered(&self.path, 1))?;
        self.open = Open::at(&self.path, self.numbered)?;
        Ok(())
    }

    /// Removes rotated files that are too old or too many.
    pub fn prune(&self) -> Result<(), LogError> {
        for path in self.expired()? {
            self.remove(&path)?;
        }
        Ok(())
    }

    /// Removes a rotated file. One that is gone already is no error.
    pub(super) fn remove(&self, path: &Path) -> Result<(), LogError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LogError::Io {
                operation: "remove",
                path: path.to_owned(),
                source: error,
            }),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Rotated files that are too old or too many, the oldest first.
    pub(super) fn expired(&self) -> Result<Vec<PathBuf>, LogError> {
        let failed = |source| self.error("list the rotated files of", source);
        let mut files = rotated(&self.path).map_err(failed)?;
        files.sort_unstable_by_key(|(number, _)| *number);
        let now = SystemTime::now();
        let mut total = self.first.as_deref().map_or(0, bytes_of);
        let mut expired = Vec::new();
        for (number, meta) in files {
            total = total.saturating_add(meta.len());
            let age = meta
                .modified()
                .ok()
                .and_then(|modified| now.duration_since(modified).ok())
                .unwrap_or_default();
            if total > self.limits.max_total || age > self.limits.retention {
                expired.push(numbered(&self.path, number));
            }
        }
        expired.reverse();
        Ok(expired)
    }

    fn error(&self, operation: &'static str, source: io::Error) -> LogError {
        LogError::Io {
            operation,
            path: self.path.clone(),
            source,
        }
    }
}

// === impl Open ===

impl Open {
    fn at(path: &Path, numbered: bool) -> Result<Self, LogError> {
        let error = |operation| {
            move |source| LogError::Io {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(MODE)
            // A link planted in the log folder must not lead us to write elsewhere.
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(error("open"))?;
        let meta = file.metadata().map_err(error("open"))?;
        if meta.len() == 0 {
            // The umask may have taken the group's right to read.
            file.set_permissions(Permissions::from_mode(MODE))
                .map_err(error("set the mode of"))?;
        }
        let (last, torn) = last_sequence(&mut file, meta.len(), numbered).map_err(error("read"))?;
        Ok(Self {
            file,
            identity: identity(&meta),
            size: meta.len(),
            next: last + 1,
            torn,
        })
    }
}

impl Open {
    /// What stands behind the last line end; none if it is longer than any line of ours.
    fn fragment(&self) -> io::Result<Option<Vec<u8>>> {
        let window = self.size.min(LINE_BYTES as u64 + 1);
        let mut bytes = vec![0; usize::try_from(window).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, self.size - window)?;
        let start = match bytes.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None if window == self.size => 0,
            None => return Ok(None),
        };
        Ok(Some(bytes.split_off(start)))
    }
}
