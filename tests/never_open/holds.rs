//! suspend, resume, revoke: at once, also for what is open; across restarts and the loss of what
//! was written down; and final, where it says so.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Fire, changing, unpin};
use crate::{
    actor::traffic::{Tally, Transport},
    harness::{Case, Outcome},
    support::{
        Fixture, claim,
        daemon::Settings,
        eventually, expect,
        traffic::{Generator, IN, Lane, Numbers, OUT},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::suspended_at_once_and_resumed", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let held = hold(&fire.fx, "suspend", &[])?;
            expect("before", held["before"].as_str(), Some("active"))?;
            expect("after", held["after"].as_str(), Some("suspended"))?;
            expect("durable", held["durable"].as_bool(), Some(true))?;
            // When the command has answered, it is in force: nothing passes from now on.
            silent(&mut fire.changing, 300)?;
            let line = fire.fx.await_line(0, "changing", |line| {
                line.text("/unmapped/reason") == "suspended"
            })?;
            claim(line.is_denial(), || line.0.to_string())?;
            told(&fire.fx, "suspended")?;
            // Again is no mistake.
            let again = hold(&fire.fx, "suspend", &[])?;
            expect("before", again["before"].as_str(), Some("suspended"))?;
            expect("after", again["after"].as_str(), Some("suspended"))?;
            silent(&mut fire.changing, 50)?;

            let resumed = hold(&fire.fx, "resume", &[])?;
            expect("after", resumed["after"].as_str(), Some("active"))?;
            fire.changing.await_passing(IN)?;
            let lifecycle = fire
                .fx
                .audit()?
                .iter()
                .filter(|line| line.0["class_uid"] == 3004)
                .filter(|line| line.0.to_string().contains("a drill"))
                .count();
            claim(lifecycle >= 2, || {
                format!("{lifecycle} lines of 3004 with the reason")
            })?;
            steady_alone(fire)
        }),
        Case::with_outcome("never_open::suspension_ends_open_connections", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let before = fire.changing.report()?;
            let held = hold(&fire.fx, "suspend", &[])?;
            if held["warnings"].to_string().contains("connection") {
                return Ok(Outcome::NotTested(format!(
                    "this kernel closes no connections for others: {}",
                    held["warnings"]
                )));
            }
            // The stream sees an error, and its next connect is refused: it does not hang.
            eventually(2, || {
                for ((lane, old), (_, new)) in before.iter().zip(fire.changing.report()?) {
                    if lane.label == IN && lane.transport == Transport::Stream {
                        claim(ended(&new) > ended(old), || {
                            format!("still open: {lane:?}: {new:?}")
                        })?;
                    }
                }
                Ok(())
            })?;
            let closed = held["closed"].as_u64().unwrap_or_default();
            claim(closed >= 3, || {
                format!("{closed} closed, three were open: {held}")
            })?;
            steady_alone(fire).map(|()| Outcome::Passed)
        }),
        Case::new("never_open::commands_that_cannot_hold_say_so", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let place = fire.fx.place().clone();
            for verb in ["suspend", "resume", "revoke"] {
                let said = place.remit(&[verb, "nobody", "--reason", "x"])?;
                expect(&format!("exit code of {verb} nobody"), said.code, 1)?;
                let said = place.remit(&[verb, "changing"])?;
                expect(
                    &format!("exit code of {verb} without a reason"),
                    said.code,
                    2,
                )?;
            }
            let both = ["suspend", "changing", "--reason", "x", "--kill", "--freeze"];
            expect("exit code of both", place.remit(&both)?.code, 2)?;
            fire.changing.await_passing(IN)?;
            fire.fx.daemon.kill()?;
            let said = place.remit(&["suspend", "changing", "--reason", "x"])?;
            expect("exit code without a daemon", said.code, 3)?;
            fire.fx.daemon.restart()?;
            let (_fx, numbers) = fire.cease()?;
            println!("{numbers}");
            Ok(())
        }),
        Case::new("never_open::a_suspension_survives", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            hold(&fire.fx, "suspend", &[])?;
            let survived = survives(&mut fire, "suspended")?;
            // Another entry, approved anew, lifts no suspension.
            fire.fx.place().write(&changing(true).approval("CHG-2"))?;
            fire.reload()?;
            silent(&mut fire.changing, 50)?;
            let resumed = hold(&fire.fx, "resume", &[])?;
            expect("after", resumed["after"].as_str(), Some("active"))?;
            fire.changing.await_passing(IN)?;
            // What was lifted stays lifted.
            fire.fx.daemon.kill()?;
            fire.fx.daemon.restart()?;
            fire.changing.await_passing(IN)?;
            println!("survived {survived}");
            Ok(())
        }),
        Case::new("never_open::a_revocation_is_final", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let held = hold(&fire.fx, "revoke", &[])?;
            expect("after", held["after"].as_str(), Some("revoked"))?;
            silent(&mut fire.changing, 300)?;
            let resume = ["resume", "changing", "--reason", "no"];
            expect(
                "exit code of resume",
                fire.fx.place().remit(&resume)?.code,
                1,
            )?;
            silent(&mut fire.changing, 50)?;
            let survived = survives(&mut fire, "revoked")?;
            expect(
                "exit code of resume",
                fire.fx.place().remit(&resume)?.code,
                1,
            )?;
            // Suspending does not soften it.
            let suspend = ["suspend", "changing", "--reason", "softer"];
            fire.fx.place().remit(&suspend)?;
            expect(
                "exit code of resume",
                fire.fx.place().remit(&resume)?.code,
                1,
            )?;
            silent(&mut fire.changing, 50)?;
            // Changed, and not approved again.
            fire.fx.place().write(&changing(true))?;
            fire.reload()?;
            silent(&mut fire.changing, 50)?;
            // Approved again, and not changed.
            fire.fx.place().write(&changing(false).approval("CHG-1"))?;
            fire.reload()?;
            silent(&mut fire.changing, 50)?;
            // Both.
            fire.fx.place().write(&changing(true).approval("CHG-2"))?;
            fire.reload()?;
            fire.changing.await_passing(IN)?;
            fire.fx.daemon.kill()?;
            fire.fx.daemon.restart()?;
            fire.changing.await_passing(IN)?;
            println!("survived {survived}");
            Ok(())
        }),
        Case::new("never_open::a_hold_that_nobody_can_read_is_final", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            hold(&fire.fx, "suspend", &[])?;
            fire.fx.daemon.kill()?;
            remove_dir(&fire.fx.place().at("state"))?;
            spoil(&fire.fx.place().at("agents.d/changing.hold"))?;
            fire.fx.daemon.restart()?;
            // It cannot say that it was no revocation.
            silent(&mut fire.changing, 50)?;
            let status = fire.fx.place().status()?;
            let agent = status.agent("changing")?;
            expect("state", agent["state"].as_str(), Some("revoked"))?;
            let resume = ["resume", "changing", "--reason", "no"];
            expect(
                "exit code of resume",
                fire.fx.place().remit(&resume)?.code,
                1,
            )?;
            silent(&mut fire.changing, 50)?;
            fire.fx.place().write(&changing(true).approval("CHG-2"))?;
            fire.reload()?;
            fire.changing.await_passing(IN)
        }),
        Case::new(
            "never_open::a_file_that_goes_and_comes_back_stays_held",
            |ctx| {
                let mut fire = Fire::start(ctx, &Settings::default())?;
                hold(&fire.fx, "suspend", &[])?;
                fs::remove_file(fire.fx.place().at("agents.d/changing.toml"))?;
                fire.reload()?;
                silent(&mut fire.changing, 50)?;
                fire.write(false)?;
                fire.reload()?;
                silent(&mut fire.changing, 200)?;
                told(&fire.fx, "suspended")?;
                steady_alone(fire)
            },
        ),
        Case::new("never_open::suspended_and_killed", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let held = hold(&fire.fx, "suspend", &["--kill"])?;
            claim(held["killed"].as_u64() >= Some(1), || {
                format!("none was killed: {held}")
            })?;
            let procs = fire.fx.cgroup("changing")?.path().join("cgroup.procs");
            eventually(3, || {
                let left = fs::read_to_string(&procs)?;
                claim(left.is_empty(), || format!("still there: {left}"))
            })?;
            // Who comes next is suspended as well.
            let cgroup = fire.fx.cgroup("changing")?;
            let lanes = super::lanes(super::CHANGING_PORT, &[IN, OUT])?;
            fire.changing = Generator::start(cgroup, lanes)?;
            silent(&mut fire.changing, 100)?;
            steady_alone(fire)
        }),
        Case::new("never_open::suspended_and_frozen", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let events = fire.fx.cgroup("changing")?.path().join("cgroup.events");
            let frozen = |wanted: &str| -> Result<()> {
                eventually(3, || {
                    let said = fs::read_to_string(&events)?;
                    claim(said.contains(wanted), || said.clone())
                })
            };
            let held = hold(&fire.fx, "suspend", &["--freeze"])?;
            claim(held["frozen"].as_u64() >= Some(1), || {
                format!("none was frozen: {held}")
            })?;
            frozen("frozen 1")?;
            fire.fx.daemon.kill()?;
            fire.fx.daemon.restart()?;
            frozen("frozen 1")?;
            hold(&fire.fx, "resume", &[])?;
            frozen("frozen 0")?;
            fire.changing.await_passing(IN)?;
            let (_fx, numbers) = {
                // The frozen one was refused between the resume's two steps at most, or not at all.
                let Fire {
                    fx,
                    mut ear,
                    steady,
                    changing,
                } = fire;
                drop(changing);
                (fx, Numbers::settle(vec![steady], &mut ear)?)
            };
            println!("{numbers}");
            Ok(())
        }),
    ]
}

