//! Wall-clock steps of a day, each way, while the daemon runs and while it does not. In VMs alone:
//! the clock is the whole machine's.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

use super::unpin;
use crate::{
    harness::{Case, Outcome},
    support::{
        Actor, Agent, Ctx, Family, Fixture, Way,
        clock::from_now,
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        traffic::{Ear, Generator, IN, Numbers, OUT, lanes},
    },
};

const DAY: i64 = 86_400;
/// Port of the agent that never notices; the others are asked at another.
const STEADY_PORT: u16 = 445;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        in_a_vm("never_open::clock_stepped_a_day_while_running", |ctx| {
            let (mut fx, clock) = start(ctx)?;
            let (mut brief, mut held) = (fx.actor("brief")?, fx.actor("held")?);
            let lanes = lanes(STEADY_PORT, &[IN, OUT])?;
            let mut ear = Ear::start(&lanes)?;
            let mut steady = Generator::start(fx.cgroup("steady")?, lanes)?;
            steady.await_passing(IN)?;
            reaches(&mut brief, true)?;

            clock.step(DAY)?;
            eventually(5, || reaches(&mut brief, false))?;
            reaches(&mut held, false)?;
            // Back to the truth: what has expired once stays so.
            clock.step(0)?;
            stays(&mut brief, &mut held)?;
            clock.step(-DAY)?;
            stays(&mut brief, &mut held)?;
            clock.step(0)?;
            fx.daemon.kill()?;
            fx.daemon.restart()?;
            stays(&mut brief, &mut held)?;
            // Only somebody who says so takes the clock back, and a plain reload is nobody.
            expect(
                "exit code of reload",
                fx.place().remit(&["reload"])?.code,
                0,
            )?;
            stays(&mut brief, &mut held)?;
            let accepted = fx.place().remit(&["reload", "--accept-clock"])?;
            expect("exit code of --accept-clock", accepted.code, 0)
                .with_context(|| accepted.stderr.clone())?;
            eventually(3, || reaches(&mut brief, true))?;
            reaches(&mut held, false)?;
            fx.daemon.kill()?;
            fx.daemon.restart()?;
            reaches(&mut brief, true)?;
            // Whose entry ends in 2099 never noticed.
            let numbers = Numbers::settle(vec![steady], &mut ear)?;
            println!("{numbers}");
            Ok(())
        }),
        in_a_vm("never_open::clock_stepped_a_day_across_a_restart", |ctx| {
            across(ctx, false)
        }),
        in_a_vm("never_open::clock_stepped_a_day_across_a_reboot", |ctx| {
            across(ctx, true)
        }),
        in_a_vm("never_open::clock_stepped_back_and_state_lost", |ctx| {
            let (mut fx, clock) = start(ctx)?;
            let (mut brief, mut held) = (fx.actor("brief")?, fx.actor("held")?);
            clock.step(DAY)?;
            eventually(5, || reaches(&mut brief, false))?;
            let mut told = Vec::new();
            for step in [DAY, 0, -DAY] {
                fx.daemon.kill()?;
                let state = fx.place().at("state");
                fs::remove_dir_all(&state).with_context(|| state.display().to_string())?;
                clock.step(step)?;
                fx.daemon.restart()?;
                reaches(&mut held, false)?;
                let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                let tried = Way::UdpSendTo.perform(&mut brief, Family::V4, out)?;
                expect("errno out of scope", tried.errno, libc::EPERM)?;
                // Nobody has promised this one: with the mark lost, the clock's word is all there is.
                let is = if reaches(&mut brief, false).is_ok() {
                    "expired"
                } else {
                    "in force again"
                };
                told.push(format!("{:+} d {is}", step / DAY));
            }
            println!(
                "suspension stands; what had expired is, by the clock's distance from the truth: {}",
                told.join(", ")
            );
            Ok(())
        }),
    ]
}

