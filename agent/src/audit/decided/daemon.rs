//! The daemon and its fence: Application Lifecycle, 6002.

use serde_json::{Value, json};

use super::{Actor, bounded, cleaned};
use crate::{
    audit::ocsf::{Class, Code, Envelope, Severity, Status, put},
    policy::tables::UnixMillis,
};

/// How a new daemon came to the fence that an older one left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Succession {
    /// Process id of the new daemon.
    pub pid: u32,
    /// What became of the tables.
    pub tables: Tables,
    /// Links whose program was replaced in place.
    pub links: u64,
    /// Agents for which the kernel did not have what the last good registry says; their tables were
    /// written anew.
    pub rewritten: Vec<String>,
    /// The registry state in force.
    pub revision: u64,
}

/// What became of the tables of the daemon before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tables {
    /// Taken over as they are.
    Adopted,
    /// Written anew in another layout, and put in the place of the old by link update.
    Migrated {
        /// Layout before, such as `v1`.
        from: String,
        /// Layout now.
        to: String,
    },
    /// Written anew in the same layout, because the old had no room.
    Grown,
}

/// The fence was taken down on purpose, or that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceLifted {
    /// Who asked.
    pub by: Actor,
    /// The user who logged in, whatever became of the session since; the kernel's audit login id.
    pub login_uid: Option<u32>,
    /// The pin directories that were removed; empty when there was no fence.
    pub removed: Vec<String>,
    /// Why not all of it could be removed.
    pub error: Option<String>,
}

/// A root that had no fence, because its cgroup was removed and made again or its links were taken
/// away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refenced {
    /// The root.
    pub root: String,
    /// Why it could not be fenced again; none when it is.
    pub error: Option<String>,
    /// The registry state in force.
    pub revision: u64,
}

pub(super) fn started(
    pid: u32,
    roots: &[String],
    revision: u64,
    adopted: bool,
    time: UnixMillis,
) -> (Envelope, Value) {
    let on = roots.join(", ");
    let message = format!("Daemon started: revision {revision} in force on {on}");
    let unmapped = json!({ "revision": revision, "roots": roots, "adopted": adopted });
    (
        lifecycle(Code::DaemonStarted, (3, "Start"), message, time),
        fields(process(pid), unmapped),
    )
}

pub(super) fn stopped(
    pid: u32,
    reason: &str,
    revision: u64,
    time: UnixMillis,
) -> (Envelope, Value) {
    let reason = cleaned(reason);
    let message = format!("Daemon stopped ({reason}); revision {revision} stays in force");
    let unmapped = json!({ "revision": revision, "reason": reason });
    (
        lifecycle(Code::DaemonStopped, (4, "Stop"), message, time),
        fields(process(pid), unmapped),
    )
}

// === impl Succession ===

impl Succession {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let (links, rewritten) = (self.links, self.rewritten.len());
        let (how, from, to) = match &self.tables {
            Tables::Adopted => ("adopted", None, None),
            Tables::Migrated { from, to } => ("migrated", Some(from), Some(to)),
            Tables::Grown => ("grown", None, None),
        };
        let tables = match &self.tables {
            Tables::Adopted => "tables taken over".to_owned(),
            Tables::Migrated { from, to } => format!("tables migrated from {from} to {to}"),
            Tables::Grown => "tables grown".to_owned(),
        };
        let mut message = format!("Fence taken over: {tables}, programs replaced: {links}");
        if rewritten > 0 {
            message.push_str(&format!(
                ", agents whose tables were not as the registry says: {rewritten}"
            ));
        }
        let mut envelope = lifecycle(Code::FenceTakenOver, (8, "Update"), message, time);
        if rewritten > 0 {
            envelope.severity = Severity::High;
        }
        let mut unmapped = json!({
            "revision": self.revision,
            "tables": how,
            "links": links,
            "rewritten": bounded(&self.rewritten),
            "rewritten_total": rewritten,
        });
        put(&mut unmapped, "from", from.map(|version| cleaned(version)));
        put(&mut unmapped, "to", to.map(|version| cleaned(version)));
        (envelope, fields(process(self.pid), unmapped))
    }
}

// === impl FenceLifted ===

impl FenceLifted {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let by = self.by;
        let message = match &self.error {
            None if self.removed.is_empty() => {
                format!("{by} asked to lift the fence with --detach-all; there was none")
            }
            None => format!("Fence lifted with --detach-all by {by}: nothing is enforced any more"),
            Some(why) => format!(
                "{by} asked to lift the fence with --detach-all, which failed halfway: {}",
                cleaned(why)
            ),
        };
        let mut envelope = lifecycle(Code::FenceLifted, (7, "Disable"), message, time);
        envelope.severity = Severity::High;
        envelope.status = Status::of(self.error.is_none());
        let mut unmapped = json!({ "revision": 0, "removed": bounded(&self.removed) });
        put(&mut unmapped, "login_uid", self.login_uid);
        let mut fields = fields(by.to_ocsf(), unmapped);
        put(&mut fields, "is_alert", Some(true));
        put(
            &mut fields,
            "status_detail",
            self.error.as_deref().map(cleaned),
        );
        (envelope, fields)
    }
}

// === impl Refenced ===

impl Refenced {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let root = cleaned(&self.root);
        let message = match &self.error {
            None => format!("Root {root} had no fence; it is fenced again"),
            Some(why) => format!("Root {root} is not fenced: {}", cleaned(why)),
        };
        let mut envelope = lifecycle(Code::RootFenced, (6, "Enable"), message, time);
        (envelope.severity, envelope.status) = match self.error {
            None => (Severity::Medium, Status::Success),
            Some(_) => (Severity::High, Status::Failure),
        };
        if self.error.is_some() {
            envelope.code = Code::RootNotFenced;
        }
        let unmapped = json!({ "revision": self.revision, "root": root });
        let mut fields = fields(Actor::Daemon.to_ocsf(), unmapped);
        put(&mut fields, "is_alert", Some(true));
        put(
            &mut fields,
            "status_detail",
            self.error.as_deref().map(cleaned),
        );
        (envelope, fields)
    }
}

// === the class ===

fn lifecycle(
    code: Code,
    activity: (u64, &'static str),
    message: String,
    time: UnixMillis,
) -> Envelope {
    Envelope {
        code,
        class: Class::ApplicationLifecycle,
        activity,
        severity: Severity::Informational,
        status: Status::Success,
        time,
        feature: ("daemon", "daemon"),
        message,
    }
}

fn process(pid: u32) -> Value {
    json!({ "process": { "pid": pid, "name": "remit" } })
}

fn fields(actor: Value, unmapped: Value) -> Value {
    json!({
        "app": {
            "name": "remit",
            "vendor_name": "Remit project",
            "version": env!("CARGO_PKG_VERSION"),
        },
        "actor": actor,
        "unmapped": unmapped,
    })
}
