//! What all events have in common, as OCSF 1.9.0 wants it: the envelope, the host, the captions.
//! The schemas do not check that a caption agrees with its id, so each pair stands in one place.

use serde_json::{Map, Value, json};

use super::text::{NAME_BYTES, clean};

/// The version of OCSF that events claim.
pub const OCSF_VERSION: &str = "1.9.0";

/// Declares the event codes.
macro_rules! codes {
    ($($(#[$meta:meta])* $variant:ident = $name:literal, $log:ident, $title:literal;)*) => {
        /// What an event is, in a word that never changes its meaning: `metadata.event_code`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$meta])* $variant,)* }

        impl Code {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// As in events: `RM` and four digits.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// In a few words, for the documentation.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }

            /// The log that it is written to.
            pub const fn log(self) -> LogName {
                match self { $(Self::$variant => LogName::$log,)* }
            }
        }
    };
}

codes! {
    /// An attempt was refused.
    Denied = "RM1001", Violations, "attempt denied";
    /// An attempt that enforcement would refuse was let through by monitor mode.
    Monitored = "RM1002", Violations, "attempt let through by monitor mode";
    /// Attempts whose details were lost.
    Dropped = "RM1003", Violations, "attempts without details";
    /// What an agent reached, and how much.
    Reached = "RM1004", Access, "destination reached";
    /// The DNS guard refused a lookup.
    LookupRefused = "RM1101", Violations, "lookup refused";
    /// A lookup that enforcement would refuse was let through by monitor mode.
    LookupMonitored = "RM1102", Violations, "lookup let through by monitor mode";
    /// An agent was suspended.
    AgentSuspended = "RM2001", Audit, "agent suspended";
    /// A suspension ended.
    AgentResumed = "RM2002", Audit, "agent resumed";
    /// An agent was revoked.
    AgentRevoked = "RM2003", Audit, "agent revoked";
    /// A revoked agent's file changed and is approved again.
    RevocationLifted = "RM2004", Audit, "revocation lifted";
    /// A change of an agent's lifecycle was refused.
    LifecycleRefused = "RM2005", Audit, "lifecycle change refused";
    /// The kernel does not have what the registry says.
    DriftFound = "RM3001", Audit, "drift found";
    /// It has again.
    DriftMended = "RM3002", Audit, "drift mended";
    /// It could not be put right.
    DriftStands = "RM3003", Audit, "drift not mended";
    /// A state file is torn or was tampered with.
    StateDamaged = "RM3004", Audit, "state file damaged";
    /// The wall clock is behind the latest time ever seen.
    ClockBehind = "RM3005", Audit, "wall clock behind";
    /// An agent's fence was tried from inside, and holds.
    ProbePassed = "RM3101", Audit, "probe passed";
    /// An agent's fence was tried from inside, and does not hold.
    ProbeFailed = "RM3102", Audit, "probe failed";
    /// An agent's fence was tried from inside, and nothing can be told.
    ProbeUnknown = "RM3103", Audit, "probe without a verdict";
    /// A registry is in force.
    RegistryLoaded = "RM4001", Audit, "registry loaded";
    /// A registry, or files of it, were refused.
    RegistryRefused = "RM4002", Audit, "registry refused";
    /// The wall clock was set while the daemon ran.
    ClockStepped = "RM4003", Audit, "wall clock stepped";
    /// A wall clock that is behind the latest time ever seen was accepted.
    ClockAccepted = "RM4004", Audit, "wall clock accepted";
    /// The daemon enforces.
    DaemonStarted = "RM9001", Audit, "daemon started";
    /// The daemon ends; what is enforced stays enforced.
    DaemonStopped = "RM9002", Audit, "daemon stopped";
    /// The fence was taken down on purpose.
    FenceLifted = "RM9003", Audit, "fence lifted";
    /// A daemon took over the fence of the one before.
    FenceTakenOver = "RM9004", Audit, "fence taken over";
    /// A root that had lost its fence has one again.
    RootFenced = "RM9005", Audit, "root fenced again";
    /// A root that has lost its fence could not be fenced again.
    RootNotFenced = "RM9006", Audit, "root not fenced";
    /// The hash chain of the audit trail begins.
    TrailBegun = "RM9101", Audit, "audit trail begun";
    /// The host vouches for the audit trail so far.
    TrailCheckpoint = "RM9102", Audit, "audit trail checkpoint";
    /// The audit trail was not as it was left.
    TrailResumed = "RM9103", Audit, "audit trail taken up";
    /// The oldest files of the audit trail go.
    TrailRemoved = "RM9104", Audit, "audit files removed";
    /// Another key signs the audit trail.
    TrailKeyChanged = "RM9105", Audit, "audit key changed";
}

/// A log, and the stem of its file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogName {
    /// What agents attempted.
    Violations,
    /// What was decided about agents.
    Audit,
    /// What agents reached.
    Access,
}

impl LogName {
    /// `violations`, `audit` or `access`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Violations => "violations",
            Self::Audit => "audit",
            Self::Access => "access",
        }
    }

    /// `violations.jsonl`, `audit.jsonl` or `access.jsonl`.
    pub const fn file(self) -> &'static str {
        match self {
            Self::Violations => "violations.jsonl",
            Self::Audit => "audit.jsonl",
            Self::Access => "access.jsonl",
        }
    }
}

