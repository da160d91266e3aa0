//! What is not as it should be: drift, damaged state files, a wall clock that went back. Detection
//! Finding, 2004.

use std::fmt::Write as _;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Actor, cleaned, span};
use crate::{
    audit::ocsf::{Class, Code, Envelope, Severity, Status, put, rfc3339},
    policy::tables::UnixMillis,
};

/// A difference between what should be in the kernel and what is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// `missing`, `extra`, `changed`, `detached`, `foreign_program`, ….
    pub kind: String,
    /// What differs: a map and its key, or a hook.
    pub what: String,
    /// The agent that it concerns.
    pub agent: Option<String>,
    /// The root that it concerns.
    pub root: Option<String>,
    /// What the kernel has.
    pub found: String,
    /// What it should have.
    pub wanted: String,
    /// What became of it.
    pub mending: Mending,
}

/// What became of a [`Difference`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mending {
    /// Nothing yet.
    NotTried,
    /// It is as it should be again.
    Mended,
    /// It stands, and why.
    Failed(String),
}

/// A [`Difference`] that was found or mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drifted {
    /// What differs.
    pub difference: Difference,
    /// When it was first seen. With it a line that says mended names the one that said found.
    pub since: UnixMillis,
    /// Hash of the agent's entry in force.
    pub hash: Option<String>,
    /// Who asked for the comparison.
    pub by: Actor,
    /// The registry state in force.
    pub revision: u64,
}

/// A file of the state directory, or a marker beside the registry, that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// The file.
    pub file: String,
    /// What is wrong with it.
    pub why: String,
    /// The agent that it was about.
    pub agent: Option<String>,
    /// What is in force in its place, such as `the agent is denied everything`.
    pub consequence: String,
    /// Where the damaged file was put.
    pub moved_to: Option<String>,
    /// The registry state in force.
    pub revision: u64,
}

/// The wall clock is behind the latest time that was ever seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockBehind {
    /// What the wall clock says.
    pub wall: UnixMillis,
    /// The latest time seen, which is taken in its place.
    pub mark: UnixMillis,
    /// The registry state in force.
    pub revision: u64,
}

// === impl Difference ===

impl Difference {
    /// What differs and what became of it: the sentence of the audit log and of `remit reconcile`.
    pub fn sentence(&self) -> String {
        let mut line = format!("Drift: {}", cleaned(&self.what));
        let agent = self.agent.as_deref().map(|id| ("agent", id));
        let root = self.root.as_deref().map(|root| ("root", root));
        let whose: Vec<_> = agent
            .into_iter()
            .chain(root)
            .map(|(thing, name)| format!("{thing} {}", cleaned(name)))
            .collect();
        if !whose.is_empty() {
            let _ = write!(line, " ({})", whose.join(", "));
        }
        let (kind, found, wanted) = (&self.kind, &self.found, &self.wanted);
        let _ = write!(
            line,
            ": {}: found {}, wanted {}",
            cleaned(kind),
            cleaned(found),
            cleaned(wanted)
        );
        match &self.mending {
            Mending::NotTried => {}
            Mending::Mended => line.push_str("; mended"),
            Mending::Failed(why) => {
                let _ = write!(line, "; not mended: {}", cleaned(why));
            }
        }
        line
    }
}

// === impl Drifted ===

impl Drifted {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let difference = &self.difference;
        let (code, stage) = match &difference.mending {
            Mending::NotTried => (Code::DriftFound, Stage::New),
            Mending::Mended => (Code::DriftMended, Stage::Mended),
            Mending::Failed(_) => (Code::DriftStands, Stage::Stands),
        };
        let Difference {
            kind,
            what,
            agent,
            root,
            found,
            wanted,
            mending,
        } = difference;
        let mut finding = Finding {
            code,
            stage,
            feature: ("reconcile", "reconcile"),
            message: difference.sentence(),
            kind: "drift",
            title: "The kernel differs from the registry",
            since: self.since,
            of: &[kind, what, agent.as_deref().unwrap_or_default()],
            evidence: json!({
                "kind": cleaned(kind),
                "what": cleaned(what),
                "found": cleaned(found),
                "wanted": cleaned(wanted),
                "root": root.as_deref().map(cleaned),
            }),
            agent: agent.as_deref(),
            hash: self.hash.as_deref(),
            by: self.by,
            revision: self.revision,
        }
        .event(time);
        let fields = &mut finding.1;
        if *mending == Mending::Mended {
            let desc = format!("put back: {}", cleaned(wanted));
            put(fields, "remediation", Some(json!({ "desc": desc })));
        }
        if let Mending::Failed(why) = mending {
            put(fields, "status_detail", Some(cleaned(why)));
        }
        finding
    }
}

// === impl Damaged ===

impl Damaged {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let (file, why) = (cleaned(&self.file), cleaned(&self.why));
        let consequence = cleaned(&self.consequence);
        Finding {
            code: Code::StateDamaged,
            stage: Stage::New,
            feature: ("state", "state"),
            message: format!("State file {file} cannot be trusted: {why}; {consequence}"),
            kind: "tampering",
            title: "A state file is torn or was changed by somebody else",
            since: time,
            of: &[&self.file, &self.why],
            evidence: json!({
                "file": file,
                "why": why,
                "consequence": consequence,
                "moved_to": self.moved_to.as_deref().map(cleaned),
            }),
            agent: self.agent.as_deref(),
            hash: None,
            by: Actor::Daemon,
            revision: self.revision,
        }
        .event(time)
    }
}

