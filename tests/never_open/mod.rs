//! Nothing that happens to the daemon or to the registry leaves an agent unfenced: traffic in and
//! out of scope goes on without pause, on both families, while the daemon is killed, replaced,
//! reloaded, starved and robbed of its state; a listener and a tap on the wire count what arrives.
//!
//! Each case prints its numbers. `REMIT_TEST_FULL=1` runs the full counts, else a twentieth.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    harness::Case,
    support::{
        Agent, Ctx, Fixture, api,
        daemon::Settings,
        expect, scale,
        traffic::{Ear, FLIP, Generator, IN, Numbers, OUT, lanes},
    },
};

mod clock;
mod drift;
mod full_disk;
mod holds;
mod kills;
pub mod latency;
mod lost_state;
mod reboot;
mod reloads;
mod replacements;
mod stopped;
mod torn;
mod two_daemons;
mod unit_restart;

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        kills::cases(),
        reloads::cases(),
        replacements::cases(),
        torn::cases(),
        full_disk::cases(),
        lost_state::cases(),
        stopped::cases(),
        holds::cases(),
        latency::cases(),
        unit_restart::cases(),
        two_daemons::cases(),
        reboot::cases(),
        drift::cases(),
        clock::cases(),
    ]
    .into_iter()
    .flatten()
    .collect();
    for case in &mut cases {
        case.deadline = scale::deadline();
    }
    cases
}

/// Port of the agent whose entry stays as it is.
const STEADY_PORT: u16 = 443;
/// Port of the agent whose entry changes.
const CHANGING_PORT: u16 = 444;

/// Two agents under traffic: `steady`, whose entry never changes, and `changing`, whose entry gets
/// and loses the `flip` destinations.
struct Fire {
    fx: Fixture,
    ear: Ear,
    steady: Generator,
    changing: Generator,
}

/// The entry of `steady`.
fn steady() -> Agent {
    Agent::standard("steady")
}

/// The entry of `changing`: the standard grants on its own port, and `flip` when `wide`.
fn changing(wide: bool) -> Agent {
    let ports = r#"444, "444/udp""#;
    let agent = Agent::new("changing")
        .allow("198.51.100.0/24", ports)
        .allow("2001:db8:1::/64", ports);
    if wide {
        agent
            .allow("192.0.2.0/24", ports)
            .allow("fd00:20::/64", ports)
    } else {
        agent
    }
}

// === impl Fire ===

impl Fire {
    /// Starts the daemon, the agents and their traffic.
    fn start(ctx: &Ctx, settings: &Settings) -> Result<Self> {
        let fx = Fixture::start_with(ctx, &[steady(), changing(false)], settings)?;
        Self::open(fx)
    }

    /// Opens fire on what a fixture has.
    fn open(fx: Fixture) -> Result<Self> {
        let steady = lanes(STEADY_PORT, &[IN, OUT])?;
        let changing = lanes(CHANGING_PORT, &[IN, OUT, FLIP])?;
        let all: Vec<_> = steady.iter().chain(&changing).cloned().collect();
        let mut fire = Self {
            ear: Ear::start(&all)?,
            steady: Generator::start(fx.cgroup("steady")?, steady)?,
            changing: Generator::start(fx.cgroup("changing")?, changing)?,
            fx,
        };
        for generator in [&mut fire.steady, &mut fire.changing] {
            generator.await_passing(IN)?;
            generator.await_refused(OUT)?;
        }
        Ok(fire)
    }

    /// Ceases fire and judges. The daemon must run: the kernel's counter of `steady` is what its
    /// generator saw refused, and the lines of the log add up to it.
    fn cease(self) -> Result<(Fixture, Numbers)> {
        let Self {
            fx,
            mut ear,
            steady,
            changing,
        } = self;
        let (steady, changing) = (steady.stop()?, changing.stop()?);
        let refused: u64 = steady
            .iter()
            .map(|(_, tally)| tally.errors.get(&libc::EPERM).copied().unwrap_or_default())
            .sum();
        let reports = [steady, changing];
        let numbers = Numbers::sum(&reports, &mut ear)?;
        numbers.judge(&reports)?;
        ear.control(OUT)?;
        expect(
            "the kernel's counter against what the program saw",
            fx.place().status()?.denied("steady", None)?,
            refused,
        )?;
        fx.reconcile("steady")
            .with_context(|| format!("the log does not add up ({numbers})"))?;
        Ok((fx, numbers))
    }

    /// Writes the changing entry, as editors do; nothing is asked to take it in.
    fn write(&self, wide: bool) -> Result<()> {
        self.fx.place().write(&changing(wide))
    }

    /// `POST /v1/reload`; it must say that all is well.
    fn reload(&self) -> Result<()> {
        let answer = api::ask(self.fx.place(), "POST", "/reload", None)?;
        expect("HTTP status of reload", answer.status, 200)
            .with_context(|| answer.body.to_string())?;
        expect("reload", answer.body["ok"].as_bool(), Some(true))
            .with_context(|| answer.body.to_string())
    }

    /// Whether the flip destinations are in scope right now, by every lane to them.
    fn expect_flip(&mut self, wide: bool) -> Result<()> {
        if wide {
            self.changing.await_passing(FLIP)
        } else {
            self.changing.await_refused(FLIP)
        }
    }
}

/// Every file below `dir`.
fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Removes every pin below a bpffs, and with it what it holds, as a reboot does.
fn unpin(bpffs: &Path) -> Result<()> {
    let mut pins = Vec::new();
    files(bpffs, &mut pins)?;
    // The kernel's own, at the top of every bpffs.
    pins.retain(|path| path.extension().is_none_or(|kind| kind != "debug"));
    if pins.is_empty() {
        bail!("nothing is pinned below {}", bpffs.display());
    }
    for pin in &pins {
        fs::remove_file(pin).with_context(|| format!("cannot unpin {}", pin.display()))?;
    }
    Ok(())
}

/// The daemon's resident memory, in KiB.
fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|number| number.parse().ok())
        .context("no VmRSS")
}
