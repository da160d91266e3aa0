//! Records to OCSF values.

use std::net::{IpAddr, SocketAddr};

use agent_ebpf::abi::{Reason, Verdict};
use serde_json::{Map, Value, json};

use super::{
    DEFAULT_DENY, Dropped, Endpoint, EntryRef, Lost, Parent, ProcessInfo, Subject, Violation,
    words::{detail, protocol_name, socket_type_name},
};
use crate::audit::{
    flow::community_id,
    ocsf::{Class, Code, Envelope, Host, Severity, Status, put, rfc3339},
    text::{COMMAND_BYTES, NAME_BYTES, PATH_BYTES, clean},
};

// === impl Violation ===

impl Violation {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let (code, severity, verb) = match self.verdict {
            Verdict::Denied => (Code::Denied, Severity::Medium, "Denied"),
            Verdict::Monitored => (Code::Monitored, Severity::Low, "Would deny"),
        };
        let detail = detail(self.reason);
        let mut event = Envelope {
            code,
            class: Class::NetworkActivity,
            activity: activity(self.verdict),
            severity,
            status: Status::of(self.verdict == Verdict::Monitored),
            time: self.time,
            feature: ("egress", self.hook.name()),
            message: format!(
                "{verb} {}: {}: {detail}",
                self.agent.label(),
                self.attempt()
            ),
        }
        .build(host, sequence);
        verdict_fields(&mut event, self.verdict, self.reason);
        if self.count > 1 {
            event.insert("count".to_owned(), json!(self.count));
        }
        self.agent
            .fields(&mut event, self.verdict == Verdict::Denied);
        event.insert("firewall_rule".to_owned(), self.rule());
        event.insert("actor".to_owned(), actor(&self.agent, &self.process));
        event.insert("connection_info".to_owned(), self.connection());
        let src = self.src.filter(|src| !src.ip.is_unspecified());
        if src.is_some() || self.dst.is_none() {
            let mut value = json!({ "hostname": host.label() });
            put(&mut value, "ip", src.map(|src| src.ip.to_string()));
            // Not settled yet is no port.
            put(
                &mut value,
                "port",
                src.and_then(|src| src.port).filter(|port| *port != 0),
            );
            event.insert("src_endpoint".to_owned(), value);
        }
        if let Some(dst) = &self.dst {
            let mut value = json!({ "ip": dst.ip.to_string() });
            put(&mut value, "port", dst.port);
            let name = self.dst_name.as_deref();
            put(
                &mut value,
                "hostname",
                name.map(|name| clean(name.as_bytes(), 255)),
            );
            event.insert("dst_endpoint".to_owned(), value);
        }
        event.insert("unmapped".to_owned(), self.unmapped());
        Value::Object(event)
    }

    /// `tcp 198.51.100.23:443`, or `raw socket (icmp)`.
    fn attempt(&self) -> String {
        let protocol = protocol_name(self.protocol);
        match &self.dst {
            Some(dst) => format!("{protocol} {}", dst.shown()),
            None => format!("{} socket ({protocol})", socket_type_name(self.socket_type)),
        }
    }

    fn rule(&self) -> Value {
        let reason = self.reason.name();
        let Some(entry) = &self.entry else {
            let condition = format!("no entry grants {}", self.attempt());
            return json!({
                "uid": DEFAULT_DENY,
                "name": DEFAULT_DENY,
                "type": "egress",
                "category": reason,
                "condition": condition,
            });
        };
        json!({
            "uid": entry.name,
            "name": entry.name,
            "type": "egress",
            "category": reason,
            "condition": entry.text,
            "desc": entry.place(),
        })
    }

    fn connection(&self) -> Value {
        let mut connection = connection(&protocol_name(self.protocol));
        put(&mut connection, "protocol_num", Some(self.protocol));
        let ip = self.dst.or(self.src).map(|endpoint| endpoint.ip);
        let version = match (ip, self.family) {
            (Some(IpAddr::V4(_)), _) | (None, AF_INET) => Some(4),
            (Some(IpAddr::V6(_)), _) | (None, AF_INET6) => Some(6),
            (None, _) => None,
        };
        put(&mut connection, "protocol_ver_id", version);
        let ends = self
            .src
            .and_then(Endpoint::socket)
            .zip(self.dst.and_then(Endpoint::socket));
        let flow = ends.and_then(|(src, dst)| community_id(self.protocol, src, dst));
        put(&mut connection, "community_uid", flow);
        connection
    }

    fn unmapped(&self) -> Value {
        let mut unmapped = json!({ "cgroup_id": self.cgroup_id });
        let cgroup = self.cgroup.as_deref();
        put(
            &mut unmapped,
            "cgroup",
            cgroup.map(|path| clean(path.as_bytes(), PATH_BYTES)),
        );
        put(&mut unmapped, "container_id", cgroup.and_then(container_of));
        let invocation = self.invocation.as_deref();
        put(
            &mut unmapped,
            "invocation_id",
            invocation.map(|id| clean(id.as_bytes(), NAME_BYTES)),
        );
        put(&mut unmapped, "hook", Some(self.hook.name()));
        put(&mut unmapped, "verdict", Some(self.verdict.name()));
        put(&mut unmapped, "reason", Some(self.reason.name()));
        put(&mut unmapped, "revision", Some(self.revision));
        let fault = self.reason == Reason::Fault;
        put(&mut unmapped, "cause", fault.then(|| self.cause.name()));
        put(&mut unmapped, "witness", Some(self.process.witness.name()));
        if self.socket_type != 0 {
            put(
                &mut unmapped,
                "socket_type",
                Some(socket_type_name(self.socket_type)),
            );
        }
        if !self.process.is_complete() {
            put(&mut unmapped, "enrichment", Some("gone"));
        }
        unmapped
    }
}

