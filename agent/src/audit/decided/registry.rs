//! What is in force, and by which clock: Device Config State Change, 5019.

use serde_json::{Value, json};

use super::{Actor, bounded, cleaned, names, span};
use crate::{
    audit::ocsf::{Class, Code, Envelope, Severity, Status, put, rfc3339},
    policy::tables::UnixMillis,
};

/// The wall clock was set to another time while the daemon ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockStepped {
    /// By how much, in milliseconds; negative when it went back.
    pub by_ms: i64,
    /// What it says now.
    pub wall: UnixMillis,
    /// Whether the deadlines in the kernel are still those of the old time.
    pub failed: bool,
    /// The registry state in force.
    pub revision: u64,
}

/// Somebody said that the wall clock is right although it is behind the latest time ever seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockAccepted {
    /// Who.
    pub by: Actor,
    /// What the wall clock says.
    pub wall: UnixMillis,
    /// The latest time seen before, now forgotten.
    pub mark: UnixMillis,
    /// The registry state in force.
    pub revision: u64,
}

pub(super) fn loaded(
    revision: u64,
    agents: usize,
    warnings: &[String],
    closed: u64,
    time: UnixMillis,
) -> (Envelope, Value) {
    let message = format!("Registry loaded: revision {revision} in force, agents: {agents}");
    let unmapped = json!({
        "revision": revision,
        "agents": agents,
        "warnings": bounded(warnings),
        "warnings_total": warnings.len(),
        "closed": closed,
    });
    (
        config(Code::RegistryLoaded, Status::Success, message, time),
        fields(Actor::Daemon, warnings.first(), unmapped),
    )
}

pub(super) fn refused(
    revision: u64,
    agents: &[String],
    errors: &[String],
    closed: u64,
    time: UnixMillis,
) -> (Envelope, Value) {
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
        "closed": closed,
    });
    (
        config(Code::RegistryRefused, Status::Failure, message, time),
        fields(Actor::Daemon, errors.first(), unmapped),
    )
}

// === impl ClockStepped ===

impl ClockStepped {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let way = if self.by_ms < 0 { "back" } else { "forward" };
        let (by, wall) = (span(self.by_ms.saturating_abs()), rfc3339(self.wall));
        let deadlines = if self.failed {
            "could not be computed anew"
        } else {
            "are computed anew"
        };
        let message = format!("The wall clock went {way} by {by} to {wall}; deadlines {deadlines}");
        let unmapped = json!({ "revision": self.revision, "by_ms": self.by_ms, "wall": self.wall });
        let mut envelope = config(Code::ClockStepped, Status::of(!self.failed), message, time);
        envelope.feature = ("clock", "clock");
        (envelope, fields(Actor::Daemon, None, unmapped))
    }
}

// === impl ClockAccepted ===

impl ClockAccepted {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let (wall, mark) = (rfc3339(self.wall), rfc3339(self.mark));
        let behind = span(self.mark.saturating_sub(self.wall));
        let message = format!(
            "{} had the wall clock accepted: it says {wall}, {behind} behind the latest time seen, \
             {mark}; what expired between the two is in force again",
            self.by
        );
        let unmapped = json!({ "revision": self.revision, "wall": self.wall, "mark": self.mark });
        let mut envelope = config(Code::ClockAccepted, Status::Success, message, time);
        envelope.severity = Severity::High;
        envelope.feature = ("clock", "clock");
        (envelope, fields(self.by, None, unmapped))
    }
}

// === the class ===

fn config(code: Code, status: Status, message: String, time: UnixMillis) -> Envelope {
    Envelope {
        code,
        class: Class::DeviceConfigStateChange,
        activity: (1, "Log"),
        severity: match status {
            Status::Failure => Severity::High,
            _ => Severity::Informational,
        },
        status,
        time,
        feature: ("registry", "registry"),
        message,
    }
}

fn fields(by: Actor, finding: Option<&String>, unmapped: Value) -> Value {
    let mut fields = json!({ "actor": by.to_ocsf(), "unmapped": unmapped });
    put(
        &mut fields,
        "status_detail",
        finding.map(|text| cleaned(text)),
    );
    fields
}
