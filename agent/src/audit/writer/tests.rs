//! Tests of `writer`.

use serde_json::json;

use std::os::unix::fs::MetadataExt as _;

use super::{disk::TAIL_BYTES, *};

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
