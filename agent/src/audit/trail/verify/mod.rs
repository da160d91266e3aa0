//! Lines in, findings out: what of a trail is not as it was written. Pure.
//!
//! Lines come in the order of their files. After each finding the check goes on behind it, so that
//! one edit is one finding.

mod end;
mod special;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use self::special::Special;
use super::{
    chain::{self, Flaw, Hash, Position, Record},
    checkpoint::Checkpoint,
    event::{Resumed, Why},
    head::Head,
    keys::PublicKey,
};
use crate::{audit::ocsf::Code, policy::tables::UnixMillis};

/// Findings kept; more are counted.
const FINDINGS: usize = 100;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// In which file.
    pub file: String,
    /// In which line, from 1.
    pub line: u64,
    /// Which record, as far as that can be told.
    pub record: Option<u64>,
    /// `metadata.sequence` of that line.
    pub sequence: Option<u64>,
    /// What is wrong.
    pub what: String,
}

/// How far a trail is known to be complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "complete_to")]
pub enum Complete {
    /// There is no record.
    Nothing,
    /// To the head in the state directory.
    Head {
        /// Its record.
        record: u64,
    },
    /// To the hash that the caller knows.
    Hash {
        /// Its record.
        record: u64,
        /// Records behind it.
        behind: u64,
    },
    /// To the last checkpoint; whether more followed than is here cannot be told.
    Checkpoint {
        /// Its number.
        number: u64,
        /// Its record.
        record: u64,
        /// When it was signed.
        time: UnixMillis,
        /// Records behind it.
        behind: u64,
    },
    /// Records follow each other, and nothing vouches for their end.
    Unsigned {
        /// The last one.
        record: u64,
    },
}

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Lines in the chain.
    pub records: u64,
    /// Lines from before the chain began: nothing is known of them.
    pub unchained: u64,
    /// Checkpoints whose signature is right.
    pub checkpoints: u64,
    /// Number of the first record.
    pub first: Option<u64>,
    /// Hash of the last record.
    pub head: Option<String>,
    /// The key that signs at the end.
    pub key: Option<String>,
    /// Whether the caller named that key.
    pub key_pinned: bool,
    /// How far it is complete.
    #[serde(flatten)]
    pub complete: Complete,
    /// What is wrong, in the order of the lines; the first of all is the first.
    pub findings: Vec<Finding>,
    /// How much is wrong, also what is not listed.
    pub findings_total: u64,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
}

/// What the end of a trail is compared with.
#[derive(Clone, Debug)]
pub enum Anchor {
    /// Nothing: the files come from elsewhere.
    None,
    /// A hash that the caller knows.
    Hash(Hash),
    /// The head, read before the lines and after them: the daemon may have written meanwhile.
    Host {
        /// Before.
        before: Box<Seen>,
        /// After.
        after: Box<Seen>,
        /// The key that signs on this host, if it can be read.
        key: Option<PublicKey>,
    },
}

/// What was seen of the head.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there are two at most, each in a box of its own"
)]
pub enum Seen {
    /// It is not there.
    Missing,
    /// It cannot be read or trusted.
    Untrusted(String),
    /// It is there, signed by this key.
    Head(Head, PublicKey),
}

/// The check under way.
#[derive(Debug)]
pub struct Verifier {
    pinned: Vec<PublicKey>,
    anchor: Anchor,
    file: usize,
    files: Vec<String>,
    line: u64,
    sequence: u64,
    chain: Option<String>,
    last: Option<Position>,
    key: Option<PublicKey>,
    checkpoint: Option<(u64, u64, UnixMillis)>,
    /// What the first record hangs on, if it is not the chain's first.
    start: Option<(Place, u64, Hash)>,
    /// Lines that are no events, until a record accounts for them.
    rubbish: Vec<(Place, Hash, String)>,
    /// The record of the hash that the caller knows.
    anchored: Option<u64>,
    /// The head's record has been passed, with its hash.
    passed: bool,
    /// In the midst of records that are out of order.
    behind: bool,
    /// By file, line and the order in which they were found.
    found: BTreeMap<(usize, u64, usize), Finding>,
    report: Report,
}

