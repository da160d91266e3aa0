//! Elastic Common Schema. The AI agent is `remit.agent`: ECS's own `agent` is the log shipper. A
//! block that worked is an `event.outcome` of `success`. Pure.

use serde_json::{Map, Value, json};

use crate::audit::ocsf::rfc3339;

/// The version of ECS that events claim.
pub const ECS_VERSION: &str = "8.17.0";

/// The event in ECS.
pub fn encode(event: &Value) -> Value {
    let mut out = Tree::default();
    let at = |path: &str| event.pointer(path).cloned();
    if let Some(time) = event["time"].as_i64() {
        out.put("@timestamp", Some(json!(rfc3339(time))));
    }
    out.put("ecs.version", Some(json!(ECS_VERSION)));
    out.put("message", at("/message"));
    let (category, kinds) = categories(event);
    let kind = match event["is_alert"].as_bool() {
        Some(true) => "alert",
        _ => "event",
    };
    out.put("event.kind", Some(json!(kind)));
    out.put("event.category", Some(json!([category])));
    out.put("event.type", Some(json!(kinds)));
    out.put("event.outcome", Some(json!(outcome(event))));
    out.put("event.code", at("/metadata/event_code"));
    out.put("event.action", action(event));
    out.put("event.module", Some(json!("remit")));
    let log = event["metadata"]["log_name"].as_str().unwrap_or("events");
    out.put("event.dataset", Some(json!(format!("remit.{log}"))));
    out.put("event.sequence", at("/metadata/sequence"));
    out.put("event.id", at("/metadata/uid"));
    out.put("event.severity", at("/severity_id"));
    out.put("event.reason", at("/status_detail"));
    out.put("service.name", Some(json!("remit")));
    out.put("service.version", at("/metadata/product/version"));

    out.put("host.name", at("/device/name"));
    out.put("host.hostname", at("/device/hostname"));
    out.put("host.id", at("/device/uid"));
    out.put("host.boot.id", at("/device/boot_uid"));
    out.put("host.os.name", at("/device/os/name"));
    out.put("host.os.version", at("/device/os/version"));
    out.put("host.os.kernel", at("/device/os/kernel_release"));
    out.put("host.os.type", Some(json!("linux")));

    out.put("process.pid", at("/actor/process/pid"));
    out.put("process.name", at("/actor/process/name"));
    out.put("process.executable", at("/actor/process/file/path"));
    out.put("process.command_line", at("/actor/process/cmd_line"));
    let parent = "/actor/process/parent_process";
    out.put("process.parent.pid", at(&format!("{parent}/pid")));
    out.put("process.parent.name", at(&format!("{parent}/name")));
    let user = |name: &str| {
        at(&format!("/actor/process/user/{name}")).or_else(|| at(&format!("/actor/user/{name}")))
    };
    out.put("user.id", user("uid"));
    out.put("user.name", user("name"));
    out.put("container.id", at("/unmapped/container_id"));

    for (to, from) in [("source", "src_endpoint"), ("destination", "dst_endpoint")] {
        out.put(&format!("{to}.ip"), at(&format!("/{from}/ip")));
        out.put(&format!("{to}.port"), at(&format!("/{from}/port")));
        let address = at(&format!("/{from}/ip")).or_else(|| at(&format!("/{from}/hostname")));
        out.put(&format!("{to}.address"), address);
    }
    out.put("destination.domain", at("/dst_endpoint/hostname"));
    if event["class_uid"] == 4001 {
        out.put("network.direction", Some(json!("egress")));
        out.put("network.transport", at("/connection_info/protocol_name"));
        let number = event["connection_info"]["protocol_num"].as_u64();
        out.put(
            "network.iana_number",
            number.map(|number| json!(number.to_string())),
        );
        let version = event["connection_info"]["protocol_ver_id"].as_u64();
        out.put(
            "network.type",
            version.map(|version| json!(format!("ipv{version}"))),
        );
        out.put("network.community_id", at("/connection_info/community_uid"));
    }
    out.put("source.bytes", at("/traffic/bytes_out"));
    out.put("source.packets", at("/traffic/packets_out"));
    let rfc3339 = |pointer: &str| Some(json!(rfc3339(at(pointer)?.as_i64()?)));
    out.put("event.start", rfc3339("/start_time"));
    out.put("event.end", rfc3339("/end_time"));
    out.put("rule.id", at("/firewall_rule/uid"));
    out.put("rule.category", at("/firewall_rule/category"));
    out.put("rule.description", at("/firewall_rule/condition"));

    let agent = at("/ai_agent/uid").or_else(|| at("/unmapped/agent"));
    out.put("remit.agent.id", agent.filter(Value::is_string));
    out.put("remit.agent.name", at("/ai_agent/name"));
    out.put("remit.policy.version", at("/policy/version"));
    out.put("remit.count", at("/count"));
    out.put("remit.record", at("/attestation_list/0"));
    // The rest as it is: nothing that an event says is dropped for want of a field.
    if let Some(Value::Object(unmapped)) = at("/unmapped") {
        for (key, value) in unmapped {
            if key != "agent" {
                out.put(&format!("remit.{key}"), Some(value));
            }
        }
    }
    out.put("remit.comment", at("/comment"));
    out.put("dns.question.name", at("/query/hostname"));
    out.put("dns.question.type", at("/query/type"));
    out.put("remit.entity.before", at("/entity"));
    out.put("remit.entity.after", at("/updated_entity"));
    out.put("remit.finding", at("/finding_info"));
    out.put("remit.evidence", at("/evidences/0/data"));
    Value::Object(out.0)
}

