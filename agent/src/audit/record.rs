//! A violation as OCSF Network Activity (4001). Pure: what happened goes in, one JSON value comes
//! out, and everything that people or tools read of a violation is derived from that value.
//!
//! The sum of `count` (absent: 1) over an agent's lines with `activity_id` 5 is the number of its
//! denied attempts; [`super::ledger`] says how many attempts each line stands for.

use std::net::IpAddr;

use agent_ebpf::abi::{Cause, Hook, Reason, Verdict, Witness};
use serde_json::{Map, Value, json};

use super::{
    ocsf::{Class, Code, Envelope, Host, Severity, put, rfc3339},
    text::{COMMAND_BYTES, NAME_BYTES, PATH_BYTES, clean},
};
use crate::policy::tables::{AgentTables, Entry, UnixMillis};

/// `ai_agent.uid` of processes that no agent claims.
pub const UNREGISTERED: &str = "unregistered";
/// `firewall_rule.uid` where no entry decided.
pub const DEFAULT_DENY: &str = "default-deny";

/// Attempts of one kind, refused or let through by monitor mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// When; the kernel's boot time put on the wall clock.
    pub time: UnixMillis,
    /// Who is accountable.
    pub agent: Subject,
    /// What came of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Where in the kernel it was judged.
    pub hook: Hook,
    /// What the kernel could not tell, if the reason is `fault`.
    pub cause: Cause,
    /// IP protocol number.
    pub protocol: u8,
    /// Address family of the socket (`AF_INET`, `AF_INET6`); 0 when not known.
    pub family: u8,
    /// Socket type (`SOCK_*`); 0 when not known, and always but at sock_create.
    pub socket_type: u8,
    /// Destination; none where a socket was refused before it had one.
    pub dst: Option<Endpoint>,
    /// Name that the destination was leased for, if one is known.
    pub dst_name: Option<String>,
    /// Source, as far as it was settled.
    pub src: Option<Endpoint>,
    /// Which process.
    pub process: ProcessInfo,
    /// Id of the cgroup.
    pub cgroup_id: u64,
    /// Path of the cgroup below the v2 mount, if it is still there.
    pub cgroup: Option<String>,
    /// The entry that decided; none is the default.
    pub entry: Option<EntryRef>,
    /// The registry state in force.
    pub revision: u64,
    /// Attempts that this stands for, 1 or more.
    pub count: u64,
}

/// Attempts of one agent whose details were lost: they are counted, so that nothing is lost
/// silently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// When the loss was settled.
    pub time: UnixMillis,
    /// Who is accountable.
    pub agent: Subject,
    /// What came of the attempts.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// How many, by where the details went.
    pub lost: Lost,
    /// Id and path of a cgroup that the agent has, if there is one.
    pub cgroup: Option<(u64, String)>,
    /// The registry state in force.
    pub revision: u64,
}

/// Attempts by where their details were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// In the kernel: the ring was full, the agent's event budget spent, or the fold slot went to
    /// another kind of attempt.
    pub kernel: u64,
    /// Over the agent's rate of lines.
    pub rate: u64,
    /// The log could not be written.
    pub disk: u64,
}

/// The agent of an event, as its registry entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// `agent.id`, or [`UNREGISTERED`].
    pub id: String,
    /// `agent.name`.
    pub name: String,
    /// `agent.owner`; empty when nobody is.
    pub owner: String,
    /// Hash of the entry in force.
    pub hash: String,
    /// `lifecycle.approval_ref`.
    pub approval_ref: Option<String>,
    /// `lifecycle.expires`.
    pub expires: Option<UnixMillis>,
    /// Whether it is an agent at all.
    pub registered: bool,
}

/// An address, and a port where the protocol has one and it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

/// What was known of a process when its record was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Process id; 0 when not known.
    pub pid: u32,
    /// Its name, from the kernel's record.
    pub name: String,
    /// Path of its executable.
    pub exe: Option<String>,
    /// Whether that file has been removed since.
    pub exe_deleted: bool,
    /// Its arguments, spaced apart.
    pub cmd_line: Option<String>,
    /// Its user.
    pub uid: Option<u32>,
    /// That user's name.
    pub user: Option<String>,
    /// Its parent.
    pub parent: Option<Parent>,
    /// When it started, in clock ticks since boot: tells it from a later one with the same id.
    pub started: Option<u64>,
    /// Whether it, or its tenancy of the id, was over before it could be looked at.
    pub gone: bool,
    /// How the kernel found it.
    pub witness: Witness,
}

/// A process's parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Process id.
    pub pid: u32,
    /// Its name, if it could be read.
    pub name: Option<String>,
}