/// `remit VERB changing --reason "a drill" … --json`; the answer.
fn hold(fx: &Fixture, verb: &str, further: &[&str]) -> Result<Value> {
    let mut args = vec![verb, "changing", "--reason", "a drill", "--json"];
    args.extend(further);
    let said = fx.place().remit(&args)?;
    expect(&format!("exit code of remit {verb}"), said.code, 0)
        .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
    serde_json::from_str(&said.stdout).with_context(|| format!("not JSON: {}", said.stdout))
}

/// Nothing in scope of `changing` passes any more, and it goes on trying. A stream may take bytes
/// until it is closed; that they do not arrive is seen by [`crate::support::traffic::Ear`].
fn silent(changing: &mut Generator, millis: u64) -> Result<()> {
    let of = |report: Vec<(Lane, Tally)>| -> Vec<(Lane, Tally)> {
        report
            .into_iter()
            .filter(|(lane, _)| lane.label == IN && lane.transport != Transport::Stream)
            .collect()
    };
    changing.await_refused(IN)?;
    let before = of(changing.report()?);
    sleep(Duration::from_millis(millis));
    changing.await_refused(IN)?;
    for ((lane, old), (_, new)) in before.iter().zip(of(changing.report()?)) {
        expect(&format!("passed on {lane:?}"), new.passed, old.passed)?;
        claim(new.attempts > old.attempts, || {
            format!("not tried: {lane:?}")
        })?;
    }
    Ok(())
}

