//! `remit top` through a pseudo-terminal: its screens at 80×24 are kept in `tests/top/`, what keys do,
//! and that the terminal is as before when it ends, however it ends. `UPDATE=1` writes screens anew.

#![allow(
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod stand_in;

use std::{
    fs,
    io::{Read as _, Write as _},
    num::NonZero,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use remit::control::protocol::{Answer, Lease, Posture};
use stand_in::Answers;

/// How long a screen may take to come.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a screen must stay the same to be the one that is meant.
const SETTLED: Duration = Duration::from_millis(350);

const ROWS: NonZero<u16> = NonZero::new(24).unwrap();
const COLUMNS: NonZero<u16> = NonZero::new(80).unwrap();

/// `remit top` on a terminal of its own.
struct Top {
    child: Child,
    terminal: fs::File,
    slave: OwnedFd,
    before: Termios,
    screen: Arc<Mutex<vt100::Parser>>,
    daemon: Option<tokio::runtime::Runtime>,
    _folder: tempfile::TempDir,
}

/// A lease that goes on for so long.
fn lease(now: Option<i64>, millis: i64, name: &str, addr: &str) -> Lease {
    Lease {
        name: Some(name.to_owned()),
        addr: addr.parse().unwrap(),
        until_ms: now.unwrap() + millis,
    }
}

/// Agents in every state, and a log.
fn world(folder: &Path) -> Answers {
    let mut status = stand_in::status(Posture::Enforcing);
    let first = status.agents.remove(0);
    for (id, state, mode, denied, expires) in [
        (
            "billing-recon",
            "active",
            "enforce",
            3,
            Some(1_830_297_599_000),
        ),
        ("crawler", "active", "monitor", 0, Some(1_793_936_900_000)),
        (
            "deploy-bot",
            "suspended",
            "enforce",
            1_204,
            Some(1_861_833_599_000),
        ),
        ("x\u{1b}[31m-evil\u{202e}", "draft", "enforce", 12, None),
    ] {
        let mut agent = first.clone();
        id.clone_into(&mut agent.id);
        state.clone_into(&mut agent.state);
        mode.clone_into(&mut agent.mode);
        agent.denied = denied;
        agent.expires_ms = expires;
        // By the status's own clock, which stands still here.
        let now = status.guards.iter().map(|guard| guard.checked_ms).max();
        agent.leases = match id {
            "billing-recon" => vec![lease(now, 95_000, "api.stripe.com", "198.51.100.23")],
            "crawler" => vec![
                lease(now, 3_600_000, "www.example.org", "2001:db8::17"),
                lease(now, 12_000, "x\u{1b}[31m.example", "198.51.100.24"),
            ],
            _ => Vec::new(),
        };
        status.agents.push(agent);
    }
    let now = jiff::Timestamp::now().as_millisecond();
    let line = |at: i64, agent: &str, ip: &str, count: u64| {
        // What is older than ten minutes is not shown.
        let time = now - 5_000 + at;
        format!(
            r#"{{"time":{time},"class_uid":4001,"action_id":2,"ai_agent":{{"uid":"{agent}"}},"actor":{{"process":{{"pid":41,"name":"curl"}}}},"connection_info":{{"protocol_name":"tcp","protocol_num":6}},"count":{count},"dst_endpoint":{{"ip":"{ip}","port":443}},"firewall_rule":{{"category":"out_of_scope","uid":"default-deny"}},"unmapped":{{"verdict":"denied","reason":"out_of_scope","hook":"cgroup/connect4"}}}}"#
        ) + "\n"
    };
    fs::create_dir(folder.join("log")).unwrap();
    let text = [
        line(1, "billing-recon", "192.0.2.7", 3),
        line(2, "deploy-bot", "2001:db8::7", 1_204),
    ];
    fs::write(folder.join("log/violations.jsonl"), text.concat()).unwrap();
    Answers {
        status,
        explain: |_| Answer::Denied,
        ..Answers::default()
    }
}

// === impl Top ===

impl Top {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let answers = world(folder.path());
        let settings = folder.path().join("remit.toml");
        let at = folder.path().display();
        let socket = folder.path().join("remit.sock");
        fs::write(
            &settings,
            format!(
                "[paths]\nrun = \"{at}\"\nlog = \"{at}/log\"\nstate = \"{at}/state\"\nbpffs = \"{at}/bpf\"\n"
            ),
        )
        .unwrap();
        let runtime = stand_in::serve_at(&socket, "no-such-group", stand_in::ELSEWHERE, answers);

        let size = Winsize {
            ws_row: ROWS.get(),
            ws_col: COLUMNS.get(),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = openpty(&size, None).unwrap();
        let before = tcgetattr(&pair.slave).unwrap();
        let end = || Stdio::from(pair.slave.try_clone().unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_remit"))
            .args(["top", "--every", "1"])
            .env("REMIT_CONFIG", settings)
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let terminal = fs::File::from(pair.master);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(ROWS, COLUMNS, 0)));
        let shown = Arc::clone(&screen);
        let mut reader = terminal.try_clone().unwrap();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // EIO when the last one at the other end has closed it.
            while let Ok(read @ 1..) = reader.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..read]);
            }
        });
        Self {
            child,
            terminal,
            slave: pair.slave,
            before,
            screen,
            daemon: Some(runtime),
            _folder: folder,
        }
    }

    fn press(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    fn contents(&self) -> String {
        let screen = self.screen.lock().unwrap();
        let rows = screen.screen().rows(0, COLUMNS.get());
        rows.map(|row| row.trim_end().to_owned() + "\n").collect()
    }

    /// The screen once it has what is looked for and stays as it is.
    fn shows(&self, wanted: &str) -> String {
        let until = Instant::now() + PATIENCE;
        let (mut last, mut since) = (String::new(), Instant::now());
        loop {
            let now = self.contents();
            if now != last {
                last = now;
                since = Instant::now();
            }
            if last.contains(wanted) && since.elapsed() > SETTLED {
                return last;
            }
            assert!(
                Instant::now() < until,
                "no `{wanted}` on the screen:\n{last}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The screen must be the one that is kept. Times of day of lines are not compared.
    fn is(&self, name: &str, wanted: &str) {
        let found: String = self.shows(wanted).lines().map(timeless).collect();
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/top")
            .join(format!("{name}.txt"));
        if std::env::var_os("UPDATE").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &found).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == kept, "{name} is\n{found}\nand not\n{kept}");
    }

    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The terminal is as it was: line by line, echoing, the main screen, the cursor there.
    fn is_restored(&self) {
        let after = tcgetattr(self.slave.as_fd()).unwrap();
        let flags = |of: &Termios| (of.input_flags, of.output_flags, of.local_flags);
        assert_eq!(flags(&after), flags(&self.before));
        let until = Instant::now() + PATIENCE;
        loop {
            let parser = self.screen.lock().unwrap();
            let screen = parser.screen();
            if !screen.alternate_screen() && !screen.hide_cursor() {
                return;
            }
            drop(parser);
            assert!(Instant::now() < until, "the main screen is not back");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ended = self.child.kill().is_ok();
        let _reaped = self.child.wait().is_ok();
    }
}

/// A line whose time of day is `HH:MM:SS`.
fn timeless(line: &str) -> String {
    let bytes = line.as_bytes();
    let is_time = bytes.len() > 9
        && bytes[..8].iter().enumerate().all(|(at, byte)| {
            if at % 3 == 2 {
                *byte == b':'
            } else {
                byte.is_ascii_digit()
            }
        });
    let rest = if is_time { &line[8..] } else { line };
    format!("{}{rest}\n", if is_time { "HH:MM:SS" } else { "" })
}

#[test]
#[ignore = "needs root"]
fn screens_at_80_by_24() {
    let mut top = Top::start();
    top.is("agents", "×1204");
    top.press("s");
    top.shows("by denied/s");
    top.press("ss");
    top.is("by-denied", "by denied ");
    top.press("/bill");
    top.is("filtering", "filter: bill_");
    top.press("\r\r");
    top.is("agent", "e explain");
    top.press("e");
    top.is("explained", "what the kernel says now");
    top.press("\x1b");
    thread::sleep(Duration::from_millis(200));
    top.press("q");
    assert!(top.end().success());
    top.is_restored();
}

#[test]
#[ignore = "needs root"]
fn no_byte_of_an_agent_reaches_the_terminal() {
    let top = Top::start();
    let screen = top.shows("-evil");
    assert!(screen.contains("x\\x1b[31m-evil"), "{screen}");
    assert!(!screen.contains('\u{202e}'), "{screen}");
}

#[test]
#[ignore = "needs root"]
fn the_terminal_is_put_back_however_it_ends() {
    for ending in ["q", "\x03", "TERM", "HUP"] {
        let mut top = Top::start();
        top.shows("ENFORCING");
        let pid = Pid::from_raw(i32::try_from(top.child.id()).unwrap());
        match ending {
            "TERM" => kill(pid, Signal::SIGTERM).unwrap(),
            "HUP" => kill(pid, Signal::SIGHUP).unwrap(),
            keys => top.press(keys),
        }
        assert!(top.end().success(), "{ending:?}");
        top.is_restored();
    }
}

#[test]
#[ignore = "needs root"]
fn a_daemon_that_goes_away_is_told_and_the_last_state_kept() {
    let mut top = Top::start();
    top.shows("ENFORCING");
    drop(top.daemon.take());
    let screen = top.shows("as it was; no daemon");
    assert!(screen.contains("billing-recon"), "{screen}");
}

#[test]
fn without_a_terminal_it_is_wrong_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_remit"))
        .arg("top")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("remit status --json"), "{said}");
}
