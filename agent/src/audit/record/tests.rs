//! Claims about records.

use serde_json::{Value, json};

use agent_ebpf::abi::{Addr, Event, Fold};

use super::*;
use crate::audit::Host;

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
        invocation: None,
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
    let unknown = rule(Some(EntryRef::unknown()));
    assert_eq!(unknown["uid"], "unknown");
    assert_eq!(unknown["desc"], "unknown");
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

fn context() -> Context {
    let v = violation();
    Context {
        time: v.time,
        agent: v.agent,
        process: v.process,
        cgroup: v.cgroup,
        invocation: None,
        entry: v.entry,
        dst_name: None,
        revision: v.revision,
        count: v.count,
    }
}

fn event(hook: Hook, protocol: u8) -> Event {
    Event {
        cgroup: 7_421,
        addr: Addr::v4([198, 51, 100, 23]),
        port: 443,
        protocol,
        family: 2,
        hook: hook as u8,
        verdict: Verdict::Denied as u8,
        reason: Reason::OutOfScope as u8,
        ..Event::zeroed()
    }
}

#[test]
fn a_kernel_record_becomes_a_violation() {
    let made = Violation::from_event(&event(Hook::Connect4, 6), context()).unwrap();
    assert_eq!(made, violation());
    let ping = Violation::from_event(&event(Hook::Egress, 1), context()).unwrap();
    assert_eq!(ping.dst.unwrap().port, None, "icmp has no ports");
    let socket = Violation::from_event(&event(Hook::SockCreate, 1), context()).unwrap();
    assert_eq!(socket.dst, None);
    let broken = Event {
        addr: Addr::zeroed(),
        ..event(Hook::Egress, 0)
    };
    assert_eq!(Violation::from_event(&broken, context()).unwrap().dst, None);
}

#[test]
fn an_unknown_word_makes_no_violation() {
    let good = event(Hook::Connect4, 6);
    for bad in [
        Event { hook: 0, ..good },
        Event { verdict: 9, ..good },
        Event {
            reason: 200,
            ..good
        },
        Event { cause: 99, ..good },
    ] {
        assert_eq!(Violation::from_event(&bad, context()), None);
    }
}

#[test]
fn a_fold_slot_becomes_a_violation() {
    let fold = Fold {
        cgroup: 7_421,
        addr: Addr::v4([198, 51, 100, 23]),
        port: 443,
        protocol: 6,
        pid: 41_822,
        hook: Hook::Connect4 as u8,
        verdict: Verdict::Denied as u8,
        reason: Reason::OutOfScope as u8,
        ..Fold::zeroed()
    };
    let made = Violation::from_fold(&fold, context()).unwrap();
    assert_eq!((made.dst, made.count), (violation().dst, 37));
    let process = ProcessInfo::from_fold(&fold);
    assert_eq!(
        (process.pid, process.witness, process.uid),
        (41_822, Witness::Owner, None)
    );
}

#[test]
fn user_zero_is_root_only_when_the_kernel_said_so() {
    let unknown = event(Hook::Egress, 6);
    assert_eq!(ProcessInfo::from_event(&unknown).uid, None);
    let known = Event {
        witness: Witness::Current as u8,
        comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
        pid: 7,
        ..unknown
    };
    let process = ProcessInfo::from_event(&known);
    assert_eq!(
        (process.uid, process.name.as_str(), process.pid),
        (Some(0), "curl", 7)
    );
}

#[test]
fn a_container_is_told_by_its_cgroup() {
    let id = "0123456789abcdef".repeat(4);
    for path in [
        format!("/system.slice/docker-{id}.scope"),
        // `--cgroup-parent=agents.slice`, by Docker and by Podman, and what a container starts below.
        format!("/agents.slice/docker-{id}.scope"),
        format!("/agents.slice/libpod-{id}.scope/container/init.scope"),
        format!("/agents.slice/x/{id}"),
        format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope/inner"),
    ] {
        let event = Violation {
            cgroup: Some(path.clone()),
            invocation: Some("6f\u{1b}".to_owned()),
            ..violation()
        }
        .to_ocsf(&host(), 1);
        assert_eq!(event["unmapped"]["container_id"], id, "{path}");
        assert_eq!(event["unmapped"]["invocation_id"], "6f\\x1b");
    }
    for path in ["/agents.slice/a.service".to_owned(), format!("/x/{id}0")] {
        assert_eq!(event::container_of(&path), None);
    }
}

#[test]
fn a_settled_flow_has_a_community_id() {
    let settled = Violation {
        src: Some(Endpoint {
            ip: "128.232.110.120".parse().unwrap(),
            port: Some(34_855),
        }),
        dst: Some(Endpoint {
            ip: "66.35.250.204".parse().unwrap(),
            port: Some(80),
        }),
        ..violation()
    };
    let id = |violation: &Violation| {
        violation.to_ocsf(&host(), 1)["connection_info"]["community_uid"].clone()
    };
    assert_eq!(id(&settled), "1:LQU9qZlK+B5F3KDmev6m5PMibrg=");
    assert!(id(&violation()).is_null());
}

#[test]
fn the_line_of_ancestors_begins_with_the_parent() {
    let mut deep = violation();
    deep.process.ancestors = vec![Parent {
        pid: 1,
        name: Some("init".to_owned()),
    }];
    let event = deep.to_ocsf(&host(), 1);
    let expected = json!([{ "pid": 41_790, "name": "node" }, { "pid": 1, "name": "init" }]);
    assert_eq!(event["actor"]["process"]["ancestry"], expected);
}
