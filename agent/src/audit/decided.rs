//! What was decided about agents and by the daemon: the events of `audit.jsonl`. Pure.

use serde_json::{Value, json};

use super::{
    ocsf::{Class, Code, Envelope, Host, Severity, put},
    text::{NAME_BYTES, clean},
};
use crate::policy::tables::UnixMillis;

/// Longest message kept of one finding, in bytes.
const FINDING_BYTES: usize = 1_024;
/// Findings kept in one event; the rest is counted.
const FINDINGS: usize = 50;

/// An event of `audit.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// When.
    pub time: UnixMillis,
    /// What.
    pub what: Decision,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The daemon enforces: programs are attached, maps filled and read back.
    Started {
        /// Its process id.
        pid: u32,
        /// The roots that it governs.
        roots: Vec<String>,
        /// The revision in force.
        revision: u64,
        /// Whether it found the fence standing and took it over.
        adopted: bool,
    },
    /// The daemon ends. The fence stays.
    Stopped {
        /// Its process id.
        pid: u32,
        /// Why: `SIGTERM`, or an error.
        reason: String,
        /// The revision that stays in force.
        revision: u64,
    },
    /// A registry is in force.
    Loaded {
        /// Its revision.
        revision: u64,
        /// Agents in it.
        agents: usize,
        /// Warnings, one message each.
        warnings: Vec<String>,
    },
    /// A registry was refused, all of it or some files.
    Refused {
        /// The revision in force now.
        revision: u64,
        /// Agents that keep their last good entry, or are denied, for their files are bad.
        agents: Vec<String>,
        /// Errors, one message each.
        errors: Vec<String>,
    },
}

impl Decided {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let (envelope, fields) = match &self.what {
            Decision::Started {
                pid,
                roots,
                revision,
                adopted,
            } => {
                let on = roots.join(", ");
                let message = format!("Daemon started: revision {revision} in force on {on}");
                let unmapped = json!({ "revision": revision, "roots": roots, "adopted": adopted });
                (
                    self.lifecycle(Code::DaemonStarted, (3, "Start"), message),
                    daemon_fields(*pid, unmapped),
                )
            }
            Decision::Stopped {
                pid,
                reason,
                revision,
            } => {
                let reason = clean(reason.as_bytes(), FINDING_BYTES);
                let message =
                    format!("Daemon stopped ({reason}); revision {revision} stays in force");
                let unmapped = json!({ "revision": revision, "reason": reason });
                (
                    self.lifecycle(Code::DaemonStopped, (4, "Stop"), message),
                    daemon_fields(*pid, unmapped),
                )
            }
            Decision::Loaded {
                revision,
                agents,
                warnings,
            } => {
                let message =
                    format!("Registry loaded: revision {revision} in force, agents: {agents}");
                let unmapped = json!({
                    "revision": revision,
                    "agents": agents,
                    "warnings": bounded(warnings),
                    "warnings_total": warnings.len(),
                });
                (
                    self.registry(Code::RegistryLoaded, Severity::Informational, message),
                    registry_fields(warnings, unmapped),
                )
            }
            Decision::Refused {
                revision,
                agents,
                errors,
            } => {
                let message = format!(
                    "Registry refused in part: revision {revision} in force, errors: {}, agents not as their files say: {}",
                    errors.len(),
                    agents.len()
                );
                let unmapped = json!({
                    "revision": revision,
                    "agents": names(agents),
                    "errors": bounded(errors),
                    "errors_total": errors.len(),
                });
                (
                    self.registry(Code::RegistryRefused, Severity::High, message),
                    registry_fields(errors, unmapped),
                )
            }
        };
        let mut event = envelope.build(host, sequence);
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        Value::Object(event)
    }

    /// Application Lifecycle, 6002.
    fn lifecycle(&self, code: Code, activity: (u64, &'static str), message: String) -> Envelope {
        Envelope {
            code,
            class: Class::ApplicationLifecycle,
            activity,
            severity: Severity::Informational,
            success: true,
            time: self.time,
            feature: ("daemon", "daemon"),
            message,
        }
    }

    /// Device Config State Change, 5019.
    fn registry(&self, code: Code, severity: Severity, message: String) -> Envelope {
        Envelope {
            code,
            class: Class::DeviceConfigStateChange,
            activity: (1, "Log"),
            severity,
            success: code == Code::RegistryLoaded,
            time: self.time,
            feature: ("registry", "registry"),
            message,
        }
    }
}

fn daemon_fields(pid: u32, unmapped: Value) -> Value {
    json!({
        "app": {
            "name": "remit",
            "vendor_name": "Remit project",
            "version": env!("CARGO_PKG_VERSION"),
        },
        "actor": { "process": { "pid": pid, "name": "remit" } },
        "unmapped": unmapped,
    })
}

fn registry_fields(findings: &[String], unmapped: Value) -> Value {
    let mut fields = json!({
        "actor": { "app_name": "remit", "app_uid": "daemon" },
        "unmapped": unmapped,
    });
    let first = findings.first();
    let detail = first.map(|text| clean(text.as_bytes(), FINDING_BYTES));
    put(&mut fields, "status_detail", detail);
    fields
}

fn bounded(messages: &[String]) -> Vec<String> {
    messages
        .iter()
        .take(FINDINGS)
        .map(|message| clean(message.as_bytes(), FINDING_BYTES))
        .collect()
}

fn names(agents: &[String]) -> Vec<String> {
    agents
        .iter()
        .map(|agent| clean(agent.as_bytes(), NAME_BYTES))
        .collect()
}
