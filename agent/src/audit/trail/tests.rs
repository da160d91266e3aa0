//! Claims about the whole trail: written, left in every way a daemon can leave it, and bent in
//! every way we could think of.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::{
    chain::{Hash, Link, Position, seal},
    check::{copy, host},
    head::Head,
    keys::{PublicKey, Signer},
    verify::{Complete, Report},
    *,
};
use crate::audit::{Decided, Decision, files::beside, record::tests::host as machine};

const NOW: i64 = 1_795_544_570_000;

/// A trail of its own, with files of a few records each.
struct World {
    dir: tempfile::TempDir,
    places: Places,
    limits: Limits,
    boot: &'static str,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            log: dir.path().join("log"),
            state: dir.path().join("state"),
            key: None,
        };
        let limits = Limits {
            max_size: 9_000,
            max_total: 1 << 40,
            retention: Duration::from_secs(1 << 30),
        };
        Self {
            dir,
            places,
            limits,
            boot: "first",
        }
    }

    /// 20 records in several files, and a clean end.
    fn written() -> Self {
        let world = Self::new();
        let mut trail = world.open();
        for n in 0..20 {
            say(&mut trail, n);
        }
        trail.close(NOW).unwrap();
        assert!(trail.take_trouble().is_none());
        assert!(world.files().len() > 3);
        world
    }

    fn open(&self) -> Trail {
        let host = Host {
            boot_id: Some(self.boot.to_owned()),
            ..machine()
        };
        Trail::open(&self.places, self.limits, &host, NOW).unwrap()
    }

    /// The oldest first.
    fn files(&self) -> Vec<PathBuf> {
        beside(&self.places.file()).unwrap()
    }

    fn head(&self) -> Head {
        Head::read(&self.places.head()).unwrap().unwrap().0
    }

    fn check(&self) -> Report {
        host(&self.places, Vec::new()).unwrap()
    }

    fn check_copy(&self, head: Option<Hash>) -> Report {
        copy(&self.files(), head, Vec::new()).unwrap()
    }

    /// All lines of one file.
    fn lines(&self, file: usize) -> Vec<String> {
        let text = fs::read_to_string(&self.files()[file]).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn rewrite(&self, file: usize, lines: &[String]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&self.files()[file], text).unwrap();
    }

    fn edit(&self, file: usize, change: impl FnOnce(&mut Vec<String>)) {
        let mut lines = self.lines(file);
        change(&mut lines);
        self.rewrite(file, &lines);
    }

    /// Chains all lines of the current file from line `from` on anew, as one can who has no key.
    fn rechain(&self, from: usize) {
        let last = self.files().len() - 1;
        self.edit(last, |lines| {
            let before = chain::read(lines[from - 1].as_bytes()).unwrap();
            let mut after = before.position;
            for line in &mut lines[from..] {
                let event: Map<String, Value> = serde_json::from_str(line).unwrap();
                let link = Link {
                    chain: &before.chain,
                    authority: "host17/remit",
                    after: Some(after),
                };
                let sealed = seal(event, &link);
                after = sealed.position;
                *line = String::from_utf8(sealed.line)
                    .unwrap()
                    .trim_end()
                    .to_owned();
            }
        });
    }
}

fn say(trail: &mut Trail, n: u64) {
    let decided = Decided {
        time: NOW,
        what: Decision::Loaded {
            revision: n,
            agents: 3,
            warnings: Vec::new(),
            closed: 0,
        },
    };
    trail
        .append(NOW, |sequence| decided.to_ocsf(&machine(), sequence))
        .unwrap();
}

fn is_whole(report: &Report) -> bool {
    report.findings.is_empty() && matches!(report.complete, Complete::Head { .. })
}

#[test]
fn what_was_written_is_whole() {
    let world = World::written();
    let report = world.check();
    assert!(is_whole(&report), "{report:#?}");
    assert_eq!(report.first, Some(1));
    assert!(report.checkpoints >= 4, "one a file");
    assert_eq!(report.records, world.head().last.record);
    assert!(report.notes.is_empty() && report.unchained == 0);
    // Each file begins with what the one before ended with, and ends with a checkpoint.
    for file in 1..world.files().len() {
        let (before, after) = (world.lines(file - 1), world.lines(file));
        let last = chain::read(before.last().unwrap().as_bytes()).unwrap();
        let first = chain::read(after[0].as_bytes()).unwrap();
        assert_eq!(
            first.previous,
            Some((last.position.record, last.position.hash))
        );
        assert_eq!((first.sequence, last.code.as_str()), (1, "RM9102"));
    }
}

