//! What the trail says of itself. Pure.

use serde_json::{Map, Value, json};

use super::{
    chain::{Hash, Position},
    checkpoint::Checkpoint,
    keys::PublicKey,
};
use crate::{
    audit::{
        ocsf::{Class, Code, Envelope, Host, Severity, Status, put},
        text::{PATH_BYTES, clean},
    },
    policy::tables::UnixMillis,
};

/// An event of the trail itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrailEvent {
    /// A chain begins; lines before it are in none.
    Begun {
        /// The key that will sign.
        key: PublicKey,
    },
    /// The host vouches for all before.
    Checkpoint(Checkpoint),
    /// The oldest files are about to be removed, for their age or for want of room.
    Removed {
        /// Their names.
        files: Vec<String>,
        /// The last record in them.
        through: Position,
    },
    /// The trail was not as its head says, or ended in the middle of a line.
    Resumed(Resumed),
    /// Another key signs from here on.
    KeyChanged {
        /// The one before.
        from: PublicKey,
        /// The one from here on.
        to: PublicKey,
    },
}

/// How the trail was found when it was taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// What was found.
    pub why: Why,
    /// The record that the head says was the last.
    pub head: Option<u64>,
    /// The last record in the log.
    pub found: Option<u64>,
    /// Lines that were cut short, by their bytes and hashes.
    pub fragments: Vec<(usize, Hash)>,
}