// === impl Dropped ===

impl Dropped {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let count = self.lost.sum();
        let verb = match self.verdict {
            Verdict::Denied => "denied",
            Verdict::Monitored => "let through by monitor mode",
        };
        let mut event = Envelope {
            code: Code::Dropped,
            class: Class::NetworkActivity,
            activity: activity(self.verdict),
            severity: Severity::Medium,
            status: Status::of(self.verdict == Verdict::Monitored),
            time: self.time,
            feature: ("egress", "ledger"),
            message: format!(
                "{count} more attempts of {} {verb}, their details lost: {}",
                self.agent.label(),
                detail(self.reason)
            ),
        }
        .build(host, sequence);
        verdict_fields(&mut event, self.verdict, self.reason);
        event.insert("count".to_owned(), json!(count));
        self.agent
            .fields(&mut event, self.verdict == Verdict::Denied);
        event.insert(
            "firewall_rule".to_owned(),
            json!({
                "uid": DEFAULT_DENY,
                "name": DEFAULT_DENY,
                "type": "egress",
                "category": self.reason.name(),
            }),
        );
        event.insert("actor".to_owned(), self.agent.actor());
        event.insert("connection_info".to_owned(), connection("unknown"));
        event.insert(
            "src_endpoint".to_owned(),
            json!({ "hostname": host.label() }),
        );
        let mut unmapped = json!({});
        if let Some((id, path)) = &self.cgroup {
            put(&mut unmapped, "cgroup_id", Some(*id));
            put(
                &mut unmapped,
                "cgroup",
                Some(clean(path.as_bytes(), PATH_BYTES)),
            );
        }
        put(&mut unmapped, "hook", Some("unknown"));
        put(&mut unmapped, "verdict", Some(self.verdict.name()));
        put(&mut unmapped, "reason", Some(self.reason.name()));
        put(&mut unmapped, "revision", Some(self.revision));
        put(&mut unmapped, "enrichment", Some("gone"));
        let Lost { kernel, rate, disk } = self.lost;
        let lost = json!({ "kernel": kernel, "rate": rate, "disk": disk });
        put(&mut unmapped, "lost", Some(lost));
        event.insert("unmapped".to_owned(), unmapped);
        Value::Object(event)
    }
}

// === impl Subject ===

impl Subject {
    /// `billing-recon (owner alice@example.com)`.
    pub(super) fn label(&self) -> String {
        if self.registered {
            format!("{} (owner {})", self.id, self.owner)
        } else {
            "an unregistered process".to_owned()
        }
    }

    pub(super) fn actor(&self) -> Value {
        json!({ "app_name": self.name, "app_uid": self.id })
    }

    /// `applied`: whether what happened is what the entry says.
    pub(super) fn fields(&self, event: &mut Map<String, Value>, applied: bool) {
        event.insert(
            "ai_agent".to_owned(),
            json!({ "uid": self.id, "name": self.name }),
        );
        let mut policy = json!({
            "uid": format!("agent/{}", self.id),
            "name": self.id,
            "version": self.hash,
            "type": "egress-scope",
            "is_applied": applied,
        });
        if self.registered {
            let mut desc = format!("owner={}", self.owner);
            if let Some(approval) = &self.approval_ref {
                desc.push_str(&format!(" approval={approval}"));
            }
            if let Some(expires) = self.expires {
                desc.push_str(&format!(" expires={}", rfc3339(expires)));
            }
            put(&mut policy, "desc", Some(desc));
        }
        event.insert("policy".to_owned(), policy);
    }
}