#[test]
fn a_copy_is_whole_up_to_what_vouches_for_it() {
    let world = World::written();
    let head = world.head().last;
    let report = world.check_copy(Some(head.hash));
    assert!(report.findings.is_empty());
    assert_eq!(
        report.complete,
        Complete::Hash {
            record: head.record,
            behind: 0
        }
    );
    // Without a hash: up to the last checkpoint, here the last record.
    let report = world.check_copy(None);
    assert!(report.findings.is_empty());
    assert!(
        matches!(report.complete, Complete::Checkpoint { record, behind: 0, .. } if record == head.record)
    );
    // A tail that is cut off is not noticed, nor claimed.
    let last = world.files().len() - 1;
    world.edit(last, |lines| lines.truncate(lines.len() - 1));
    let report = world.check_copy(None);
    assert!(report.findings.is_empty());
    assert!(
        matches!(report.complete, Complete::Checkpoint { record, .. } if record < head.record),
        "{report:#?}"
    );
    // A key that is named must be the one.
    let key = PublicKey::open(&world.places.key()).unwrap();
    let report = copy(&world.files(), None, vec![key]).unwrap();
    assert!(report.findings.is_empty() && report.key_pinned);
    let other = Signer::random().unwrap().public();
    let report = copy(&world.files(), None, vec![other]).unwrap();
    assert!(report.findings[0].what.contains("`--key` does not"));
}

/// A way to bend a trail: its name, how, what the check on the host says first, and whether a copy
/// shows it without a head.
type Bend = (&'static str, fn(&World), &'static str, bool);

fn last(world: &World) -> usize {
    world.files().len() - 1
}