/// Steps while the daemon is dead, with the kernel's state kept or gone.
fn across(ctx: &Ctx, reboot: bool) -> Result<()> {
    let (mut fx, clock) = start(ctx)?;
    let (mut brief, mut held) = (fx.actor("brief")?, fx.actor("held")?);
    reaches(&mut brief, true)?;
    // A day on, it has expired; and so it has on the way back and beyond.
    for step in [DAY, 0, -DAY] {
        fx.daemon.kill()?;
        clock.step(step)?;
        if reboot {
            unpin(&fx.place().at("bpf"))?;
        }
        fx.daemon.restart()?;
        eventually(3, || reaches(&mut brief, false))
            .with_context(|| format!("clock {:+} d from the truth", step / DAY))?;
        reaches(&mut held, false)?;
        stays(&mut brief, &mut held)?;
    }
    clock.step(0)?;
    let accepted = fx.place().remit(&["reload", "--accept-clock"])?;
    expect("exit code of --accept-clock", accepted.code, 0)
        .with_context(|| accepted.stderr.clone())?;
    eventually(3, || reaches(&mut brief, true))?;
    reaches(&mut held, false)
}

fn in_a_vm(name: &str, run: fn(&mut Ctx) -> Result<()>) -> Case {
    Case::with_outcome(name, move |ctx| {
        if std::env::var_os("REMIT_TEST_VM").is_none() {
            return Ok(Outcome::NotTested(
                "the wall clock is set in VMs alone".to_owned(),
            ));
        }
        run(ctx).map(|()| Outcome::Passed)
    })
}

/// `brief` ends in an hour, `held` is suspended by command, `steady` is neither.
fn start(ctx: &Ctx) -> Result<(Fixture, Truth)> {
    let clock = Truth::learn()?;
    let ports = r#"445, "445/udp""#;
    let agents = [
        Agent::standard("brief").expires(from_now(3600)),
        Agent::standard("held"),
        Agent::new("steady")
            .allow("198.51.100.0/24", ports)
            .allow("2001:db8:1::/64", ports),
    ];
    let fx = Fixture::start(ctx, &agents)?;
    let said = fx
        .place()
        .remit(&["suspend", "held", "--reason", "a drill"])?;
    expect("exit code of suspend", said.code, 0).with_context(|| said.stderr.clone())?;
    Ok((fx, clock))
}

/// Whether it reaches what is in scope, on both families.
fn reaches(actor: &mut Actor, wanted: bool) -> Result<()> {
    for family in Family::ALL {
        let to = family.pick(IN_V4, IN_V6, 443)?;
        let tried = Way::UdpSendTo.perform(actor, family, to)?;
        let errno = if wanted { 0 } else { libc::EPERM };
        expect(&format!("errno to {to}"), tried.errno, errno)?;
        if let Some(id) = tried.id {
            actor.must(&crate::actor::Op::Close { id })?;
        }
    }
    Ok(())
}

/// Both are refused, and for longer than the daemon takes to look at the clock.
fn stays(brief: &mut Actor, held: &mut Actor) -> Result<()> {
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(250));
        reaches(brief, false)?;
        reaches(held, false)?;
    }
    Ok(())
}

/// The true time, kept by boot time; put back when the case ends.
struct Truth {
    origin: Duration,
}

impl Truth {
    fn learn() -> Result<Self> {
        let wall = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        let boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
        Ok(Self {
            origin: wall.checked_sub(boot).context("the clock is before 1970")?,
        })
    }

    /// Sets the wall clock so far from the truth, in seconds.
    fn step(&self, secs: i64) -> Result<()> {
        let boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
        let truth = self.origin + boot;
        let by = Duration::from_secs(secs.unsigned_abs());
        let wall = if secs < 0 {
            truth.checked_sub(by)
        } else {
            truth.checked_add(by)
        };
        let wall = wall.context("the clock would leave its range")?;
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(wall))
            .context("cannot set the wall clock")
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        // The next case shall not start a day off.
        drop(self.step(0));
    }
}
