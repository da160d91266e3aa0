//! The log followed while it is rotated by us and by others, and the daemon dies: by `remit tail`,
//! by `tail -F`, and by a reader that knows files by their inodes. Each must have every line once.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::reader::{Shipper, all_lines};
use crate::{
    actor::Op,
    harness::{Case, Outcome},
    support::{
        Actor, Agent, Family, Fixture, claim,
        daemon::Settings,
        eventually, expect,
        network::{OUT_V4, OUT_V6},
        remit, scale,
        way::PAYLOAD,
    },
};

/// Where `tail` and `logrotate` are looked for.
const FOLDERS: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("evidence::followers_have_every_line_once", followers).once(),
        Case::new("evidence::from_attempt_to_printed_line", latency).once(),
        Case::with_outcome("evidence::logrotate_as_the_snippet_has_it", logrotate),
    ]
}

fn small_files() -> Settings {
    Settings {
        more: "[log]\nmax_size = \"64KiB\"\nper_agent_rate = 100000\n".to_owned(),
        ..Settings::default()
    }
}

fn followers(ctx: &mut crate::support::Ctx) -> Result<()> {
    let mut fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &small_files())?;
    let folder = fx.place().at("log");
    let current = folder.join("violations.jsonl");
    let mut tail = Follower::start(&mut fx.place().command(&["tail", "-f", "--json"])?)?;
    let mut plain = by_name(&current)?;
    let mut shipper = Shipper::new(&folder, "violations.jsonl");
    let mut actor = fx.actor("alpha")?;
    let mut port = 1000;
    let rounds: u16 = if scale::emulated() { 1 } else { 3 };
    for round in 0..rounds {
        // Enough for the log to rotate by itself.
        attempts(&mut actor, &mut port, 120, &mut shipper)?;
        // By somebody else, who tells the daemon.
        rotate(&current, &format!("-2026112{round}"))?;
        fx.daemon.signal(Signal::SIGUSR1)?;
        attempts(&mut actor, &mut port, 20, &mut shipper)?;
        // By somebody who does not.
        rotate(&current, &format!("-2026113{round}"))?;
        attempts(&mut actor, &mut port, 20, &mut shipper)?;
        // The daemon dies; attempts meanwhile are told by the next one.
        fx.daemon.kill()?;
        attempts(&mut actor, &mut port, 20, &mut shipper)?;
        fx.daemon.restart()?;
        attempts(&mut actor, &mut port, 20, &mut shipper)?;
    }
    let told = || -> Result<u64> {
        let lines = all_lines(&folder, "violations.jsonl")?;
        Ok(lines
            .iter()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .map(|event| event["count"].as_u64().unwrap_or(1))
            .sum())
    };
    let made = u64::from(port - 1000);
    eventually(10, || expect("attempts in all files", told()?, made))?;
    let mut written = all_lines(&folder, "violations.jsonl")?;
    written.sort();
    let mut unique = written.clone();
    unique.dedup();
    expect(
        "lines that are there twice",
        written.len() - unique.len(),
        0,
    )?;
    let rotated = fs::read_dir(&folder)?.count();
    claim(rotated > 4, || {
        format!("{rotated} files: nothing was rotated")
    })?;
    shipper.look()?;
    same("a reader that goes by inodes", &written, shipper.lines)?;
    eventually(5, || same("remit tail -f", &written, tail.lines()))?;
    tail.stop()?;
    // By name two rotations between two looks cannot be seen: what it has is told, not judged.
    let by_name = match &mut plain {
        Some(plain) => format!("tail -F has {} of them", plain.stop()?.len()),
        None => "tail -F not tested: no GNU tail here".to_owned(),
    };
    println!(
        "{} lines of {made} attempts in {rotated} files, each read once by remit tail -f and a \
         reader that goes by inodes; {by_name}",
        written.len()
    );
    Ok(())
}

