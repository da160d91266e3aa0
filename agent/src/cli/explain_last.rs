//! `remit explain --last ID`: what an agent was refused last, by the log, explained as any other
//! destination.

use serde_json::Value;

use super::{
    Global,
    destination::Target,
    outcome::{Failure, Result},
    output::plain,
};
use crate::audit::tail::{Filter, Tail};

/// The last refusal of an agent.
pub(super) struct Last {
    /// As `explain` takes it; none where a socket was refused before it had a destination.
    pub(super) destination: Option<Target>,
    /// The line for people.
    pub(super) text: String,
}

/// Finds it in the violation log, rotated files included. What a probe provoked does not count.
pub(super) fn find(global: &Global, agent: &str) -> Result<Last> {
    let settings = global.settings()?;
    let filter = Filter {
        agent: Some(agent.to_owned()),
        since: Some(0),
    };
    let path = settings.paths.log.join("violations.jsonl");
    let mut tail = Tail::open(&path, filter).map_err(anyhow::Error::from)?;
    let mut last = None;
    loop {
        let lines = tail.read().map_err(anyhow::Error::from)?;
        if lines.is_empty() {
            break;
        }
        for line in lines {
            let event = line.event;
            let refused = event["class_uid"] == 4001 && event["activity_id"] == 5;
            if refused && event.pointer("/unmapped/probe").is_none() {
                last = Some(event);
            }
        }
    }
    let Some(event) = last else {
        return Err(Failure::no(format!(
            "the log tells of no refusal of `{}`",
            plain(agent)
        )));
    };
    let destination = destination(&event).map(|text| text.parse()).transpose();
    Ok(Last {
        destination: destination
            .map_err(|error| Failure::unknown(format!("the log names no destination: {error}")))?,
        text: event["message"].as_str().unwrap_or_default().to_owned(),
    })
}

/// A refusal's destination as `explain` takes it.
fn destination(event: &Value) -> Option<String> {
    let ip = event.pointer("/dst_endpoint/ip")?.as_str()?;
    let ip = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    let port = event.pointer("/dst_endpoint/port").and_then(Value::as_u64);
    let protocol = event.pointer("/connection_info/protocol_num")?.as_u64()?;
    match (protocol, port) {
        (6, Some(port)) => Some(format!("{ip}:{port}")),
        (17, Some(port)) => Some(format!("{ip}:{port}/udp")),
        (1 | 58, _) => Some(format!("{ip}/icmp")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_names_its_destination_as_explain_takes_it() {
        let event = |ip: &str, port: Option<u16>, protocol: u8| {
            destination(&json!({
                "dst_endpoint": { "ip": ip, "port": port },
                "connection_info": { "protocol_num": protocol },
            }))
        };
        for (found, wanted) in [
            (event("192.0.2.7", Some(443), 6), "192.0.2.7:443"),
            (event("2001:db8::7", Some(53), 17), "[2001:db8::7]:53/udp"),
            (event("192.0.2.7", None, 1), "192.0.2.7/icmp"),
            (event("2001:db8::7", None, 58), "[2001:db8::7]/icmp"),
        ] {
            assert_eq!(found.as_deref(), Some(wanted));
            assert!(wanted.parse::<Target>().is_ok(), "{wanted}");
        }
        assert_eq!(event("192.0.2.7", None, 132), None);
    }
}