// === impl Parent ===

impl Parent {
    fn to_ocsf(&self) -> Value {
        let mut object = json!({ "pid": self.pid });
        let name = self.name.as_deref();
        put(
            &mut object,
            "name",
            name.map(|name| clean(name.as_bytes(), NAME_BYTES)),
        );
        object
    }
}

// === impl Endpoint ===

impl Endpoint {
    fn socket(self) -> Option<SocketAddr> {
        self.port.map(|port| SocketAddr::new(self.ip, port))
    }

    /// `198.51.100.23:443`, `[2001:db8::1]:443`, `198.51.100.23`.
    pub(super) fn shown(&self) -> String {
        match (self.port, self.ip) {
            (Some(port), IpAddr::V4(ip)) => format!("{ip}:{port}"),
            (Some(port), IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
            (None, ip) => ip.to_string(),
        }
    }
}

// === impl ProcessInfo ===

impl ProcessInfo {
    /// Whether all of it could be read.
    pub(super) fn is_complete(&self) -> bool {
        !self.gone && self.pid != 0 && self.exe.is_some() && self.uid.is_some()
    }
}

// === impl EntryRef ===

impl EntryRef {
    /// `billing-recon.toml:31`, `built in`, or `unknown`.
    pub(super) fn place(&self) -> String {
        if *self == Self::unknown() {
            return self.name.clone();
        }
        if self.file.is_empty() {
            return "built in".to_owned();
        }
        format!("{}:{}", self.file, self.line)
    }
}

/// Who did it: the agent, and its process if that is known.
pub(super) fn actor(agent: &Subject, process: &ProcessInfo) -> Value {
    let mut actor = agent.actor();
    if process.pid == 0 {
        return actor;
    }
    let mut value = json!({
        "pid": process.pid,
        "name": clean(process.name.as_bytes(), NAME_BYTES),
    });
    let command = process.cmd_line.as_deref();
    put(
        &mut value,
        "cmd_line",
        command.map(|line| clean(line.as_bytes(), COMMAND_BYTES)),
    );
    if let Some(exe) = &process.exe {
        let path = clean(exe.as_bytes(), PATH_BYTES);
        let name = path.rsplit('/').next().unwrap_or_default();
        let mut file = json!({ "name": name, "path": path, "type_id": 1, "type": "Regular File" });
        put(&mut file, "is_deleted", process.exe_deleted.then_some(true));
        put(&mut value, "file", Some(file));
    }
    if let Some(uid) = process.uid {
        let mut user = json!({ "uid": uid.to_string() });
        let name = process.user.as_deref();
        put(
            &mut user,
            "name",
            name.map(|name| clean(name.as_bytes(), NAME_BYTES)),
        );
        put(&mut value, "user", Some(user));
    }
    if let Some(parent) = &process.parent {
        put(&mut value, "parent_process", Some(parent.to_ocsf()));
    }
    if !process.ancestors.is_empty() {
        // OCSF's lineage begins with the parent.
        let line = process.parent.iter().chain(&process.ancestors);
        let line: Vec<Value> = line.map(Parent::to_ocsf).collect();
        put(&mut value, "ancestry", Some(line));
    }
    put(&mut actor, "process", Some(value));
    actor
}

// === words ===

/// The id of a container in the path of its cgroup: 64 hexadecimal digits, as Docker, containerd,
/// CRI-O and Podman put it there. The innermost counts.
pub(super) fn container_of(cgroup: &str) -> Option<&str> {
    let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    cgroup
        .rsplit('/')
        .flat_map(|part| part.split(|c| !is_digit(c)))
        .find(|run| run.len() == 64)
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const fn activity(verdict: Verdict) -> (u64, &'static str) {
    match verdict {
        Verdict::Denied => (5, "Refuse"),
        Verdict::Monitored => (1, "Open"),
    }
}

fn verdict_fields(event: &mut Map<String, Value>, verdict: Verdict, reason: Reason) {
    let fields = match verdict {
        Verdict::Denied => json!({
            "status_code": "EPERM",
            "status_detail": detail(reason),
            "action_id": 2,
            "action": "Denied",
            "disposition_id": 2,
            "disposition": "Blocked",
            "is_alert": true,
        }),
        Verdict::Monitored => json!({
            "status_detail": detail(reason),
            "action_id": 3,
            "action": "Observed",
            "disposition_id": 17,
            "disposition": "Logged",
            "is_alert": false,
        }),
    };
    if let Value::Object(fields) = fields {
        event.extend(fields);
    }
}

pub(super) fn connection(protocol: &str) -> Value {
    json!({ "direction_id": 2, "direction": "Outbound", "protocol_name": protocol })
}
