//! A million refused attempts of one agent, while another makes ten.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::reader::all_lines;
use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, claim,
        daemon::Settings,
        eventually, expect,
        network::{OUT_V4, OUT_V6},
        scale,
        way::PAYLOAD,
    },
};

/// Attempts of the one.
const FLOOD: u64 = 1_000_000;
/// Kinds of attempt: more than the kernel folds at a time.
const KINDS: u16 = 2_000;
/// Attempts of the other.
const TEN: u16 = 10;
/// What the log may hold.
const MAX_SIZE: u64 = 1 << 20;
const MAX_TOTAL: u64 = 16 << 20;
/// How much the daemon may grow.
const GROWTH_KIB: u64 = 24 << 10;

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut case = Case::new("evidence::a_million_and_ten", |ctx| {
        let settings = Settings {
            more: format!(
                "[log]\nmax_size = \"{}KiB\"\nmax_total = \"{}KiB\"\n",
                MAX_SIZE >> 10,
                MAX_TOTAL >> 10
            ),
            ..Settings::default()
        };
        let agents = [Agent::standard("alpha"), Agent::standard("beta")];
        let fx = Fixture::start_with(ctx, &agents, &settings)?;
        let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
        let pid = fx.daemon.pid()?;
        let before = Use::of(pid)?;
        let flood = if scale::emulated() && !scale::full() {
            FLOOD / 50
        } else {
            FLOOD
        };
        let log = fx.place().at("log/violations.jsonl");

        let began = Instant::now();
        let flooding = thread::spawn(move || -> Result<(u64, Duration)> {
            let id = alpha.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            let each = u32::try_from(flood / u64::from(KINDS))?;
            let mut refused = 0;
            for port in 0..KINDS {
                let reply = alpha.ask(&send_to(id, 2_000 + port, each))?;
                refused += if each == 1 {
                    u64::from(reply.errno == libc::EPERM)
                } else {
                    u64::try_from(reply.value)?
                };
            }
            Ok((refused, began.elapsed()))
        });
        let mut late = Vec::new();
        for port in 0..TEN {
            thread::sleep(Duration::from_millis(20));
            late.push(attempt(&mut beta, &log, 60_000 + port)?);
        }
        let still = !flooding.is_finished();
        let (refused, took) = flooding.join().ok().context("the flood panicked")??;
        expect("refused of alpha", refused, flood)?;
        claim(still || scale::emulated(), || {
            "the flood was over before the other's ten: nothing was shown".to_owned()
        })?;
        let second = scale::patience(1) * 1_000_000_000;
        let text = scale::percentiles(&mut late);
        claim(late.last().is_some_and(|most| *most < second), || {
            format!("the ten were late: {text}")
        })?;

        let status = fx.place().status()?;
        expect(
            "the kernel's counter of alpha",
            status.denied("alpha", None)?,
            flood,
        )?;
        expect(
            "the kernel's counter of beta",
            status.denied("beta", None)?,
            u64::from(TEN),
        )?;
        fx.reconcile_all("alpha", "violations.jsonl")?;
        fx.reconcile_all("beta", "violations.jsonl")?;
        verified(&fx, flood)?;
        let after = Use::of(pid)?;
        let settled = began.elapsed();
        let lines = all_lines(&fx.place().at("log"), "violations.jsonl")?;
        let disk: u64 = lines.iter().map(|line| line.len() as u64 + 1).sum();
        claim(disk < MAX_TOTAL + 2 * MAX_SIZE, || {
            format!("{disk} bytes of log")
        })?;
        let grown = after.peak_kib.saturating_sub(before.peak_kib);
        claim(grown < GROWTH_KIB, || {
            format!("the daemon grew by {grown} KiB")
        })?;
        let cpu = after.cpu.saturating_sub(before.cpu);
        println!(
            "{flood} attempts of {KINDS} kinds refused in {:.2} s ({:.0}/s), all accounted for in {} \
             lines ({} KiB); the other's ten in the log after {text}; daemon: {:.2} s of processor \
             time in {:.1} s, {grown} KiB more memory ({} KiB at most)",
            took.as_secs_f64(),
            flood as f64 / took.as_secs_f64(),
            lines.len(),
            disk >> 10,
            cpu.as_secs_f64(),
            settled.as_secs_f64(),
            after.peak_kib,
        );
        Ok(())
    });
    case.deadline = Duration::from_secs(60);
    vec![case]
}