/// Declares words.
macro_rules! whys {
    ($($(#[$meta:meta])* $variant:ident = $name:literal, $text:literal;)*) => {
        /// What was found.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Why { $($(#[$meta])* $variant,)* }

        impl Why {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// As in events.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// In words.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

whys! {
    /// A line was cut short: by a crash, or a full disk.
    Fragment = "fragment", "a line was cut short";
    /// Head and log differ by no more than a machine loses that stops without warning.
    PowerLoss = "power_loss", "the machine stopped without warning";
    /// There is no head.
    HeadMissing = "head_missing", "the head is missing, so records may be as well";
    /// The head is not as it was written, or another key signed it.
    HeadUntrusted = "head_untrusted", "the head cannot be trusted, so records may be missing";
    /// The log ends before its head.
    Behind = "behind", "the log ends before its head: records are missing";
    /// The log goes on behind its head.
    Ahead = "ahead", "the log has records that its head does not know";
    /// The file was longer or shorter than it was left, while the daemon had it open.
    Touched = "touched", "somebody else wrote to the log or cut it";
    /// The log's end is not what the head says.
    Differs = "differs", "the log's last record is not the one that its head says";
}

// === impl TrailEvent ===

impl TrailEvent {
    /// The event, before it is sealed. `revision` is that of the last record that had one.
    pub fn to_ocsf(
        &self,
        host: &Host,
        sequence: u64,
        time: UnixMillis,
        revision: u64,
    ) -> Map<String, Value> {
        let mut event = self.event(host, sequence, time);
        if let Some(unmapped) = event.get_mut("unmapped") {
            put(unmapped, "revision", Some(revision));
        }
        event
    }

    fn event(&self, host: &Host, sequence: u64, time: UnixMillis) -> Map<String, Value> {
        let (code, severity, activity, message, unmapped) = match self {
            Self::Begun { key } => (
                Code::TrailBegun,
                Severity::Informational,
                ENABLE,
                "Audit trail begun: each record holds the hash of the one before".to_owned(),
                json!({ "key": key.to_string() }),
            ),
            Self::Checkpoint(checkpoint) => (
                Code::TrailCheckpoint,
                Severity::Informational,
                OTHER,
                format!(
                    "Checkpoint {}: the audit trail is complete up to record {}, {}",
                    checkpoint.number, checkpoint.record, checkpoint.hash
                ),
                json!({ "checkpoint": checkpoint.to_value() }),
            ),
            Self::Removed { files, through } => (
                Code::TrailRemoved,
                Severity::Informational,
                OTHER,
                format!(
                    "Audit files removed by retention: {}, up to record {}",
                    files.len(),
                    through.record
                ),
                json!({
                    "files": files.iter().map(|f| clean(f.as_bytes(), PATH_BYTES)).collect::<Vec<_>>(),
                    "through": { "record": through.record, "hash": through.hash.to_string() },
                }),
            ),
            Self::Resumed(resumed) => return resumed.to_ocsf(host, sequence, time),
            Self::KeyChanged { from, to } => (
                Code::TrailKeyChanged,
                Severity::High,
                UPDATE,
                format!("Another key signs the audit trail from here on: {to}"),
                json!({ "from": from.to_string(), "to": to.to_string() }),
            ),
        };
        let mut event = Envelope {
            code,
            class: Class::ApplicationLifecycle,
            activity,
            severity,
            status: Status::Success,
            time,
            feature: ("trail", "audit"),
            message,
        }
        .build(host, sequence);
        let mut fields = json!({
            "app": {
                "name": "remit",
                "vendor_name": "Remit project",
                "version": env!("CARGO_PKG_VERSION"),
            },
            "actor": { "app_name": "remit", "app_uid": "daemon" },
        });
        put(&mut fields, "unmapped", Some(unmapped));
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        event
    }
}

const ENABLE: (u64, &str) = (6, "Enable");
const UPDATE: (u64, &str) = (8, "Update");
const OTHER: (u64, &str) = (99, "Other");

// === impl Resumed ===

impl Resumed {
    /// Whether it says no more than that the machine or the daemon died.
    pub const fn is_innocent(&self) -> bool {
        matches!(self.why, Why::Fragment | Why::PowerLoss)
    }

    const fn severity(&self) -> Severity {
        if self.is_innocent() {
            Severity::Low
        } else {
            Severity::High
        }
    }

    /// Detection Finding, 2004.
    fn to_ocsf(&self, host: &Host, sequence: u64, time: UnixMillis) -> Map<String, Value> {
        let mut event = Envelope {
            code: Code::TrailResumed,
            class: Class::DetectionFinding,
            activity: (1, "Create"),
            severity: self.severity(),
            status: Status::New,
            time,
            feature: ("trail", "audit"),
            message: self.message(),
        }
        .build(host, sequence);
        let kind = if self.is_innocent() {
            "damage"
        } else {
            "tampering"
        };
        let fields = json!({
            "actor": { "app_name": "remit", "app_uid": "daemon" },
            "is_alert": !self.is_innocent(),
            "action_id": 3,
            "action": "Observed",
            "disposition_id": 15,
            "disposition": "Detected",
            "finding_info": {
                "uid": format!("trail-{}-{time}", self.why.name()),
                "title": "The audit trail was not as it was left",
                "types": [kind],
                "analytic": {
                    "name": "trail",
                    "uid": Code::TrailResumed.name(),
                    "type_id": 1,
                    "type": "Rule",
                },
                "first_seen_time": time,
                "last_seen_time": time,
            },
            "unmapped": self.to_value(),
        });
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        event
    }

    /// In a sentence.
    pub fn message(&self) -> String {
        let number = |record: Option<u64>| record.map_or("none".to_owned(), |n| n.to_string());
        format!(
            "Audit trail taken up: {}; last record by the head: {}, in the log: {}, lines cut \
             short: {}",
            self.why.text(),
            number(self.head),
            number(self.found),
            self.fragments.len()
        )
    }

    fn to_value(&self) -> Value {
        let fragments: Vec<Value> = self
            .fragments
            .iter()
            .map(|(bytes, hash)| json!({ "bytes": bytes, "hash": hash.to_string() }))
            .collect();
        json!({
            "why": self.why.name(),
            "head": self.head,
            "found": self.found,
            "fragments": fragments,
        })
    }

    /// From `unmapped`.
    pub fn from_value(value: &Value) -> Option<Self> {
        let why = value["why"].as_str()?;
        let fragments = value["fragments"].as_array()?.iter().map(|fragment| {
            let bytes = usize::try_from(fragment["bytes"].as_u64()?).ok()?;
            Some((bytes, fragment["hash"].as_str()?.parse().ok()?))
        });
        Some(Self {
            why: *Why::ALL.iter().find(|known| known.name() == why)?,
            head: value["head"].as_u64(),
            found: value["found"].as_u64(),
            fragments: fragments.collect::<Option<_>>()?,
        })
    }
}
