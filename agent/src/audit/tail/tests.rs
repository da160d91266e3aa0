//! Tests of the reader.

use serde_json::json;

use super::*;
use crate::audit::{Limits, Log, LogName, writer::disk::numbered};

const ROOMY: Limits = Limits {
    max_size: 1 << 30,
    max_total: 1 << 40,
    retention: Duration::from_secs(1 << 30),
};
/// Each line fills its file.
const TIGHT: Limits = Limits {
    max_size: 1,
    ..ROOMY
};

fn log(dir: &tempfile::TempDir, limits: Limits) -> Log {
    Log::open(dir.path(), LogName::Violations, limits).unwrap()
}

fn write(log: &mut Log, agent: &str, time: i64) {
    log.append(|sequence| {
        json!({
            "time": time,
            "ai_agent": { "uid": agent },
            "metadata": { "sequence": sequence },
        })
    })
    .unwrap();
}

fn tail(log: &Log, filter: Filter) -> Tail {
    Tail::open(log.path(), filter).unwrap()
}

/// All times that can be read now.
fn times(tail: &mut Tail) -> Vec<i64> {
    let mut times = Vec::new();
    loop {
        let lines = tail.read().unwrap();
        if lines.is_empty() {
            return times;
        }
        times.extend(
            lines
                .iter()
                .map(|line| line.event["time"].as_i64().unwrap()),
        );
    }
}

#[test]
fn lines_come_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    let mut tail = tail(&log, Filter::default());
    assert!(times(&mut tail).is_empty());
    write(&mut log, "a", 1);
    write(&mut log, "b", 2);
    assert_eq!(times(&mut tail), [1, 2]);
    write(&mut log, "a", 3);
    assert_eq!(times(&mut tail), [3]);
    assert!(times(&mut tail).is_empty());
}

#[test]
fn a_line_is_given_as_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    write(&mut log, "a", 1);
    let lines = tail(&log, Filter::default()).read().unwrap();
    assert_eq!(
        fs::read_to_string(log.path()).unwrap(),
        format!("{}\n", lines[0].raw)
    );
}

#[test]
fn following_goes_on_over_any_number_of_rotations() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, TIGHT);
    write(&mut log, "a", 1);
    let mut tail = tail(&log, Filter::default());
    assert_eq!(times(&mut tail), [1]);
    for time in 2..7 {
        write(&mut log, "a", time);
    }
    assert_eq!(times(&mut tail), [2, 3, 4, 5, 6]);
    write(&mut log, "a", 7);
    assert_eq!(times(&mut tail), [7]);
}

#[test]
fn a_rotation_by_somebody_else_loses_no_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    write(&mut log, "a", 1);
    let mut tail = tail(&log, Filter::default());
    assert_eq!(times(&mut tail), [1]);
    write(&mut log, "a", 2);
    fs::rename(log.path(), dir.path().join("violations.jsonl-20261124")).unwrap();
    assert_eq!(times(&mut tail), [2]);
    assert!(times(&mut tail).is_empty(), "no file is no error");
    write(&mut log, "a", 3);
    assert_eq!(times(&mut tail), [3]);
}

#[test]
fn since_reads_rotated_files_and_filters() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, TIGHT);
    for time in 1..6 {
        write(&mut log, if time == 4 { "b" } else { "a" }, time);
    }
    let all = |since| Filter {
        since: Some(since),
        agent: None,
    };
    assert_eq!(times(&mut tail(&log, all(3))), [3, 4, 5]);
    let mut followed = tail(&log, all(0));
    assert_eq!(times(&mut followed), [1, 2, 3, 4, 5]);
    write(&mut log, "a", 6);
    assert_eq!(times(&mut followed), [6]);
    let one = Filter {
        since: Some(3),
        agent: Some("a".to_owned()),
    };
    assert_eq!(times(&mut tail(&log, one)), [3, 5, 6]);
    // Files last written to before then cannot have such lines.
    let past = UNIX_EPOCH + Duration::from_secs(1);
    for number in 3..6 {
        let old = numbered(log.path(), number);
        let old = File::options().append(true).open(old).unwrap();
        old.set_modified(past).unwrap();
    }
    let tail = tail(&log, all(2_000));
    assert_eq!(tail.queue.len(), 3);
}

