//! Holds every event that Remit emits against the OCSF 1.9.0 schemas, and `docs/events.md`
//! against the events.
//!
//! The schemas are not part of this repository: they are looked for in `../shared/ocsf` beside the
//! checkout, or where `REMIT_OCSF_SCHEMAS` says; without them the test says that nothing was
//! tested. `REMIT_BLESS=1` writes `docs/events.md` anew.

use std::{
    env, fs,
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
};

use agent_ebpf::abi::{Cause, Hook, Reason, Verdict, Witness};
use remit::audit::{
    Code, Decided, Decision, Dropped, Endpoint, EntryRef, Host, Lost, Parent, ProcessInfo, Subject,
    Violation, human,
};
use serde_json::Value;

fn host() -> Host {
    Host {
        hostname: "host17".to_owned(),
        machine_id: Some("4f6c0f0e8f1b4c2f9d6b3f2a1c0d9e8f".to_owned()),
        boot_id: Some("0f6f2f8e-5c3d-4f7b-9d0a-7e8e7a3f5b11".to_owned()),
        os_name: "Debian GNU/Linux".to_owned(),
        os_version: Some("12".to_owned()),
        kernel: "6.12.57".to_owned(),
    }
}

fn agent() -> Subject {
    Subject {
        id: "billing-recon".to_owned(),
        name: "Billing reconciliation".to_owned(),
        owner: "alice@example.com".to_owned(),
        hash: "sha256:9f2c1d0b7f1d4f5b8a6f3d2e1c0b9a8f7e6d5c4b3a29181706f5e4d3c2b1a090".to_owned(),
        approval_ref: Some("CHG-20931".to_owned()),
        expires: Some(1_830_211_200_000),
        registered: true,
    }
}

fn endpoint(ip: impl Into<IpAddr>, port: Option<u16>) -> Option<Endpoint> {
    let ip = ip.into();
    Some(Endpoint { ip, port })
}

fn denied() -> Violation {
    Violation {
        time: 1_795_544_572_123,
        agent: agent(),
        verdict: Verdict::Denied,
        reason: Reason::OutOfScope,
        hook: Hook::Connect4,
        cause: Cause::Nothing,
        protocol: 6,
        family: 2,
        socket_type: 0,
        dst: endpoint([198, 51, 100, 23], Some(443)),
        dst_name: None,
        src: None,
        process: ProcessInfo {
            exe: Some("/usr/bin/python3.11".to_owned()),
            cmd_line: Some("python3 -m recon".to_owned()),
            user: Some("agent-billing".to_owned()),
            parent: Some(Parent {
                pid: 41_790,
                name: Some("node".to_owned()),
            }),
            gone: false,
            ..ProcessInfo::from_record(41_822, b"python3\0", Some(1007), Witness::Current)
        },
        cgroup_id: 7_421,
        cgroup: Some("/agents.slice/billing-recon.service".to_owned()),
        entry: None,
        revision: 12,
        count: 37,
    }
}

fn monitored() -> Violation {
    Violation {
        verdict: Verdict::Monitored,
        reason: Reason::Denied,
        hook: Hook::Egress,
        protocol: 17,
        dst: endpoint([0x2001, 0xdb8, 9, 0, 0, 0, 0, 7], Some(53)),
        src: endpoint([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10], Some(48_122)),
        family: 10,
        entry: Some(EntryRef {
            name: "scope.deny[0]".to_owned(),
            text: "2001:db8:9::/48 any".to_owned(),
            file: "/etc/remit/agents.d/billing-recon.toml".to_owned(),
            line: 31,
        }),
        count: 1,
        ..denied()
    }
}

fn dropped() -> Dropped {
    Dropped {
        time: 1_795_544_575_000,
        agent: agent(),
        verdict: Verdict::Denied,
        reason: Reason::OutOfScope,
        lost: Lost {
            kernel: 412,
            rate: 88,
            disk: 0,
        },
        cgroup: Some((7_421, "/agents.slice/billing-recon.service".to_owned())),
        revision: 12,
    }
}

fn decided(what: Decision) -> Value {
    Decided {
        time: 1_795_544_570_000,
        what,
    }
    .to_ocsf(&host(), 1)
}