/// The machine that events come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub hostname: String,
    /// `/etc/machine-id`, if there is one.
    pub machine_id: Option<String>,
    /// `/proc/sys/kernel/random/boot_id`, if it could be read.
    pub boot_id: Option<String>,
    /// `NAME` of os-release.
    pub os_name: String,
    /// `VERSION_ID` of os-release; rolling distributions have none.
    pub os_version: Option<String>,
    /// As `uname -r` says.
    pub kernel: String,
}

impl Host {
    /// The name, or a word in its place: some objects must have one.
    pub(super) fn label(&self) -> String {
        match clean(self.hostname.as_bytes(), NAME_BYTES) {
            name if name.is_empty() => "localhost".to_owned(),
            name => name,
        }
    }

    fn device(&self) -> Value {
        let mut os = json!({
            "name": if self.os_name.is_empty() { "Linux" } else { &self.os_name },
            "type_id": 200,
            "type": "Linux",
        });
        put(&mut os, "version", self.os_version.as_deref());
        put(&mut os, "kernel_release", Some(self.kernel.as_str()));
        let name = self.label();
        let mut device = json!({ "hostname": name, "name": name, "type_id": 1, "type": "Server" });
        put(&mut device, "uid", self.machine_id.as_deref());
        put(&mut device, "boot_uid", self.boot_id.as_deref());
        put(&mut device, "os", Some(os));
        device
    }
}

/// OCSF classes used, each with its category.
#[derive(Clone, Copy)]
pub(super) enum Class {
    ComplianceFinding,
    DetectionFinding,
    EntityManagement,
    NetworkActivity,
    DnsActivity,
    DeviceConfigStateChange,
    ApplicationLifecycle,
}

impl Class {
    const fn uid(self) -> u64 {
        match self {
            Self::ComplianceFinding => 2003,
            Self::DetectionFinding => 2004,
            Self::EntityManagement => 3004,
            Self::NetworkActivity => 4001,
            Self::DnsActivity => 4003,
            Self::DeviceConfigStateChange => 5019,
            Self::ApplicationLifecycle => 6002,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::ComplianceFinding => "Compliance Finding",
            Self::DetectionFinding => "Detection Finding",
            Self::EntityManagement => "Entity Management",
            Self::NetworkActivity => "Network Activity",
            Self::DnsActivity => "DNS Activity",
            Self::DeviceConfigStateChange => "Device Config State Change",
            Self::ApplicationLifecycle => "Application Lifecycle",
        }
    }

    const fn category(self) -> (u64, &'static str) {
        match self {
            Self::ComplianceFinding | Self::DetectionFinding => (2, "Findings"),
            Self::EntityManagement => (3, "Identity & Access Management"),
            Self::NetworkActivity | Self::DnsActivity => (4, "Network Activity"),
            Self::DeviceConfigStateChange => (5, "Discovery"),
            Self::ApplicationLifecycle => (6, "Application Activity"),
        }
    }