/// File, line, and the sequence that the line states.
type Place = (usize, u64, Option<u64>);

// === impl Verifier ===

impl Verifier {
    /// A check against `anchor`. Signatures must be of one of the `pinned` keys; with none, of the
    /// key that the trail itself names.
    pub fn new(pinned: Vec<PublicKey>, anchor: Anchor) -> Self {
        Self {
            pinned,
            anchor,
            file: 0,
            files: Vec::new(),
            line: 0,
            sequence: 0,
            chain: None,
            last: None,
            key: None,
            checkpoint: None,
            start: None,
            rubbish: Vec::new(),
            anchored: None,
            passed: false,
            behind: false,
            found: BTreeMap::new(),
            report: Report {
                records: 0,
                unchained: 0,
                checkpoints: 0,
                first: None,
                head: None,
                key: None,
                key_pinned: false,
                complete: Complete::Nothing,
                findings: Vec::new(),
                findings_total: 0,
                notes: Vec::new(),
            },
        }
    }

    /// The next file begins.
    pub fn begin(&mut self, file: &str) {
        self.files.push(file.to_owned());
        self.file = self.files.len() - 1;
        self.line = 0;
        self.sequence = 0;
    }

    /// The head as it is after all lines.
    pub fn head_after(&mut self, seen: Seen) {
        if let Anchor::Host { after, .. } = &mut self.anchor {
            **after = seen;
        }
    }

    /// The next line, without its end.
    pub fn line(&mut self, line: &[u8]) {
        self.read(line, chain::read(line));
    }

    /// The next line, without its end, and what reading it came to: see [`chain::read`].
    pub fn read(&mut self, line: &[u8], read: Result<Record, Flaw>) {
        self.line += 1;
        match read {
            Ok(record) => self.record(&record, line),
            Err(flaw) => self.flaw(flaw, line),
        }
    }

    /// The file ends with a piece of a line.
    pub fn torn(&mut self, piece: &[u8]) {
        self.line += 1;
        let place = (self.file, self.line, None);
        let what = "the file ends in the middle of a line".to_owned();
        self.rubbish.push((place, chain::hash(piece), what));
    }

    /// A line longer than any that is written.
    pub fn overlong(&mut self) {
        self.line += 1;
        self.finding(None, None, "it is longer than any line that is written");
    }

    /// What it all came to.
    pub fn finish(mut self) -> Report {
        if let Some((place, record, _)) = self.start.take() {
            let what = format!(
                "records 1 to {record} are not here, and no record says that they were removed"
            );
            self.finding_at(place, Some(record + 1), what);
        }
        let anchor = std::mem::replace(&mut self.anchor, Anchor::None);
        let torn_by_crash = match &anchor {
            // The daemon died in the middle of a line, and no other has come since.
            Anchor::Host { after, .. } => {
                matches!(&**after, Seen::Head(head, _) if head.next.is_some())
            }
            Anchor::None | Anchor::Hash(_) => false,
        };
        let end = (self.file, self.line);
        for (place, _, what) in std::mem::take(&mut self.rubbish) {
            if torn_by_crash && (place.0, place.1) == end {
                let note = "the last line was cut short when the daemon ended";
                self.report.notes.push(note.to_owned());
            } else {
                self.finding_at(place, None, what);
            }
        }
        self.report.complete = self.complete(&anchor);
        self.report.head = self.last.map(|last| last.hash.to_string());
        self.report.key = self.key.map(|key| key.to_string());
        self.report.key_pinned = self.key.is_some_and(|key| self.pinned.contains(&key));
        let found = std::mem::take(&mut self.found);
        self.report.findings = found.into_values().take(FINDINGS).collect();
        self.report
    }

