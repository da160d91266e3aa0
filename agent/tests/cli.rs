//! The command line from outside: what it prints where, and what it exits with. Those that ask the
//! stand-in daemon need root, as it lets nobody else ask.

#![allow(
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod stand_in;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use remit::{
    audit::{Actor, Decided, Decision, Difference, Drifted, Host, Mending},
    control::{
        HoldState, Processes,
        protocol::{
            Answer, Code, Drift, DriftSummary, Former, Held, HoldInfo, Posture, Reached,
            Reconciled, Refusal, Reload, Traffic,
        },
    },
};
use stand_in::{Answers, ELSEWHERE, Served, held, reconciled, served, status};
use tempfile::TempDir;

/// Runs `remit` with settings that keep it away from this machine's own.
fn remit(settings: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_remit"))
        .args(arguments)
        .env("REMIT_CONFIG", settings)
        .env_remove("NO_COLOR")
        .output()
        .unwrap()
}

/// Settings whose every path is in `folder`.
fn settings(folder: &Path) -> std::path::PathBuf {
    let file = folder.join("remit.toml");
    let at = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "[paths]\nregistry = {:?}\nsets = [{:?}]\nrun = {:?}\nlog = {:?}\nstate = {:?}\n",
        at("agents.d"),
        at("sets.d"),
        at(""),
        at("log"),
        at("state"),
    );
    fs::write(&file, text).unwrap();
    file
}

fn asked(served: &Served, arguments: &[&str]) -> Output {
    remit(&settings(served.folder.path()), arguments)
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn help_lists_every_command() {
    let folder = TempDir::new().unwrap();
    let help = remit(&settings(folder.path()), &["--help"]);
    assert_eq!(code(&help), 0);
    let text = stdout(&help);
    let listed = text
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next());
    assert_eq!(listed.collect::<Vec<_>>(), COMMANDS);
}

const COMMANDS: &[&str] = &[
    "daemon",
    "fence",
    "run",
    "check",
    "explain",
    "status",
    "guard",
    "agents",
    "tail",
    "top",
    "log",
    "suspend",
    "resume",
    "revoke",
    "reload",
    "reconcile",
    "doctor",
    "init",
    "discover",
    "probe",
    "completions",
    "man",
    "help",
];

#[test]
fn every_command_says_what_it_does() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    for command in COMMANDS.iter().filter(|command| **command != "help") {
        let help = remit(&settings, &[command, "--help"]);
        assert_eq!(code(&help), 0, "{command}");
        assert!(
            stdout(&help).contains(&format!("remit {command}")),
            "{command}"
        );
        let page = remit(&settings, &["man", command]);
        assert_eq!(code(&page), 0, "{command}");
        assert!(stdout(&page).contains(".SH SYNOPSIS"), "{command}");
    }
}

#[test]
fn wrong_usage_is_2_and_leaves_stdout_empty() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    for arguments in [
        &[][..],
        &["nonsense"],
        &["status", "--nonsense"],
        &["status", "extra"],
        &["status", "--require", "something"],
        &["guard"],
        &["guard", "--unit", "x.service", "--cgroup", "/x"],
        &["guard", "--cgroup", "no/leading/slash"],
        &["completions"],
        &["man", "nonsense"],
        &["tail", "--since", "yesterday"],
        &["log", "verify", "--head", "abc"],
        &["log", "query", "--dest", "a b"],
        &["log", "query", "--kind", "nonsense"],
        &["log", "query", "--until", "yesterday"],
        &["explain", "alpha"],
        &["run", "--agent", "alpha"],
        &["run", "--", "true"],
        &["explain", "alpha", "*.example.com:443"],
        &["explain", "alpha", "192.0.2.1:443/sctp"],
        &["suspend", "alpha"],
        &["suspend", "--reason", "x"],
        &["suspend", "alpha", "--reason", " "],
        &["resume", "alpha"],
        &["revoke", "alpha"],
        &["revoke", "alpha", "--reason", "x", "--kill", "--freeze"],
        &["resume", "alpha", "--reason", "x", "--kill"],
        &["resume", "alpha", "--reason", "x", "--freeze"],
        &["reconcile", "alpha"],
    ] {
        let output = remit(&settings, arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert_eq!(stdout(&output), "", "{arguments:?}");
        assert_ne!(stderr(&output), "", "{arguments:?}");
    }
}

#[test]
fn without_a_daemon_it_could_not_be_told() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["status", "--require", "enforcing"],
        &["agents"],
        &["agents", "x"],
        &["reload"],
        &["reload", "--accept-clock"],
        &["suspend", "x", "--reason", "y"],
        &["resume", "x", "--reason", "y"],
        &["revoke", "x", "--reason", "y", "--kill"],
        &["reconcile"],
        &["reconcile", "--repair"],
        &["probe"],
        &["probe", "x"],
        &["run", "--agent", "x", "--", "true", "--json"],
    ] {
        let output = remit(&settings, arguments);
        assert_eq!(code(&output), 3, "{arguments:?}");
        assert_eq!(stdout(&output), "", "{arguments:?}");
        let socket = folder.path().join("remit.sock");
        assert_eq!(
            stderr(&output),
            format!(
                "error: no daemon at `{}`\nhelp: start it with `remit daemon`, or by its systemd \
                 unit\n",
                socket.display()
            )
        );
    }
}

