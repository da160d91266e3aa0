//! The one line that a person reads of an event. It is derived from the event's JSON value and
//! from nothing else, so `remit tail` on a file, the daemon and a remote reader never disagree.

use std::fmt::Write as _;

use serde_json::Value;

use super::{
    ocsf::rfc3339,
    text::{PATH_BYTES, clean},
};

/// Behind a line that a probe has provoked.
const PROBE: &str = " (a probe's)";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// One line without its end. `colour` adds escape sequences of our own; none of the event's pass.
pub fn human(event: &Value, colour: bool) -> String {
    let paint = |style: &str, text: &str| match colour {
        true => format!("{style}{text}{PLAIN}"),
        false => text.to_owned(),
    };
    let time = event["time"].as_i64().map_or("-".to_owned(), rfc3339);
    let mut line = paint(DIM, &time);
    if event["class_uid"] != 4001 {
        let _ = write!(
            line,
            " {} {}",
            paint(BOLD, &text(&event["metadata"]["event_code"])),
            text(&event["message"])
        );
        if event["class_uid"] == 4003 && is_of_probe(event) {
            line.push_str(PROBE);
        }
        return line;
    }
    let unmapped = &event["unmapped"];
    let verdict = text(&unmapped["verdict"]).to_uppercase();
    let style = match event["action_id"].as_u64() {
        Some(1) => GREEN,
        Some(2) => RED,
        _ => YELLOW,
    };
    let agent = text(&event["ai_agent"]["uid"]);
    let _ = write!(line, " {} {}", paint(style, &verdict), paint(BOLD, &agent));
    if event["traffic"].is_object() {
        let _ = write!(line, " {}", sent(event));
        return line;
    }
    if unmapped["lost"].is_null() {
        let _ = write!(line, " {}", target(event));
    }
    let rule = &event["firewall_rule"];
    let _ = write!(
        line,
        " {} ({})",
        text(&rule["category"]),
        text(&rule["uid"])
    );
    if let Some(lost) = unmapped["lost"].as_object() {
        let _ = write!(
            line,
            " {} attempts without details:",
            number(&event["count"])
        );
        for (stage, count) in lost.iter().filter(|(_, count)| **count != 0) {
            let _ = write!(line, " {} {}", clean(stage.as_bytes(), 64), number(count));
        }
        return line;
    }
    let process = &event["actor"]["process"];
    if process.is_object() {
        let _ = write!(
            line,
            " pid {} {}",
            number(&process["pid"]),
            text(&process["name"])
        );
        if process["file"].is_object() {
            let _ = write!(line, " {}", text(&process["file"]["path"]));
        }
    } else {
        line.push_str(" pid ?");
    }
    let hook = text(&unmapped["hook"]);
    let _ = write!(line, " {}", hook.rsplit('/').next().unwrap_or_default());
    if event["count"].is_number() {
        let _ = write!(line, " ×{}", number(&event["count"]));
    }
    if is_of_probe(event) {
        line.push_str(PROBE);
    }
    line
}

/// Whether a probe made it, so that it is no violation of the agent's own.
pub fn is_of_probe(event: &Value) -> bool {
    !event["unmapped"]["probe"].is_null()
}

/// What was let through, and where to.
fn sent(event: &Value) -> String {
    let unmapped = &event["unmapped"];
    let to = match event["dst_endpoint"].is_object() {
        true => target(event),
        false => format!("{} more destinations", number(&unmapped["destinations"])),
    };
    let traffic = &event["traffic"];
    format!(
        "{to} {} bytes in {} packets, {} connections, in {} s",
        number(&traffic["bytes_out"]),
        number(&traffic["packets_out"]),
        number(&unmapped["connections"]),
        event["duration"].as_u64().unwrap_or_default() / 1000,
    )
}

/// `tcp 198.51.100.23:443`, with the name if one is known; or `raw socket icmp`.
pub fn target(event: &Value) -> String {
    let protocol = text(&event["connection_info"]["protocol_name"]);
    let dst = &event["dst_endpoint"];
    if !dst.is_object() {
        return format!(
            "{protocol} {} socket",
            text(&event["unmapped"]["socket_type"])
        );
    }
    let ip = text(&dst["ip"]);
    let ip = match dst["port"].as_u64() {
        Some(port) if ip.contains(':') => format!("[{ip}]:{port}"),
        Some(port) => format!("{ip}:{port}"),
        None => ip,
    };
    match dst["hostname"].as_str() {
        Some(_) => format!("{protocol} {ip} {}", text(&dst["hostname"])),
        None => format!("{protocol} {ip}"),
    }
}

