//! What probing an agent's fence came to: Compliance Finding, 2003.

use serde_json::{Value, json};

use super::{Actor, TEXTS, bounded, cleaned};
use crate::{
    audit::ocsf::{Class, Code, Envelope, Severity, Status, put},
    policy::tables::UnixMillis,
};

/// What a probe proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The fence does what the registry says.
    Pass,
    /// It does not.
    Fail,
    /// It could not be told.
    Unknown,
}

/// A probe of an agent's fence from inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeRun {
    /// The agent.
    pub agent: String,
    /// Hash of its entry in force; empty where the probe did not come so far.
    pub hash: String,
    /// `unmapped.probe` of the violation lines that it made.
    pub run: String,
    /// What it proves.
    pub result: ProbeResult,
    /// Why it is not a pass, one sentence each.
    pub why: Vec<String>,
    /// When it began.
    pub began: UnixMillis,
    /// Each attempt: what, what it proves (`pass`, `fail`, `unknown`), and why.
    pub checks: Vec<(String, &'static str, String)>,
    /// Who asked for it.
    pub by: Actor,
    /// The registry state in force.
    pub revision: u64,
}

// === impl ProbeRun ===

impl ProbeRun {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let agent = cleaned(&self.agent);
        let why = bounded(&self.why);
        let (code, severity, status, compliance, word) = match self.result {
            ProbeResult::Pass => (
                Code::ProbePassed,
                Severity::Informational,
                Status::Resolved,
                (1, "Pass"),
                "PASS",
            ),
            ProbeResult::Fail => (
                Code::ProbeFailed,
                Severity::High,
                Status::New,
                (3, "Fail"),
                "FAIL",
            ),
            ProbeResult::Unknown => (
                Code::ProbeUnknown,
                Severity::Low,
                Status::New,
                (0, "Unknown"),
                "UNKNOWN",
            ),
        };
        let first = why
            .first()
            .map_or_else(String::new, |why| format!(": {why}"));
        let checks: Vec<Value> = self
            .checks
            .iter()
            .take(TEXTS)
            .map(|(name, result, text)| {
                let (id, caption) = match *result {
                    "pass" => (1, "Pass"),
                    "fail" => (3, "Fail"),
                    _ => (0, "Unknown"),
                };
                json!({
                    "name": cleaned(name),
                    "status_id": id,
                    "status": caption,
                    "desc": cleaned(text),
                })
            })
            .collect();
        let failed = self.result == ProbeResult::Fail;
        let mut fields = json!({
            "actor": self.by.to_ocsf(),
            "is_alert": failed,
            "compliance": {
                "control": "The kernel refuses what the registry does not grant",
                "status_id": compliance.0,
                "status": compliance.1,
                "status_details": why,
                "checks": checks,
            },
            "finding_info": {
                "uid": format!("probe-{agent}-{}", cleaned(&self.run)),
                "title": "The fence, tried from inside the agent's cgroup",
                "types": ["probe"],
                "first_seen_time": self.began,
                "last_seen_time": time,
            },
            "evidences": [{
                "name": "probe",
                "ai_agent": { "uid": agent },
                "data": { "run": cleaned(&self.run), "attempts": self.checks.len() },
            }],
            "unmapped": {
                "revision": self.revision,
                "agent": agent,
                "probe": cleaned(&self.run),
            },
        });
        let policy = (!self.hash.is_empty()).then(|| {
            let version = cleaned(&self.hash);
            json!({ "uid": format!("agent/{agent}"), "name": agent, "version": version })
        });
        put(&mut fields, "policy", policy);
        let envelope = Envelope {
            code,
            class: Class::ComplianceFinding,
            activity: (1, "Create"),
            severity,
            status,
            time,
            feature: ("probe", "probe"),
            message: format!("Probe of {agent}: {word}{first}"),
        };
        (envelope, fields)
    }
}