/// Errors by which a stream learns that it is over.
fn ended(tally: &Tally) -> u64 {
    [libc::ECONNABORTED, libc::EPIPE, libc::ECONNRESET]
        .iter()
        .filter_map(|errno| tally.errors.get(errno))
        .sum()
}

/// Status says who is held, and why.
fn told(fx: &Fixture, state: &str) -> Result<()> {
    let status = fx.place().status()?;
    let agent = status.agent("changing")?;
    expect("state", agent["state"].as_str(), Some(state))?;
    expect(
        "hold.reason",
        agent["hold"]["reason"].as_str(),
        Some("a drill"),
    )
    .with_context(|| agent.to_string())
}

/// A hold outlives each of these: the daemon's restart in order and not, the loss of the state
/// directory, of the marker, of all pins. Says what it was put through.
fn survives(fire: &mut Fire, state: &str) -> Result<&'static str> {
    let dir: PathBuf = fire.fx.place().at("state");
    let marker = fire.fx.place().at("agents.d/changing.hold");
    fire.fx.daemon.kill()?;
    fire.fx.daemon.restart()?;
    still(fire, state)?;
    fire.fx.daemon.terminate()?;
    fire.fx.daemon.restart()?;
    still(fire, state)?;
    // What is left is the marker beside the registry file.
    fire.fx.daemon.kill()?;
    remove_dir(&dir)?;
    fire.fx.daemon.restart()?;
    still(fire, state)?;
    // What is left is the state directory.
    fire.fx.daemon.kill()?;
    fs::remove_file(&marker).with_context(|| marker.display().to_string())?;
    fire.fx.daemon.restart()?;
    still(fire, state)?;
    // A reboot takes the kernel's state along.
    fire.fx.daemon.kill()?;
    unpin(&fire.fx.place().at("bpf"))?;
    fire.fx.daemon.restart()?;
    still(fire, state)?;
    Ok("2 restarts, state lost, marker lost, pins lost")
}

fn still(fire: &mut Fire, state: &str) -> Result<()> {
    silent(&mut fire.changing, 50)?;
    told(&fire.fx, state)
}

fn remove_dir(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Turns a bit in the middle.
fn spoil(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let middle = bytes.len() / 2;
    let byte = bytes.get_mut(middle).context("an empty marker")?;
    *byte ^= 1;
    Ok(fs::write(path, bytes)?)
}

/// The other agent never noticed; nothing out of scope ever arrived, of either.
fn steady_alone(fire: Fire) -> Result<()> {
    let Fire {
        fx: _fx,
        mut ear,
        steady,
        changing,
    } = fire;
    drop(changing);
    let numbers = Numbers::settle(vec![steady], &mut ear)?;
    println!("{numbers}");
    Ok(())
}
