//! Holds every event that Remit emits against the OCSF 1.9.0 schemas, and `docs/events.md`
//! against the events.
//!
//! The schemas are not part of this repository: they are looked for in `../shared/ocsf` beside the
//! checkout, or where `REMIT_OCSF_SCHEMAS` says; without them the test says that nothing was
//! tested. `REMIT_BLESS=1` writes `docs/events.md` anew.

mod schemas;

use std::{
    env, fs,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

use agent_ebpf::abi::{Cause, Hook, Reason, Verdict, Witness};
use remit::audit::{
    Actor, Change, ClockAccepted, ClockBehind, ClockStepped, Code, Damaged, Decided, Decision,
    Difference, Drifted, Dropped, Endpoint, EntryRef, FenceLifted, Host, Lifecycle, Lookup, Lost,
    Mending, Parent, ProbeResult, ProbeRun, ProcessInfo, Reached, Refenced, Subject, Succession,
    Tables, Violation,
    encode::{ecs, ocsf18},
    human,
    trail::{
        chain::{Link, Position, hash, seal},
        checkpoint::Checkpoint,
        event::{Resumed, TrailEvent, Why},
        keys::Signer,
    },
};
use schemas::Schemas;
use serde_json::{Map, Value, json};

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
        invocation: None,
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

fn refused() -> Lookup {
    Lookup {
        time: 1_795_544_573_000,
        agent: agent(),
        verdict: Verdict::Denied,
        reason: Reason::NameNotInScope,
        name: "paste.example.net".to_owned(),
        kind: "A".to_owned(),
        why: "name",
        text: "agent billing-recon may not resolve paste.example.net; ask alice@example.com"
            .to_owned(),
        resolver: endpoint([192, 0, 2, 53], Some(53)),
        src: Endpoint {
            ip: [127, 0, 0, 1].into(),
            port: Some(48_122),
        },
        protocol: 17,
        process: denied().process,
        cgroup_id: 7_421,
        cgroup: denied().cgroup,
        entry: None,
        revision: 12,
        count: 3,
    }
}

fn looked_up() -> Lookup {
    Lookup {
        verdict: Verdict::Monitored,
        reason: Reason::Denied,
        protocol: 6,
        entry: Some(EntryRef {
            name: "scope.deny[0]".to_owned(),
            text: "*.example.net any".to_owned(),
            file: "/etc/remit/agents.d/billing-recon.toml".to_owned(),
            line: 31,
        }),
        count: 1,
        ..refused()
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

fn reached() -> Reached {
    Reached {
        since: 1_795_544_275_000,
        until: 1_795_544_575_000,
        agent: agent(),
        protocol: 6,
        dst: endpoint([198, 51, 100, 23], Some(443)),
        destinations: 1,
        dst_name: None,
        entry: Some(EntryRef {
            name: "scope.allow[2]".to_owned(),
            text: "198.51.100.0/24 443/tcp".to_owned(),
            file: "/etc/remit/agents.d/billing-recon.toml".to_owned(),
            line: 24,
        }),
        bytes: 1_204_338,
        packets: 1_021,
        connections: 14,
        revision: 12,
    }
}

fn decided(what: Decision) -> Value {
    let decided = Decided {
        time: 1_795_544_570_000,
        what,
    };
    let Value::Object(event) = decided.to_ocsf(&host(), 1) else {
        panic!("no object")
    };
    sealed(event, Some(before()))
}

const CHAIN: &str = "5b7d0c1f9a3e4d2860c7b1e5f2a49d38";

/// The record before.
fn before() -> Position {
    Position {
        record: 1_041,
        hash: hash(b"before"),
        type_uid: 501_901,
    }
}

/// An event as it stands in the audit trail.
#[allow(
    clippy::unwrap_used,
    reason = "a sealed line that is no JSON has failed the test"
)]
fn sealed(event: Map<String, Value>, after: Option<Position>) -> Value {
    let link = Link {
        chain: CHAIN,
        authority: "host17/remit",
        after,
    };
    serde_json::from_slice(&seal(event, &link).line).unwrap()
}

fn trail(event: &TrailEvent) -> Value {
    let after = (!matches!(event, TrailEvent::Begun { .. })).then(before);
    sealed(event.to_ocsf(&host(), 1, 1_795_544_570_000, 12), after)
}

/// The first key of RFC 8032, section 7.1.
fn signer() -> Signer {
    Signer::from_bytes(&[
        0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c,
        0xc4, 0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae,
        0x7f, 0x60,
    ])
}

fn resumed(why: Why) -> Resumed {
    Resumed {
        why,
        head: Some(1_043),
        found: Some(1_041),
        fragments: vec![(112, hash(b"fragment"))],
    }
}

/// One event of each code, as in the documentation.
fn example(code: Code) -> Value {
    match code {
        Code::Denied => denied().to_ocsf(&host(), 48_213),
        Code::Monitored => monitored().to_ocsf(&host(), 48_214),
        Code::Reached => reached().to_ocsf(&host(), 3_107),
        Code::Dropped => dropped().to_ocsf(&host(), 48_215),
        Code::LookupRefused => refused().to_ocsf(&host(), 48_216),
        Code::LookupMonitored => looked_up().to_ocsf(&host(), 48_217),
        Code::RegistryLoaded => decided(Decision::Loaded {
            revision: 12,
            agents: 41,
            warnings: vec!["ledger.toml:9:11: warning: the grant expired on 2026-11-01".to_owned()],
            closed: 2,
        }),
        Code::RegistryRefused => decided(Decision::Refused {
            revision: 12,
            agents: vec!["ledger".to_owned()],
            errors: vec!["ledger.toml:9:6: error: host bits set in `10.0.0.1/8`".to_owned()],
            closed: 0,
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
        Code::AgentSuspended => lifecycle(Lifecycle {
            closed: 3,
            frozen: 2,
            ..suspended()
        }),
        Code::AgentResumed => lifecycle(Lifecycle {
            change: Change::Resume,
            before: "suspended".to_owned(),
            after: "active".to_owned(),
            reason: "the key was rotated".to_owned(),
            frozen: 2,
            ..suspended()
        }),
        Code::AgentRevoked => lifecycle(Lifecycle {
            change: Change::Revoke,
            after: "revoked".to_owned(),
            reason: "decommissioned, CHG-21004".to_owned(),
            killed: 4,
            ..suspended()
        }),
        Code::RevocationLifted => lifecycle(Lifecycle {
            change: Change::Lift,
            before: "revoked".to_owned(),
            after: "active".to_owned(),
            reason: "its file has changed and is approved again (CHG-21017)".to_owned(),
            by: Actor::Daemon,
            ..suspended()
        }),
        Code::LifecycleRefused => lifecycle(Lifecycle {
            change: Change::Resume,
            before: "revoked".to_owned(),
            after: "revoked".to_owned(),
            reason: "back to work".to_owned(),
            refused: Some("it is revoked, until its file changes and is approved again".to_owned()),
            ..suspended()
        }),
        Code::DriftFound => drift(drifted(Mending::NotTried)),
        Code::DriftMended => drift(drifted(Mending::Mended)),
        Code::DriftStands => drift(drifted(Mending::Failed(
            "cannot write `prefixes`: no space left on device".to_owned(),
        ))),
        Code::ProbePassed => probe(ProbeResult::Pass),
        Code::ProbeFailed => probe(ProbeResult::Fail),
        Code::ProbeUnknown => probe(ProbeResult::Unknown),
        Code::StateDamaged => decided(Decision::Damaged(damaged())),
        Code::ClockBehind => decided(Decision::ClockBehind(ClockBehind {
            wall: 1_795_458_170_000,
            mark: 1_795_544_570_000,
            revision: 12,
        })),
        Code::ClockStepped => decided(Decision::ClockStepped(stepped())),
        Code::ClockAccepted => decided(Decision::ClockAccepted(ClockAccepted {
            by: caller(),
            wall: 1_795_458_170_000,
            mark: 1_795_544_570_000,
            revision: 12,
        })),
        Code::TrailBegun => trail(&TrailEvent::Begun {
            key: signer().public(),
        }),
        Code::TrailCheckpoint => trail(&TrailEvent::Checkpoint(Checkpoint::sign(
            &signer(),
            CHAIN,
            4,
            before(),
            1_795_544_570_000,
        ))),
        Code::TrailResumed => trail(&TrailEvent::Resumed(resumed(Why::Behind))),
        Code::TrailRemoved => trail(&TrailEvent::Removed {
            files: vec!["audit.jsonl.7".to_owned()],
            through: before(),
        }),
        Code::TrailKeyChanged => trail(&TrailEvent::KeyChanged {
            from: signer().public(),
            to: Signer::from_bytes(&[7; 32]).public(),
        }),
        Code::FenceLifted => decided(Decision::FenceLifted(lifted())),
        Code::FenceTakenOver => decided(Decision::Succession(succession())),
        Code::RootFenced => decided(Decision::Refenced(refenced())),
        Code::RootNotFenced => decided(Decision::Refenced(Refenced {
            error: Some("cannot attach `egress`: operation not permitted".to_owned()),
            ..refenced()
        })),
    }
}

fn caller() -> Actor {
    Actor::Caller {
        uid: 0,
        pid: Some(4_711),
    }
}

fn suspended() -> Lifecycle {
    Lifecycle {
        change: Change::Suspend,
        agent: agent(),
        before: "active".to_owned(),
        after: "suspended".to_owned(),
        reason: "its key was seen in a public repository".to_owned(),
        by: caller(),
        closed: 0,
        killed: 0,
        frozen: 0,
        durable: true,
        warnings: Vec::new(),
        refused: None,
        revision: 12,
    }
}

fn lifecycle(lifecycle: Lifecycle) -> Value {
    decided(Decision::Lifecycle(Box::new(lifecycle)))
}

fn drifted(mending: Mending) -> Drifted {
    Drifted {
        difference: Difference {
            kind: "extra".to_owned(),
            what: "prefixes 203.0.113.0/24".to_owned(),
            agent: Some("billing-recon".to_owned()),
            root: None,
            found: "rule set 9: allow any".to_owned(),
            wanted: "nothing".to_owned(),
            mending,
        },
        since: 1_795_544_569_000,
        hash: Some(agent().hash),
        by: Actor::Daemon,
        revision: 12,
    }
}

fn probe(result: ProbeResult) -> Value {
    let (name, text) = match result {
        ProbeResult::Pass => ("pass", "refused at once as out_of_scope, counted and told"),
        ProbeResult::Fail => ("fail", "connect succeeded, and must be refused"),
        ProbeResult::Unknown => ("unknown", "connect ended with ENETUNREACH"),
    };
    let why = match result {
        ProbeResult::Pass => Vec::new(),
        ProbeResult::Fail | ProbeResult::Unknown => vec![format!("IPv4 TCP connect: {text}")],
    };
    let check = (
        "IPv4 TCP connect".to_owned(),
        name,
        format!("to 198.51.100.7:40112, must be refused as out_of_scope: {text}"),
    );
    decided(Decision::Probed(Box::new(ProbeRun {
        agent: "billing-recon".to_owned(),
        hash: agent().hash,
        run: "2a5f1c3e9b00".to_owned(),
        result,
        why,
        began: 1_795_544_569_000,
        checks: vec![check],
        by: Actor::Daemon,
        revision: 12,
    })))
}

fn drift(drifted: Drifted) -> Value {
    decided(Decision::Drifted(Box::new(drifted)))
}

fn damaged() -> Damaged {
    Damaged {
        file: "/var/lib/remit/holds/billing-recon.json".to_owned(),
        why: "its checksum does not match".to_owned(),
        agent: Some("billing-recon".to_owned()),
        consequence: "the agent is suspended".to_owned(),
        moved_to: Some("/var/lib/remit/holds/billing-recon.json.damaged-1795544570000".to_owned()),
        revision: 12,
    }
}

fn stepped() -> ClockStepped {
    ClockStepped {
        by_ms: 86_400_000,
        wall: 1_795_544_570_000,
        failed: false,
        revision: 12,
    }
}

fn lifted() -> FenceLifted {
    FenceLifted {
        by: caller(),
        login_uid: Some(1_000),
        removed: vec!["/sys/fs/bpf/remit/v1".to_owned()],
        error: None,
    }
}

fn succession() -> Succession {
    Succession {
        pid: 812,
        tables: Tables::Migrated {
            from: "v1".to_owned(),
            to: "v2".to_owned(),
        },
        links: 6,
        rewritten: Vec::new(),
        revision: 12,
    }
}

fn refenced() -> Refenced {
    Refenced {
        root: "/agents.slice".to_owned(),
        error: None,
        revision: 12,
    }
}

/// What can look different in the events of `audit.jsonl`.
fn decisions() -> Vec<Value> {
    let mut events = Vec::new();
    for change in Change::ALL {
        for refused in [None, Some("no".to_owned())] {
            for by in [
                Actor::Daemon,
                caller(),
                Actor::Caller {
                    uid: 1_000,
                    pid: None,
                },
            ] {
                events.push(lifecycle(Lifecycle {
                    change: *change,
                    by,
                    refused: refused.clone(),
                    durable: false,
                    warnings: vec!["the marker could not be written".to_owned()],
                    ..suspended()
                }));
            }
        }
    }
    let hostile = "x\u{1b}[2J\n\u{202e}".repeat(400);
    events.push(lifecycle(Lifecycle {
        reason: hostile.clone(),
        before: "suspended".to_owned(),
        ..suspended()
    }));
    for mending in [
        Mending::NotTried,
        Mending::Mended,
        Mending::Failed(hostile.clone()),
    ] {
        events.push(drift(Drifted {
            difference: Difference {
                kind: "detached".to_owned(),
                what: "egress".to_owned(),
                agent: None,
                root: Some("/agents.slice".to_owned()),
                found: hostile.clone(),
                wanted: String::new(),
                mending,
            },
            hash: None,
            by: caller(),
            ..drifted(Mending::NotTried)
        }));
    }
    events.push(decided(Decision::Damaged(Damaged {
        agent: None,
        moved_to: None,
        why: hostile,
        ..damaged()
    })));
    events.push(decided(Decision::ClockStepped(ClockStepped {
        by_ms: i64::MIN,
        failed: true,
        ..stepped()
    })));
    for (removed, error) in [(Vec::new(), None), (Vec::new(), Some("busy".to_owned()))] {
        events.push(decided(Decision::FenceLifted(FenceLifted {
            login_uid: None,
            removed,
            error,
            ..lifted()
        })));
    }
    for tables in [Tables::Adopted, Tables::Grown] {
        events.push(decided(Decision::Succession(Succession {
            tables,
            rewritten: vec!["billing-recon".to_owned()],
            ..succession()
        })));
    }
    events
}

/// Everything that can look different: each hook and reason, with and without each optional part.
fn variants() -> Vec<Value> {
    let mut events: Vec<Value> = Code::ALL.iter().map(|code| example(*code)).collect();
    events.extend(decisions());
    for why in Why::ALL {
        events.push(trail(&TrailEvent::Resumed(resumed(*why))));
    }
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

#[test]
fn every_event_is_valid_ocsf() {
    let schemas = Schemas::of_1_9();
    variants().iter().for_each(|event| schemas.check(event));
    // The check is able to fail.
    let mut broken = example(Code::Denied);
    broken["connection_info"]
        .as_object_mut()
        .unwrap()
        .remove("direction_id");
    assert!(!schemas.is_valid(&broken));
}

#[test]
fn every_event_has_a_valid_form_in_ocsf_1_8() {
    let schemas = Schemas::of_1_8();
    for event in variants() {
        schemas.check(&ocsf18::encode(&event));
        // And the newer form is not one of the older schema: the check is able to fail.
        if event["ai_agent"].is_object() {
            assert!(!schemas.is_valid(&event));
        }
    }
}

#[test]
fn every_event_has_a_form_in_ecs() {
    // Elastic Common Schema 8.17: the values that `event.category` and `event.type` may have, and
    // which go together.
    let allowed: &[(&str, &[&str])] = &[
        (
            "configuration",
            &["access", "change", "creation", "deletion", "info"],
        ),
        (
            "iam",
            &[
                "admin", "change", "creation", "deletion", "group", "info", "user",
            ],
        ),
        (
            "network",
            &[
                "access",
                "allowed",
                "connection",
                "denied",
                "end",
                "info",
                "protocol",
                "start",
            ],
        ),
        ("process", &["access", "change", "end", "info", "start"]),
    ];
    for event in variants() {
        let ecs = ecs::encode(&event);
        for pointer in [
            "/@timestamp",
            "/ecs/version",
            "/message",
            "/event/code",
            "/host/name",
        ] {
            assert!(
                ecs.pointer(pointer).is_some_and(Value::is_string),
                "{pointer} {ecs:#}"
            );
        }
        let category = ecs["event"]["category"][0].as_str().unwrap();
        let (_, kinds) = allowed.iter().find(|(name, _)| *name == category).unwrap();
        for kind in ecs["event"]["type"].as_array().unwrap() {
            assert!(kinds.contains(&kind.as_str().unwrap()), "{category} {kind}");
        }
        let outcome = ecs["event"]["outcome"].as_str().unwrap();
        assert!(["success", "failure", "unknown"].contains(&outcome));
        // ECS's agent is the shipper.
        assert!(ecs["agent"].is_null());
        let denied = event["unmapped"]["verdict"] == "denied";
        let kinds = ecs["event"]["type"].as_array().unwrap();
        assert_eq!(denied, kinds.contains(&json!("denied")));
    }
}

#[test]
fn captions_agree_with_their_ids() {
    // OCSF 1.9.0: dictionary and class definitions; the schemas do not check this.
    let table: &[(&str, &[(u64, &str)])] = &[
        (
            "severity",
            &[(1, "Informational"), (2, "Low"), (3, "Medium"), (4, "High")],
        ),
        (
            "action",
            &[
                (1, "Allowed"),
                (2, "Denied"),
                (3, "Observed"),
                (4, "Modified"),
            ],
        ),
        (
            "disposition",
            &[
                (1, "Allowed"),
                (2, "Blocked"),
                (11, "Corrected"),
                (13, "Uncorrected"),
                (15, "Detected"),
                (17, "Logged"),
            ],
        ),
    ];
    // Findings have statuses of their own.
    let of_findings: &[(u64, &str)] = &[(1, "New"), (2, "In Progress"), (4, "Resolved")];
    let of_others: &[(u64, &str)] = &[(1, "Success"), (2, "Failure")];
    let activities: &[(u64, u64, &str)] = &[
        (2003, 1, "Create"),
        (2004, 1, "Create"),
        (2004, 2, "Update"),
        (2004, 3, "Close"),
        (3004, 10, "Activate"),
        (3004, 11, "Deactivate"),
        (3004, 12, "Suspend"),
        (3004, 13, "Resume"),
        (4001, 1, "Open"),
        (4001, 5, "Refuse"),
        (4001, 6, "Traffic"),
        (4003, 1, "Query"),
        (5019, 1, "Log"),
        (6002, 3, "Start"),
        (6002, 4, "Stop"),
        (6002, 6, "Enable"),
        (6002, 7, "Disable"),
        (6002, 8, "Update"),
        (6002, 99, "Other"),
    ];
    let classes: &[(u64, &str, u64, &str)] = &[
        (2003, "Compliance Finding", 2, "Findings"),
        (2004, "Detection Finding", 2, "Findings"),
        (3004, "Entity Management", 3, "Identity & Access Management"),
        (4001, "Network Activity", 4, "Network Activity"),
        (4003, "DNS Activity", 4, "Network Activity"),
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
        let statuses = if uid == 2003 || uid == 2004 {
            of_findings
        } else {
            of_others
        };
        let status = statuses.iter().find(|(id, _)| event["status_id"] == *id);
        assert_eq!(event["status"], status.unwrap().1);
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
    let is_violation = |event: &&Value| event["metadata"]["log_name"] == "violations";
    for event in variants().iter().filter(is_violation) {
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
fn what_is_decided_about_an_agent_names_it_and_who_asked() {
    for event in variants() {
        let at = |pointer: &str| event.pointer(pointer);
        let class = event["class_uid"].as_u64().unwrap();
        assert!(at("/unmapped/revision").is_some(), "{event:#}");
        // No text of anybody else's drives a terminal or reorders what stands around it.
        let message = event["message"].as_str().unwrap();
        assert!(
            !message.contains(['\u{1b}', '\n', '\u{202e}']),
            "{message:?}"
        );
        match class {
            3004 => {
                assert_eq!(at("/ai_agent/uid"), at("/entity/uid"));
                assert_eq!(at("/policy/version"), at("/entity/version"));
                assert!(!event["comment"].as_str().unwrap().is_empty());
                assert!(event["actor"].is_object());
                let states = ["/entity/data/state", "/updated_entity/data/state"];
                assert!(states.iter().all(|state| at(state).unwrap().is_string()));
            }
            2003 => {
                let agent = at("/unmapped/agent");
                assert_eq!(agent, at("/evidences/0/ai_agent/uid"));
                assert!(at("/unmapped/probe").unwrap().is_string());
                let failed = event["compliance"]["status"] == "Fail";
                assert_eq!(event["is_alert"], failed);
                assert_eq!(event["severity_id"] == 4, failed);
            }
            2004 => {
                let agent = at("/unmapped/agent");
                assert_eq!(agent, at("/evidences/0/ai_agent/uid"));
                assert!(event["finding_info"]["uid"].is_string());
                let innocent = [&json!("fragment"), &json!("power_loss")];
                let severity = if innocent.contains(&&event["unmapped"]["why"]) {
                    2
                } else {
                    4
                };
                assert_eq!(event["severity_id"], severity);
            }
            _ => {}
        }
    }
    // A line that says mended names the one that said found.
    let finding = |mending| drift(drifted(mending))["finding_info"]["uid"].clone();
    assert_eq!(finding(Mending::NotTried), finding(Mending::Mended));
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
