//! The files of a log: the current one and those that were rotated, by whomever, in the order in
//! which they were written, line by line in little memory.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Longest line that is taken into memory, in bytes; what is written is far shorter.
const LINE: u64 = 1 << 20;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// Why files cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read `{}`", path.display())]
pub struct FilesError {
    /// Which file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// A file as it was when it was opened; what is appended later is not read.
#[derive(Debug)]
pub struct Opened {
    /// Its name then.
    pub path: PathBuf,
    /// When it was last written to.
    pub modified: Option<SystemTime>,
    file: File,
    size: u64,
}

/// The lines of a file.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    reader: BufReader<io::Take<File>>,
    line: Vec<u8>,
}

/// A line, or what is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A line without its end.
    Line(&'a [u8]),
    /// The file ends in the middle of a line.
    Torn(&'a [u8]),
    /// A line longer than any that is written.
    Overlong,
}

/// The log at `path` and its rotated files, whoever rotated them.
pub fn beside(path: &Path) -> Result<Vec<PathBuf>, FilesError> {
    let failed = |source| FilesError {
        path: path.to_owned(),
        source,
    };
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Ok(Vec::new());
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let ours = entry.file_name().to_str().is_some_and(|other| {
            let rest = other.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
        });
        if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            files.push(entry.path());
        }
    }
    sort(&mut files);
    Ok(files)
}

/// Sorts the files of a log as they were written.
pub fn sort(files: &mut [PathBuf]) {
    files.sort_by_cached_key(|path| order(path));
}

/// Those with a date, the earliest first; those with a number, the highest first; the current one.
fn order(path: &Path) -> (u8, std::cmp::Reverse<u64>, PathBuf) {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let number = name
        .rsplit_once('.')
        .and_then(|(_, number)| number.parse::<u64>().ok());
    match number {
        Some(number) => (1, std::cmp::Reverse(number), path.to_owned()),
        None if name.ends_with(".jsonl") => (2, std::cmp::Reverse(0), path.to_owned()),
        None => (0, std::cmp::Reverse(0), path.to_owned()),
    }
}

/// Opens all of them before any is read, so that a rotation meanwhile changes nothing.
pub fn open(paths: &[PathBuf]) -> Result<Vec<Opened>, FilesError> {
    let mut files = Vec::new();
    for path in paths {
        let failed = |source| FilesError {
            path: path.clone(),
            source,
        };
        // A pipe in a log's place must not hold us up.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        files.push(Opened {
            path: path.clone(),
            modified: meta.modified().ok(),
            size: meta.len(),
            file,
        });
    }
    Ok(files)
}

// === impl Opened ===

impl Opened {
    /// Its lines from the first on.
    pub fn lines(self) -> Lines {
        Lines {
            path: self.path,
            reader: BufReader::with_capacity(CHUNK, self.file.take(self.size)),
            line: Vec::new(),
        }
    }
}

// === impl Lines ===

impl Lines {
    /// The next line; none at the end.
    #[expect(
        clippy::should_implement_trait,
        reason = "what it returns borrows from it, which an iterator's items cannot"
    )]
    pub fn next(&mut self) -> Result<Option<Piece<'_>>, FilesError> {
        self.line.clear();
        let read = (&mut self.reader)
            .take(LINE)
            .read_until(b'\n', &mut self.line);
        let read = read.and_then(|read| {
            let cut = read as u64 == LINE && self.line.last() != Some(&b'\n');
            if cut {
                skip(&mut self.reader)?;
            }
            Ok((read, cut))
        });
        let (read, cut) = read.map_err(|source| FilesError {
            path: self.path.clone(),
            source,
        })?;
        Ok(match (read, cut) {
            (0, _) => None,
            (_, true) => Some(Piece::Overlong),
            _ => Some(match self.line.strip_suffix(b"\n") {
                Some(line) => Piece::Line(line),
                None => Piece::Torn(&self.line),
            }),
        })
    }
}

/// Reads on behind the next line end.
fn skip(reader: &mut BufReader<io::Take<File>>) -> io::Result<()> {
    loop {
        let bytes = reader.fill_buf()?;
        let (found, length) = match bytes.iter().position(|&byte| byte == b'\n') {
            Some(at) => (true, at + 1),
            None => (bytes.is_empty(), bytes.len()),
        };
        reader.consume(length);
        if found {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "a.jsonl-20261123",
            "a.jsonl-20261124",
            "a.jsonl.10",
            "a.jsonl.2",
            "a.jsonl.1",
            "a.jsonl",
        ];
        for name in names.iter().rev().chain(&["a.jsonlx", "b.jsonl.1"]) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("a.jsonl.3")).unwrap();
        let found = beside(&dir.path().join("a.jsonl")).unwrap();
        let found: Vec<_> = found.iter().map(|f| f.file_name().unwrap()).collect();
        assert_eq!(found, names);
        assert!(beside(&dir.path().join("none/a.jsonl")).unwrap().is_empty());
    }

    #[test]
    fn lines_are_bounded_and_pieces_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let long = "x".repeat(3 << 20);
        fs::write(&path, format!("a\n\n{long}\nb\nc")).unwrap();
        let mut lines = open(&[path]).unwrap().remove(0).lines();
        let mut found = Vec::new();
        while let Some(piece) = lines.next().unwrap() {
            found.push(match piece {
                Piece::Line(line) => format!("line {}", String::from_utf8_lossy(line)),
                Piece::Torn(line) => format!("torn {}", String::from_utf8_lossy(line)),
                Piece::Overlong => "overlong".to_owned(),
            });
        }
        assert_eq!(found, ["line a", "line ", "overlong", "line b", "torn c"]);
    }
}
