//! Fields of the systemd journal, and its native protocol (systemd.journal-fields(7), "Native
//! Journal Protocol"): one datagram an event. `journalctl MESSAGE_ID=…` finds a kind of event,
//! `journalctl REMIT_AGENT=…` an agent's.

use std::{
    io,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::super::{line::human, trail::chain::hex};

/// Where the journal listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// Fields with where they stand in an event.
const FIELDS: [(&str, &str); 16] = [
    ("REMIT_EVENT_CODE", "/metadata/event_code"),
    ("REMIT_SEQUENCE", "/metadata/sequence"),
    ("REMIT_RECORD", "/metadata/uid"),
    ("REMIT_AGENT", "/ai_agent/uid"),
    ("REMIT_VERDICT", "/unmapped/verdict"),
    ("REMIT_REASON", "/unmapped/reason"),
    ("REMIT_RULE", "/firewall_rule/uid"),
    ("REMIT_REVISION", "/unmapped/revision"),
    ("REMIT_COUNT", "/count"),
    ("REMIT_PROTOCOL", "/connection_info/protocol_name"),
    ("REMIT_DESTINATION_IP", "/dst_endpoint/ip"),
    ("REMIT_DESTINATION_PORT", "/dst_endpoint/port"),
    ("REMIT_DESTINATION_NAME", "/dst_endpoint/hostname"),
    ("OBJECT_PID", "/actor/process/pid"),
    ("REMIT_CGROUP", "/unmapped/cgroup"),
    ("REMIT_HASH", "/attestation_list/0/fingerprint/value"),
];

/// The fields of an event.
pub fn fields(event: &Value) -> Vec<(&'static str, String)> {
    let line = human(event, false);
    // The journal has its own time.
    let message = line.split_once(' ').map_or(line.as_str(), |(_, rest)| rest);
    let mut fields = vec![
        ("MESSAGE", message.to_owned()),
        ("PRIORITY", priority(event).to_owned()),
        ("SYSLOG_IDENTIFIER", "remit".to_owned()),
    ];
    if let Some(code) = event["metadata"]["event_code"].as_str() {
        fields.push(("MESSAGE_ID", message_id(code)));
    }
    let agent = event["unmapped"]["agent"].as_str();
    if let Some(agent) = agent.filter(|_| event["ai_agent"].is_null()) {
        fields.push(("REMIT_AGENT", agent.to_owned()));
    }
    for (name, pointer) in FIELDS {
        match event.pointer(pointer) {
            Some(Value::String(text)) => fields.push((name, text.clone())),
            Some(Value::Number(number)) => fields.push((name, number.to_string())),
            _ => {}
        }
    }
    fields
}

/// The same for each event of a code, on every host and in every version.
pub fn message_id(code: &str) -> String {
    let digest = Sha256::digest(format!("remit event {code}"));
    hex(digest.get(..16).unwrap_or_default())
}

/// syslog's.
fn priority(event: &Value) -> &'static str {
    match event["severity_id"].as_u64() {
        Some(4..) => "3",
        Some(3) => "4",
        Some(2) => "5",
        _ => "6",
    }
}

/// The bytes of one datagram.
pub fn datagram(fields: &[(&str, String)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.extend_from_slice(name.as_bytes());
        if value.contains('\n') {
            bytes.push(b'\n');
            bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            bytes.push(b'=');
        }
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(b'\n');
    }
    bytes
}

/// Sends to the journal, and never waits for it.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    lost: u64,
}

// === impl Journal ===

impl Journal {
    /// A sender to the journal that listens at `path`, now or later.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            lost: 0,
        })
    }

    /// Sends an event. One that the journal does not take is counted: the log has it.
    pub fn send(&mut self, event: &Value) {
        let bytes = datagram(&fields(event));
        if self.socket.send_to(&bytes, &self.path).is_err() {
            self.lost += 1;
        }
    }

    /// Events that the journal did not take, since the last call.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::record::tests::{host, violation};

    #[test]
    fn an_event_arrives_as_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixDatagram::bind(&path).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        journal.send(&violation().to_ocsf(&host(), 7));
        let mut bytes = [0; 4096];
        let length = listener.recv(&mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes[..length]).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for line in [
            "MESSAGE=DENIED billing-recon tcp 198.51.100.23:443 out_of_scope (default-deny) pid \
             41822 python3 /usr/bin/python3.11 connect4 ×37",
            "PRIORITY=4",
            "SYSLOG_IDENTIFIER=remit",
            "REMIT_AGENT=billing-recon",
            "REMIT_DESTINATION_PORT=443",
            "OBJECT_PID=41822",
        ] {
            assert!(lines.contains(&line), "{line}\n{text}");
        }
        let id = lines.iter().find_map(|l| l.strip_prefix("MESSAGE_ID="));
        // A value of the past that scripts may have: it must not change.
        assert_eq!(id, Some(message_id("RM1001").as_str()));
        assert_eq!(id.unwrap().len(), 32);
        assert_eq!(journal.take_lost(), 0);
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        journal.send(&violation().to_ocsf(&host(), 8));
        assert_eq!((journal.take_lost(), journal.take_lost()), (1, 0));
    }

    #[test]
    fn a_value_of_several_lines_carries_its_length() {
        assert_eq!(datagram(&[("A", "b".to_owned())]), b"A=b\n");
        let long = datagram(&[("A", "b\nc".to_owned())]);
        assert_eq!(long, b"A\n\x03\0\0\0\0\0\0\0b\nc\n");
    }
}
