//! The control socket from outside, with a stand-in for the daemon behind it. Those that take on
//! other users need root: `cargo test -p remit --test control -- --include-ignored`.

#![allow(
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod stand_in;

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    time::Duration,
};

use remit::control::{
    client::{Client, ClientError},
    protocol::{
        Agent, Agents, Code, Explain, Held, Myself, Posture, Reconciled, Refusal, Reload, RunGrant,
        RunRequest, Status,
    },
    server::{BindError, Listener},
};
use stand_in::{Answers, ELSEWHERE, Served, held, serve_at, status};

fn served(roots: &[&str]) -> Served {
    stand_in::served(roots, Answers::default())
}

fn client(served: &Served) -> Client {
    Client::new(&served.socket).unwrap()
}

/// Sends `text` as it stands, and reads to the end.
fn exchange(socket: &Path, text: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Refusal {
    match answer.unwrap_err() {
        ClientError::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

/// This process's own cgroup.
fn own_cgroup() -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    line.unwrap().to_owned()
}

/// Runs `act` with another effective user id, on a thread of its own: the raw call, unlike the C
/// library's, changes one thread alone, and SO_PEERCRED tells the thread's.
fn as_user<T: Send>(uid: u32, gid: u32, act: impl FnOnce() -> T + Send) -> T {
    let keep = u32::MAX;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // SAFETY: integers only; no group but `gid` remains.
            let groups = unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) };
            // SAFETY: integers only.
            let group = unsafe { libc::syscall(libc::SYS_setresgid, keep, gid, keep) };
            // SAFETY: integers only.
            let user = unsafe { libc::syscall(libc::SYS_setresuid, keep, uid, keep) };
            assert_eq!((groups, group, user), (0, 0, 0));
            act()
        });
        thread.join().unwrap()
    })
}

#[test]
#[ignore = "needs root"]
fn root_outside_the_fence_may_ask_and_change() {
    let served = served(ELSEWHERE);
    let client = client(&served);
    assert_eq!(
        client.get::<Status>("/status").unwrap(),
        status(Posture::Enforcing)
    );
    assert_eq!(client.get::<Agents>("/agents").unwrap().revision, 7);
    let explain: Explain = client
        .get("/explain?agent=a&addr=2001:db8::1&port=53&protocol=17")
        .unwrap();
    assert_eq!(explain.question.addr.to_string(), "2001:db8::1");
    assert_eq!((explain.question.port, explain.question.protocol), (53, 17));
    let request = RunRequest {
        agent: "a".to_owned(),
    };
    let grant: RunGrant = client.post_json("/run", &request).unwrap();
    assert_eq!(grant.cgroup, Path::new("/cg/a"));

    let missing = refusal(client.get::<Agent>("/agents/ghost"));
    assert_eq!(missing.code, Code::NoSuchAgent);
    assert!(missing.message.contains("`ghost`"));
    let own = refusal(client.get::<Myself>("/self"));
    assert_eq!(own.code, Code::NotGoverned);
}

#[test]
#[ignore = "needs root"]
fn metrics_come_as_text() {
    let served = served(ELSEWHERE);
    let get = "GET /v1/metrics HTTP/1.1\r\nhost: remit\r\n\r\n";
    let answer = exchange(&served.socket, get);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(
        answer.contains("content-type: application/openmetrics-text"),
        "{answer}"
    );
    assert!(answer.ends_with("\r\n\r\nremit_problems 0\n# EOF\n"));
}