/// One event of each code, as in the documentation.
fn example(code: Code) -> Value {
    match code {
        Code::Denied => denied().to_ocsf(&host(), 48_213),
        Code::Monitored => monitored().to_ocsf(&host(), 48_214),
        Code::Dropped => dropped().to_ocsf(&host(), 48_215),
        Code::RegistryLoaded => decided(Decision::Loaded {
            revision: 12,
            agents: 41,
            warnings: vec!["ledger.toml:9:11: warning: the grant expired on 2026-11-01".to_owned()],
        }),
        Code::RegistryRefused => decided(Decision::Refused {
            revision: 12,
            agents: vec!["ledger".to_owned()],
            errors: vec!["ledger.toml:9:6: error: host bits set in `10.0.0.1/8`".to_owned()],
        }),
        Code::DaemonStarted => decided(Decision::Started {
            pid: 812,
            roots: vec!["/agents.slice".to_owned()],
            revision: 12,
            adopted: true,
        }),
        Code::DaemonStopped => decided(Decision::Stopped {
            pid: 812,
            reason: "SIGTERM".to_owned(),
            revision: 12,
        }),
    }
}

/// Everything that can look different: each hook and reason, with and without each optional part.
fn variants() -> Vec<Value> {
    let mut events: Vec<Value> = Code::ALL.iter().map(|code| example(*code)).collect();
    for reason in Reason::ALL {
        for hook in Hook::ALL {
            for verdict in Verdict::ALL {
                let violation = Violation {
                    reason: *reason,
                    hook: *hook,
                    verdict: *verdict,
                    ..denied()
                };
                events.push(violation.to_ocsf(&host(), 1));
            }
        }
        let lost = Dropped {
            reason: *reason,
            cgroup: None,
            agent: Subject::unregistered("sha256:00"),
            ..dropped()
        };
        events.push(lost.to_ocsf(&Host::default(), 1));
    }
    for cause in Cause::ALL {
        let fault = Violation {
            reason: Reason::Fault,
            cause: *cause,
            protocol: 0,
            ..denied()
        };
        events.push(fault.to_ocsf(&host(), 1));
    }
    for protocol in 0..=255 {
        let socket = Violation {
            hook: Hook::SockCreate,
            reason: Reason::SocketType,
            protocol,
            socket_type: protocol % 12,
            dst: None,
            ..denied()
        };
        events.push(socket.to_ocsf(&host(), 1));
    }
    let bare = Violation {
        agent: Subject::unregistered("sha256:00"),
        process: ProcessInfo::from_record(0, b"", None, Witness::Unknown),
        cgroup: None,
        dst: None,
        family: 0,
        ..denied()
    };
    events.push(bare.to_ocsf(&Host::default(), 1));
    let gone = Violation {
        process: ProcessInfo::from_record(9, b"\xff\x1b", Some(0), Witness::Owner),
        dst: endpoint(Ipv6Addr::LOCALHOST, None),
        dst_name: Some("paste.example.net".to_owned()),
        src: endpoint(Ipv6Addr::UNSPECIFIED, Some(0)),
        ..denied()
    };
    events.push(gone.to_ocsf(&host(), 1));
    let deleted = Violation {
        process: ProcessInfo {
            exe_deleted: true,
            parent: Some(Parent { pid: 1, name: None }),
            ..denied().process
        },
        ..denied()
    };
    events.push(deleted.to_ocsf(&host(), 1));
    events
}

fn schemas() -> PathBuf {
    env::var_os("REMIT_OCSF_SCHEMAS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/ocsf"),
        PathBuf::from,
    )
}

#[test]
fn every_event_is_valid_ocsf() {
    let dir = schemas();
    // Not passed over where they are missing: `cargo xtask test` leaves this test out there, and
    // counts it as not tested.
    let listing = fs::read_dir(&dir).unwrap_or_else(|error| {
        panic!(
            "no OCSF schemas at {}: {error}; set REMIT_OCSF_SCHEMAS",
            dir.display()
        )
    });
    let mut validators = Vec::new();
    for file in listing {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(stem) = name.strip_suffix(".schema.json") else {
            continue;
        };
        let class: u64 = stem.rsplit('.').next().unwrap().parse().unwrap();
        let schema = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        validators.push((class, jsonschema::validator_for(&schema).unwrap()));
    }
    for event in variants() {
        let class = event["class_uid"].as_u64().unwrap();
        let (_, validator) = validators.iter().find(|(uid, _)| *uid == class).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&event)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}\n{event:#}");
    }
    // The check is able to fail.
    let mut broken = example(Code::Denied);
    broken["connection_info"]
        .as_object_mut()
        .unwrap()
        .remove("direction_id");
    let (_, validator) = validators.iter().find(|(uid, _)| *uid == 4001).unwrap();
    assert!(!validator.is_valid(&broken));
}