/// The entry that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryRef {
    /// `scope.deny[0]`.
    pub name: String,
    /// What it says.
    pub text: String,
    /// Its file; empty for what is built in.
    pub file: String,
    /// Its line, from 1; 0 for what is built in.
    pub line: u32,
}

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
            success: self.verdict == Verdict::Monitored,
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
        self.agent.fields(&mut event, self.verdict);
        event.insert("firewall_rule".to_owned(), self.rule());
        event.insert("actor".to_owned(), self.actor());
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

    fn actor(&self) -> Value {
        let mut actor = self.agent.actor();
        let process = &self.process;
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
            let mut file =
                json!({ "name": name, "path": path, "type_id": 1, "type": "Regular File" });
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
            let mut object = json!({ "pid": parent.pid });
            let name = parent.name.as_deref();
            put(
                &mut object,
                "name",
                name.map(|name| clean(name.as_bytes(), NAME_BYTES)),
            );
            put(&mut value, "parent_process", Some(object));
        }
        put(&mut actor, "process", Some(value));
        actor
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
            success: self.verdict == Verdict::Monitored,
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
        self.agent.fields(&mut event, self.verdict);
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

impl Lost {
    /// All of them.
    pub const fn sum(self) -> u64 {
        self.kernel + self.rate + self.disk
    }
}

// === impl Subject ===

impl Subject {
    /// The pseudo-agent of processes that no agent claims; `hash` is that of the rules that hold
    /// for them.
    pub fn unregistered(hash: impl Into<String>) -> Self {
        Self {
            id: UNREGISTERED.to_owned(),
            name: "Unregistered process".to_owned(),
            owner: String::new(),
            hash: hash.into(),
            approval_ref: None,
            expires: None,
            registered: false,
        }
    }

    /// `billing-recon (owner alice@example.com)`.
    fn label(&self) -> String {
        if self.registered {
            format!("{} (owner {})", self.id, self.owner)
        } else {
            "an unregistered process".to_owned()
        }
    }

    fn actor(&self) -> Value {
        json!({ "app_name": self.name, "app_uid": self.id })
    }