    fn record(&mut self, record: &Record, line: &[u8]) {
        self.report.records += 1;
        self.report.first.get_or_insert(record.position.record);
        let special = self.special(record, line);
        let sound = self.follows(record, special.as_ref());
        let due = self.sequence + 1;
        if sound && record.sequence != due {
            let what = format!("its sequence is {}, {due} is due", record.sequence);
            self.finding(Some(record), None, &what);
        }
        self.sequence = record.sequence;
        self.anchor(record);
        match special {
            Some(Special::Begun(key)) => self.sign_with(record, key),
            Some(Special::Checkpoint(checkpoint)) => self.checkpoint(record, &checkpoint),
            Some(Special::Removed(number, hash)) => {
                let explains = self
                    .start
                    .as_ref()
                    .is_some_and(|(_, first, named)| (*first, *named) == (number, hash));
                if explains {
                    self.start = None;
                    let note = format!("records 1 to {number} were removed by retention");
                    self.report.notes.push(note);
                }
            }
            Some(Special::Resumed(resumed)) => self.resumed(record, &resumed),
            Some(Special::KeyChanged(from, to)) => {
                if self.key.is_some_and(|key| key != from) {
                    let what = "it says that a key signed before which did not";
                    self.finding(Some(record), None, what);
                }
                if self.pinned.contains(&to) {
                    let note = format!(
                        "another key signs from record {} on",
                        record.position.record
                    );
                    self.report.notes.push(note);
                } else {
                    let what = format!(
                        "another key signs from here on: {to}; name it with `--key` if it is yours"
                    );
                    self.finding(Some(record), None, &what);
                }
                self.key = Some(to);
            }
            Some(Special::Broken) => {
                self.finding(Some(record), None, "it does not say what its code promises");
            }
            None => {}
        }
    }

    /// Whether the record follows the one before; goes on behind it in any case.
    fn follows(&mut self, record: &Record, special: Option<&Special>) -> bool {
        let position = record.position;
        if let Some(chain) = self.chain.as_ref().filter(|chain| **chain != record.chain) {
            let what = format!("it is of another chain, {}: {chain} is due", record.chain);
            self.finding(Some(record), None, &what);
            self.chain = Some(record.chain.clone());
            self.last = Some(position);
            return false;
        }
        self.chain.get_or_insert_with(|| record.chain.clone());
        let Some(last) = self.last else {
            self.last = Some(position);
            match record.previous {
                Some((before, hash)) => {
                    let place = (self.file, self.line, Some(record.sequence));
                    self.start = Some((place, before, hash));
                }
                None if !matches!(special, Some(Special::Begun(_))) => {
                    self.finding(
                        Some(record),
                        None,
                        "it is the first record and begins no chain",
                    );
                }
                None => {}
            }
            return true;
        };
        let due = last.record + 1;
        if position.record < due {
            if position == last {
                self.finding(Some(record), None, "it is there twice");
            } else if !self.behind {
                let what = format!(
                    "it stands behind record {}: lines or files are out of order, or were put in",
                    last.record
                );
                self.finding(Some(record), None, &what);
                self.behind = true;
            }
            return false;
        }
        self.behind = false;
        self.last = Some(position);
        if position.record > due {
            let missing = match position.record - due {
                1 => format!("record {due} is missing"),
                _ => format!("records {due} to {} are missing", position.record - 1),
            };
            let explained = matches!(
                special,
                Some(Special::Resumed(Resumed { why: Why::PowerLoss, found, .. }))
                    if *found == Some(last.record)
            );
            if explained {
                let note = format!("{missing}: the machine stopped before they were on the disk");
                self.report.notes.push(note);
            } else {
                self.finding(Some(record), None, &format!("{missing} before it"));
            }
            return explained;
        }
        match record.previous {
            // Of the one before it is only known that it is not as it was written.
            Some(_) if last.hash == Hash::ZERO => true,
            Some((_, hash)) if hash == last.hash => true,
            Some((_, hash)) => {
                let what = format!(
                    "it does not follow record {}: it hangs on {hash}, that record is {}; one of \
                     the two was replaced",
                    last.record, last.hash
                );
                self.finding(Some(record), None, &what);
                false
            }
            None => true,
        }
    }