#[test]
fn bad_settings_are_told_with_their_place() {
    let folder = TempDir::new().unwrap();
    let file = settings(folder.path());
    fs::write(&file, "[paths]\nregstry = \"/x\"\n").unwrap();
    let output = remit(&file, &["status"]);
    assert_eq!(code(&output), 3);
    let expected = format!("{}:2:1: error: ", file.display());
    assert!(
        stderr(&output).starts_with(&expected),
        "{}",
        stderr(&output)
    );

    let missing = remit(&folder.path().join("missing.toml"), &["status"]);
    assert_eq!(code(&missing), 3);
    assert!(stderr(&missing).contains("cannot read settings"));
}

#[test]
fn an_empty_variable_names_no_settings() {
    let help = remit(Path::new(""), &["completions", "bash"]);
    assert_eq!(code(&help), 0, "{}", stderr(&help));
}

#[test]
#[ignore = "needs root"]
fn status_exits_by_posture() {
    for (posture, expected) in [
        (Posture::Enforcing, 0),
        (Posture::Degraded, 1),
        (Posture::NotEnforcing, 1),
    ] {
        let answers = Answers {
            status: status(posture),
            ..Answers::default()
        };
        let served = served(ELSEWHERE, answers);
        assert_eq!(code(&asked(&served, &["status"])), expected, "{posture:?}");
        let json = asked(&served, &["status", "--json"]);
        assert_eq!(code(&json), expected);
        let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(value["posture"], posture.name());
        let required = asked(&served, &["status", "--require", "enforcing"]);
        assert_eq!(
            (code(&required), stdout(&required)),
            (expected, String::new())
        );
        let least = asked(&served, &["status", "--require", "degraded"]);
        assert_eq!(code(&least), i32::from(posture == Posture::NotEnforcing));
    }
}

