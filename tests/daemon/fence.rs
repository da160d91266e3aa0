//! `remit fence`: what stands before any daemon does, and what becomes of it when one comes.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    harness::{Case, Outcome},
    support::{
        Actor, Agent, Cgroup, Ctx, Daemon, Family, Line, Way, claim,
        daemon::{Place, Settings},
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        remit,
    },
};

const SETPRIV: &str = "/usr/bin/setpriv";

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("fence::stands_before_a_daemon_and_is_taken_over", |ctx| {
            let world = World::lay(ctx)?;
            world.fences("raised, 1 agent in force")?;
            let mut known = Actor::spawn(Some(&world.agent))?;
            refused(&mut known, OUT_V4, OUT_V6)?;
            passes(&mut known)?;
            // Nobody has said yet whose it is.
            let born = world.root.child("born.service")?;
            let mut born = Actor::spawn(Some(&born))?;
            refused(&mut born, IN_V4, IN_V6)?;
            world.fences("it stood already")?;

            let mut daemon = Daemon::start(&world.place)?;
            world.fences("a daemon looks after it")?;
            refused(&mut known, OUT_V4, OUT_V6)?;
            passes(&mut known)?;
            daemon.kill()?;
            world.fences("it stood already")?;

            // A link that is gone is no fence, whatever else is pinned.
            let mut links = fs::read_dir(world.place.at("bpf"))?
                .flatten()
                .map(|version| version.path().join("links"))
                .filter(|links| links.is_dir());
            let links = links.next().context("no links are pinned")?;
            let root = fs::read_dir(&links)?.flatten().next();
            let root = root.context("no root has links")?.path();
            fs::remove_file(root.join("remit_egress"))?;
            world.fences("raised, 1 agent in force")?;
            refused(&mut known, OUT_V4, OUT_V6)?;
            passes(&mut known)
        })
        .once(),
        Case::new("fence::a_root_made_anew_is_fenced_anew", |ctx| {
            let world = World::lay(ctx)?;
            world.fences("raised")?;
            fs::remove_dir(world.agent.path())?;
            world.root.recreate()?;
            world.fences("raised")?;
            let born = world.root.child("born.service")?;
            let mut born = Actor::spawn(Some(&born))?;
            refused(&mut born, IN_V4, IN_V6)
        })
        .once(),
        Case::new("fence::without_a_registry_nobody_reaches_anything", |ctx| {
            let world = World::lay(ctx)?;
            let floor = world.place.at("floor.toml");
            fs::write(&floor, "schema = 1\nnonsense = true\n")?;
            world.fences("raised, 0 agents in force")?;
            let mut actor = Actor::spawn(Some(&world.agent))?;
            refused(&mut actor, IN_V4, IN_V6)?;
            let said = world.place.remit(&["daemon"])?;
            expect("exit code of a daemon without a floor", said.code, 1)?;
            world.fences("it stood already")?;
            refused(&mut actor, IN_V4, IN_V6)?;

            fs::write(&floor, "schema = 1\n")?;
            let _daemon = Daemon::start(&world.place)?;
            eventually(3, || passes(&mut actor))
        })
        .once(),
        Case::new("fence::the_watchdog_is_fed_while_all_goes_well", |ctx| {
            let world = World::lay(ctx)?;
            let mut daemon = Daemon::start(&world.place)?;
            let fed = |daemon: &Daemon| daemon.heard("WATCHDOG=1", Duration::from_secs(3));
            expect("without a watchdog", fed(&daemon)?, 0)?;
            daemon.terminate()?;
            let mut command = world.place.command(&["daemon"])?;
            command.env("WATCHDOG_USEC", "10000000");
            daemon.launch_as(command, &[])?;
            daemon.await_ready()?;
            let times = fed(&daemon)?;
            claim((2..=4).contains(&times), || {
                format!("fed {times} times in 3 s")
            })
        })
        .once(),
        Case::with_outcome(
            "fence::its_units_capabilities_are_enough_for_a_daemon",
            |ctx| {
                if !Path::new(SETPRIV).exists() {
                    return Ok(Outcome::NotTested(format!("no {SETPRIV} here")));
                }
                confined(ctx).map(|()| Outcome::Passed)
            },
        )
        .once(),
        Case::new("fence::what_cannot_be_told_is_no_fence", |ctx| {
            let settings = Settings {
                more: "[enforcment]\nroots = []\n".to_owned(),
                ..Settings::default()
            };
            let place = Place::lay(ctx, &settings)?;
            expect("exit code", place.remit(&["fence"])?.code, 3)
        })
        .once(),
    ]
}