    fn fields(&self, event: &mut Map<String, Value>, verdict: Verdict) {
        event.insert(
            "ai_agent".to_owned(),
            json!({ "uid": self.id, "name": self.name }),
        );
        let mut policy = json!({
            "uid": format!("agent/{}", self.id),
            "name": self.id,
            "version": self.hash,
            "type": "egress-scope",
            "is_applied": verdict == Verdict::Denied,
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

impl From<&AgentTables> for Subject {
    fn from(tables: &AgentTables) -> Self {
        Self {
            id: tables.id.clone(),
            name: tables.name.clone(),
            owner: tables.owner.clone(),
            hash: tables.hash.clone(),
            approval_ref: tables.approval_ref.clone(),
            expires: tables.expires,
            registered: true,
        }
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// `198.51.100.23:443`, `[2001:db8::1]:443`, `198.51.100.23`.
    fn shown(&self) -> String {
        match (self.port, self.ip) {
            (Some(port), IpAddr::V4(ip)) => format!("{ip}:{port}"),
            (Some(port), IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
            (None, ip) => ip.to_string(),
        }
    }
}

// === impl ProcessInfo ===

impl ProcessInfo {
    /// What the kernel's record itself says, before anyone looked further.
    pub fn from_record(pid: u32, comm: &[u8], uid: Option<u32>, witness: Witness) -> Self {
        Self {
            pid,
            name: clean(super::text::until_nul(comm), NAME_BYTES),
            exe: None,
            exe_deleted: false,
            cmd_line: None,
            uid,
            user: None,
            parent: None,
            started: None,
            gone: true,
            witness,
        }
    }

    /// Whether all of it could be read.
    fn is_complete(&self) -> bool {
        !self.gone && self.pid != 0 && self.exe.is_some() && self.uid.is_some()
    }
}

// === impl EntryRef ===

impl EntryRef {
    /// `billing-recon.toml:31`, or `built in`.
    fn place(&self) -> String {
        if self.file.is_empty() {
            return "built in".to_owned();
        }
        format!("{}:{}", self.file, self.line)
    }
}

impl From<&Entry> for EntryRef {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            text: entry.text.clone(),
            file: entry.file.clone(),
            line: entry.line,
        }
    }
}

// === words ===

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

fn connection(protocol: &str) -> Value {
    json!({ "direction_id": 2, "direction": "Outbound", "protocol_name": protocol })
}

/// The reason as a person would give it.
const fn detail(reason: Reason) -> &'static str {
    match reason {
        Reason::OutOfScope => "destination not in scope",
        Reason::Denied => "destination denied by the scope",
        Reason::Floor => "destination denied on this host",
        Reason::Expired => "the agent's registration or the grant has expired",
        Reason::NotYetValid => "the agent's registration is not valid yet",
        Reason::Suspended => "the agent is suspended",
        Reason::Revoked => "the agent is revoked",
        Reason::Draft => "the agent is not approved",
        Reason::Unregistered => "no agent claims this process",
        Reason::NameNotInScope => "name not in scope",
        Reason::LoopbackForeign => "loopback peer is not the agent's own",
        Reason::UnixNotInScope => "unix socket not in scope",
        Reason::SocketType => "socket type has no use in the scope",
        Reason::LeaseExpired => "the lease of this address has ended",
        Reason::Translated => "address translation led out of scope",
        Reason::Containment => "containment",
        Reason::Fault => "it could not be told, so it was denied",
    }
}

/// Names of IANA's protocol number registry, in lower case; others are their number.
fn protocol_name(number: u8) -> String {
    match number {
        0 => "ip",
        1 => "icmp",
        2 => "igmp",
        6 => "tcp",
        17 => "udp",
        33 => "dccp",
        41 => "ipv6",
        47 => "gre",
        50 => "esp",
        51 => "ah",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        255 => "raw",
        other => return other.to_string(),
    }
    .to_owned()
}

/// Names of `SOCK_*`.
const fn socket_type_name(number: u8) -> &'static str {
    match number {
        1 => "stream",
        2 => "datagram",
        3 => "raw",
        4 => "rdm",
        5 => "seqpacket",
        6 => "dccp",
        10 => "packet",
        _ => "unknown",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::audit) fn host() -> Host {
        Host {
            hostname: "host17".to_owned(),
            machine_id: Some("4f6c0f0e8f1b4c2f9d6b3f2a1c0d9e8f".to_owned()),
            boot_id: Some("0f6f2f8e-5c3d-4f7b-9d0a-7e8e7a3f5b11".to_owned()),
            os_name: "Debian GNU/Linux".to_owned(),
            os_version: Some("12".to_owned()),
            kernel: "6.12.57".to_owned(),
        }
    }

    pub(in crate::audit) fn violation() -> Violation {
        Violation {
            time: 1_795_544_572_123,
            agent: Subject {
                id: "billing-recon".to_owned(),
                name: "Billing reconciliation".to_owned(),
                owner: "alice@example.com".to_owned(),
                hash: "sha256:9f2c".to_owned(),
                approval_ref: Some("CHG-20931".to_owned()),
                expires: Some(1_830_211_200_000),
                registered: true,
            },
            verdict: Verdict::Denied,
            reason: Reason::OutOfScope,
            hook: Hook::Connect4,
            cause: Cause::Nothing,
            protocol: 6,
            family: 2,
            socket_type: 0,
            dst: Some(Endpoint {
                ip: "198.51.100.23".parse().unwrap(),
                port: Some(443),
            }),
            dst_name: None,
            src: None,
            process: ProcessInfo {
                exe: Some("/usr/bin/python3.11".to_owned()),
                user: Some("agent-billing".to_owned()),
                parent: Some(Parent {
                    pid: 41_790,
                    name: Some("node".to_owned()),
                }),
                cmd_line: Some("python3 -m recon".to_owned()),
                gone: false,
                ..ProcessInfo::from_record(41_822, b"python3\0\0\0", Some(1007), Witness::Current)
            },
            cgroup_id: 7_421,
            cgroup: Some("/agents.slice/billing-recon.service".to_owned()),
            entry: None,
            revision: 12,
            count: 37,
        }
    }

    #[test]
    fn one_attempt_has_no_count() {
        let one = Violation {
            count: 1,
            ..violation()
        };
        assert!(one.to_ocsf(&host(), 1).get("count").is_none());
        assert_eq!(violation().to_ocsf(&host(), 1)["count"], 37);
    }

    #[test]
    fn monitor_mode_is_told_apart_from_a_denial() {
        let denied = violation().to_ocsf(&host(), 1);
        let monitored = Violation {
            verdict: Verdict::Monitored,
            ..violation()
        }
        .to_ocsf(&host(), 1);
        let ids = |event: &Value| {
            ["activity_id", "action_id", "disposition_id", "type_uid"]
                .map(|key| event[key].as_u64().unwrap())
        };
        assert_eq!(ids(&denied), [5, 2, 2, 400_105]);
        assert_eq!(ids(&monitored), [1, 3, 17, 400_101]);
        assert_eq!(denied["status_code"], "EPERM");
        assert!(monitored.get("status_code").is_none());
    }

    #[test]
    fn without_a_destination_there_is_a_source() {
        let socket = Violation {
            hook: Hook::SockCreate,
            reason: Reason::SocketType,
            dst: None,
            protocol: 1,
            socket_type: 3,
            ..violation()
        }
        .to_ocsf(&host(), 1);
        assert!(socket.get("dst_endpoint").is_none());
        assert_eq!(socket["src_endpoint"], json!({ "hostname": "host17" }));
        assert_eq!(socket["connection_info"]["protocol_ver_id"], 4);
        assert_eq!(socket["unmapped"]["socket_type"], "raw");
    }

    #[test]
    fn a_source_that_is_not_settled_is_left_out() {
        let at = |ip: &str, port| {
            Violation {
                src: Some(Endpoint {
                    ip: ip.parse().unwrap(),
                    port,
                }),
                ..violation()
            }
            .to_ocsf(&host(), 1)["src_endpoint"]
                .clone()
        };
        assert_eq!(
            at("10.0.0.7", Some(0)),
            json!({ "hostname": "host17", "ip": "10.0.0.7" })
        );
        assert_eq!(at("10.0.0.7", Some(4321))["port"], 4321);
        assert_eq!(at("0.0.0.0", Some(4321)), Value::Null);
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be() {
        let gone = Violation {
            process: ProcessInfo::from_record(9, b"curl\0", Some(0), Witness::Owner),
            ..violation()
        }
        .to_ocsf(&host(), 1);
        let process = &gone["actor"]["process"];
        assert_eq!(
            *process,
            json!({ "pid": 9, "name": "curl", "user": { "uid": "0" } })
        );
        assert_eq!(gone["unmapped"]["enrichment"], "gone");
        let unknown = Violation {
            process: ProcessInfo::from_record(0, b"", None, Witness::Unknown),
            ..violation()
        }
        .to_ocsf(&host(), 1);
        assert!(unknown["actor"].get("process").is_none());
        assert_eq!(unknown["actor"]["app_uid"], "billing-recon");
        assert_eq!(unknown["unmapped"]["enrichment"], "gone");
        let known = violation().to_ocsf(&host(), 1);
        assert!(known["unmapped"].get("enrichment").is_none());
    }

    #[test]
    fn the_entry_that_decided_is_named_with_its_place() {
        let rule = |entry| {
            Violation {
                entry,
                reason: Reason::Denied,
                ..violation()
            }
            .to_ocsf(&host(), 1)["firewall_rule"]
                .clone()
        };
        let entry = rule(Some(EntryRef {
            name: "scope.deny[0]".to_owned(),
            text: "10.20.9.0/24 any".to_owned(),
            file: "agents.d/billing-recon.toml".to_owned(),
            line: 31,
        }));
        assert_eq!(
            (&entry["uid"], &entry["category"]),
            (&json!("scope.deny[0]"), &json!("denied"))
        );
        assert_eq!(entry["desc"], "agents.d/billing-recon.toml:31");
        assert_eq!(rule(None)["uid"], "default-deny");
    }

    #[test]
    fn what_an_agent_calls_itself_reaches_nobody_raw() {
        let hostile = Violation {
            process: ProcessInfo {
                name: "\u{1b}[2Jx\n".to_owned(),
                exe: Some("/tmp/\u{202e}gpj\r".to_owned()),
                cmd_line: Some("\u{7}".repeat(5_000)),
                ..violation().process
            },
            cgroup: Some("/agents.slice/a\u{1b}]0;".to_owned()),
            ..violation()
        };
        let event = hostile.to_ocsf(&host(), 1);
        let text = event.to_string();
        assert!(text.len() < 6_000, "{}", text.len());
        assert_eq!(event["actor"]["process"]["name"], "\\x1b[2Jx\\x0a");
        // JSON would escape them as well, and its readers would bring them back.
        assert!(
            !text.contains("\\u00") && !text.chars().any(char::is_control),
            "{text}"
        );
    }

    #[test]
    fn lost_details_are_counted_by_where_they_went() {
        let event = Dropped {
            time: 1_795_544_572_123,
            agent: Subject::unregistered("sha256:00"),
            verdict: Verdict::Denied,
            reason: Reason::Unregistered,
            lost: Lost {
                kernel: 30,
                rate: 7,
                disk: 0,
            },
            cgroup: None,
            revision: 12,
        }
        .to_ocsf(&host(), 3);
        assert_eq!(
            (&event["count"], &event["activity_id"]),
            (&json!(37), &json!(5))
        );
        assert_eq!(event["ai_agent"]["uid"], "unregistered");
        assert!(event.get("dst_endpoint").is_none());
        assert_eq!(
            event["unmapped"]["lost"],
            json!({ "kernel": 30, "rate": 7, "disk": 0 })
        );
    }
}