#[test]
#[ignore = "needs root"]
fn probe_exits_by_the_worst_verdict() {
    let served = served(ELSEWHERE, Answers::default());
    for (ids, expected, says) in [
        (
            &["holds"][..],
            0,
            "PASS holds in /agents.slice/x.service: 1 attempts in 80 ms\n",
        ),
        (
            &["dark"],
            3,
            "UNKNOWN dark in /agents.slice/x.service: 1 attempts in 80 ms\n  UNKNOWN IPv4 TCP \
             connect to 192.0.2.7:4000 at cgroup/connect4: must be refused as out_of_scope: \
             connect ended with ENETUNREACH\n",
        ),
    ] {
        let output = asked(&served, &[&["probe"], ids].concat());
        assert_eq!((code(&output), stdout(&output).as_str()), (expected, says));
    }
    for (ids, expected) in [
        (&["holds", "open"][..], 1),
        (&["open", "dark"], 1),
        (&["holds", "dark"], 3),
        (&["ghost"], 1),
    ] {
        let output = asked(&served, &[&["probe"], ids].concat());
        assert_eq!(code(&output), expected, "{ids:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn guard_says_whether_a_cgroup_is_guarded() {
    let served = served(ELSEWHERE, Answers::default());
    let inside = "/agents.slice/billing-recon.service";
    let guarded = asked(&served, &["guard", "--cgroup", inside]);
    assert_eq!(code(&guarded), 0, "{}", stderr(&guarded));
    assert_eq!(
        stdout(&guarded),
        format!("guarded {inside}: fenced, agent billing-recon is active\n")
    );
    let outside = asked(&served, &["guard", "--cgroup", "/user.slice"]);
    assert_eq!(code(&outside), 1);
    assert_eq!(
        stderr(&outside),
        "not guarded: /user.slice: it is below no root\n"
    );
    let json = asked(&served, &["guard", "--cgroup", "/user.slice", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["ok"], false);
    let none = asked(&served, &["guard", "--unit", "no-such-unit-here.service"]);
    assert_eq!(code(&none), 1, "{}", stderr(&none));
}

#[test]
#[ignore = "needs root"]
fn status_shows_guards_agents_and_the_last_violation() {
    let mut said = status(Posture::NotEnforcing);
    for guard in &mut said.guards {
        // Ahead of every clock: however long the others here take, its age is none.
        guard.checked_ms = i64::MAX;
    }
    said.former.push(Former {
        id: "old-agent".to_owned(),
        denied: 12,
        monitored: 0,
        by_reason: [("floor".to_owned(), 12)].into(),
    });
    let answers = Answers {
        status: said,
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    let text = stdout(&asked(&served, &["status"]));
    assert_eq!(
        text,
        "\
NOT ENFORCING since 2026-11-05T00:00:00Z, revision 7, remit 0.1.0
  because egress is not attached at /agents.slice

GUARD     KIND  ROOT           STATE   AGE  EVIDENCE
connect4  link  /agents.slice  live    now  link 12, program 44
egress    link  /agents.slice  ABSENT  now  link 12, program 44

AGENT          STATE   MODE     REVISION  CGROUPS  PROCESSES  ALLOWED  DENIED  MONITORED  EXPIRES
billing-recon  active  enforce  6         1        2          120      3       0          \
2027-12-31T23:59:59Z

billing-recon
  cgroup /agents.slice/billing-recon.service, processes: 2
  reasons floor 1, out_of_scope 2
  last denied billing-recon \\x1b[31mcurl to 192.0.2.7:443/tcp

left the registry: 1 agent, 12 denied and 0 monitored until then

registry: 3 files, 0 errors, 1 warning
drift: registry and kernel were not compared yet
"
    );
}

#[test]
#[ignore = "needs root"]
fn status_and_agents_show_who_holds_an_agent_and_drift() {
    let mut held = status(Posture::Enforcing);
    held.agents[0].state = "suspended".to_owned();
    held.agents[0].hold = Some(HoldInfo {
        state: "suspended".to_owned(),
        reason: "leaked key\u{1b}[2J".to_owned(),
        by: "uid 0 (pid 4711)".to_owned(),
        since_ms: 1_793_836_800_000,
        frozen: true,
    });
    held.drift = DriftSummary {
        checked_ms: Some(1_793_836_900_000),
        open: 1,
        found: 3,
        last_ms: Some(1_793_836_890_000),
    };
    let answers = Answers {
        status: held,
        ..Answers::default()
    };
    let text = stdout(&asked(&served(ELSEWHERE, answers), &["status"]));
    for expected in [
        "\nbilling-recon\n  suspended since 2026-11-05T00:00:00Z by uid 0 (pid 4711), processes \
         frozen: leaked key\\x1b[2J\n",
        "\ndrift: 1 difference unmended, compared 2026-11-05T00:01:40Z; 3 found since the start, \
         the last 2026-11-05T00:01:30Z\n",
    ] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_hold_says_what_it_came_to() {
    let answers = Answers {
        hold: |hold| {
            assert_eq!(hold.processes, Processes::Kill);
            Ok(Held {
                closed: 3,
                killed: 2,
                warnings: vec!["the marker could\u{1b} not be written".to_owned()],
                durable: hold.state == HoldState::Revoked,
                ..held(&hold.id, "active", hold.state.name(), hold.reason.as_str())
            })
        },
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    let revoked = asked(
        &served,
        &[
            "revoke",
            "alpha",
            "--reason",
            "  leaked\u{1b} key ",
            "--kill",
        ],
    );
    assert_eq!(code(&revoked), 0, "{}", stderr(&revoked));
    assert_eq!(
        stdout(&revoked),
        "alpha: active before, revoked now, revision 8\n  reason leaked\\x1b key\n  connections \
         closed: 3\n  processes killed: 2\n  on disk: it survives a restart\n"
    );
    assert_eq!(
        stderr(&revoked),
        "warning: the marker could\\x1b not be written\n"
    );
    let suspended = asked(&served, &["suspend", "alpha", "--reason", "x", "--kill"]);
    assert_eq!(code(&suspended), 0);
    assert!(!stdout(&suspended).contains("on disk"));
    assert!(stderr(&suspended).contains("warning: not on disk: "));
    let json = asked(
        &served,
        &["suspend", "alpha", "--reason", "x", "--kill", "--json"],
    );
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    for (key, expected) in [
        ("id", serde_json::json!("alpha")),
        ("before", "active".into()),
        ("after", "suspended".into()),
        ("reason", "x".into()),
        ("revision", 8.into()),
        ("closed", 3.into()),
        ("killed", 2.into()),
        ("frozen", 0.into()),
        ("durable", false.into()),
    ] {
        assert_eq!(value[key], expected, "{key}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_hold_that_was_there_before_is_no_failure() {
    let answers = Answers {
        hold: |hold| {
            assert_eq!(hold.processes, Processes::Freeze);
            Ok(held(&hold.id, "suspended", "suspended", "x"))
        },
        resume: |resume| {
            Ok(Held {
                frozen: 2,
                ..held(&resume.id, "active", "active", "x")
            })
        },
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    let again = asked(&served, &["suspend", "alpha", "--reason", "x", "--freeze"]);
    assert_eq!(code(&again), 0);
    assert!(stdout(&again).starts_with("alpha: suspended as before, revision 8\n"));
    assert!(stdout(&again).contains("  processes frozen: 0\n"));
    let resumed = asked(&served, &["resume", "alpha", "--reason", "x"]);
    assert_eq!(code(&resumed), 0);
    assert!(stdout(&resumed).starts_with("alpha: active as before, revision 8\n"));
    assert!(stdout(&resumed).contains("  processes thawed: 2\n"));
    // It did not come to what was asked for.
    let revoked = asked(&served, &["revoke", "alpha", "--reason", "x", "--freeze"]);
    assert_eq!(code(&revoked), 1);
    assert!(stderr(&revoked).contains("warning: alpha is suspended all the same"));
}

#[test]
#[ignore = "needs root"]
fn a_hold_that_cannot_be_is_1() {
    let answers = Answers {
        hold: |hold| Err(Refusal::no_such_agent(&hold.id)),
        resume: |resume| match resume.id.as_str() {
            "busy" => Err(Refusal::new(Code::Unavailable, "the daemon is stopping")),
            id => Err(Refusal::new(Code::Conflict, format!("`{id}` is revoked"))
                .help("change its file and have it approved again")),
        },
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    // An id reaches the daemon as it was written, whatever is in it.
    let ghost = asked(&served, &["suspend", "../gh/ost?", "--reason", "x"]);
    assert_eq!((code(&ghost), stdout(&ghost)), (1, String::new()));
    assert!(
        stderr(&ghost).starts_with("error: no agent `../gh/ost?`"),
        "{}",
        stderr(&ghost)
    );
    let revoked = asked(&served, &["resume", "alpha", "--reason", "x", "--json"]);
    assert_eq!((code(&revoked), stdout(&revoked)), (1, String::new()));
    assert_eq!(
        stderr(&revoked),
        "error: `alpha` is revoked\nhelp: change its file and have it approved again\n"
    );
    let busy = asked(&served, &["resume", "busy", "--reason", "x"]);
    assert_eq!(code(&busy), 3, "{}", stderr(&busy));
}

fn drifted(repaired: Option<bool>) -> Drift {
    Drift {
        kind: "changed".to_owned(),
        what: "agents 3".to_owned(),
        agent: Some("billing-recon".to_owned()),
        root: None,
        found: "0x7\u{1b}[2J".to_owned(),
        wanted: "0x8".to_owned(),
        since_ms: 1_793_836_890_000,
        remedy: Some("writes it anew".to_owned()),
        repaired,
        error: (repaired == Some(false)).then(|| "no room".to_owned()),
    }
}

#[test]
#[ignore = "needs root"]
fn reconcile_prints_the_sentence_of_the_audit_log_and_exits_by_what_stands() {
    // As the daemon has it in its log.
    let logged = |mending| {
        let event = Decided {
            time: 0,
            what: Decision::Drifted(Box::new(Drifted {
                difference: Difference {
                    kind: "changed".to_owned(),
                    what: "agents 3".to_owned(),
                    agent: Some("billing-recon".to_owned()),
                    root: None,
                    found: "0x7\u{1b}[2J".to_owned(),
                    wanted: "0x8".to_owned(),
                    mending,
                },
                since: 1_793_836_890_000,
                hash: None,
                by: Actor::Daemon,
                revision: 7,
            })),
        };
        let event = event.to_ocsf(&Host::default(), 1);
        event["message"].as_str().unwrap().to_owned()
    };
    let answers = Answers {
        reconcile: |repair| Reconciled {
            drift: match repair {
                false => vec![drifted(None)],
                true => vec![drifted(Some(true)), drifted(Some(false))],
            },
            notices: vec![Drift {
                kind: "unclaimed_cgroup".to_owned(),
                what: "cgroup /agents.slice/x".to_owned(),
                agent: None,
                found: "1 processes that are nobody's".to_owned(),
                remedy: Some("nothing: register an agent".to_owned()),
                ..drifted(None)
            }],
            information: vec!["`coder` has no cgroup yet".to_owned()],
            ..reconciled()
        },
        ..Answers::default()
    };
    let differs = served(ELSEWHERE, answers);
    let compared = asked(&differs, &["reconcile"]);
    assert_eq!(code(&compared), 1);
    let sentence = logged(Mending::NotTried);
    assert_eq!(
        stdout(&compared),
        format!(
            "{sentence}\n  since 2026-11-05T00:01:30Z\n  --repair: writes it anew\nNotice: \
             unclaimed_cgroup: cgroup /agents.slice/x: 1 processes that are nobody's, since \
             2026-11-05T00:01:30Z; nothing: register an agent\nInformation: `coder` has no cgroup \
             yet\n"
        )
    );
    assert_eq!(
        stderr(&compared),
        "compared 41 items in 3 ms: 1 difference, 0 mended\n"
    );
    let partly = asked(&differs, &["reconcile", "--repair"]);
    assert_eq!(code(&partly), 1);
    assert!(
        stdout(&partly).starts_with(&format!(
            "{}\n  since 2026-11-05T00:01:30Z\n{}\n  since 2026-11-05T00:01:30Z\n  --repair: \
             writes it anew\n",
            logged(Mending::Mended),
            logged(Mending::Failed("no room".to_owned()))
        )),
        "{}",
        stdout(&partly)
    );
    let json = asked(&differs, &["reconcile", "--json"]);
    assert_eq!(code(&json), 1);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["drift"][0]["wanted"], "0x8");

    let answers = Answers {
        reconcile: |repair| Reconciled {
            drift: match repair {
                true => vec![drifted(Some(true))],
                false => Vec::new(),
            },
            ..reconciled()
        },
        ..Answers::default()
    };
    let agrees = served(ELSEWHERE, answers);
    let mended = asked(&agrees, &["reconcile", "--repair"]);
    assert_eq!(code(&mended), 0, "{}", stderr(&mended));
    let none = asked(&agrees, &["reconcile"]);
    assert_eq!((code(&none), stdout(&none)), (0, String::new()));
    assert_eq!(stderr(&none), "compared 41 items in 3 ms: no drift\n");
}

#[test]
#[ignore = "needs root"]
fn only_root_lifts_the_fence() {
    use std::os::unix::process::CommandExt as _;
    let folder = TempDir::new().unwrap();
    let file = settings(folder.path());
    // Readable by all, so that it is not the settings that keep the other user out.
    for path in [folder.path(), &file] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, mode).unwrap();
    }
    let program = folder.path().join("remit");
    // By another process: while this one writes, a child that another test starts would hold the
    // file open for writing, and it could not be executed (ETXTBSY).
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_remit"))
        .arg(&program)
        .status()
        .unwrap();
    assert!(copied.success());
    let output = Command::new(&program)
        .args(["daemon", "--detach-all", "--yes"])
        .env("REMIT_CONFIG", &file)
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert_eq!(
        stderr(&output),
        "error: only root may lift the fence\nhelp: try sudo\n"
    );
}

#[test]
#[ignore = "needs root"]
fn agents_are_listed_and_shown() {
    let served = served(ELSEWHERE, Answers::default());
    let all = asked(&served, &["agents"]);
    assert_eq!(code(&all), 0);
    assert!(
        stdout(&all).contains("billing-recon  active"),
        "{}",
        stdout(&all)
    );
    let one = asked(&served, &["agents", "billing-recon"]);
    assert_eq!(code(&one), 0);
    let text = stdout(&one);
    assert!(text.contains("10.20.0.0/16 5432/tcp"), "{text}");
    assert!(
        text.contains("/etc/remit/agents.d/billing-recon.toml:17"),
        "{text}"
    );

    let ghost = asked(&served, &["agents", "ghost"]);
    assert_eq!(code(&ghost), 1);
    assert!(stderr(&ghost).starts_with("error: no agent `ghost`"));
}

#[test]
#[ignore = "needs root"]
fn reload_is_1_when_a_file_was_bad() {
    let good = Reload {
        revision: 8,
        changed: vec!["billing-recon".to_owned()],
        kept: Vec::new(),
        findings: Vec::new(),
        ok: true,
        closed: 0,
    };
    let bad = Reload {
        kept: vec!["coder".to_owned()],
        findings: vec!["coder.toml:3:1: error: x\n3 | y".to_owned()],
        ok: false,
        ..good.clone()
    };
    let narrowed = Reload {
        closed: 2,
        ..good.clone()
    };
    for (reload, expected, text) in [
        (
            good,
            0,
            "revision 8 in force, 1 agent changed: billing-recon\n",
        ),
        (
            narrowed,
            0,
            "revision 8 in force, 1 agent changed: billing-recon\n2 connections closed, no grant \
             is left for them\n",
        ),
        (
            bad,
            1,
            "coder.toml:3:1: error: x\n3 | y\n\nrevision 8 in force, 1 agent changed: \
             billing-recon\nlast good entry kept: coder\n",
        ),
    ] {
        let answers = Answers {
            reload: Some(reload),
            ..Answers::default()
        };
        let output = asked(&served(ELSEWHERE, answers), &["reload"]);
        assert_eq!(code(&output), expected);
        assert_eq!(stdout(&output), text);
    }
}

#[test]
#[ignore = "needs root"]
fn nobody_reading_is_no_failure() {
    let served = served(ELSEWHERE, Answers::default());
    let mut child = Command::new(env!("CARGO_BIN_EXE_remit"))
        .args(["agents"])
        .env("REMIT_CONFIG", settings(served.folder.path()))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), stderr(&output)), (0, String::new()));
}

#[test]
fn tail_reads_the_log_without_a_daemon() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let none = remit(&settings, &["tail"]);
    assert_eq!((code(&none), stdout(&none)), (0, String::new()));

    let lines = [
        r#"{"time":1793836800000,"class_uid":4001,"message":"one","ai_agent":{"uid":"a"}}"#,
        "torn {",
        r#"{"time":1793836801000,"class_uid":4001,"message":"two","ai_agent":{"uid":"b"}}"#,
    ];
    fs::create_dir(folder.path().join("log")).unwrap();
    fs::write(
        folder.path().join("log/violations.jsonl"),
        lines.map(|line| format!("{line}\n")).concat(),
    )
    .unwrap();
    let raw = remit(&settings, &["tail", "--json"]);
    assert_eq!(code(&raw), 0);
    assert_eq!(stdout(&raw), format!("{}\n{}\n", lines[0], lines[2]));
    assert!(stderr(&raw).starts_with("1 line in `"), "{}", stderr(&raw));
    let one = remit(&settings, &["tail", "--json", "--agent", "b"]);
    assert_eq!(stdout(&one), format!("{}\n", lines[2]));
    let late = remit(
        &settings,
        &["tail", "--json", "--since", "2026-11-05T00:00:01Z"],
    );
    assert_eq!(stdout(&late), format!("{}\n", lines[2]));
    let readable = remit(&settings, &["tail"]);
    assert_eq!(stdout(&readable).lines().count(), 2);
    assert!(!stdout(&readable).contains('\u{1b}'));
    let painted = remit(&settings, &["tail", "--color", "always"]);
    assert!(stdout(&painted).contains('\u{1b}'));
}

#[test]
fn tail_filters_folds_and_converts() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let line = |at: i64, reason: &str, ip: &str, count: u64| {
        format!(
            r#"{{"time":{},"class_uid":4001,"action_id":2,"ai_agent":{{"uid":"a"}},"count":{count},"dst_endpoint":{{"ip":"{ip}","port":443}},"unmapped":{{"verdict":"denied","reason":"{reason}","hook":"cgroup/connect4"}}}}"#,
            1_793_836_800_000 + at
        )
    };
    let lines = [
        line(0, "out_of_scope", "192.0.2.1", 1),
        line(1_000, "out_of_scope", "192.0.2.1", 20),
        line(1_500, "floor", "169.254.169.254", 1),
        line(2_000, "out_of_scope", "192.0.2.1", 21),
    ];
    fs::create_dir(folder.path().join("log")).unwrap();
    fs::write(
        folder.path().join("log/violations.jsonl"),
        lines.clone().map(|line| line + "\n").concat(),
    )
    .unwrap();
    let told = |arguments: &[&str]| {
        let output = remit(&settings, &[&["tail"], arguments].concat());
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        stdout(&output)
            .lines()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let folded = told(&[]);
    assert_eq!(folded.len(), 3, "{folded:?}");
    assert!(folded[2].ends_with("×41"), "{folded:?}");
    assert_eq!(told(&["--all"]).len(), 4);
    assert_eq!(told(&["--json"]), lines);
    assert_eq!(told(&["--json", "--reason", "floor"]), lines[2..3]);
    assert_eq!(
        told(&["--json", "--dest", "192.0.2.0/24:443", "-n", "2"]),
        [lines[1].clone(), lines[3].clone()]
    );
    let ecs = told(&["--format", "ecs", "--reason", "floor"]);
    assert!(ecs[0].starts_with(r#"{"@timestamp""#), "{ecs:?}");
    for wrong in [["--format", "xml"], ["--dest", "a b"], ["--color", "some"]] {
        let output = remit(&settings, &[&["tail"], &wrong[..]].concat());
        assert_eq!(code(&output), 2);
    }
}

/// A trail of a few records in the log folder of the settings.
fn trail(folder: &Path) -> remit::audit::Trail {
    use remit::audit::{Decided, Decision, Host, Limits, Places, Trail};
    let places = Places {
        log: folder.join("log"),
        state: folder.join("state"),
        key: None,
    };
    let limits = Limits {
        max_size: 1 << 30,
        max_total: 1 << 40,
        retention: std::time::Duration::from_secs(1 << 30),
    };
    let host = Host::read();
    let mut trail = Trail::open(&places, limits, &host, 1_793_836_800_000).unwrap();
    for revision in 1..4 {
        let decided = Decided {
            time: 1_793_836_800_000 + revision,
            what: Decision::Stopped {
                pid: 7,
                reason: "SIGTERM".to_owned(),
                revision: revision.unsigned_abs(),
            },
        };
        trail
            .append(decided.time, |sequence| decided.to_ocsf(&host, sequence))
            .unwrap();
    }
    trail.close(1_793_836_800_009).unwrap();
    trail
}

#[test]
fn log_verify_says_whether_the_trail_is_whole() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let none = remit(&settings, &["log", "verify"]);
    assert_eq!(code(&none), 3, "{}", stdout(&none));
    assert_eq!(code(&remit(&settings, &["log", "key"])), 3);

    let head = trail(folder.path()).position().unwrap();
    let whole = remit(&settings, &["log", "verify"]);
    assert_eq!(code(&whole), 0, "{}", stdout(&whole));
    assert!(stdout(&whole).contains("complete to the head: record 5"));
    assert!(stdout(&whole).contains(&format!("head {}", head.hash)));
    assert!(stderr(&whole).contains("accounting not tested"));

    // A copy on another machine.
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    let file = copy.join("audit.jsonl");
    fs::copy(folder.path().join("log/audit.jsonl"), &file).unwrap();
    let pem = remit(&settings, &["log", "key"]);
    assert!(stdout(&pem).starts_with("-----BEGIN PUBLIC KEY-----"));
    let public = copy.join("key.pem");
    fs::write(&public, &pem.stdout).unwrap();
    let at = |path: &Path| path.display().to_string();
    let hash = head.hash.to_string();
    let (file, public) = (at(&file), at(&public));
    let alone = remit(&settings, &["log", "verify", &file]);
    assert_eq!(code(&alone), 3, "{}", stdout(&alone));
    assert!(stdout(&alone).contains("complete to checkpoint 1"));
    let known = ["log", "verify", &file, "--head", &hash, "--key", &public];
    let known = remit(&settings, &known);
    assert_eq!(code(&known), 0, "{}", stdout(&known));
    assert!(stdout(&known).contains("as named by `--key`"));

    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("SIGTERM", "SIGKILL", 1)).unwrap();
    let bent = remit(&settings, &["log", "verify", &at(&copy), "--json"]);
    assert_eq!(code(&bent), 1);
    let report: serde_json::Value = serde_json::from_slice(&bent.stdout).unwrap();
    assert_eq!(report["findings"][0]["line"], 2);
    assert_eq!(report["findings"][0]["record"], 2);
    assert_eq!(report["complete_to"], "checkpoint");
    let bent = remit(&settings, &["log", "verify", &file]);
    assert!(stdout(&bent).starts_with(&format!("{file}:2: record 2: sequence 2: ")));
    let gone = remit(&settings, &["log", "verify", "/nonexistent/audit.jsonl"]);
    assert_eq!(code(&gone), 3);
}

#[test]
fn log_query_finds_lines_of_both_logs() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    assert_eq!(code(&remit(&settings, &["log", "query"])), 0);
    trail(folder.path());
    let denied = |time: i64, port: u16| {
        serde_json::json!({
            "time": time,
            "class_uid": 4001,
            "ai_agent": { "uid": "alpha" },
            "dst_endpoint": { "ip": "192.0.2.7", "port": port },
            "metadata": { "event_code": "RM1001" },
            "unmapped": { "verdict": "denied", "reason": "floor" },
        })
    };
    let log = folder.path().join("log");
    fs::write(
        log.join("violations.jsonl.1"),
        format!("{}\n", denied(5, 80)),
    )
    .unwrap();
    fs::write(
        log.join("violations.jsonl"),
        format!("{}\n", denied(6, 443)),
    )
    .unwrap();
    let query = |arguments: &[&str]| {
        let all: Vec<&str> = ["log", "query"].iter().chain(arguments).copied().collect();
        let found = remit(&settings, &all);
        assert_eq!(code(&found), 0, "{}", stderr(&found));
        stdout(&found)
    };
    assert_eq!(query(&[]).lines().count(), 2 + 5);
    assert_eq!(query(&["--agent", "alpha"]).lines().count(), 2);
    let one = query(&["--dest", "192.0.2.0/24:443", "--json"]);
    assert_eq!(one, format!("{}\n", denied(6, 443)));
    assert_eq!(query(&["--last", "1"]).lines().count(), 1);
    assert_eq!(query(&["--kind", "RM9002"]).lines().count(), 3);
    let count = query(&["--count", "--agent", "alpha"]);
    let row: Vec<&str> = count.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["alpha", "denied", "floor", "2", "2"]);
}

const ENTRY: &str = r#"schema = 1
[agent]
id = "alpha"
owner = "alice@example.com"
[lifecycle]
state = "active"
approved_by = "dave@example.com"
expires = 2999-01-01T00:00:00Z
[selector]
cgroup = ["/agents.slice/alpha"]
[[scope.allow]]
to = "198.51.100.0/24"
ports = [443]
[[scope.deny]]
to = "198.51.100.64/26"
"#;

/// A folder with settings and the agent `alpha`.
fn registry(folder: &Path) -> std::path::PathBuf {
    let file = settings(folder);
    fs::create_dir(folder.join("agents.d")).unwrap();
    fs::write(folder.join("agents.d/alpha.toml"), ENTRY).unwrap();
    file
}

#[test]
fn check_is_0_for_a_good_registry_and_1_for_a_bad_one() {
    let folder = TempDir::new().unwrap();
    let settings = registry(folder.path());
    let good = remit(&settings, &["check"]);
    assert_eq!(
        (code(&good), stdout(&good)),
        (0, String::new()),
        "{}",
        stderr(&good)
    );
    assert_eq!(
        stderr(&good),
        "1 file, 1 agent compiled: 0 errors, 0 warnings\n"
    );

    let bad = folder.path().join("agents.d/beta.toml");
    fs::write(&bad, ENTRY.replace("alpha", "beta") + "typo = 1\n").unwrap();
    fs::create_dir(folder.path().join("agents.d/gamma.toml")).unwrap();
    let output = remit(&settings, &["check"]);
    assert_eq!(code(&output), 1);
    let text = stdout(&output);
    assert!(
        text.contains(&format!("{}:16:1: error: ", bad.display())),
        "{text}"
    );
    assert!(
        text.contains("gamma.toml: error: cannot read: not a regular file"),
        "{text}"
    );
    let json = remit(&settings, &["check", "--json"]);
    assert_eq!(code(&json), 1);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["ok"], false);
    assert_eq!(value["errors"], 2);
    assert_eq!(value["findings"][0]["line"], 16);

    let one = folder.path().join("agents.d/alpha.toml");
    let one = remit(&settings, &["check", one.to_str().unwrap()]);
    assert_eq!(code(&one), 0, "{}", stdout(&one));
    let missing = remit(&settings, &["check", "/nonexistent.toml"]);
    assert_eq!(code(&missing), 1);
}

#[test]
fn check_takes_bad_settings_for_an_answer() {
    let folder = TempDir::new().unwrap();
    let file = settings(folder.path());
    fs::write(&file, "[paths]\nregstry = \"/x\"\n").unwrap();
    let output = remit(&file, &["check"]);
    assert_eq!(code(&output), 1);
    assert!(
        stdout(&output).contains("remit.toml:2:1: error: "),
        "{}",
        stdout(&output)
    );
}

#[test]
fn init_writes_a_first_entry_once() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    let entry = folder.path().join("agents.d/coder.toml");
    let init = |owner: &'static str| {
        let further = [
            "--approved-by",
            "dave@example.com",
            "--allow",
            "198.51.100.7:443",
        ];
        remit(
            &settings,
            &[&["init", "coder", "--owner", owner], &further[..]].concat(),
        )
    };
    // What would not compile is not written.
    let refused = init("dave@example.com");
    assert_eq!(code(&refused), 1, "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains("coder.toml:"),
        "{}",
        stderr(&refused)
    );
    assert!(!entry.exists());

    let written = init("alice@example.com");
    assert_eq!(code(&written), 0, "{}", stderr(&written));
    assert!(
        stdout(&written).contains("active, monitored"),
        "{}",
        stdout(&written)
    );
    assert!(
        stderr(&written).contains("remit reload"),
        "{}",
        stderr(&written)
    );
    let text = fs::read_to_string(&entry).unwrap();
    assert!(text.contains("mode = \"monitor\""), "{text}");
    assert_eq!(code(&remit(&settings, &["check"])), 0);

    let again = init("eve@example.com");
    assert_eq!(code(&again), 1);
    assert_eq!(fs::read_to_string(&entry).unwrap(), text);
    // Nobody can be asked here.
    assert_eq!(code(&remit(&settings, &["init", "other"])), 2);
}