/// A string made harmless once more: a file may have been written by somebody else.
fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or("?".to_owned(), |text| clean(text.as_bytes(), PATH_BYTES))
}

fn number(value: &Value) -> String {
    value
        .as_u64()
        .map_or("?".to_owned(), |number| number.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::audit::{
        Decided, Decision, Dropped, Endpoint, Lost, ProcessInfo, Violation,
        record::tests::{host, violation},
    };

    fn line(violation: &Violation) -> String {
        human(&violation.to_ocsf(&host(), 1), false)
    }

    #[test]
    fn a_denial_on_one_line() {
        assert_eq!(
            line(&violation()),
            "2026-11-24T18:22:52.123Z DENIED billing-recon tcp 198.51.100.23:443 out_of_scope \
             (default-deny) pid 41822 python3 /usr/bin/python3.11 connect4 ×37"
        );
    }

    #[test]
    fn the_parts_that_may_be_missing() {
        use agent_ebpf::abi::{Hook, Reason, Witness};
        let v6 = Violation {
            dst: Some(Endpoint {
                ip: "2001:db8::1".parse().unwrap(),
                port: Some(53),
            }),
            dst_name: Some("paste.example.net".to_owned()),
            protocol: 17,
            hook: Hook::Egress,
            count: 1,
            process: ProcessInfo::from_record(0, b"", None, Witness::Unknown),
            ..violation()
        };
        assert!(line(&v6).ends_with(
            " udp [2001:db8::1]:53 paste.example.net out_of_scope (default-deny) pid ? egress"
        ));
        let ping = Violation {
            dst: Some(Endpoint {
                ip: "192.0.2.1".parse().unwrap(),
                port: None,
            }),
            protocol: 1,
            ..violation()
        };
        assert!(line(&ping).contains(" icmp 192.0.2.1 out_of_scope"));
        let socket = Violation {
            dst: None,
            hook: Hook::SockCreate,
            reason: Reason::SocketType,
            socket_type: 3,
            protocol: 1,
            ..violation()
        };
        assert!(line(&socket).contains(" icmp raw socket socket_type (default-deny) "));
    }

    #[test]
    fn lost_details_say_where_they_went() {
        use agent_ebpf::abi::{Reason, Verdict};
        let dropped = Dropped {
            time: 0,
            agent: violation().agent,
            verdict: Verdict::Monitored,
            reason: Reason::OutOfScope,
            lost: Lost {
                kernel: 30,
                rate: 7,
                disk: 0,
            },
            cgroup: None,
            revision: 1,
        };
        assert_eq!(
            human(&dropped.to_ocsf(&host(), 1), false),
            "1970-01-01T00:00:00.000Z MONITORED billing-recon out_of_scope (default-deny) \
             37 attempts without details: kernel 30 rate 7"
        );
    }

    #[test]
    fn a_line_of_a_probe_says_so() {
        let mut event = violation().to_ocsf(&host(), 1);
        assert!(!is_of_probe(&event));
        event["unmapped"]["probe"] = json!("2a");
        assert!(is_of_probe(&event));
        assert!(human(&event, false).ends_with(" connect4 ×37 (a probe's)"));
    }

    #[test]
    fn other_events_show_their_message() {
        let event = Decided {
            time: 0,
            what: Decision::Stopped {
                pid: 7,
                reason: "SIGTERM".to_owned(),
                revision: 3,
            },
        }
        .to_ocsf(&host(), 1);
        assert_eq!(
            human(&event, false),
            "1970-01-01T00:00:00.000Z RM9002 Daemon stopped (SIGTERM); revision 3 stays in force"
        );
    }

    #[test]
    fn colour_adds_nothing_but_colour() {
        let event = violation().to_ocsf(&host(), 1);
        let mut stripped = human(&event, true);
        assert!(stripped.contains("\x1b[31mDENIED\x1b[0m"));
        for style in [RED, YELLOW, BOLD, DIM, PLAIN] {
            stripped = stripped.replace(style, "");
        }
        assert_eq!(stripped, human(&event, false));
    }

    #[test]
    fn a_file_that_somebody_else_wrote_drives_no_terminal() {
        let mut event = violation().to_ocsf(&host(), 1);
        event["ai_agent"]["uid"] = json!("x\u{1b}[2J");
        event["actor"]["process"]["name"] = json!("\u{9b}31m\n");
        event["unmapped"]["hook"] = json!(["not", "text"]);
        event["unmapped"]["lost"] = json!({ "\u{1b}c": 1 });
        event["time"] = json!("soon");
        for event in [
            event.clone(),
            json!(null),
            json!({ "class_uid": 4001 }),
            json!([1]),
        ] {
            assert!(!human(&event, false).chars().any(char::is_control));
        }
    }
}
