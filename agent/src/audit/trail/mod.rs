//! `audit.jsonl` as a trail that cannot be bent unnoticed.
//!
//! | module       | promises |
//! |--------------|----------|
//! | `chain`      | each record holds the hash of the one before; pure |
//! | `checkpoint` | the host's signed word for all before it; pure |
//! | `event`      | what the trail says of itself; pure |
//! | `head`       | where the chain is, outside the log |
//! | `keys`       | who signs |
//! | `verify`     | names the first bad record; pure |
//! | `check`      | the same for files, on the host or on a copy |
//!
//! What is not promised: who is root while the daemon runs can stop it, put log, head and key back
//! to what they were together, and start it again. A checkpoint, or the head, that somebody else
//! has seen (a log server, the journal, a sheet of paper) shows that; see `remit log verify --head`.

pub mod chain;
pub mod check;
pub mod checkpoint;
mod ending;
pub mod event;
pub mod head;
pub mod keys;
#[cfg(test)]
mod tests;
pub mod verify;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

use self::{
    chain::{Link, Position},
    checkpoint::Checkpoint,
    ending::{Ending, Opening, ending_of, fragments, judge, last_record},
    event::{Resumed, TrailEvent, Why},
    head::Head,
    keys::{KeyError, PublicKey, Signer},
};
use super::{
    ocsf::{Host, LogName},
    writer::{Limits, Log, LogError},
};
use crate::policy::tables::UnixMillis;

/// Records between two checkpoints.
const CHECKPOINT_RECORDS: u64 = 256;
/// Longest time that a record waits for its checkpoint.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(900);
/// How often old files are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3_600);

/// Where the trail's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Folder of the logs.
    pub log: PathBuf,
    /// Folder of what outlives a restart.
    pub state: PathBuf,
    /// The operator's signing key; none for one of our own in the state directory.
    pub key: Option<PathBuf>,
}

/// Why the trail cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TrailError {
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The audit log with its chain. This process alone writes it.
#[derive(Debug)]
pub struct Trail {
    log: Log,
    host: Host,
    authority: String,
    signer: Signer,
    key_path: PathBuf,
    head_path: PathBuf,
    head: Head,
    /// The head on the disk is older than this one.
    head_stale: bool,
    /// Records since the last checkpoint.
    unsigned: u64,
    /// The registry state of the last event that named one; 0 before.
    revision: u64,
    /// What could not be said yet.
    opening: Option<Opening>,
    signed_at: Instant,
    pruned_at: Option<Instant>,
    trouble: Option<String>,
    /// What is wrong until the daemon starts anew.
    lasting: Option<String>,
    /// What was written, for those who want it in another form.
    written: Option<Vec<Vec<u8>>>,
}

/// Before the first record.
const NOTHING: Position = Position {
    record: 0,
    hash: chain::Hash::ZERO,
    type_uid: 0,
};

// === impl Places ===

impl Places {
    /// The file with the signing key.
    pub fn key(&self) -> PathBuf {
        self.key
            .clone()
            .unwrap_or_else(|| self.state.join("keys/audit.key"))
    }

    /// The head.
    pub fn head(&self) -> PathBuf {
        head::path(&self.state)
    }

    /// The log's current file.
    pub fn file(&self) -> PathBuf {
        self.log.join(LogName::Audit.file())
    }
}

// === impl Trail ===