#[test]
fn explain_answers_from_the_registry_alone() {
    let folder = TempDir::new().unwrap();
    let settings = registry(folder.path());
    for (destination, expected, reason) in [
        ("198.51.100.7:443", 0, None),
        ("[::ffff:198.51.100.7]:443", 0, None),
        ("198.51.100.7:443/udp", 1, Some("out_of_scope")),
        ("198.51.100.7:80", 1, Some("out_of_scope")),
        ("198.51.100.70:443", 1, Some("denied")),
        ("169.254.169.254:443", 1, Some("floor")),
        ("198.51.100.7/icmp", 1, Some("out_of_scope")),
        ("198.51.100.7", 0, None),
    ] {
        let output = remit(&settings, &["explain", "alpha", destination]);
        assert_eq!(
            code(&output),
            expected,
            "{destination}: {}",
            stdout(&output)
        );
        assert!(stderr(&output).contains("answered from the registry alone"));
        let json = remit(&settings, &["explain", "--json", "alpha", destination]);
        assert_eq!(code(&json), expected);
        let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(
            value["answers"][0]["registry"]["reason"].as_str(),
            reason,
            "{destination}"
        );
        assert!(value["agree"].is_null());
    }
    let text = stdout(&remit(
        &settings,
        &["explain", "alpha", "198.51.100.70:443"],
    ));
    assert!(
        text.starts_with("denied alpha to 198.51.100.70:443/tcp: denied\n"),
        "{text}"
    );
    assert!(text.contains("agents.d/alpha.toml:15)"), "{text}");

    let ghost = remit(&settings, &["explain", "ghost", "198.51.100.7:443"]);
    assert_eq!(code(&ghost), 1, "{}", stderr(&ghost));
    fs::write(
        folder.path().join("agents.d/alpha.toml"),
        format!("{ENTRY}x = 1"),
    )
    .unwrap();
    let broken = remit(&settings, &["explain", "alpha", "198.51.100.7:443"]);
    assert_eq!(code(&broken), 3, "{}", stderr(&broken));
    assert!(
        stderr(&broken).contains("alpha.toml:16:1: error"),
        "{}",
        stderr(&broken)
    );
}