// === impl ClockBehind ===

impl ClockBehind {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let (wall, mark) = (rfc3339(self.wall), rfc3339(self.mark));
        let behind = span(self.mark.saturating_sub(self.wall));
        Finding {
            code: Code::ClockBehind,
            stage: Stage::New,
            feature: ("clock", "clock"),
            message: format!(
                "The wall clock says {wall}, {behind} behind the latest time seen; {mark} is taken \
                 in its place, so that no expired grant comes back"
            ),
            kind: "clock",
            title: "The wall clock went back",
            since: time,
            of: &["clock"],
            evidence: json!({ "wall": self.wall, "mark": self.mark }),
            agent: None,
            hash: None,
            by: Actor::Daemon,
            revision: self.revision,
        }
        .event(time)
    }
}

// === the class ===

/// Where a finding stands.
#[derive(Clone, Copy)]
enum Stage {
    New,
    Mended,
    Stands,
}

struct Finding<'a> {
    code: Code,
    stage: Stage,
    feature: (&'static str, &'static str),
    message: String,
    kind: &'static str,
    title: &'static str,
    since: UnixMillis,
    /// What tells it from other findings of its kind.
    of: &'a [&'a str],
    evidence: Value,
    agent: Option<&'a str>,
    hash: Option<&'a str>,
    by: Actor,
    revision: u64,
}

impl Finding<'_> {
    fn event(self, time: UnixMillis) -> (Envelope, Value) {
        let (activity, status, action, disposition) = match self.stage {
            Stage::New => (
                (1, "Create"),
                Status::New,
                (3, "Observed"),
                (15, "Detected"),
            ),
            Stage::Mended => (
                (3, "Close"),
                Status::Resolved,
                (4, "Modified"),
                (11, "Corrected"),
            ),
            Stage::Stands => (
                (2, "Update"),
                Status::InProgress,
                (3, "Observed"),
                (13, "Uncorrected"),
            ),
        };
        let mut evidence = json!({ "name": "difference", "data": self.evidence });
        let mut unmapped = json!({ "revision": self.revision });
        if let Some(agent) = self.agent.map(cleaned) {
            put(&mut evidence, "ai_agent", Some(json!({ "uid": agent })));
            put(&mut unmapped, "agent", Some(agent));
        }
        let mut fields = json!({
            "actor": self.by.to_ocsf(),
            "is_alert": true,
            "action_id": action.0,
            "action": action.1,
            "disposition_id": disposition.0,
            "disposition": disposition.1,
            "finding_info": {
                "uid": self.uid(),
                "title": self.title,
                "types": [self.kind],
                "analytic": {
                    "name": self.feature.0,
                    "uid": self.code.name(),
                    "type_id": 1,
                    "type": "Rule",
                },
                "first_seen_time": self.since,
                "last_seen_time": time,
            },
            "evidences": [evidence],
            "unmapped": unmapped,
        });
        let policy = self.agent.zip(self.hash).map(|(agent, hash)| {
            let agent = cleaned(agent);
            json!({ "uid": format!("agent/{agent}"), "name": agent, "version": hash })
        });
        put(&mut fields, "policy", policy);
        let envelope = Envelope {
            code: self.code,
            class: Class::DetectionFinding,
            activity,
            severity: Severity::High,
            status,
            time,
            feature: self.feature,
            message: self.message,
        };
        (envelope, fields)
    }

    /// The same for each line about one finding, and another for each finding.
    fn uid(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.since.to_le_bytes());
        for part in self.of {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut uid = format!("{}-", self.kind);
        for byte in hash.finalize().iter().take(8) {
            let _ = write!(uid, "{byte:02x}");
        }
        uid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drifted(mending: Mending) -> Drifted {
        Drifted {
            difference: Difference {
                kind: "changed".to_owned(),
                what: "prefixes 10.0.0.0/8".to_owned(),
                agent: Some("billing-recon".to_owned()),
                root: None,
                found: "rule set 9\u{1b}[2J".to_owned(),
                wanted: "rule set 3".to_owned(),
                mending,
            },
            since: 5,
            hash: None,
            by: Actor::Daemon,
            revision: 1,
        }
    }

    #[test]
    fn a_sentence_says_what_and_what_became_of_it() {
        let said = |mending| drifted(mending).difference.sentence();
        let start = "Drift: prefixes 10.0.0.0/8 (agent billing-recon): changed: found rule set \
                     9\\x1b[2J, wanted rule set 3";
        assert_eq!(said(Mending::NotTried), start);
        assert_eq!(said(Mending::Mended), format!("{start}; mended"));
        assert_eq!(
            said(Mending::Failed("no room".to_owned())),
            format!("{start}; not mended: no room")
        );
        let link = Difference {
            agent: None,
            root: Some("/agents.slice".to_owned()),
            what: "egress".to_owned(),
            ..drifted(Mending::NotTried).difference
        };
        assert!(
            link.sentence()
                .starts_with("Drift: egress (root /agents.slice): ")
        );
    }

    #[test]
    fn lines_of_one_finding_share_its_uid() {
        let uid = |drifted: &Drifted| drifted.event(9).1["finding_info"]["uid"].clone();
        let found = drifted(Mending::NotTried);
        assert_eq!(uid(&found), uid(&drifted(Mending::Mended)));
        let later = Drifted {
            since: 6,
            ..found.clone()
        };
        assert_ne!(uid(&found), uid(&later));
        let mut other = found.clone();
        other.difference.what.push('1');
        assert_ne!(uid(&found), uid(&other));
    }
}
