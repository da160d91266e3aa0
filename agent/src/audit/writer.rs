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

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{
        DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _,
        PermissionsExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::ocsf::LogName;

/// Mode of log files: the owner writes, the group (`adm`, by a setgid folder) reads.
const MODE: u32 = 0o640;
/// Longest line that is written. The parts that agents choose are bounded far below; this keeps a
/// mistake of ours from filling the disk.
const LINE_BYTES: usize = 256 << 10;
/// First piece read from the end of a file in search of the last number; doubled until one is
/// found.
const TAIL_BYTES: u64 = 64 << 10;

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
        log.mend()?;
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
        self.mend()
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

/// Bytes of the log at `path`, rotated files included; 0 where that cannot be told.
fn bytes_of(path: &Path) -> u64 {
    let current = fs::metadata(path).map_or(0, |meta| meta.len());
    let rotated = rotated(path).unwrap_or_default();
    rotated
        .iter()
        .fold(current, |sum, (_, meta)| sum.saturating_add(meta.len()))
}

fn identity(meta: &fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// `PATH.NUMBER`.
pub(super) fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// The rotated files beside `path`, in no order.
pub(super) fn rotated(path: &Path) -> io::Result<Vec<(u32, fs::Metadata)>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let other = entry.file_name();
        let number = other
            .to_str()
            .zip(name.to_str())
            .and_then(|(other, name)| other.strip_prefix(name)?.strip_prefix('.')?.parse().ok());
        let Some(number) = number else { continue };
        match entry.metadata() {
            Ok(meta) if meta.is_file() => found.push((number, meta)),
            Ok(_) => {}
            // Somebody else may prune as well.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The number of the last line that has one (0 without), and whether the file ends in the middle
/// of a line.
fn last_sequence(file: &mut File, size: u64, numbered: bool) -> io::Result<(u64, bool)> {
    if size == 0 {
        return Ok((0, false));
    }
    let mut last = [0];
    file.read_exact_at(&mut last, size - 1)?;
    let torn = last != [b'\n'];
    if !numbered {
        return Ok((0, torn));
    }
    let mut window = TAIL_BYTES;
    loop {
        let start = size.saturating_sub(window);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(size - start).read_to_end(&mut bytes)?;
        // The first piece may be the end of a line, which then does not parse.
        for line in bytes.split(|&byte| byte == b'\n').rev() {
            let event = serde_json::from_slice::<Value>(line).ok();
            if let Some(number) = event.and_then(|event| event["metadata"]["sequence"].as_u64()) {
                return Ok((number, torn));
            }
        }
        if start == 0 {
            return Ok((0, torn));
        }
        window = window.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ROOMY: Limits = Limits {
        max_size: 1 << 30,
        max_total: 1 << 40,
        retention: Duration::from_secs(1 << 30),
    };

    fn open(dir: &tempfile::TempDir, limits: Limits) -> Log {
        Log::open(dir.path(), LogName::Violations, limits).unwrap()
    }

    fn write(log: &mut Log, word: &str) {
        log.append(|sequence| json!({ "metadata": { "sequence": sequence }, "word": word }))
            .unwrap();
    }

    /// Number and word of each line that parses.
    fn lines(path: &Path) -> Vec<(u64, String)> {
        fs::read_to_string(path)
            .unwrap()
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|event| {
                let number = event["metadata"]["sequence"].as_u64().unwrap();
                (number, event["word"].as_str().unwrap().to_owned())
            })
            .collect()
    }

    fn pairs(expected: &[(u64, &str)]) -> Vec<(u64, String)> {
        expected
            .iter()
            .map(|(number, word)| (*number, (*word).to_owned()))
            .collect()
    }

    #[test]
    fn numbers_go_on_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        write(&mut log, "b");
        drop(log);
        let mut log = open(&dir, ROOMY);
        write(&mut log, "c");
        assert_eq!(lines(log.path()), pairs(&[(1, "a"), (2, "b"), (3, "c")]));
        assert_eq!(log.take_torn(), 0);
        let mode = fs::metadata(log.path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn a_torn_line_is_ended_kept_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        let path = log.path().to_owned();
        drop(log);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"metadata\":{\"sequ").unwrap();
        let mut log = open(&dir, ROOMY);
        assert_eq!((log.take_torn(), log.take_torn()), (1, 0));
        write(&mut log, "b");
        assert_eq!(lines(&path), pairs(&[(1, "a"), (2, "b")]));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
        // The fragment hides the last number from nobody.
        drop(log);
        file.write_all(b"{").unwrap();
        write(&mut open(&dir, ROOMY), "c");
        assert_eq!(lines(&path), pairs(&[(1, "a"), (2, "b"), (3, "c")]));
    }

    #[test]
    fn the_last_number_is_found_behind_much_rubbish() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        let path = log.path().to_owned();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&vec![b'x'; 3 * TAIL_BYTES as usize])
            .unwrap();
        write(&mut open(&dir, ROOMY), "b");
        assert_eq!(lines(&path), pairs(&[(1, "a"), (2, "b")]));
    }

    #[test]
    fn a_file_moved_or_removed_is_followed_by_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        let moved = dir.path().join("violations.jsonl-20261124");
        fs::rename(log.path(), &moved).unwrap();
        write(&mut log, "b");
        fs::remove_file(log.path()).unwrap();
        write(&mut log, "c");
        assert_eq!(lines(&moved), pairs(&[(1, "a")]));
        assert_eq!(lines(log.path()), pairs(&[(1, "c")]));
    }

    #[test]
    fn a_full_file_is_rotated_and_numbers_start_again() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_size: 60,
            ..ROOMY
        };
        let mut log = open(&dir, limits);
        for word in ["aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd", "eeeeeeee"] {
            write(&mut log, word);
        }
        let second = numbered(log.path(), 2);
        let first = numbered(log.path(), 1);
        assert_eq!(lines(&second), pairs(&[(1, "aaaaaaaa"), (2, "bbbbbbbb")]));
        assert_eq!(lines(&first), pairs(&[(1, "cccccccc"), (2, "dddddddd")]));
        assert_eq!(lines(log.path()), pairs(&[(1, "eeeeeeee")]));
    }

    #[test]
    fn the_oldest_files_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_size: 1,
            max_total: 100,
            ..ROOMY
        };
        let mut log = open(&dir, limits);
        for word in ["a", "b", "c", "d", "e"] {
            write(&mut log, word);
        }
        let left: Vec<u32> = {
            let mut left: Vec<u32> = rotated(log.path())
                .unwrap()
                .into_iter()
                .map(|(number, _)| number)
                .collect();
            left.sort_unstable();
            left
        };
        assert_eq!(left, [1, 2]);
        assert_eq!(lines(&numbered(log.path(), 1)), pairs(&[(1, "d")]));
    }

    #[test]
    fn a_rotation_that_fails_stops_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_size: 1,
            ..ROOMY
        };
        let mut log = open(&dir, limits);
        write(&mut log, "a");
        // A folder that is not empty is in the way.
        fs::create_dir_all(numbered(log.path(), 1).join("x")).unwrap();
        write(&mut log, "b");
        assert!(matches!(
            log.take_trouble(),
            Some(LogError::Io {
                operation: "rotate",
                ..
            })
        ));
        assert_eq!(lines(log.path()), pairs(&[(1, "a"), (2, "b")]));
    }

    #[test]
    fn a_line_that_cannot_be_written_leaves_no_gap() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        let long = "x".repeat(LINE_BYTES);
        let error = log.append(|_| json!(long)).unwrap_err();
        assert!(matches!(error, LogError::TooLong { .. }), "{error}");
        write(&mut log, "b");
        assert_eq!(lines(log.path()), pairs(&[(1, "a"), (2, "b")]));
    }

    #[test]
    fn a_full_disk_is_an_error_and_heals() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        // /dev/full refuses every write as a full disk does.
        let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let real = std::mem::replace(&mut log.open.file, full);
        let error = log.append(|_| json!({})).unwrap_err();
        assert!(
            matches!(
                error,
                LogError::Io {
                    operation: "write",
                    ..
                }
            ),
            "{error}"
        );
        log.open.file = real;
        write(&mut log, "b");
        assert_eq!(lines(log.path()), pairs(&[(1, "a"), (2, "b")]));
    }

    #[test]
    fn half_a_line_that_cannot_be_taken_back_is_ended_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(&dir, ROOMY);
        write(&mut log, "a");
        // A full pipe takes half a line as a full disk may, and cannot be cut.
        let (_reader, writer) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&pipe, nonblocking).unwrap();
        let real = std::mem::replace(&mut log.open.file, pipe);
        let long = "x".repeat(100_000);
        let error = log.append(|_| json!(long)).unwrap_err();
        assert!(matches!(error, LogError::Short { .. }), "{error}");
        log.open.file = real;
        write(&mut log, "b");
        assert_eq!(log.take_torn(), 1);
        assert_eq!(lines(log.path()), pairs(&[(1, "a"), (2, "b")]));
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("elsewhere");
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("violations.jsonl")).unwrap();
        let error = Log::open(dir.path(), LogName::Violations, ROOMY).unwrap_err();
        assert!(
            matches!(
                error,
                LogError::Io {
                    operation: "open",
                    ..
                }
            ),
            "{error}"
        );
    }
}