#[test]
fn a_loopback_address_serves_metrics_and_nothing_else() {
    let (address, _served) = stand_in::scraped();
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("GET /metrics HTTP/1.1\r\nhost: remit\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("remit_problems 0\n# EOF\n"), "{answer}");
    for (request, status) in [
        ("GET /v1/status", 404),
        ("GET /v1/metrics", 404),
        ("POST /metrics", 405),
        ("POST /v1/reload", 404),
    ] {
        let answer = ask(&format!(
            "{request} HTTP/1.1\r\nhost: remit\r\ncontent-length: 0\r\n\r\n"
        ));
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}: {answer}"
        );
    }
    // Those who connect and say nothing keep nobody out.
    let _silent: Vec<_> = (0..4)
        .map(|_| std::net::TcpStream::connect(address).unwrap())
        .collect();
    let answer = ask("GET /metrics HTTP/1.1\r\nhost: remit\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
#[ignore = "needs root"]
fn a_request_that_the_daemon_drops_is_told_as_such() {
    let reload = refusal(client(&served(ELSEWHERE)).post::<Reload>("/reload"));
    assert_eq!(reload.code, Code::Internal);
}

#[test]
fn root_inside_the_fence_may_ask_about_itself_alone() {
    let own = own_cgroup();
    let served = served(&[&own]);
    let client = client(&served);
    let myself: Myself = client.get("/self").unwrap();
    assert_eq!(myself.cgroup.as_deref(), Some(own.as_str()));
    for path in [
        "/status",
        "/agents",
        "/agents/a",
        "/nothing",
        "/self/",
        "/reconcile",
        "/metrics",
    ] {
        let refused = refusal(client.get::<serde_json::Value>(path));
        assert_eq!(refused.code, Code::Forbidden, "{path}");
        assert!(refused.message.contains(&own), "{refused}");
    }
    let posts = [
        "/reload",
        "/run",
        "/self",
        "/reconcile",
        "/agents/a/suspend",
        "/agents/a/resume",
        "/agents/a/revoke",
    ];
    for path in posts {
        let refused = refusal(client.post::<serde_json::Value>(path));
        assert_eq!(refused.code, Code::Forbidden, "{path}");
    }
}

#[test]
#[ignore = "needs root"]
fn strangers_may_nothing_and_the_socket_keeps_them_out_first() {
    let served = served(ELSEWHERE);
    let kept_out = as_user(65_534, 65_534, || {
        UnixStream::connect(&served.socket).map(drop)
    });
    assert_eq!(
        kept_out.unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );

    open_to_all(&served);
    let get = "GET /v1/status HTTP/1.1\r\nhost: remit\r\n\r\n";
    let answer = as_user(65_534, 65_534, || exchange(&served.socket, get));
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("user 65534 may not use"), "{answer}");
}