/// An agent's cgroup below a root that nobody governs yet.
struct World {
    agent: Cgroup,
    root: Cgroup,
    place: Place,
}

impl World {
    fn lay(ctx: &Ctx) -> Result<Self> {
        let place = Place::lay(ctx, &Settings::default())?;
        place.write(&Agent::standard("alpha"))?;
        let root = Cgroup::create(&ctx.root())?;
        Ok(Self {
            agent: root.child("alpha.service")?,
            root,
            place,
        })
    }

    /// Runs `remit fence`, which must say this and exit 0.
    fn fences(&self, words: &str) -> Result<()> {
        let said = self.place.remit(&["fence"])?;
        expect("exit code of remit fence", said.code, 0).with_context(|| said.stderr.clone())?;
        claim(said.stdout.contains(words), || {
            format!("not `{words}`: {}{}", said.stdout, said.stderr)
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.place.remit(&["daemon", "--detach-all", "--yes"]));
    }
}

/// A daemon with the capabilities that its unit leaves it.
fn confined(ctx: &Ctx) -> Result<()> {
    let unit = include_str!("../../agent/package/systemd/remit.service");
    let kept = unit
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .flat_map(str::split_whitespace)
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .fold("-all".to_owned(), |all, name| format!("{all},+{name}"));
    let world = World::lay(ctx)?;
    let mut daemon = Daemon::start(&world.place)?;
    daemon.terminate()?;
    let mut command = Command::new(SETPRIV);
    command
        .arg(format!("--bounding-set={kept}"))
        .arg("--no-new-privs")
        .arg(remit::binary()?)
        .arg("daemon")
        .env("REMIT_CONFIG", world.place.config());
    daemon.launch_as(command, &[])?;
    daemon.await_ready()?;
    let mut actor = Actor::spawn(Some(&world.agent))?;
    passes(&mut actor)?;
    refused(&mut actor, OUT_V4, OUT_V6)?;
    let log = world.place.at("log/violations.jsonl");
    eventually(5, || {
        let lines = Line::read_all(&log)?;
        let line = lines.last().context("no line")?;
        for field in ["/unmapped/cgroup", "/actor/process/file/path"] {
            claim(!line.text(field).is_empty(), || format!("no {field}"))?;
        }
        claim(
            line.text("/unmapped/cgroup").ends_with("/alpha.service"),
            || line.text("/unmapped/cgroup").to_owned(),
        )
    })?;
    let said = world.place.remit(&["probe", "alpha"])?;
    expect("exit code of remit probe", said.code, 0).with_context(|| said.stdout)?;
    let said = world
        .place
        .remit(&["suspend", "alpha", "--reason", "test", "--freeze"])?;
    expect("exit code of remit suspend", said.code, 0).with_context(|| said.stderr)?;
    let said = world
        .place
        .remit(&["resume", "alpha", "--reason", "test"])?;
    expect("exit code of remit resume", said.code, 0).with_context(|| said.stderr)?;
    let drift = world.place.remit(&["reconcile"])?;
    expect("exit code of remit reconcile", drift.code, 0).with_context(|| drift.stdout)
}

/// Refused by TCP and UDP, in every family.
fn refused(actor: &mut Actor, v4: &str, v6: &str) -> Result<()> {
    for family in Family::ALL {
        for way in Way::MAIN {
            let tried = way.perform(actor, family, family.pick(v4, v6, 443)?)?;
            expect("errno", tried.errno, libc::EPERM)?;
        }
    }
    Ok(())
}

/// In scope a datagram leaves, in every family.
fn passes(actor: &mut Actor) -> Result<()> {
    for family in Family::ALL {
        let to = family.pick(IN_V4, IN_V6, 443)?;
        expect(
            "errno in scope",
            Way::UdpSendTo.perform(actor, family, to)?.errno,
            0,
        )?;
    }
    Ok(())
}