const BENDS: &[Bend] = &[
    (
        "a field is edited",
        |w| w.edit(1, |l| l[2] = l[2].replace("\"agents\":3", "\"agents\":4")),
        "altered",
        true,
    ),
    (
        "a hash is edited",
        |w| {
            w.edit(1, |l| {
                let at = l[2].len() - 5;
                let other = if l[2].ends_with("0\"}}]}") { "1" } else { "0" };
                l[2].replace_range(at - 1..at, other);
            })
        },
        "altered",
        true,
    ),
    (
        "the time is edited",
        |w| {
            w.edit(0, |l| {
                l[1] = l[1].replace(&format!("{NOW}"), "1795544570001")
            })
        },
        "altered",
        true,
    ),
    (
        "the first record is deleted",
        |w| w.edit(0, |l| drop(l.remove(0))),
        "sequence is 2, 1 is due",
        true,
    ),
    (
        "a record in the middle is deleted",
        |w| w.edit(1, |l| drop(l.remove(3))),
        "is missing before it",
        true,
    ),
    (
        "several records are deleted",
        |w| w.edit(1, |l| drop(l.drain(2..4))),
        "are missing before it",
        true,
    ),
    (
        "the last record is deleted",
        |w| w.edit(last(w), |l| drop(l.pop())),
        "records are missing",
        false,
    ),
    (
        "the last line is cut",
        |w| {
            let path = w.files().pop().unwrap();
            let length = fs::metadata(&path).unwrap().len();
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(length - 40).unwrap();
        },
        "ends in the middle of a line",
        true,
    ),
    (
        "a line in the middle is cut",
        |w| w.edit(1, |l| l[2].truncate(200)),
        "it is no event",
        true,
    ),
    (
        "two records change places",
        |w| w.edit(1, |l| l.swap(2, 3)),
        "is missing before it",
        true,
    ),
    (
        "a record is there twice",
        |w| w.edit(1, |l| l.insert(3, l[2].clone())),
        "it is there twice",
        true,
    ),
    (
        "an older record is put in",
        |w| w.edit(1, |l| l.insert(4, l[1].clone())),
        "out of order",
        true,
    ),
    (
        "a line without a chain is put in",
        |w| {
            w.edit(1, |l| {
                l.insert(2, json!({ "metadata": { "sequence": 3 } }).to_string())
            })
        },
        "it is in no chain",
        true,
    ),
    (
        "rubbish is put in",
        |w| w.edit(1, |l| l.insert(2, "once upon a time".to_owned())),
        "it is no event",
        true,
    ),
    (
        "the current file is put back to an old copy",
        |w| w.edit(last(w), |l| l.truncate(1)),
        "records are missing",
        false,
    ),
    (
        "all files are put back to an old copy",
        |w| {
            for path in w.files().split_off(2) {
                fs::remove_file(path).unwrap();
            }
            fs::rename(&w.files()[1], w.places.file()).unwrap();
        },
        "records are missing",
        false,
    ),
    (
        "rotated files change places",
        |w| {
            let files = w.files();
            let aside = w.dir.path().join("aside");
            fs::rename(&files[0], &aside).unwrap();
            fs::rename(&files[1], &files[0]).unwrap();
            fs::rename(&aside, &files[1]).unwrap();
        },
        "records 1 to",
        true,
    ),
    (
        "a rotated file is removed",
        |w| fs::remove_file(&w.files()[1]).unwrap(),
        "are missing before it",
        true,
    ),
    (
        "the oldest file is removed",
        |w| fs::remove_file(&w.files()[0]).unwrap(),
        "no record says that they were removed",
        true,
    ),
    (
        "the current file is removed",
        |w| fs::remove_file(w.places.file()).unwrap(),
        "records are missing",
        false,
    ),
    (
        "a record is replaced with a right hash of its own",
        |w| {
            w.edit(1, |l| {
                let before = chain::read(l[1].as_bytes()).unwrap();
                let mut event: Map<String, Value> = serde_json::from_str(&l[2]).unwrap();
                event["message"] = json!("nothing happened");
                let link = Link {
                    chain: &before.chain,
                    authority: "host17/remit",
                    after: Some(before.position),
                };
                let line = String::from_utf8(seal(event, &link).line).unwrap();
                l[2] = line.trim_end().to_owned();
            })
        },
        "does not follow record",
        true,
    ),
    (
        "the tail is chained anew",
        |w| {
            let file = last(w);
            w.edit(file, |l| {
                l[1] = l[1].replace("\"agents\":3", "\"agents\":4")
            });
            w.rechain(1);
        },
        "the checkpoint is not of the record before it",
        true,
    ),
    (
        "the tail is chained anew and its checkpoint left out",
        |w| {
            let file = last(w);
            w.edit(file, |l| {
                l.pop();
                let last = l.len() - 1;
                l[last] = l[last].replace("\"agents\":3", "\"agents\":4");
            });
            let lines = w.lines(file).len();
            w.rechain(lines - 1);
        },
        "records are missing",
        false,
    ),
    (
        "records are put in at the end",
        |w| {
            let file = last(w);
            let end = w.lines(file);
            let due = format!("\"sequence\":{}", end.len() + 1);
            w.edit(file, |l| l.push(end[0].replace("\"sequence\":1", &due)));
            w.rechain(end.len());
        },
        "records were put in",
        false,
    ),
    (
        "a checkpoint is forged",
        |w| {
            let file = last(w);
            w.edit(file, |l| {
                let last = l.len() - 1;
                let mut event: Map<String, Value> = serde_json::from_str(&l[last]).unwrap();
                event["unmapped"]["checkpoint"]["time"] = json!(5);
                l[last] = Value::Object(event).to_string();
            });
            let lines = w.lines(file).len();
            w.rechain(lines - 1);
        },
        "the checkpoint's signature is wrong",
        true,
    ),
    (
        "a checkpoint is signed with another key",
        |w| {
            let file = last(w);
            w.edit(file, |l| {
                let last = l.len() - 1;
                let record = chain::read(l[last].as_bytes()).unwrap();
                let (number, hash) = record.previous.unwrap();
                let before = Position {
                    record: number,
                    hash,
                    type_uid: 0,
                };
                let signer = Signer::random().unwrap();
                let forged = Checkpoint::sign(&signer, &record.chain, 99, before, NOW);
                let mut event: Map<String, Value> = serde_json::from_str(&l[last]).unwrap();
                event["unmapped"]["checkpoint"] = forged.to_value();
                l[last] = Value::Object(event).to_string();
            });
            let lines = w.lines(file).len();
            w.rechain(lines - 1);
        },
        "signed by another key",
        true,
    ),
    (
        "the host's key is replaced",
        |w| {
            fs::remove_file(w.places.key()).unwrap();
            Signer::open_or_create(&w.places.key()).unwrap();
        },
        "this host signs with",
        false,
    ),
    (
        "the head is replaced and signed with another key",
        |w| {
            w.edit(last(w), |l| drop(l.pop()));
            let end = w.lines(last(w)).pop().unwrap();
            let head = Head {
                last: chain::read(end.as_bytes()).unwrap().position,
                ..w.head()
            };
            let signer = Signer::random().unwrap();
            head.write(&w.places.head(), &signer, false).unwrap();
        },
        "the head is signed by another key",
        false,
    ),
    (
        "the head is edited",
        |w| {
            let text = fs::read_to_string(w.places.head()).unwrap();
            let record = w.head().last.record;
            let edited = text.replace(
                &format!("\"record\":{record}"),
                &format!("\"record\":{}", record - 1),
            );
            fs::write(w.places.head(), edited).unwrap();
        },
        "its signature is wrong",
        false,
    ),
    (
        "the head is removed",
        |w| fs::remove_file(w.places.head()).unwrap(),
        "the head is missing",
        false,
    ),
    (
        "a line is written with other spaces",
        |w| w.edit(1, |l| l[2] = l[2].replacen("\",\"", "\", \"", 1)),
        "altered",
        true,
    ),
    (
        "lines are written anew by another JSON library",
        |w| {
            w.edit(1, |l| {
                let value: Value = serde_json::from_str(&l[2]).unwrap();
                l[2] = format!("{value:#}").replace('\n', "");
            })
        },
        "it is not as it was written",
        true,
    ),
    (
        "line ends are changed",
        |w| w.edit(1, |l| l[2].push('\r')),
        "it is not as it was written",
        true,
    ),
    (
        "sequences are written anew",
        |w| {
            w.edit(1, |l| {
                for line in l.iter_mut() {
                    *line = line.replace("\"sequence\":3", "\"sequence\":30");
                }
            })
        },
        "altered",
        true,
    ),
    (
        "sequences are closed over a gap, chained anew",
        |w| {
            let file = last(w);
            w.edit(file, |l| drop(l.remove(1)));
            w.rechain(1);
        },
        "sequence is 3, 2 is due",
        true,
    ),
    (
        "a number in the chain is edited",
        |w| w.edit(1, |l| l[2] = l[2].replacen(":1", ":2", 1)),
        "",
        true,
    ),
    (
        "another host's trail is put in its place",
        |w| {
            let other = World::written();
            for (from, to) in other.files().iter().zip(w.files()) {
                fs::copy(from, to).unwrap();
            }
        },
        "",
        false,
    ),
    (
        "a member is there twice",
        |w| {
            w.edit(1, |l| {
                l[2] = l[2].replacen("\"sequence\"", "\"sequence\":9,\"sequence\"", 1)
            })
        },
        "it is no event",
        true,
    ),
];