    fn anchor(&mut self, record: &Record) {
        match &self.anchor {
            Anchor::None => {}
            Anchor::Hash(hash) => {
                if record.position.hash == *hash {
                    self.anchored = Some(record.position.record);
                }
            }
            Anchor::Host { before, .. } => {
                if let Seen::Head(head, _) = &**before
                    && head.last == record.position
                {
                    self.passed = true;
                }
            }
        }
    }

    fn flaw(&mut self, flaw: Flaw, line: &[u8]) {
        let begun = self.last.is_some();
        match flaw {
            Flaw::Unchained(sequence) if !begun => {
                self.report.unchained += 1;
                self.sequence = sequence.unwrap_or(self.sequence + 1);
            }
            Flaw::NoEvent(_) if !begun => self.report.unchained += 1,
            Flaw::NoEvent(why) => {
                let place = (self.file, self.line, None);
                let what = format!("it is no event: {why}");
                self.rubbish.push((place, chain::hash(line), what));
            }
            Flaw::Unchained(sequence) => {
                self.finding(
                    None,
                    sequence,
                    "it is in no chain: it was put in or rewritten",
                );
            }
            Flaw::Form(_) => {
                // What it stated of itself cannot be relied on; the record was one of the chain.
                let what = flaw.to_string();
                self.finding(None, None, &what);
                self.skip(None);
            }
            Flaw::Altered { ref stated, .. } => {
                self.report.records += 1;
                let what = flaw.to_string();
                let due = self.last.map_or(1, |last| last.record + 1);
                let place = (self.file, self.line, Some(stated.sequence));
                self.finding_at(place, Some(due), what);
                self.skip(Some(stated));
            }
        }
    }

    /// Goes on behind a record that is not as it was written: the number due and the hash that it
    /// states, if any, for the next record hangs on that.
    fn skip(&mut self, stated: Option<&Record>) {
        self.sequence += 1;
        let Some(last) = &mut self.last else { return };
        last.record += 1;
        last.hash = stated.map_or(Hash::ZERO, |stated| stated.position.hash);
    }

    fn finding(&mut self, record: Option<&Record>, sequence: Option<u64>, what: &str) {
        let sequence = record.map(|record| record.sequence).or(sequence);
        let number = record.map(|record| record.position.record);
        self.finding_at((self.file, self.line, sequence), number, what.to_owned());
    }

    fn finding_at_end(&mut self, what: String) {
        let record = self.last.map(|last| last.record);
        self.finding_at((self.file, self.line, None), record, what);
    }

    fn finding_at(&mut self, place: Place, record: Option<u64>, what: String) {
        let (file, line, sequence) = place;
        self.report.findings_total += 1;
        let finding = Finding {
            file: self.files.get(file).cloned().unwrap_or_default(),
            line,
            record,
            sequence,
            what,
        };
        self.found.insert((file, line, self.found.len()), finding);
        // The first ones are those that matter; a hostile file must not fill the memory.
        if self.found.len() > 2 * FINDINGS {
            self.found.pop_last();
        }
    }

    /// What a record of the trail itself says.
    fn special(&self, record: &Record, line: &[u8]) -> Option<Special> {
        let known = [
            Code::TrailBegun,
            Code::TrailCheckpoint,
            Code::TrailRemoved,
            Code::TrailResumed,
            Code::TrailKeyChanged,
        ];
        let code = *known.iter().find(|code| code.name() == record.code)?;
        let event: Value = serde_json::from_slice(line).unwrap_or_default();
        Some(Special::read(code, &event["unmapped"]).unwrap_or(Special::Broken))
    }
}