#[test]
#[ignore = "needs root"]
fn explain_is_loud_when_the_kernel_says_otherwise() {
    let answers = Answers {
        explain: |question| match question.port {
            443 => Answer::Allowed,
            _ => Answer::Denied,
        },
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    registry(served.folder.path());
    let same = asked(&served, &["explain", "alpha", "198.51.100.7:443"]);
    assert_eq!(code(&same), 0, "{}", stderr(&same));
    assert!(
        stdout(&same).contains("kernel    allowed"),
        "{}",
        stdout(&same)
    );
    assert!(!stderr(&same).contains("DISAGREE"));

    // The registry denies what this kernel allows.
    let differs = asked(&served, &["explain", "alpha", "203.0.113.1:443"]);
    assert_eq!(code(&differs), 1);
    assert!(
        stderr(&differs).contains("DISAGREE"),
        "{}",
        stderr(&differs)
    );

    // Only the daemon knows this one.
    let kept = asked(&served, &["explain", "other", "203.0.113.1:443"]);
    assert_eq!(code(&kept), 0);
    assert!(stderr(&kept).contains("stands alone"), "{}", stderr(&kept));
}

#[test]
fn run_says_as_a_shell_would_that_there_is_no_such_command() {
    let folder = TempDir::new().unwrap();
    let settings = settings(folder.path());
    for (command, expected) in [("/nonexistent/command", 127), ("/etc/passwd", 126)] {
        let output = remit(&settings, &["run", "--agent", "alpha", "--", command]);
        assert_eq!(code(&output), expected, "{}", stderr(&output));
    }
}

/// `remit discover` that knows no program, so that only what was reached is listed.
fn discovered(served: &Served, arguments: &[&str]) -> Output {
    let known = served.folder.path().join("known.toml");
    fs::write(&known, "agent = []\n").unwrap();
    let known = known.display().to_string();
    asked(
        served,
        &[&["discover", "--known", &known], arguments].concat(),
    )
}

#[test]
#[ignore = "needs root"]
fn discover_tells_of_a_process_that_has_ended_and_believes_none_of_its_words() {
    let note = |pid, last_ns| Reached {
        pid,
        uid: 1000,
        comm: "x\"\n[scope]".to_owned(),
        cgroup_id: 5,
        cgroup: Some("/user.slice/session-2.scope".to_owned()),
        addr: "192.0.2.7".parse().unwrap(),
        port: 443,
        protocol: 6,
        names: vec!["api.model.example".to_owned()],
        count: 6,
        first_ns: 1,
        last_ns,
    };
    let inside = Reached {
        cgroup_id: 6,
        cgroup: Some("/agents.slice/a.service".to_owned()),
        ..note(4_194_307, 3)
    };
    let answers = Answers {
        traffic: Traffic {
            wanted: true,
            observed: true,
            boot_ms: 1_793_836_800_000,
            // No process has these ids: they are beyond what the kernel gives.
            notes: vec![note(4_194_305, 1), note(4_194_306, 2), inside],
            ..Traffic::default()
        },
        ..Answers::default()
    };
    let served = served(ELSEWHERE, answers);
    let text = discovered(&served, &[]);
    assert_eq!(code(&text), 1);
    assert_eq!(stderr(&text), "");
    let text = stdout(&text);
    let first = "client of api.model.example 2 processes that have ended, the last with pid 4194306, \
                 of user 1000 in /user.slice/session-2.scope: x\"\\x0a[scope]\n  \
                 reached api.model.example (192.0.2.7:443), 12 times, last ";
    assert!(text.starts_with(first), "{text}");
    assert_eq!(text.matches("client of").count(), 1, "{text}");
    assert!(!text.contains("\n[scope]"), "{text}");
    assert!(text.contains("\nname = \"xx0a[scope]\"\n"), "{text}");
    let json = stdout(&discovered(&served, &["--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["processes"], 2);
    assert_eq!(json[0]["reached"][0]["count"], 12);
    assert_eq!(json[0]["reached"][0]["last_ms"], 1_793_836_800_000_i64);
}

#[test]
#[ignore = "needs root"]
fn discover_says_when_traffic_is_not_observed() {
    let served = served(ELSEWHERE, Answers::default());
    let said = discovered(&served, &[]);
    assert_eq!((code(&said), stdout(&said).as_str()), (0, ""));
    let settings = served.folder.path().join("remit.toml");
    assert_eq!(
        stderr(&said),
        format!(
            "traffic to model APIs is not observed; `traffic = true` in `[discover]` of {} has the \
             daemon do it from its next start on\nno process outside the roots looks like an agent \
             that is known here\n",
            settings.display()
        )
    );
}