#[test]
fn every_way_to_bend_it_is_noticed_and_its_place_named() {
    const BESIDE_THE_LOG: [&str; 3] = [
        "the host's key is replaced",
        "the head is edited",
        "the head is removed",
    ];
    assert!(BENDS.len() >= 20);
    let mut wrong = Vec::new();
    for (name, bend, says, on_copies) in BENDS {
        let world = World::written();
        let whole = world.head().last;
        bend(&world);
        let report = world.check();
        let named = report.findings.first().is_some_and(|first| {
            first.what.contains(says) && first.line > 0 && !first.file.is_empty()
        });
        if !named {
            wrong.push(format!(
                "{name}: on the host: {:?}",
                report.findings.first()
            ));
        }
        // On a copy, who knows the hash sees it always, unless the log is whole up to that.
        let known = world.check_copy(Some(whole.hash));
        let behind = matches!(known.complete, Complete::Hash { behind: 1.., .. });
        let noticed = !known.findings.is_empty() || behind;
        if noticed == BESIDE_THE_LOG.contains(name) {
            wrong.push(format!("{name}: on a copy: {:?}", known.complete));
        }
        let unknown = world.check_copy(None);
        if unknown.findings.is_empty() == *on_copies {
            wrong.push(format!("{name}: without a hash: {:?}", unknown.findings));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_edit_is_one_finding_at_its_place() {
    let world = World::written();
    world.edit(1, |l| l[2] = l[2].replace("\"agents\":3", "\"agents\":4"));
    let report = world.check();
    let [finding] = report.findings.as_slice() else {
        panic!("{report:#?}")
    };
    assert_eq!(finding.file, world.files()[1].display().to_string());
    assert_eq!((finding.line, finding.sequence), (3, Some(3)));
    let before = world.lines(0).len() as u64;
    assert_eq!(finding.record, Some(before + 3));
}

#[test]
fn a_crash_between_line_and_head_is_no_alarm() {
    // Before the line was written.
    let world = World::written();
    let mut head = world.head();
    let signer = Signer::open(&world.places.key()).unwrap();
    head.next = Some(Position {
        record: head.last.record + 1,
        ..head.last
    });
    head.write(&world.places.head(), &signer, false).unwrap();
    assert!(is_whole(&world.check()));
    say(&mut world.open(), 21);
    let report = world.check();
    assert!(is_whole(&report) && report.notes.is_empty(), "{report:#?}");

    // Behind it.
    let world = World::written();
    let end: Vec<String> = world.lines(last(&world));
    let position = |line: &String| chain::read(line.as_bytes()).unwrap().position;
    let [.., before, at] = end.as_slice() else {
        panic!()
    };
    let head = Head {
        last: position(before),
        next: Some(position(at)),
        ..world.head()
    };
    head.write(&world.places.head(), &signer_of(&world), false)
        .unwrap();
    assert!(is_whole(&world.check()));
    say(&mut world.open(), 21);
    let report = world.check();
    assert!(is_whole(&report) && report.notes.is_empty(), "{report:#?}");
}

fn signer_of(world: &World) -> Signer {
    Signer::open(&world.places.key()).unwrap()
}

#[test]
fn the_very_first_record_may_crash_too() {
    let world = World::new();
    drop(world.open());
    let head = world.head();
    let nothing = Head {
        last: NOTHING,
        next: Some(head.last),
        ..head
    };
    nothing
        .write(&world.places.head(), &signer_of(&world), false)
        .unwrap();
    assert!(is_whole(&world.check()));
    drop(world.open());
    assert!(is_whole(&world.check()));
    // The line was not written.
    fs::write(world.places.file(), "").unwrap();
    nothing
        .write(&world.places.head(), &signer_of(&world), false)
        .unwrap();
    drop(world.open());
    let report = world.check();
    assert!(is_whole(&report), "{report:#?}");
}

#[test]
fn a_line_cut_short_is_accounted_for() {
    let world = World::written();
    let append = |text: &[u8]| {
        let mut file = OpenOptions::new()
            .append(true)
            .open(world.places.file())
            .unwrap();
        file.write_all(text).unwrap();
    };
    append(b"{\"metadata\":{\"sequ");
    assert!(!world.check().findings.is_empty(), "nobody vouches for it");
    say(&mut world.open(), 21);
    let report = world.check();
    assert!(is_whole(&report), "{report:#?}");
    assert!(report.notes[0].contains("cut short"));
    // Another one like it is not.
    append(b"{\"metadata\":{\"sequ\n");
    assert!(!is_whole(&world.check()));
}

#[test]
fn what_a_power_failure_takes_is_told_and_no_more_is_forgiven() {
    let lose = |records: usize, reboot: bool, synced_back: u64| {
        let mut world = World::written();
        let mut head = world.head();
        head.synced = head.last.record - synced_back;
        head.write(&world.places.head(), &signer_of(&world), false)
            .unwrap();
        world.edit(last(&world), |l| l.truncate(l.len() - records));
        if reboot {
            world.boot = "second";
        }
        let mut trail = world.open();
        say(&mut trail, 21);
        trail.close(NOW).unwrap();
        world.check()
    };
    let report = lose(1, true, 1);
    assert!(is_whole(&report), "{report:#?}");
    assert!(report.notes[0].contains("the machine stopped"));
    for (records, reboot, synced_back) in [(1, false, 1), (2, true, 1), (1, true, 0)] {
        let report = lose(records, reboot, synced_back);
        assert!(report.findings[0].what.contains("missing"), "{report:#?}");
    }
}

#[test]
fn a_trail_that_was_bent_while_nobody_wrote_stays_bent() {
    type Stop = (fn(&World), Why);
    let stops: [Stop; 5] = [
        (
            |w| fs::remove_file(w.places.head()).unwrap(),
            Why::HeadMissing,
        ),
        (
            |w| fs::write(w.places.head(), "{}").unwrap(),
            Why::HeadUntrusted,
        ),
        (|w| w.edit(last(w), |l| drop(l.pop())), Why::Behind),
        (
            |w| {
                w.edit(last(w), |l| {
                    *l.last_mut().unwrap() = l.last().unwrap().replace("host17", "host18")
                })
            },
            Why::Differs,
        ),
        (
            |w| {
                let end = w.lines(last(w));
                w.edit(last(w), |l| l.push(end[0].clone()));
                w.rechain(end.len());
            },
            Why::Ahead,
        ),
    ];
    for (bend, why) in stops {
        let world = World::written();
        bend(&world);
        let mut trail = world.open();
        say(&mut trail, 21);
        trail.close(NOW).unwrap();
        let report = world.check();
        let told = report
            .findings
            .iter()
            .any(|finding| finding.what.contains(why.text()));
        assert!(told, "{why:?}: {report:#?}");
    }
}

#[test]
fn a_log_that_is_touched_while_it_is_open_says_so() {
    let world = World::new();
    let mut trail = world.open();
    say(&mut trail, 1);
    let mut file = OpenOptions::new()
        .append(true)
        .open(world.places.file())
        .unwrap();
    file.write_all(b"{}\n").unwrap();
    say(&mut trail, 2);
    let report = world.check();
    let touched = Why::Touched.text();
    assert!(report.findings.iter().any(|f| f.what.contains(touched)));
    // And goes on.
    say(&mut trail, 3);
    assert_eq!(world.check().findings.len(), report.findings.len());
}

#[test]
fn an_old_log_begins_its_chain_where_it_is() {
    let world = World::new();
    let mut log = Log::open(&world.places.log, LogName::Audit, world.limits).unwrap();
    for _ in 0..3 {
        log.append(|sequence| json!({ "metadata": { "sequence": sequence } }))
            .unwrap();
    }
    drop(log);
    say(&mut world.open(), 1);
    let report = world.check();
    assert!(is_whole(&report), "{report:#?}");
    assert_eq!((report.unchained, report.first), (3, Some(1)));
    // Sequences go on.
    assert!(world.lines(0)[3].contains("\"sequence\":4"));
    assert!(world.lines(0)[3].contains("RM9101"));
}

#[test]
fn files_that_retention_removes_are_accounted_for() {
    let mut world = World::new();
    world.limits.max_total = 30_000;
    let mut trail = world.open();
    for n in 0..60 {
        say(&mut trail, n);
    }
    trail.close(NOW).unwrap();
    assert!(trail.take_trouble().is_none());
    let report = world.check();
    assert!(is_whole(&report), "{report:#?}");
    assert!(report.first.unwrap() > 1);
    assert!(report.notes[0].contains("removed by retention"));
    let bytes: u64 = world
        .files()
        .iter()
        .map(|file| fs::metadata(file).unwrap().len())
        .sum();
    assert!(bytes < 45_000);
    // More than that is not.
    fs::remove_file(&world.files()[0]).unwrap();
    assert!(!is_whole(&world.check()));
}

#[test]
fn rotation_by_somebody_else_keeps_the_chain() {
    let world = World::new();
    let mut trail = world.open();
    say(&mut trail, 1);
    let moved = |name: &str| world.places.log.join(name);
    fs::rename(world.places.file(), moved("audit.jsonl-20261124")).unwrap();
    say(&mut trail, 2);
    drop(trail);
    fs::rename(world.places.file(), moved("audit.jsonl-20261125")).unwrap();
    // A restart finds the end in the file that was moved.
    say(&mut world.open(), 3);
    let report = world.check();
    assert!(is_whole(&report) && report.notes.is_empty(), "{report:#?}");
    assert_eq!(world.files().len(), 3);
}

#[test]
fn another_key_is_told_and_must_be_named() {
    let world = World::written();
    let old = PublicKey::open(&world.places.key()).unwrap();
    fs::remove_file(world.places.key()).unwrap();
    let mut trail = world.open();
    say(&mut trail, 21);
    trail.close(NOW).unwrap();
    assert_ne!(trail.key(), old);
    let report = world.check();
    assert!(report.findings[0].what.contains("another key signs"));
    let report = host(&world.places, vec![old, trail.key()]).unwrap();
    assert!(is_whole(&report), "{report:#?}");
}

#[test]
fn a_key_of_the_operator_must_be_there() {
    let mut world = World::new();
    let path = world.dir.path().join("hsm.key");
    world.places.key = Some(path.clone());
    let open = |world: &World| Trail::open(&world.places, world.limits, &machine(), NOW);
    assert!(matches!(open(&world), Err(TrailError::Key(_))));
    Signer::open_or_create(&path).unwrap();
    open(&world).unwrap();
    assert!(is_whole(&world.check()));
    assert!(!world.places.state.join("keys").exists());
}

#[test]
fn a_key_that_others_may_read_is_told() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    let mut trail = world.open();
    assert_eq!(trail.take_trouble(), None);
    fs::set_permissions(world.places.key(), fs::Permissions::from_mode(0o644)).unwrap();
    for _ in 0..2 {
        assert!(trail.take_trouble().unwrap().contains("chmod 600"));
    }
}

#[test]
fn a_key_that_cannot_be_had_stops_no_record_and_is_told() {
    let world = World::new();
    fs::create_dir_all(world.places.key().join("x")).unwrap();
    let mut trail = world.open();
    say(&mut trail, 1);
    for _ in 0..2 {
        assert!(trail.take_trouble().unwrap().contains("for this run alone"));
    }
    trail.close(NOW).unwrap();
    assert!(is_whole(&world.check()));
    // The next run has another, which is told too.
    drop(world.open());
    assert!(!is_whole(&world.check()));
}

#[test]
fn a_full_state_directory_stops_no_record() {
    let world = World::written();
    let mut trail = world.open();
    // Nothing can be put where a folder is.
    fs::remove_file(world.places.head()).unwrap();
    fs::create_dir_all(world.places.head().join("x")).unwrap();
    say(&mut trail, 21);
    assert!(trail.take_trouble().unwrap().contains("head"));
    fs::remove_dir_all(world.places.head()).unwrap();
    say(&mut trail, 22);
    assert!(is_whole(&world.check()));
}

#[test]
fn a_line_that_is_not_written_leaves_no_gap() {
    let world = World::new();
    let mut trail = world.open();
    let long = "x".repeat(300 << 10);
    trail
        .append(NOW, |_| json!({ "message": long }))
        .unwrap_err();
    assert!(is_whole(&world.check()));
    say(&mut trail, 1);
    assert!(is_whole(&world.check()));
}

/// A long chain holds to its last record. What checking it costs is printed and not judged:
/// `RECORDS=1000000 cargo test --release -p remit --lib -- --nocapture a_long_chain`.
#[test]
fn a_long_chain_is_checked_to_its_end() {
    let mut world = World::new();
    world.limits.max_size = 256 << 20;
    let records: u64 = std::env::var("RECORDS").map_or(10_000, |text| text.parse().unwrap());
    let mut after: Option<Position> = None;
    let event = {
        let mut trail = world.open();
        say(&mut trail, 1);
        drop(trail);
        let line = world.lines(0).pop().unwrap();
        serde_json::from_str::<Map<String, Value>>(&line).unwrap()
    };
    let path = world.dir.path().join("big.jsonl");
    let mut file = io::BufWriter::new(File::create(&path).unwrap());
    let mut bytes = 0;
    for n in 1..=records {
        let mut event = event.clone();
        event["metadata"]["sequence"] = json!(n);
        let link = Link {
            chain: "c0ffee",
            authority: "host17/remit",
            after,
        };
        let sealed = seal(event, &link);
        after = Some(sealed.position);
        bytes += sealed.line.len();
        file.write_all(&sealed.line).unwrap();
    }
    file.flush().unwrap();
    let begun = Instant::now();
    let report = copy(&[path], after.map(|after| after.hash), Vec::new()).unwrap();
    let took = begun.elapsed();
    assert_eq!(report.records, records);
    assert_eq!(report.findings.len(), 1, "it begins no chain: {report:#?}");
    let rate = records as f64 / took.as_secs_f64();
    println!(
        "{records} records, {} MiB, in {:.2} s: {rate:.0} records a second, 10,000,000 in {:.0} s",
        bytes >> 20,
        took.as_secs_f64(),
        1e7 / rate
    );
}