#[test]
fn captions_agree_with_their_ids() {
    // OCSF 1.9.0: dictionary and class definitions; the schemas do not check this.
    let table: &[(&str, &[(u64, &str)])] = &[
        (
            "severity",
            &[(1, "Informational"), (2, "Low"), (3, "Medium"), (4, "High")],
        ),
        ("status", &[(1, "Success"), (2, "Failure")]),
        ("action", &[(2, "Denied"), (3, "Observed")]),
        ("disposition", &[(2, "Blocked"), (17, "Logged")]),
    ];
    let activities: &[(u64, u64, &str)] = &[
        (4001, 1, "Open"),
        (4001, 5, "Refuse"),
        (5019, 1, "Log"),
        (6002, 3, "Start"),
        (6002, 4, "Stop"),
    ];
    let classes: &[(u64, &str, u64, &str)] = &[
        (4001, "Network Activity", 4, "Network Activity"),
        (5019, "Device Config State Change", 5, "Discovery"),
        (6002, "Application Lifecycle", 6, "Application Activity"),
    ];
    for event in variants() {
        for (key, pairs) in table {
            let id = &event[format!("{key}_id")];
            if id.is_null() {
                assert!(event[*key].is_null(), "{key} without id");
                continue;
            }
            let pair = pairs.iter().find(|(number, _)| id == number);
            assert_eq!(event[*key], pair.unwrap().1, "{key} {id}");
        }
        let uid = event["class_uid"].as_u64().unwrap();
        let (_, class, category, category_name) =
            classes.iter().find(|(number, ..)| *number == uid).unwrap();
        assert_eq!(event["class_name"], *class);
        assert_eq!(event["category_uid"], *category);
        assert_eq!(event["category_name"], *category_name);
        let activity = event["activity_id"].as_u64().unwrap();
        let (.., caption) = activities
            .iter()
            .find(|(c, a, _)| (*c, *a) == (uid, activity))
            .unwrap();
        assert_eq!(event["activity_name"], *caption);
        assert_eq!(event["type_uid"], uid * 100 + activity);
        assert_eq!(event["type_name"], format!("{class}: {caption}"));
    }
}

#[test]
fn what_the_contract_promises_is_always_there() {
    for event in variants().iter().filter(|event| event["class_uid"] == 4001) {
        for pointer in [
            "/time",
            "/metadata/sequence",
            "/metadata/event_code",
            "/metadata/version",
            "/ai_agent/uid",
            "/policy/version",
            "/firewall_rule/uid",
            "/firewall_rule/category",
            "/connection_info/protocol_name",
            "/connection_info/direction_id",
            "/unmapped/revision",
            "/unmapped/verdict",
            "/unmapped/reason",
            "/unmapped/hook",
        ] {
            assert!(
                event.pointer(pointer).is_some(),
                "no {pointer} in {event:#}"
            );
        }
        let ends = [&event["dst_endpoint"], &event["src_endpoint"]];
        assert!(ends.iter().any(|end| end.is_object()));
        let complete = event.pointer("/actor/process/file/path").is_some();
        assert_eq!(
            complete,
            event["unmapped"]["enrichment"].is_null(),
            "{event:#}"
        );
        assert_eq!(
            event["firewall_rule"]["category"],
            event["unmapped"]["reason"]
        );
    }
}

#[test]
fn documented_examples_are_what_the_code_emits() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/events.md");
    let documented = fs::read_to_string(&path).unwrap_or_default();
    let (prose, _) = documented.split_once(MARK).unwrap_or((&documented, ""));
    let generated = format!("{prose}{MARK}{}", reference());
    if env::var_os("REMIT_BLESS").is_some() {
        fs::write(&path, generated).unwrap();
        return;
    }
    assert!(
        generated == documented,
        "docs/events.md is not what the code emits: REMIT_BLESS=1 cargo test -p remit --test ocsf"
    );
}

const MARK: &str =
    "<!-- From here on generated by agent/tests/ocsf.rs; REMIT_BLESS=1 renews it. -->\n";

fn reference() -> String {
    let mut out = String::from("\n## Codes\n\n| code | log | what |\n|---|---|---|\n");
    for code in Code::ALL {
        let log = code.log().file();
        out += &format!("| `{}` | `{log}` | {} |\n", code.name(), code.title());
    }
    for code in Code::ALL {
        let event = example(*code);
        assert_eq!(event["metadata"]["event_code"], code.name());
        assert_eq!(event["metadata"]["log_name"], code.log().name());
        out += &format!(
            "\n## {}: {}\n\n```text\n{}\n```\n\n```json\n{event:#}\n```\n",
            code.name(),
            code.title(),
            human(&event, false)
        );
    }
    out
}