#[test]
fn following_goes_on_whoever_rotated_and_however_often() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    write(&mut log, "a", 1);
    let mut tail = tail(&log, Filter::default());
    assert_eq!(times(&mut tail), [1]);
    let name = log.path().file_name().unwrap().to_str().unwrap().to_owned();
    for (time, suffix) in [(2, "-20261123"), (3, ".1"), (4, "-20261124"), (5, ".old")] {
        write(&mut log, "a", time);
        fs::rename(log.path(), dir.path().join(format!("{name}{suffix}"))).unwrap();
        // A file's time is as coarse as the kernel's clock tick.
        std::thread::sleep(Duration::from_millis(15));
    }
    write(&mut log, "a", 6);
    assert_eq!(times(&mut tail), [2, 3, 4, 5, 6]);
    write(&mut log, "a", 7);
    assert_eq!(times(&mut tail), [7]);
}

#[test]
fn a_line_that_comes_late_to_a_moved_file_is_read_once() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    write(&mut log, "a", 1);
    let mut tail = tail(&log, Filter::default());
    assert_eq!(times(&mut tail), [1]);
    let moved = dir.path().join("violations.jsonl.1");
    fs::rename(log.path(), &moved).unwrap();
    write(&mut log, "a", 2);
    assert_eq!(times(&mut tail), [2]);
    // Who had looked at the path before it was moved.
    let mut late = File::options().append(true).open(&moved).unwrap();
    late.write_all(b"{\"time\":3}\n").unwrap();
    assert_eq!(times(&mut tail), [3]);
    fs::rename(log.path(), dir.path().join("violations.jsonl.2")).unwrap();
    write(&mut log, "a", 4);
    assert_eq!(times(&mut tail), [4]);
    assert!(times(&mut tail).is_empty());
}

#[test]
fn since_reads_what_logrotate_named_by_date() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log(&dir, ROOMY);
    for (time, name) in [(1, "-20261123"), (2, "-20261124"), (3, ".1"), (4, "")] {
        write(&mut log, "a", time);
        if !name.is_empty() {
            let file = log.path().file_name().unwrap().to_str().unwrap();
            fs::rename(log.path(), dir.path().join(format!("{file}{name}"))).unwrap();
        }
    }
    let filter = Filter {
        since: Some(0),
        agent: None,
    };
    assert_eq!(times(&mut tail(&log, filter)), [1, 2, 3, 4]);
}

#[test]
fn half_a_line_waits_for_its_end_and_rubbish_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("violations.jsonl");
    fs::write(&path, "{\"time\":1}\n{\"ti").unwrap();
    let mut tail = Tail::open(&path, Filter::default()).unwrap();
    assert_eq!(times(&mut tail), [1]);
    use std::io::Write as _;
    let mut file = File::options().append(true).open(&path).unwrap();
    file.write_all(b"me\":2}\n{\"cut\n\xff\n{\"time\":3}\n")
        .unwrap();
    assert_eq!(times(&mut tail), [2, 3]);
    assert_eq!((tail.take_skipped(), tail.take_skipped()), (2, 0));
}

#[test]
fn a_log_that_is_not_there_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/violations.jsonl");
    for since in [None, Some(0)] {
        let filter = Filter { since, agent: None };
        assert!(times(&mut Tail::open(&path, filter).unwrap()).is_empty());
    }
}

#[test]
fn since_takes_durations_and_times() {
    let now = 1_795_544_572_123;
    assert_eq!(since("10m", now), Ok(now - 600_000));
    assert_eq!(since("2026-11-24T18:22:52.123Z", 0), Ok(now));
    assert_eq!(since("2026-11-24T19:22:52.123+01:00", 0), Ok(now));
    assert_eq!(
        since("yesterday", now).unwrap_err().to_string(),
        "`yesterday` is neither a duration such as \"10m\" nor a time such as \
         \"2026-11-24T18:00:00Z\""
    );
}

/// A rotation moves files to names that come earlier in the list of names and have been gone by.
#[test]
fn a_rotation_while_names_are_gone_through_hides_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("violations.jsonl");
    let name = |number: u32| dir.path().join(format!("violations.jsonl.{number}"));
    for (file, text) in [(&path, "new"), (&name(1), "old"), (&name(2), "older")] {
        fs::write(file, text).unwrap();
    }
    let mut rotated = 0;
    let files = by_age_while(&path, |_| {
        // Before each of the first names, so that whatever their order is, one is moved.
        if rotated < 3 {
            for number in (1..=2 + rotated).rev() {
                fs::rename(name(number), name(number + 1)).unwrap();
            }
            fs::rename(&path, name(1)).unwrap();
            rotated += 1;
            fs::write(&path, format!("newer {rotated}")).unwrap();
        }
    })
    .unwrap();
    let mut texts: Vec<String> = files
        .iter()
        .map(|aged| io::read_to_string(&aged.file).unwrap())
        .collect();
    texts.sort();
    assert_eq!(
        texts,
        ["new", "newer 1", "newer 2", "newer 3", "old", "older"]
    );
}