    const fn profiles(self) -> &'static [&'static str] {
        match self {
            Self::EntityManagement
            | Self::NetworkActivity
            | Self::DnsActivity
            | Self::ApplicationLifecycle => &["host", "security_control", "ai_operation"],
            Self::ComplianceFinding | Self::DetectionFinding | Self::DeviceConfigStateChange => {
                &["host", "security_control"]
            }
        }
    }
}

/// How bad an event is.
#[derive(Clone, Copy)]
pub(super) enum Severity {
    Informational,
    Low,
    Medium,
    High,
}

impl Severity {
    const fn pair(self) -> (u64, &'static str) {
        match self {
            Self::Informational => (1, "Informational"),
            Self::Low => (2, "Low"),
            Self::Medium => (3, "Medium"),
            Self::High => (4, "High"),
        }
    }
}

/// What became of what an event tells of. Findings count otherwise than all other classes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Success,
    Failure,
    /// Of a finding: nothing was done about it yet.
    New,
    /// Of a finding: it stands, and is being worked at.
    InProgress,
    /// Of a finding: it stands no more.
    Resolved,
}

impl Status {
    pub(super) const fn of(success: bool) -> Self {
        if success {
            Self::Success
        } else {
            Self::Failure
        }
    }

    const fn pair(self) -> (u64, &'static str) {
        match self {
            Self::Success => (1, "Success"),
            Self::Failure => (2, "Failure"),
            Self::New => (1, "New"),
            Self::InProgress => (2, "In Progress"),
            Self::Resolved => (4, "Resolved"),
        }
    }
}

/// The start of every event.
pub(super) struct Envelope {
    pub(super) code: Code,
    pub(super) class: Class,
    /// Id and caption within the class.
    pub(super) activity: (u64, &'static str),
    pub(super) severity: Severity,
    /// What became of what the event tells of.
    pub(super) status: Status,
    /// Milliseconds since the Unix epoch.
    pub(super) time: i64,
    /// What of Remit saw it: name and id.
    pub(super) feature: (&'static str, &'static str),
    pub(super) message: String,
}

impl Envelope {
    pub(super) fn build(self, host: &Host, sequence: u64) -> Map<String, Value> {
        let (category, category_name) = self.class.category();
        let (activity, activity_name) = self.activity;
        let (severity, severity_name) = self.severity.pair();
        let (class, class_name) = (self.class.uid(), self.class.name());
        let (status, status_name) = self.status.pair();
        let fields = [
            ("time", json!(self.time)),
            ("message", json!(self.message)),
            ("category_uid", json!(category)),
            ("category_name", json!(category_name)),
            ("class_uid", json!(class)),
            ("class_name", json!(class_name)),
            ("activity_id", json!(activity)),
            ("activity_name", json!(activity_name)),
            ("type_uid", json!(class * 100 + activity)),
            ("type_name", json!(format!("{class_name}: {activity_name}"))),
            ("severity_id", json!(severity)),
            ("severity", json!(severity_name)),
            ("status_id", json!(status)),
            ("status", json!(status_name)),
            (
                "metadata",
                json!({
                    "version": OCSF_VERSION,
                    "profiles": self.class.profiles(),
                    "product": {
                        "name": "remit",
                        "vendor_name": "Remit project",
                        "version": env!("CARGO_PKG_VERSION"),
                        "feature": { "name": self.feature.0, "uid": self.feature.1 },
                    },
                    "log_name": self.code.log().name(),
                    "log_provider": "remit",
                    "event_code": self.code.name(),
                    "sequence": sequence,
                }),
            ),
            ("device", host.device()),
        ];
        fields
            .map(|(key, value)| (key.to_owned(), value))
            .into_iter()
            .collect()
    }
}

/// Sets `key` of an object, if there is a value.
pub(super) fn put(object: &mut Value, key: &str, value: Option<impl Into<Value>>) {
    if let (Some(map), Some(value)) = (object.as_object_mut(), value) {
        map.insert(key.to_owned(), value.into());
    }
}

/// RFC 3339 in UTC with milliseconds; a time beyond year 9999 stays a number.
pub(super) fn rfc3339(millis: i64) -> String {
    jiff::Timestamp::from_millisecond(millis)
        .map_or_else(|_| millis.to_string(), |time| format!("{time:.3}"))
}
