//! A lookup that the DNS guard refused, or that monitor mode let through, as OCSF DNS Activity
//! (4003). It is no attempt of the kernel's counters: these lines are counted by themselves.

use agent_ebpf::abi::{Reason, Verdict};
use serde_json::{Value, json};

use super::{
    DEFAULT_DENY, Endpoint, EntryRef, ProcessInfo, Subject,
    event::{actor, container_of},
    words::{detail, protocol_name},
};
use crate::{
    audit::{
        ocsf::{Class, Code, Envelope, Host, Severity, Status, put},
        text::{PATH_BYTES, clean},
    },
    policy::tables::UnixMillis,
};

/// Lookups of one name, refused or let through by monitor mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// When.
    pub time: UnixMillis,
    /// Who is accountable.
    pub agent: Subject,
    /// What came of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The name, printable; empty where the line stands for many.
    pub name: String,
    /// The record type.
    pub kind: String,
    /// What was wrong: `name`, `search`, `kind`, `budget`, `address` or `full`.
    pub why: &'static str,
    /// In words; the agent got the same.
    pub text: String,
    /// The resolver that it meant to ask.
    pub resolver: Option<Endpoint>,
    /// The socket that asked.
    pub src: Endpoint,
    /// IP protocol number.
    pub protocol: u8,
    /// Which process.
    pub process: ProcessInfo,
    /// Id of its cgroup.
    pub cgroup_id: u64,
    /// Path of the cgroup below the v2 mount, if it is still there.
    pub cgroup: Option<String>,
    /// The entry that decided; none is the default.
    pub entry: Option<EntryRef>,
    /// The registry state in force.
    pub revision: u64,
    /// Lookups that this stands for, 1 or more.
    pub count: u64,
}

impl Lookup {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let denied = self.verdict == Verdict::Denied;
        let (code, severity) = match self.verdict {
            Verdict::Denied => (Code::LookupRefused, Severity::Medium),
            Verdict::Monitored => (Code::LookupMonitored, Severity::Low),
        };
        let mut event = Envelope {
            code,
            class: Class::DnsActivity,
            activity: (1, "Query"),
            severity,
            status: Status::of(!denied),
            time: self.time,
            feature: ("dns", "guard"),
            message: self.text.clone(),
        }
        .build(host, sequence);
        let (rcode, rcode_name) = match (denied, self.why) {
            (false, _) => (0, "NoError"),
            (true, "search") => (3, "NXDomain"),
            (true, _) => (5, "Refused"),
        };
        let fields = [
            ("status_code", json!(rcode_name.to_uppercase())),
            ("status_detail", json!(detail(self.reason))),
            ("action_id", json!(if denied { 2 } else { 3 })),
            ("action", json!(if denied { "Denied" } else { "Observed" })),
            ("disposition_id", json!(if denied { 2 } else { 17 })),
            (
                "disposition",
                json!(if denied { "Blocked" } else { "Logged" }),
            ),
            ("is_alert", json!(denied)),
            ("rcode_id", json!(rcode)),
            ("rcode", json!(rcode_name)),
        ];
        event.extend(fields.map(|(key, value)| (key.to_owned(), value)));
        if self.count > 1 {
            event.insert("count".to_owned(), json!(self.count));
        }
        self.agent.fields(&mut event, denied);
        if !self.name.is_empty() {
            let query = json!({ "hostname": self.name, "type": self.kind, "class": "IN" });
            event.insert("query".to_owned(), query);
        }
        event.insert("firewall_rule".to_owned(), self.rule());
        event.insert("actor".to_owned(), actor(&self.agent, &self.process));
        let protocol = protocol_name(self.protocol);
        event.insert(
            "connection_info".to_owned(),
            json!({
                "direction_id": 2,
                "direction": "Outbound",
                "protocol_name": protocol,
                "protocol_num": self.protocol,
            }),
        );
        let mut src = json!({ "ip": self.src.ip.to_string(), "hostname": host.label() });
        put(&mut src, "port", self.src.port);
        event.insert("src_endpoint".to_owned(), src);
        if let Some(resolver) = &self.resolver {
            let mut dst = json!({ "ip": resolver.ip.to_string() });
            put(&mut dst, "port", resolver.port);
            event.insert("dst_endpoint".to_owned(), dst);
        }
        event.insert("unmapped".to_owned(), self.unmapped());
        Value::Object(event)
    }

    fn rule(&self) -> Value {
        let (name, condition) = match &self.entry {
            Some(entry) => (entry.name.as_str(), entry.text.clone()),
            None => (DEFAULT_DENY, "no entry grants the name".to_owned()),
        };
        let mut rule = json!({
            "uid": name,
            "name": name,
            "type": "dns",
            "category": self.reason.name(),
            "condition": condition,
        });
        put(&mut rule, "desc", self.entry.as_ref().map(EntryRef::place));
        rule
    }

    fn unmapped(&self) -> Value {
        let mut unmapped = json!({
            "cgroup_id": self.cgroup_id,
            "hook": "dns/guard",
            "verdict": self.verdict.name(),
            "reason": self.reason.name(),
            "revision": self.revision,
            "wrong": self.why,
            "witness": self.process.witness.name(),
        });
        let cgroup = self.cgroup.as_deref();
        put(
            &mut unmapped,
            "cgroup",
            cgroup.map(|path| clean(path.as_bytes(), PATH_BYTES)),
        );
        put(&mut unmapped, "container_id", cgroup.and_then(container_of));
        if !self.process.is_complete() {
            put(&mut unmapped, "enrichment", Some("gone"));
        }
        unmapped
    }
}