impl Trail {
    /// Takes up the trail where it was left, or begins one. What is not as it was left is written
    /// down as such, and goes on all the same. `now` is the wall clock.
    pub fn open(
        places: &Places,
        limits: Limits,
        host: &Host,
        now: UnixMillis,
    ) -> Result<Self, TrailError> {
        let key = places.key();
        let (signer, lasting) = match &places.key {
            // What the operator named must be there: a key of ours in its place would be a lie.
            Some(path) => (Signer::open(path)?, None),
            None => match Signer::open_or_create(&key) {
                Ok((signer, _)) => (signer, None),
                // Enforcement does not wait for evidence: a key that nobody keeps signs instead.
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    let why = format!("a key for this run alone signs: {error:#}");
                    (Signer::random()?, Some(why))
                }
            },
        };
        let mut log = Log::open(&places.log, LogName::Audit, limits)?;
        let (head, trouble) = match Head::read(&places.head()) {
            Ok(head) => (head, None),
            Err(error) => (None, Some(error)),
        };
        let ending = ending_of(log.path()).map_err(|source| LogError::Io {
            operation: "read",
            path: log.path().to_owned(),
            source,
        })?;
        let boot = host.boot_id.clone().unwrap_or_default();
        let (start, mut why) = judge(head.as_ref().map(|(head, _)| head), &ending, &boot);
        if trouble.is_some() {
            why = Some(Why::HeadUntrusted);
        }
        let fragments: Vec<_> = fragments(&mut log);
        if why.is_none() && !fragments.is_empty() {
            why = Some(Why::Fragment);
        }
        let old_key = head.as_ref().map(|(_, key)| *key);
        let found = match &ending {
            Ending::Record(record) => Some(record.position.record),
            Ending::Nothing | Ending::Altered => None,
        };
        let resumed = why.map(|why| Resumed {
            why,
            head: head.as_ref().map(|(head, _)| head.last.record),
            found,
            fragments,
        });
        let checkpoint = match (&head, &start) {
            (Some((head, _)), _) => head.checkpoint,
            // No number is given twice: there are fewer checkpoints than records.
            (None, Some((_, position))) => position.record,
            (None, None) => 0,
        };
        let (chain, last) = match start {
            Some(start) => start,
            None => (chain::hex(&keys::random::<16>()?), NOTHING),
        };
        let head = Head {
            chain,
            last,
            next: None,
            synced: head.map_or(0, |(head, _)| head.synced),
            checkpoint,
            boot,
        };
        let mut trail = Self {
            authority: format!("{}/remit", host.label()),
            host: host.clone(),
            log,
            key_path: key,
            head_path: places.head(),
            head_stale: true,
            unsigned: last.record.min(1),
            revision: 0,
            head,
            signer,
            signed_at: Instant::now(),
            pruned_at: None,
            trouble: trouble.map(|error| error.to_string()),
            lasting,
            written: None,
            opening: None,
        };
        // A full disk must not keep the daemon from starting: it is said before the next record.
        let opening = Opening { resumed, old_key };
        let taken = trail.take_up(now, &opening);
        if taken.is_err() {
            trail.opening = Some(opening);
        }
        trail.note(taken);
        Ok(trail)
    }

    /// What the trail says when it is taken up.
    fn take_up(&mut self, now: UnixMillis, opening: &Opening) -> Result<(), LogError> {
        let key = self.signer.public();
        if self.head.last.record == 0 {
            self.say(now, &TrailEvent::Begun { key })?;
        }
        if let Some(resumed) = &opening.resumed {
            self.say(now, &TrailEvent::Resumed(resumed.clone()))?;
        }
        if let Some(from) = opening.old_key.filter(|old| *old != key) {
            self.say(now, &TrailEvent::KeyChanged { from, to: key })?;
        }
        Ok(())
    }

    /// Appends one event. `build` gets the line's number and returns the value that carries it;
    /// the chain is added. Returns the bytes of the line. After an error the number is still free.
    /// `now` is the wall clock.
    pub fn append(
        &mut self,
        now: UnixMillis,
        build: impl FnOnce(u64) -> Value,
    ) -> Result<usize, LogError> {
        if self.log.is_full() {
            // A file that grows too long is better than a line that is not there.
            let rotated = self.rotate(now);
            self.note(rotated);
        }
        self.mend(now)?;
        let mut revision = None;
        let bytes = self.put(|sequence| {
            let event = build(sequence);
            revision = event["unmapped"]["revision"].as_u64();
            match event {
                Value::Object(event) => event,
                other => [("unmapped".to_owned(), other)].into_iter().collect(),
            }
        })?;
        self.revision = revision.unwrap_or(self.revision);
        if self.unsigned >= CHECKPOINT_RECORDS {
            let signed = self.checkpoint(now);
            self.note(signed);
        }
        Ok(bytes)
    }

    /// Signs the trail as it is, unless nothing was written since. `now` is the wall clock.
    pub fn checkpoint(&mut self, now: UnixMillis) -> Result<(), LogError> {
        self.signed_at = Instant::now();
        if self.unsigned == 0 {
            return Ok(());
        }
        let head = &self.head;
        let number = head.checkpoint + 1;
        let checkpoint = Checkpoint::sign(&self.signer, &head.chain, number, head.last, now);
        let (record, hash) = (checkpoint.record, checkpoint.hash);
        self.say(now, &TrailEvent::Checkpoint(checkpoint))?;
        self.unsigned = 0;
        self.head.checkpoint = number;
        self.write_head(false);
        // The journal is a witness that whoever bends the trail has to bend as well.
        tracing::info!(message = "Audit trail checkpoint.", number, record, %hash);
        Ok(())
    }

    /// Once a second: hands what was written to the disk, signs what waited too long, removes old
    /// files. `now` is the wall clock.
    pub fn tick(&mut self, now: UnixMillis) {
        if self.unsigned > 0 && self.signed_at.elapsed() >= CHECKPOINT_EVERY {
            let signed = self.checkpoint(now);
            self.note(signed);
        }
        if self.pruned_at.is_none_or(|at| at.elapsed() >= PRUNE_EVERY) {
            let pruned = self.prune(now);
            self.note(pruned);
        }
        let synced = self.sync();
        self.note(synced);
    }

    /// Hands what was written to the disk, and lets the head say so.
    pub fn sync(&mut self) -> Result<(), LogError> {
        if self.head.synced == self.head.last.record && !self.head_stale {
            return Ok(());
        }
        self.log.sync()?;
        self.head.synced = self.head.last.record;
        self.write_head(true);
        Ok(())
    }

    /// The last words: signs, and hands all to the disk.
    pub fn close(&mut self, now: UnixMillis) -> Result<(), LogError> {
        self.checkpoint(now)?;
        self.sync()
    }

    /// Opens the file at the path anew, as after a rotation by somebody else.
    pub fn reopen(&mut self) -> Result<(), LogError> {
        self.log.reopen()
    }

    /// What failed last of all that is no line (head, rotation, checkpoint, removal), if anything
    /// has since the last call; or that the key could not be had, or is open to others, as long as
    /// that is so.
    pub fn take_trouble(&mut self) -> Option<String> {
        let exposed = || {
            Signer::is_exposed(&self.key_path).then(|| {
                let path = self.key_path.display();
                format!("others than its owner may read the key `{path}`: chmod 600")
            })
        };
        self.trouble
            .take()
            .or_else(|| self.lasting.clone())
            .or_else(exposed)
    }

    /// Keeps what is written from now on, for [`Self::take_written`].
    pub fn keep_written(&mut self) {
        self.written.get_or_insert_default();
    }

    /// The lines that were written since the last call, each with its end.
    pub fn take_written(&mut self) -> Vec<Vec<u8>> {
        self.written
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The key that signs.
    pub fn key(&self) -> PublicKey {
        self.signer.public()
    }

    /// Where the chain is; none before the first record.
    pub fn position(&self) -> Option<Position> {
        Some(self.head.last).filter(|last| last.record > 0)
    }

    /// The last record that a checkpoint covers; 0 for none.
    pub fn signed(&self) -> u64 {
        self.head.last.record.saturating_sub(self.unsigned)
    }

    fn note(&mut self, result: Result<(), LogError>) {
        if let Err(error) = result {
            self.trouble = Some(format!("{:#}", anyhow::Error::from(error)));
        }
    }

    fn say(&mut self, now: UnixMillis, event: &TrailEvent) -> Result<(), LogError> {
        let (host, revision) = (self.host.clone(), self.revision);
        self.put(|sequence| event.to_ocsf(&host, sequence, now, revision))?;
        Ok(())
    }

    /// Says what is not as it was left, before the next record hides it.
    fn mend(&mut self, now: UnixMillis) -> Result<(), LogError> {
        let untouched = self.log.is_as_left();
        if !untouched {
            self.log.reopen()?;
        }
        self.log.ready()?;
        let fragments = fragments(&mut self.log);
        if let Some(opening) = self.opening.take() {
            let opening = opening.with(fragments, self.head.last.record);
            let taken = self.take_up(now, &opening);
            if taken.is_err() {
                self.opening = Some(opening);
            }
            return taken;
        }
        let why = match (untouched, fragments.is_empty()) {
            (true, true) => return Ok(()),
            (true, false) => Why::Fragment,
            (false, _) => Why::Touched,
        };
        let last = self.head.last.record;
        let resumed = Resumed {
            why,
            head: Some(last),
            found: Some(last).filter(|_| untouched),
            fragments,
        };
        self.say(now, &TrailEvent::Resumed(resumed))
    }

    /// Writes one record: the head says what comes, the line is written, the head says that it is.
    fn put(&mut self, build: impl FnOnce(u64) -> Map<String, Value>) -> Result<usize, LogError> {
        let after = self.position();
        let link = Link {
            chain: &self.head.chain.clone(),
            authority: &self.authority,
            after,
        };
        let (head, path, signer) = (&mut self.head, &self.head_path, &self.signer);
        let mut trouble = None;
        let mut line = None;
        let keep = self.written.is_some();
        let bytes = self.log.append_line(|sequence| {
            let sealed = chain::seal(build(sequence), &link);
            head.next = Some(sealed.position);
            trouble = head.write(path, signer, false).err();
            line = keep.then(|| sealed.line.clone());
            sealed.line
        });
        if let Some(error) = trouble {
            self.trouble = Some(format!("{:#}", anyhow::Error::from(error)));
        }
        let bytes = bytes?;
        if let Some(written) = &mut self.written {
            written.extend(line);
        }
        if let Some(next) = self.head.next.take() {
            self.head.last = next;
        }
        self.unsigned += 1;
        self.write_head(false);
        Ok(bytes)
    }

    fn write_head(&mut self, sync: bool) {
        match self.head.write(&self.head_path, &self.signer, sync) {
            Ok(()) => self.head_stale = false,
            Err(error) => {
                self.head_stale = true;
                self.trouble = Some(format!("{:#}", anyhow::Error::from(error)));
            }
        }
    }

    /// Each file ends with a checkpoint, so that it can be taken away and checked.
    fn rotate(&mut self, now: UnixMillis) -> Result<(), LogError> {
        self.mend(now)?;
        self.checkpoint(now)?;
        self.log.rotate()?;
        self.prune(now)
    }

    /// Removes what is too old or too much, and says so before.
    fn prune(&mut self, now: UnixMillis) -> Result<(), LogError> {
        self.pruned_at = Some(Instant::now());
        let expired = self.log.expired()?;
        let Some(newest) = expired.last() else {
            return Ok(());
        };
        let last = last_record(newest).map_err(|source| LogError::Io {
            operation: "read",
            path: newest.clone(),
            source,
        })?;
        if let Ending::Record(record) = last {
            let name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
            let removed = TrailEvent::Removed {
                files: expired.iter().filter_map(name).collect(),
                through: record.position,
            };
            self.say(now, &removed)?;
        }
        for path in expired {
            self.log.remove(&path)?;
        }
        Ok(())
    }
}
