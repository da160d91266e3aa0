//! Records of the trail about itself.

use serde_json::Value;

use super::{Checkpoint, Code, Hash, PublicKey, Record, Resumed, Verifier};

/// A record of the trail itself.
pub(super) enum Special {
    Begun(PublicKey),
    Checkpoint(Checkpoint),
    Removed(u64, Hash),
    Resumed(Resumed),
    KeyChanged(PublicKey, PublicKey),
    Broken,
}

impl Special {
    pub(super) fn read(code: Code, unmapped: &Value) -> Option<Self> {
        let key = |name: &str| PublicKey::from_hex(unmapped[name].as_str()?);
        match code {
            Code::TrailBegun => key("key").map(Self::Begun),
            Code::TrailCheckpoint => {
                Checkpoint::from_value(&unmapped["checkpoint"]).map(Self::Checkpoint)
            }
            Code::TrailRemoved => {
                let through = &unmapped["through"];
                let hash = through["hash"].as_str()?.parse().ok()?;
                Some(Self::Removed(through["record"].as_u64()?, hash))
            }
            Code::TrailResumed => Resumed::from_value(unmapped).map(Self::Resumed),
            Code::TrailKeyChanged => Some(Self::KeyChanged(key("from")?, key("to")?)),
            _ => None,
        }
    }
}

// === impl Verifier ===

impl Verifier {
    pub(super) fn sign_with(&mut self, record: &Record, key: PublicKey) {
        if !self.pinned.is_empty() && !self.pinned.contains(&key) {
            let what = format!("it names a key that `--key` does not: {key}");
            self.finding(Some(record), None, &what);
        }
        if record.position.record != 1 {
            self.finding(Some(record), None, "a chain begins in the midst of one");
        }
        self.key = Some(key);
    }

    pub(super) fn checkpoint(&mut self, record: &Record, checkpoint: &Checkpoint) {
        let known = match (self.pinned.is_empty(), self.key) {
            (false, _) => self.pinned.contains(&checkpoint.key),
            (true, Some(key)) => key == checkpoint.key,
            (true, None) => true,
        };
        let what = if !known {
            format!(
                "the checkpoint is signed by another key, {}",
                checkpoint.key
            )
        } else if !checkpoint.is_signed(&record.chain) {
            "the checkpoint's signature is wrong".to_owned()
        } else if record.previous != Some((checkpoint.record, checkpoint.hash)) {
            "the checkpoint is not of the record before it".to_owned()
        } else if self
            .checkpoint
            .is_some_and(|(number, ..)| number >= checkpoint.number)
        {
            "the checkpoint's number is not above that of the one before".to_owned()
        } else {
            self.report.checkpoints += 1;
            self.key = Some(checkpoint.key);
            self.checkpoint = Some((checkpoint.number, record.position.record, checkpoint.time));
            return;
        };
        self.finding(Some(record), None, &what);
    }

    pub(super) fn resumed(&mut self, record: &Record, resumed: &Resumed) {
        let known: Vec<Hash> = resumed.fragments.iter().map(|(_, hash)| *hash).collect();
        self.rubbish.retain(|(_, hash, _)| !known.contains(hash));
        if resumed.is_innocent() {
            let note = format!("record {}: {}", record.position.record, resumed.message());
            self.report.notes.push(note);
        } else {
            let what = resumed.message();
            self.finding(Some(record), None, &what);
        }
    }
}
