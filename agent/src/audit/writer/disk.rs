//! The files of a log on the disk: rotated ones, and how a file ends.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use serde_json::Value;

/// First piece read from the end of a file in search of the last number; doubled until one is
/// found.
pub(super) const TAIL_BYTES: u64 = 64 << 10;

/// Bytes of the log at `path`, rotated files included; 0 where that cannot be told.
pub(super) fn bytes_of(path: &Path) -> u64 {
    let current = fs::metadata(path).map_or(0, |meta| meta.len());
    let rotated = rotated(path).unwrap_or_default();
    rotated
        .iter()
        .fold(current, |sum, (_, meta)| sum.saturating_add(meta.len()))
}

pub(super) fn identity(meta: &fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// `PATH.NUMBER`.
pub fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// The rotated files beside `path`, in no order.
pub fn rotated(path: &Path) -> io::Result<Vec<(u32, fs::Metadata)>> {
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
pub(super) fn last_sequence(file: &mut File, size: u64, numbered: bool) -> io::Result<(u64, bool)> {
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