fn latency(ctx: &mut crate::support::Ctx) -> Result<()> {
    let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &small_files())?;
    let mut tail = Follower::start(&mut fx.place().command(&["tail", "-f", "--json"])?)?;
    let mut actor = fx.actor("alpha")?;
    // The first finds the follower at work.
    refuse(&mut actor, 999)?;
    eventually(10, || {
        claim(!tail.lines().is_empty(), || {
            "nothing was followed".to_owned()
        })
    })?;
    let count = scale::third_of(150);
    let mut made = Vec::new();
    for at in 0..count {
        let port = 1000 + u16::try_from(at)?;
        made.push((port, Instant::now()));
        refuse(&mut actor, port)?;
        sleep(Duration::from_millis(7));
    }
    eventually(10, || expect("lines", tail.lines().len(), count + 1))?;
    let seen = tail.stop()?;
    let mut nanos = Vec::new();
    for (port, at) in made {
        let (printed, _) = seen
            .iter()
            .find(|(_, line)| line.contains(&format!("\"port\":{port}")))
            .with_context(|| format!("no line for port {port}"))?;
        nanos.push(u64::try_from((*printed - at).as_nanos())?);
    }
    let text = scale::percentiles(&mut nanos);
    let most = nanos.last().copied().unwrap_or_default();
    claim(most < scale::patience(1) * 1_000_000_000, || text.clone())?;
    println!("from attempt to the line that `remit tail -f` prints: {text}");
    Ok(())
}

/// The snippet of the documents, with this case's folder, by the real logrotate.
fn logrotate(ctx: &mut crate::support::Ctx) -> Result<Outcome> {
    let Some(program) = find("logrotate") else {
        return Ok(Outcome::NotTested("no logrotate here".to_owned()));
    };
    let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &Settings::default())?;
    let folder = fx.place().at("log");
    let mut tail = Follower::start(&mut fx.place().command(&["tail", "-f", "--json"])?)?;
    let mut shipper = Shipper::new(&folder, "violations.jsonl");
    let mut plain = by_name(&folder.join("violations.jsonl"))?;
    let snippet = include_str!("../../docs/logrotate.conf")
        .replace("/var/log/remit", &folder.display().to_string())
        .replace(
            "systemctl kill --signal=USR1 remit.service",
            &format!("kill -USR1 {}", fx.daemon.pid()?),
        );
    let config = ctx.dir().join("logrotate.conf");
    fs::write(&config, format!("su root root\n{snippet}"))?;
    let mut actor = fx.actor("alpha")?;
    let mut port = 1000;
    for round in 0..3 {
        attempts(&mut actor, &mut port, 20, &mut shipper)?;
        eventually(7, || {
            claim(
                fs::metadata(folder.join("violations.jsonl")).is_ok_and(|meta| meta.len() > 0),
                || "no line yet".to_owned(),
            )
        })?;
        // A rotation a day leaves those who follow by name the time to look.
        caught_up(plain.as_ref(), &folder)?;
        let said = remit::output(
            Command::new(&program)
                .args(["--force", "--state"])
                .arg(ctx.dir().join("state-of-logrotate"))
                .arg(&config),
        )?;
        expect("exit code of logrotate", said.code, 0)
            .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
        // One a day by date: another day begins.
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.starts_with("violations.jsonl-2") && !name.contains("round") {
                fs::rename(&path, folder.join(format!("violations.jsonl-{round}round")))?;
            }
        }
        attempts(&mut actor, &mut port, 5, &mut shipper)?;
    }
    fx.reconcile_all("alpha", "violations.jsonl")?;
    let mut written = all_lines(&folder, "violations.jsonl")?;
    written.sort();
    let files = fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.starts_with("violations"))
        .count();
    expect("files of violations", files, 4)?;
    shipper.look()?;
    same("a reader that goes by inodes", &written, shipper.lines)?;
    eventually(5, || same("remit tail -f", &written, tail.lines()))?;
    tail.stop()?;
    if let Some(plain) = &mut plain {
        eventually(5, || same("tail -F", &written, plain.lines()))?;
        plain.stop()?;
    }
    let verified = fx.place().remit(&["log", "verify"])?;
    expect("exit code of remit log verify", verified.code, 0)
        .with_context(|| format!("{}{}", verified.stdout, verified.stderr))?;
    println!(
        "{} lines over 3 rotations by logrotate, each read once",
        written.len()
    );
    Ok(Outcome::Passed)
}