/// ECS's own words: `event.category`, and the `event.type`s that go with it.
fn categories(event: &Value) -> (&'static str, Vec<&'static str>) {
    match (
        event["class_uid"].as_u64().unwrap_or_default(),
        event["activity_id"].as_u64().unwrap_or_default(),
    ) {
        (4001, 5) => ("network", vec!["connection", "denied"]),
        (4001, _) => ("network", vec!["connection", "allowed"]),
        (4003, _) if event["action_id"] == 2 => ("network", vec!["protocol", "denied"]),
        (4003, _) => ("network", vec!["protocol", "allowed"]),
        (3004, _) => ("iam", vec!["user", "change"]),
        (2003 | 2004, _) => ("configuration", vec!["info"]),
        (5019, _) => ("configuration", vec!["change"]),
        (6002, 3) => ("process", vec!["start"]),
        (6002, 4) => ("process", vec!["end"]),
        _ => ("process", vec!["info"]),
    }
}

fn outcome(event: &Value) -> &'static str {
    // The status of a denial is that of the attempt; the block itself succeeded.
    match (event["class_uid"].as_u64(), event["status"].as_str()) {
        (Some(4001 | 4003), _) => "success",
        (_, Some("Success")) => "success",
        (_, Some("Failure")) => "failure",
        _ => "unknown",
    }
}

/// `denied`, `monitored`, or what was done, in lower case.
fn action(event: &Value) -> Option<Value> {
    let verdict = event["unmapped"]["verdict"].as_str();
    let activity = || event["type_name"].as_str()?.rsplit_once(": ");
    let word = verdict.or_else(|| activity().map(|(_, activity)| activity))?;
    Some(json!(word.to_lowercase()))
}

/// An object that is filled by dotted names.
#[derive(Default)]
struct Tree(Map<String, Value>);

impl Tree {
    fn put(&mut self, path: &str, value: Option<Value>) {
        let Some(value) = value.filter(|value| !value.is_null()) else {
            return;
        };
        let (parents, name) = path.rsplit_once('.').unwrap_or(("", path));
        let mut at = &mut self.0;
        for parent in parents.split('.').filter(|parent| !parent.is_empty()) {
            let next = at.entry(parent).or_insert_with(|| json!({}));
            match next {
                Value::Object(next) => at = next,
                // A name that is a value already has no members.
                _ => return,
            }
        }
        at.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Verdict;

    use super::*;
    use crate::audit::{
        Violation,
        record::tests::{host, violation},
    };

    #[test]
    fn a_denial_in_ecs() {
        let event = encode(&violation().to_ocsf(&host(), 7));
        let expected = json!({
            "@timestamp": "2026-11-24T18:22:52.123Z",
            "ecs": { "version": "8.17.0" },
            "message": "Denied billing-recon (owner alice@example.com): tcp 198.51.100.23:443: destination not in scope",
            "event": {
                "kind": "alert",
                "category": ["network"],
                "type": ["connection", "denied"],
                "outcome": "success",
                "code": "RM1001",
                "action": "denied",
                "module": "remit",
                "dataset": "remit.violations",
                "sequence": 7,
                "severity": 3,
                "reason": "destination not in scope",
            },
            "service": { "name": "remit", "version": env!("CARGO_PKG_VERSION") },
            "host": {
                "name": "host17",
                "hostname": "host17",
                "id": "4f6c0f0e8f1b4c2f9d6b3f2a1c0d9e8f",
                "boot": { "id": "0f6f2f8e-5c3d-4f7b-9d0a-7e8e7a3f5b11" },
                "os": {
                    "name": "Debian GNU/Linux",
                    "version": "12",
                    "kernel": "6.12.57",
                    "type": "linux",
                },
            },
            "process": {
                "pid": 41822,
                "name": "python3",
                "executable": "/usr/bin/python3.11",
                "command_line": "python3 -m recon",
                "parent": { "pid": 41790, "name": "node" },
            },
            "user": { "id": "1007", "name": "agent-billing" },
            "destination": { "ip": "198.51.100.23", "port": 443, "address": "198.51.100.23" },
            "network": {
                "direction": "egress",
                "transport": "tcp",
                "iana_number": "6",
                "type": "ipv4",
            },
            "rule": {
                "id": "default-deny",
                "category": "out_of_scope",
                "description": "no entry grants tcp 198.51.100.23:443",
            },
            "remit": {
                "agent": { "id": "billing-recon", "name": "Billing reconciliation" },
                "policy": { "version": "sha256:9f2c" },
                "count": 37,
                "cgroup_id": 7421,
                "cgroup": "/agents.slice/billing-recon.service",
                "hook": "cgroup/connect4",
                "verdict": "denied",
                "reason": "out_of_scope",
                "revision": 12,
                "witness": "current",
            },
        });
        assert_eq!(event, expected, "{event:#}");
    }

    #[test]
    fn what_monitor_mode_let_through_was_allowed() {
        let monitored = Violation {
            verdict: Verdict::Monitored,
            ..violation()
        };
        let event = encode(&monitored.to_ocsf(&host(), 1));
        assert_eq!(event["event"]["type"], json!(["connection", "allowed"]));
        assert_eq!(event["event"]["kind"], "event");
    }
}
