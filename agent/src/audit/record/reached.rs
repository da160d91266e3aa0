//! What an agent reached: bytes, packets and connections that were let through to one destination in
//! a stretch of time.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Endpoint, EntryRef, Subject, event::connection, words::protocol_name};
use crate::{
    audit::{
        ocsf::{Class, Code, Envelope, Host, Severity, Status, put},
        text::clean,
    },
    policy::tables::UnixMillis,
};

/// Longest name of a destination.
const NAME: usize = 255;

/// What an agent reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    /// When the stretch began.
    pub since: UnixMillis,
    /// When it ended.
    pub until: UnixMillis,
    /// Whose.
    pub agent: Subject,
    /// IP protocol number.
    pub protocol: u8,
    /// Where to; none for all that is not told one by one.
    pub dst: Option<Endpoint>,
    /// How many destinations those are.
    pub destinations: u64,
    /// The name that led there last, if one did.
    pub dst_name: Option<String>,
    /// The entry that grants it, as the registry is when this is written.
    pub entry: Option<EntryRef>,
    /// Bytes sent, IP headers included.
    pub bytes: u64,
    /// Packets sent, as the stack hands them to the device.
    pub packets: u64,
    /// Connections begun.
    pub connections: u64,
    /// The registry state in force.
    pub revision: u64,
}

impl Reached {
    /// The event. `sequence` is the line's number within its file.
    pub fn to_ocsf(&self, host: &Host, sequence: u64) -> Value {
        let protocol = protocol_name(self.protocol);
        let to = match &self.dst {
            Some(dst) => format!("{protocol} {}", dst.shown()),
            None => format!("{} more destinations", self.destinations),
        };
        let mut event = Envelope {
            code: Code::Reached,
            class: Class::NetworkActivity,
            activity: (6, "Traffic"),
            severity: Severity::Informational,
            status: Status::Success,
            time: self.until,
            feature: ("egress", "access"),
            message: format!(
                "{} sent {} bytes in {} packets to {to}, {} connections",
                self.agent.label(),
                self.bytes,
                self.packets,
                self.connections
            ),
        }
        .build(host, sequence);
        let fields = [
            ("start_time", json!(self.since)),
            ("end_time", json!(self.until)),
            (
                "duration",
                json!(self.until.saturating_sub(self.since).max(0)),
            ),
            ("action_id", json!(1)),
            ("action", json!("Allowed")),
            ("disposition_id", json!(1)),
            ("disposition", json!("Allowed")),
            ("is_alert", json!(false)),
            (
                "traffic",
                json!({ "bytes_out": self.bytes, "packets_out": self.packets }),
            ),
            ("actor", self.agent.actor()),
        ];
        event.extend(fields.map(|(key, value)| (key.to_owned(), value)));
        self.agent.fields(&mut event, true);
        let mut info = connection(if self.dst.is_some() {
            &protocol
        } else {
            "unknown"
        });
        if let Some(dst) = &self.dst {
            put(&mut info, "protocol_num", Some(self.protocol));
            let version = if matches!(dst.ip, IpAddr::V4(_)) {
                4
            } else {
                6
            };
            put(&mut info, "protocol_ver_id", Some(version));
        }
        event.insert("connection_info".to_owned(), info);
        if let Some(entry) = &self.entry {
            let rule = json!({
                "uid": entry.name,
                "name": entry.name,
                "type": "egress",
                "condition": entry.text,
                "desc": entry.place(),
            });
            event.insert("firewall_rule".to_owned(), rule);
        }
        match &self.dst {
            Some(dst) => {
                let mut value = json!({ "ip": dst.ip.to_string() });
                put(&mut value, "port", dst.port);
                let name = self.dst_name.as_deref();
                put(
                    &mut value,
                    "hostname",
                    name.map(|name| clean(name.as_bytes(), NAME)),
                );
                event.insert("dst_endpoint".to_owned(), value);
            }
            None => {
                let src = json!({ "hostname": host.label() });
                event.insert("src_endpoint".to_owned(), src);
            }
        }
        event.insert(
            "unmapped".to_owned(),
            json!({
                "verdict": "allowed",
                "connections": self.connections,
                "destinations": self.destinations,
                "revision": self.revision,
            }),
        );
        Value::Object(event)
    }
}