/// Waits until this one has read all that is there.
fn caught_up(follower: Option<&Follower>, folder: &Path) -> Result<()> {
    let Some(follower) = follower else {
        return Ok(());
    };
    eventually(10, || {
        let written = all_lines(folder, "violations.jsonl")?.len();
        expect("lines read", follower.lines().len(), written)
    })
}

/// Renames the log, once there is something in it.
fn rotate(current: &Path, suffix: &str) -> Result<()> {
    eventually(7, || {
        let length = fs::metadata(current).map_or(0, |meta| meta.len());
        claim(length > 0, || "no line in the log".to_owned())
    })?;
    let mut name = current.as_os_str().to_owned();
    name.push(suffix);
    Ok(fs::rename(current, name)?)
}

/// Refused attempts to as many ports, with a look of the shipper now and then.
fn attempts(actor: &mut Actor, port: &mut u16, count: u16, shipper: &mut Shipper) -> Result<()> {
    for at in 0..count {
        refuse(actor, *port)?;
        *port += 1;
        if at % 10 == 9 {
            shipper.look()?;
        }
    }
    shipper.look()
}

fn refuse(actor: &mut Actor, port: u16) -> Result<()> {
    let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let reply = actor.ask(&Op::SendTo {
        id,
        addr: Family::V4.pick(OUT_V4, OUT_V6, port)?,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    })?;
    expect("errno", reply.errno, libc::EPERM)?;
    actor.must(&Op::Close { id })?;
    Ok(())
}

/// Whether these are the same lines, in whatever order.
fn same(who: &str, written: &[String], mut read: Vec<String>) -> Result<()> {
    read.sort();
    let (mut missing, mut more) = (0, 0);
    for line in written {
        missing += u32::from(read.binary_search(line).is_err());
    }
    for line in &read {
        more += u32::from(written.binary_search(line).is_err());
    }
    claim(
        missing == 0 && more == 0 && read.len() == written.len(),
        || {
            format!(
                "{who} read {} lines of {}: {missing} missing, {more} that are not there",
                read.len(),
                written.len()
            )
        },
    )
}

/// A program of the system's, by the search path or where those for root are.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = FOLDERS.iter().map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(folders)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// GNU `tail -F` on the log, if it is here.
fn by_name(log: &Path) -> Result<Option<Follower>> {
    let Some(path) = find("tail").filter(|path| speaks_gnu(path)) else {
        return Ok(None);
    };
    let mut command = Command::new(path);
    Follower::start(command.args(["-n", "+1", "-F"]).arg(log)).map(Some)
}

fn speaks_gnu(path: &Path) -> bool {
    let said = remit::output(Command::new(path).arg("--version"));
    said.is_ok_and(|said| said.stdout.contains("GNU"))
}

/// A program that prints lines, and when it did. Dropping it ends it.
pub struct Follower {
    child: Child,
    seen: Arc<Mutex<Vec<(Instant, String)>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Follower {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let out = child.stdout.take().context("no output")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&seen);
        let reader = thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Ok(mut kept) = kept.lock() {
                    kept.push((Instant::now(), line));
                }
            }
        });
        Ok(Self {
            child,
            seen,
            reader: Some(reader),
        })
    }

    /// Lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.seen
            .lock()
            .map(|seen| seen.iter().map(|(_, line)| line.clone()).collect())
            .unwrap_or_default()
    }

    /// Ends it; all lines, with their times.
    pub fn stop(&mut self) -> Result<Vec<(Instant, String)>> {
        self.child.kill()?;
        self.child.wait()?;
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
        Ok(self
            .seen
            .lock()
            .map(|seen| seen.clone())
            .unwrap_or_default())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.stop());
    }
}