#[test]
#[ignore = "needs root"]
fn readers_may_ask_and_not_change() {
    // A group that every system has stands in for `remit`.
    let group = nix::unistd::Group::from_name("nogroup").unwrap().unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = folder.path().join("remit.sock");
    let _served = serve_at(&socket, "nogroup", ELSEWHERE, Answers::default());
    assert_eq!(mode(&socket), 0o660);

    let get = "GET /v1/status HTTP/1.1\r\nhost: remit\r\n\r\n";
    let post = "POST /v1/reload HTTP/1.1\r\nhost: remit\r\ncontent-length: 0\r\n\r\n";
    let gid = group.gid.as_raw();
    let asked = as_user(65_533, gid, || exchange(&socket, get));
    assert!(asked.starts_with("HTTP/1.1 200 "), "{asked}");
    let changed = as_user(65_533, gid, || exchange(&socket, post));
    assert!(changed.starts_with("HTTP/1.1 403 "), "{changed}");
    assert!(changed.contains("may read, not change"), "{changed}");

    // Comparing is reading; mending and holding are not.
    let compared = as_user(65_533, gid, || {
        exchange(&socket, &get.replace("status", "reconcile"))
    });
    assert!(compared.starts_with("HTTP/1.1 200 "), "{compared}");
    for path in [
        "/v1/reconcile",
        "/v1/agents/a/suspend",
        "/v1/agents/a/resume",
        "/v1/agents/a/revoke",
    ] {
        let post = with_body(path, r#"{"reason": "x"}"#);
        let changed = as_user(65_533, gid, || exchange(&socket, &post));
        assert!(changed.starts_with("HTTP/1.1 403 "), "{path}: {changed}");
    }
}

fn with_body(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: r\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[test]
#[ignore = "needs root"]
fn holds_are_asked_for_with_a_reason() {
    let answers = Answers {
        hold: |hold| {
            let reason = format!("{:?} {}", hold.processes, hold.reason);
            Ok(held(&hold.id, "active", hold.state.name(), &reason))
        },
        ..Answers::default()
    };
    let served = stand_in::served(ELSEWHERE, answers);
    for (path, body, after, reason) in [
        ("suspend", r#"{"reason": " x "}"#, "suspended", "Keep x"),
        (
            "revoke",
            r#"{"reason":"x","kill":true}"#,
            "revoked",
            "Kill x",
        ),
        (
            "suspend",
            r#"{"reason":"x","freeze":true}"#,
            "suspended",
            "Freeze x",
        ),
        ("resume", r#"{"reason":"x","kill":false}"#, "active", "x"),
    ] {
        let request = with_body(&format!("/v1/agents/a.b/{path}"), body);
        let answer = exchange(&served.socket, &request);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let held: Held = serde_json::from_str(json).unwrap();
        assert_eq!((held.id.as_str(), held.after.as_str()), ("a.b", after));
        assert_eq!(held.reason, reason);
    }
    let long = format!(r#"{{"reason": "{}"}}"#, "x".repeat(1_025));
    for (path, body, said) in [
        ("suspend", "", "cannot read the body"),
        ("suspend", "{}", "missing field `reason`"),
        ("suspend", r#"{"reason": " "}"#, "the reason is blank"),
        ("suspend", &long, "1025 bytes long"),
        (
            "revoke",
            r#"{"reason":"x","kil":true}"#,
            "unknown field `kil`",
        ),
        (
            "revoke",
            r#"{"reason":"x","kill":true,"freeze":true}"#,
            "exclude each other",
        ),
        ("resume", r#"{"reason":"x","kill":true}"#, "neither kills"),
        ("resume", r#"{"reason":"x","freeze":true}"#, "neither kills"),
    ] {
        let request = with_body(&format!("/v1/agents/a/{path}"), body);
        let answer = exchange(&served.socket, &request);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains(said), "{answer}");
    }
    let get = "GET /v1/agents/a/suspend HTTP/1.1\r\nhost: r\r\n\r\n";
    assert!(exchange(&served.socket, get).starts_with("HTTP/1.1 405 "));
}

#[test]
#[ignore = "needs root"]
fn comparing_and_mending_are_told_apart() {
    let answers = Answers {
        reconcile: |repair| Reconciled {
            entries: if repair { 2 } else { 1 },
            ..stand_in::reconciled()
        },
        ..Answers::default()
    };
    let served = stand_in::served(ELSEWHERE, answers);
    let client = client(&served);
    assert_eq!(client.get::<Reconciled>("/reconcile").unwrap().entries, 1);
    assert_eq!(client.post::<Reconciled>("/reconcile").unwrap().entries, 2);
}

#[test]
#[ignore = "needs root"]
fn a_reload_needs_no_body_and_accepts_a_clock_only_when_told() {
    let answers = Answers {
        reload: Some(Reload {
            revision: 8,
            changed: Vec::new(),
            kept: Vec::new(),
            findings: Vec::new(),
            ok: true,
            closed: 0,
        }),
        ..Answers::default()
    };
    let served = stand_in::served(ELSEWHERE, answers);
    for (body, accepted) in [
        ("", false),
        ("{}", false),
        (r#"{"accept_clock": false}"#, false),
        (r#"{"accept_clock": true}"#, true),
    ] {
        let answer = exchange(&served.socket, &with_body("/v1/reload", body));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(
            answer.contains("clock accepted"),
            accepted,
            "{body}: {answer}"
        );
    }
    let typo = with_body("/v1/reload", r#"{"accept_clocks": true}"#);
    assert!(exchange(&served.socket, &typo).starts_with("HTTP/1.1 400 "));
}

fn open_to_all(served: &Served) {
    let folder = served.socket.parent().unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&served.socket, fs::Permissions::from_mode(0o666)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
#[ignore = "needs root"]
fn what_cannot_be_served_says_so_in_json() {
    let served = served(ELSEWHERE);
    let long = "x".repeat(17 << 10);
    for (request, expected, code) in [
        (
            "GET /v2/status HTTP/1.1\r\nhost: r\r\n\r\n".to_owned(),
            404,
            "not_found",
        ),
        (
            "GET /v1/reload HTTP/1.1\r\nhost: r\r\n\r\n".to_owned(),
            405,
            "method_not_allowed",
        ),
        (
            "GET /v1/explain?agent=a&addr=x HTTP/1.1\r\nhost: r\r\n\r\n".to_owned(),
            400,
            "bad_request",
        ),
        (
            "POST /v1/run HTTP/1.1\r\nhost: r\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
            400,
            "bad_request",
        ),
        (
            format!(
                "POST /v1/run HTTP/1.1\r\nhost: r\r\ncontent-length: {}\r\n\r\n{long}",
                long.len()
            ),
            413,
            "too_large",
        ),
    ] {
        let answer = exchange(&served.socket, &request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{answer}"
        );
        assert!(
            answer.contains(&format!(r#"{{"error":{{"code":"{code}""#)),
            "{answer}"
        );
    }
}

#[test]
#[ignore = "needs root"]
fn silent_strangers_do_not_keep_root_out() {
    let served = served(ELSEWHERE);
    open_to_all(&served);
    let silent: Vec<_> = as_user(65_534, 65_534, || {
        (0..40)
            .map(|_| UnixStream::connect(&served.socket).unwrap())
            .collect()
    });
    assert_eq!(
        client(&served).get::<Status>("/status").unwrap(),
        status(Posture::Enforcing)
    );
    drop(silent);
}

#[test]
fn nobody_there_is_told_from_not_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("remit.sock");
    let client = Client::new(&socket).unwrap();
    let missing = client.get::<Status>("/status").unwrap_err();
    assert!(matches!(missing, ClientError::NoDaemon(_)), "{missing:?}");
    // A socket file whose daemon is gone.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let stale = client.get::<Status>("/status").unwrap_err();
    assert!(matches!(stale, ClientError::NoDaemon(_)), "{stale:?}");
    assert_eq!(
        stale.to_string(),
        format!("no daemon at `{}`", socket.display())
    );
}

#[test]
fn a_dead_daemons_socket_is_replaced_and_a_live_ones_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("run/remit.sock");
    fs::create_dir(folder.path().join("run")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let first = Listener::bind(&socket, "no-such-group").unwrap();
    assert_eq!(mode(&socket), 0o600);
    let second = Listener::bind(&socket, "no-such-group").unwrap_err();
    assert!(matches!(second, BindError::InUse(_)), "{second:?}");
    assert!(UnixStream::connect(&socket).is_ok());
    drop(first);
    assert!(!socket.exists());

    fs::write(&socket, "precious").unwrap();
    let file = Listener::bind(&socket, "no-such-group").unwrap_err();
    assert!(matches!(file, BindError::NotASocket(_)), "{file:?}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
}

#[test]
fn an_old_daemon_leaves_a_new_ones_socket_alone() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("remit.sock");
    let old = Listener::bind(&socket, "no-such-group").unwrap();
    fs::remove_file(&socket).unwrap();
    let new = Listener::bind(&socket, "no-such-group").unwrap();
    drop(old);
    assert!(UnixStream::connect(&socket).is_ok());
    drop(new);
}