/// `remit log verify` comes to the same, and notices a line that was taken out.
fn verified(fx: &Fixture, flood: u64) -> Result<()> {
    let verify = || fx.place().remit(&["log", "verify", "--json"]);
    let said = verify()?;
    expect("exit code of remit log verify", said.code, 0)
        .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
    let report: Value = serde_json::from_str(&said.stdout)?;
    let accounting = &report["accounting"];
    let all = flood + u64::from(TEN);
    for side in ["counted", "logged"] {
        expect(side, accounting[side].as_u64(), Some(all))?;
    }
    // It waits for the log to catch up, which takes its time.
    if scale::emulated() {
        return Ok(());
    }
    let path = fx.place().at("log/violations.jsonl");
    let text = fs::read_to_string(&path)?;
    let Some(line) = text.lines().find(|line| line.contains("\"uid\":\"beta\"")) else {
        // It has been rotated away meanwhile.
        return Ok(());
    };
    fs::write(&path, text.replacen(&format!("{line}\n"), "", 1))?;
    let said = verify()?;
    expect("exit code with a line less", said.code, 1)?;
    claim(said.stdout.contains("\"agent\":\"beta\""), || {
        said.stdout.clone()
    })?;
    Ok(fs::write(&path, text)?)
}

fn send_to(id: usize, port: u16, repeat: u32) -> Op {
    Op::SendTo {
        id,
        // Both families are of one address space; which one floods is of no matter.
        addr: std::net::SocketAddr::new(std::net::Ipv4Addr::new(203, 0, 113, 10).into(), port),
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat,
    }
}

/// One attempt, and how long until the log has it.
fn attempt(beta: &mut Actor, log: &Path, port: u16) -> Result<u64> {
    let family = if port.is_multiple_of(2) {
        Family::V4
    } else {
        Family::V6
    };
    let domain = if port.is_multiple_of(2) {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let id = beta.socket(domain, libc::SOCK_STREAM, 0)?;
    let made = Instant::now();
    let reply = beta.ask(&Op::Connect {
        id,
        addr: family.pick(OUT_V4, OUT_V6, port)?,
        timeout_ms: 1000,
    })?;
    expect("errno", reply.errno, libc::EPERM)?;
    let folder = log.parent().context("no folder")?;
    let wanted = format!("\"port\":{port}");
    let seen = eventually(10, || {
        let current = fs::read_to_string(log).unwrap_or_default();
        let rotated = fs::read_to_string(folder.join("violations.jsonl.1")).unwrap_or_default();
        claim(
            current.contains(&wanted) || rotated.contains(&wanted),
            || format!("no line for port {port}"),
        )?;
        Ok(made.elapsed())
    })?;
    beta.must(&Op::Close { id })?;
    Ok(u64::try_from(seen.as_nanos())?)
}

/// What a process uses.
struct Use {
    peak_kib: u64,
    cpu: Duration,
}

impl Use {
    fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmHWM")?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("no stat")?
            .1
            .split_whitespace()
            .collect();
        // Fields 14 and 15 of proc(5); the state, first behind the name, is field 3.
        let ticks =
            |at: usize| -> Result<u64> { Ok(fields.get(at - 3).context("a short stat")?.parse()?) };
        // A tick is a hundredth of a second wherever Linux has had a user interface.
        let cpu = Duration::from_millis((ticks(14)? + ticks(15)?) * 10);
        Ok(Self {
            peak_kib: peak.parse()?,
            cpu,
        })
    }
}
