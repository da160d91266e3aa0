//! From one set of maps to another: to the next ABI version and back, out of an unfinished change,
//! into larger maps. All the while two processes of an agent try an out-of-scope and an in-scope
//! destination without pause: of the first nothing may pass, of the second nothing be refused.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use agent_ebpf::abi::ABI_VERSION;
use anyhow::{Context as _, Result, bail};
use remit::{
    daemon::image,
    kernel::{ApplyError, Capacity, EMBEDDED, Enforcer, Image, Tuning, boot_nanos},
    policy::{Clock, Source, SourceKind, compile},
};

use crate::{
    actor::Op,
    harness::{Case, Need},
    support::{
        Actor, Agent, Cgroup, Ctx, Family, Fixture, Refusal, Way, claim, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        remit as command, scale,
        way::PAYLOAD,
        wire::Wire,
    },
};

/// There and back so many times.
const JOURNEYS: usize = 3;
/// Starts that are cut short.
const KILLS: usize = 24;

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("succession::to_the_next_version_and_back", there_and_back).needs(Need::Next),
        Case::new("succession::killed_at_any_moment", killed_at_any_moment).needs(Need::Next),
        Case::new("succession::several_sets_become_one_again", several_sets),
        Case::new("succession::larger_maps_replace_full_ones", outgrown),
        Case::new("succession::a_reload_outgrows_the_maps", reload_outgrows),
        Case::new(
            "succession::a_root_that_left_the_settings_stays_fenced",
            left_behind,
        ),
    ];
    for case in &mut cases {
        case.deadline = Duration::from_secs(150);
    }
    cases
}

/// Two processes of an agent that try without pause.
struct Traffic {
    inside: Actor,
    outside: Actor,
}

// === impl Traffic ===

impl Traffic {
    /// Lets them try for so long.
    fn start(mut inside: Actor, mut outside: Actor, millis: u64) -> Result<Self> {
        for (actor, at) in [(&mut inside, IN_V4), (&mut outside, OUT_V4)] {
            let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            let addr = Family::V4.pick(at, at, 443)?;
            actor.tell(&Op::Flood {
                id,
                addr,
                data: PAYLOAD.to_vec(),
                millis,
            })?;
        }
        Ok(Self { inside, outside })
    }

    /// Waits for their end. How often each tried.
    fn end(mut self) -> Result<(i64, i64)> {
        let inside = self.inside.hear()?;
        let passed = inside.replies.first().map_or(-1, |reply| reply.value);
        expect("in scope, refused", inside.value, 0)?;
        claim(passed > 0, || "the in-scope flood did not run".to_owned())?;
        let outside = self.outside.hear()?;
        let leaked = outside.replies.first().map_or(-1, |reply| reply.value);
        expect("out of scope, let through", leaked, 0)?;
        claim(outside.value > 0, || {
            "the out-of-scope flood did not run".to_owned()
        })?;
        Ok((passed, outside.value))
    }
}

/// The pinned sets of maps, as `vN/maps-S`.
fn sets(bpf: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for version in fs::read_dir(bpf)? {
        let version = version?;
        let name = version.file_name().to_string_lossy().into_owned();
        if !name.starts_with('v') {
            continue;
        }
        for set in fs::read_dir(version.path())? {
            let set = set?.file_name().to_string_lossy().into_owned();
            if set.starts_with("maps") {
                found.push(format!("{name}/{set}"));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The folder of this build's ABI version, or of the one that is `later` versions later.
fn folder(later: u32) -> String {
    format!("v{}/", ABI_VERSION + later)
}

/// One set, of this version.
fn one_set(bpf: &Path, version: &str) -> Result<()> {
    let found = sets(bpf)?;
    let is_one = found.len() == 1 && found.iter().all(|set| set.starts_with(version));
    claim(is_one, || {
        format!("sets of maps: {found:?}, not one of {version}")
    })
}

/// The same once the log has told of what the traffic came to, and on a new tap: what was queued
/// on the old one while nobody looked has overflowed it.
fn in_force_after(fx: &mut Fixture, actor: &mut Actor, own: SocketAddr) -> Result<()> {
    fx.reconcile("alpha")?;
    fx.wire = Wire::tap()?;
    // A line about what the budget held back of the flood may still come.
    fx.reconcile("alpha")?;
    in_force(fx, actor, own)
}

/// In scope arrives, out of scope is refused and booked, an own listener is an own one.
fn in_force(fx: &mut Fixture, actor: &mut Actor, own: SocketAddr) -> Result<()> {
    for family in Family::ALL {
        fx.arrives(actor, Way::Tcp, family, family.pick(IN_V4, IN_V6, 443)?)?;
        let how = Refusal::of("alpha", "out_of_scope").without_control();
        let to = family.pick(OUT_V4, OUT_V6, 443)?;
        fx.refused(actor, Way::Tcp, family, to, &how)?;
    }
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    actor
        .must(&Op::Connect {
            id,
            addr: own,
            timeout_ms: 2000,
        })
        .context("to its own listener, bound before the first change")?;
    actor.must(&Op::Close { id })?;
    Ok(())
}

fn there_and_back(ctx: &mut Ctx) -> Result<()> {
    let (this, next) = (command::binary()?, command::next_binary()?);
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha"), Agent::new("beta")])?;
    let bpf = fx.place().at("bpf");
    let mut actor = fx.actor("alpha")?;
    let mut server = fx.actor("alpha")?;
    let (_, own) = server.listen(Family::V4.pick("127.0.0.1", "::1", 0)?)?;
    in_force(&mut fx, &mut actor, own)?;
    one_set(&bpf, &folder(0))?;
    let began = Instant::now();
    let mut tried = (0, 0);
    let journeys = scale::third_of(JOURNEYS);
    for _ in 0..journeys {
        for (binary, version) in [(&next, folder(1)), (&this, folder(0))] {
            let denied = fx.place().status()?.denied("alpha", None)?;
            let traffic = Traffic::start(fx.actor("alpha")?, fx.actor("alpha")?, 4000)?;
            fx.daemon.kill()?;
            fx.daemon.restart_as(binary, &[])?;
            let passed = traffic.end()?;
            tried = (tried.0 + passed.0, tried.1 + passed.1);
            let now = fx.place().status()?.denied("alpha", None)?;
            expect("denied attempts", now, denied + u64::try_from(passed.1)?)?;
            one_set(&bpf, &version)?;
            in_force_after(&mut fx, &mut actor, own)?;
        }
    }
    fx.reconcile("alpha")?;
    println!(
        "{} migrations in {:.1} s: {} out of scope, all refused; {} in scope, all let through",
        journeys * 2,
        began.elapsed().as_secs_f64(),
        tried.1,
        tried.0
    );
    Ok(())
}

fn killed_at_any_moment(ctx: &mut Ctx) -> Result<()> {
    let (this, next) = (command::binary()?, command::next_binary()?);
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha"), Agent::new("beta")])?;
    let bpf = fx.place().at("bpf");
    let mut actor = fx.actor("alpha")?;
    let mut server = fx.actor("alpha")?;
    let (_, own) = server.listen(Family::V4.pick("127.0.0.1", "::1", 0)?)?;
    let started = Instant::now();
    fx.daemon.kill()?;
    fx.daemon.restart_as(&next, &[])?;
    // What a start takes here, so that the kills fall all over it.
    let takes = started.elapsed();
    let denied = fx.place().status()?.denied("alpha", None)?;
    let mut refused = 0;
    let mut several = 0;
    let mut chance = u64::from(std::process::id()) | 1;
    let kills = scale::third_of(KILLS);
    for round in 0..kills {
        let binary = if round % 3 == 0 { &next } else { &this };
        chance = chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let share = (chance >> 33) % 1000;
        let after = takes.mul_f64(share as f64 / 1000.0);
        let millis = u64::try_from(after.as_millis())? + 100;
        let traffic = Traffic::start(fx.actor("alpha")?, fx.actor("alpha")?, millis)?;
        fx.daemon.kill()?;
        fx.daemon.start_and_kill(binary, after)?;
        refused += traffic.end()?.1;
        several += usize::from(sets(&bpf)?.len() > 1);
    }
    claim(several > 0, || "no kill fell into a change".to_owned())?;
    for (binary, version) in [(&this, folder(0)), (&next, folder(1)), (&this, folder(0))] {
        fx.daemon.kill()?;
        fx.daemon.restart_as(binary, &[])?;
        one_set(&bpf, &version)?;
    }
    let now = fx.place().status()?.denied("alpha", None)?;
    expect("denied attempts", now, denied + u64::try_from(refused)?)?;
    in_force_after(&mut fx, &mut actor, own)?;
    fx.reconcile("alpha")?;
    println!("{kills} kills, {several} of them in the middle of a change; {refused} refusals");
    Ok(())
}

fn several_sets(ctx: &mut Ctx) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let bpf = fx.place().at("bpf");
    let mut actor = fx.actor("alpha")?;
    let mut server = fx.actor("alpha")?;
    let (_, own) = server.listen(Family::V4.pick("127.0.0.1", "::1", 0)?)?;
    in_force(&mut fx, &mut actor, own)?;
    let denied = fx.place().status()?.denied("alpha", None)?;
    fx.daemon.kill()?;
    // As one that was killed before it had filled its own.
    fs::create_dir(bpf.join(format!("{}maps-2", folder(0))))?;
    let traffic = Traffic::start(fx.actor("alpha")?, fx.actor("alpha")?, 3000)?;
    fx.daemon.restart()?;
    let refused = u64::try_from(traffic.end()?.1)?;
    expect("sets", sets(&bpf)?, vec![format!("{}maps-3", folder(0))])?;
    let now = fx.place().status()?.denied("alpha", None)?;
    expect("denied attempts", now, denied + refused)?;
    in_force_after(&mut fx, &mut actor, own)?;
    fx.reconcile("alpha")
}

/// What an agent's entry, as people write it, comes to in the kernel's terms.
fn images(ctx: &Ctx, agents: &[Agent]) -> Result<Vec<Image>> {
    let sources: Vec<Source> = agents
        .iter()
        .map(|agent| Source {
            kind: SourceKind::Agent,
            path: format!("{}.toml", agent.id).into(),
            text: agent.toml(&ctx.root()),
        })
        .collect();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let now = i64::try_from(now.as_millis())?;
    let clock = Clock {
        boot_now_ns: boot_nanos(),
        wall_now_ms: now,
        latest_now_ms: now,
    };
    let compiled = compile(&sources, now);
    if compiled.findings.iter().any(|finding| finding.is_error()) {
        bail!("{:?}", compiled.findings);
    }
    let all =
        std::iter::once(&compiled.unregistered).chain(compiled.agents.iter().map(AsRef::as_ref));
    Ok(all.map(|tables| image(tables, &clock)).collect())
}

const TUNING: Tuning = Tuning {
    kernel_log: 0,
    events_per_second: 200,
    accounts: true,
};

/// With so many single addresses.
fn with_hosts(count: u16) -> Agent {
    (1..=count).fold(Agent::standard("alpha"), |agent, at| {
        agent.allow(&format!("192.0.2.{at}"), &(1000 + at).to_string())
    })
}

fn outgrown(ctx: &mut Ctx) -> Result<()> {
    let root = Cgroup::create(&ctx.root())?;
    let cgroup = root.child("alpha.service")?;
    let few = images(ctx, &[Agent::standard("alpha")])?;
    let small = Capacity {
        agents: 4,
        rows: 16,
        claims: 16,
        addresses: 64,
        prefixes: 128,
        rule_sets: 128,
    };
    let bpf = ctx.dir().join("bpf");
    let mut enforcer = Enforcer::open(EMBEDDED, &bpf, small, &TUNING)?;
    enforcer.apply(&few)?;
    enforcer.attribute(&[(cgroup.id()?, "alpha")])?;
    enforcer.fence(&ctx.root(), root.path())?;
    enforcer.settle_in()?;
    let alpha = enforcer.index_of("alpha").context("no index")?;
    let born = enforcer.born();

    let traffic = Traffic::start(
        Actor::spawn(Some(&cgroup))?,
        Actor::spawn(Some(&cgroup))?,
        5000,
    )?;
    let many = images(
        ctx,
        &[
            with_hosts(200),
            Agent::new("b"),
            Agent::new("c"),
            Agent::new("d"),
        ],
    )?;
    match enforcer.apply(&many) {
        Err(ApplyError::Full { .. }) => {}
        other => bail!("it fits: {other:?}"),
    }
    // Not enough still: what is in force stays.
    let failed = enforcer.outgrow(
        &many,
        Capacity {
            agents: 16,
            ..small
        },
    );
    claim(failed.is_err(), || "it fits".to_owned())?;
    expect("sets", sets(&bpf)?, vec![format!("{}maps", folder(0))])?;
    let drifts = enforcer.inspect();
    claim(drifts.is_empty(), || format!("{drifts:?}"))?;

    let room = Capacity::for_images(&many);
    let mut changed = enforcer.outgrow(&many, room)?;
    changed.sort();
    expect(
        "changed",
        changed,
        ["alpha", "b", "c", "d"].map(str::to_owned).to_vec(),
    )?;
    expect("sets", sets(&bpf)?, vec![format!("{}maps-2", folder(0))])?;
    let drifts = enforcer.inspect();
    claim(drifts.is_empty(), || format!("{drifts:?}"))?;
    expect("index", enforcer.index_of("alpha"), Some(alpha))?;
    expect("birth of the counters", enforcer.born(), born)?;
    let (passed, refused) = traffic.end()?;
    let counters = enforcer.counters(alpha).context("no counters")?;
    expect(
        "refused",
        counters.denied.iter().sum::<u64>(),
        u64::try_from(refused)?,
    )?;
    expect("let through", counters.allowed, u64::try_from(passed)?)?;

    // The next process takes the new set over as it is, with all that was counted.
    drop(enforcer);
    let mut enforcer = Enforcer::open(EMBEDDED, &bpf, small, &TUNING)?;
    expect("changed", enforcer.apply(&many)?, Vec::<String>::new())?;
    enforcer.attribute(&[(cgroup.id()?, "alpha")])?;
    enforcer.fence(&ctx.root(), root.path())?;
    enforcer.settle_in()?;
    expect("sets", sets(&bpf)?, vec![format!("{}maps-2", folder(0))])?;
    let again = enforcer.counters(alpha).context("no counters")?;
    expect("counters", again, counters)?;
    expect("birth of the counters", enforcer.born(), born)?;
    enforcer.detach_all()?;
    println!("{passed} in scope, {refused} out of scope meanwhile");
    Ok(())
}

/// More agents than the maps of a small registry hold.
fn reload_outgrows(ctx: &mut Ctx) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let bpf = fx.place().at("bpf");
    let mut actor = fx.actor("alpha")?;
    let mut server = fx.actor("alpha")?;
    let (_, own) = server.listen(Family::V4.pick("127.0.0.1", "::1", 0)?)?;
    in_force(&mut fx, &mut actor, own)?;
    let denied = fx.place().status()?.denied("alpha", None)?;
    let traffic = Traffic::start(fx.actor("alpha")?, fx.actor("alpha")?, 6000)?;
    for number in 0..300 {
        fx.place().write(&Agent::new(&format!("more-{number}")))?;
    }
    // The files are seen by themselves, too: whichever reload comes first moves.
    let said = fx.place().remit(&["reload"])?;
    expect("exit code of remit reload", said.code, 0).with_context(|| said.stderr.clone())?;
    let refused = u64::try_from(traffic.end()?.1)?;
    let found = sets(&bpf)?;
    claim(
        found.len() == 1 && found != [format!("{}maps", folder(0))],
        || format!("sets of maps: {found:?}"),
    )?;
    let now = fx.place().status()?.denied("alpha", None)?;
    expect("denied attempts", now, denied + refused)?;
    in_force_after(&mut fx, &mut actor, own)?;
    fx.reconcile("alpha")
}

fn left_behind(ctx: &mut Ctx) -> Result<()> {
    let root = Cgroup::create(&ctx.root())?;
    let name = format!("{}-other.slice", ctx.root().trim_end_matches(".slice"));
    let other = Cgroup::create(&name)?;
    let inside = other.child("alpha.service")?;
    let images = images(ctx, &[Agent::standard("alpha")])?;
    let bpf = ctx.dir().join("bpf");
    let room = Capacity::for_images(&images);
    let start = |roots: &[(&str, &Cgroup)]| -> Result<Enforcer> {
        let mut enforcer = Enforcer::open(EMBEDDED, &bpf, room, &TUNING)?;
        enforcer.apply(&images)?;
        for (name, cgroup) in roots {
            enforcer.fence(name, cgroup.path())?;
        }
        enforcer.settle_in()?;
        Ok(enforcer)
    };
    drop(start(&[(&ctx.root(), &root), (&name, &other)])?);
    let denies = || -> Result<()> {
        let mut actor = Actor::spawn(Some(&inside))?;
        let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
        let tried = Way::Tcp.perform(&mut actor, Family::V4, to)?;
        expect("errno in the root that left", tried.errno, libc::EPERM)
    };
    for _ in 0..2 {
        let enforcer = start(&[(&ctx.root(), &root)])?;
        denies()?;
        drop(enforcer);
        denies()?;
    }
    // Also into another set.
    fs::create_dir(bpf.join(format!("{}maps-9", folder(0))))?;
    let mut enforcer = start(&[(&ctx.root(), &root)])?;
    expect("sets", sets(&bpf)?, vec![format!("{}maps-10", folder(0))])?;
    denies()?;
    let counted = enforcer.counters(0).context("no counters")?;
    expect("denied", counted.denied.iter().sum::<u64>(), 5)?;
    let drifts = enforcer.inspect();
    claim(drifts.is_empty(), || format!("{drifts:?}"))?;
    enforcer.detach_all()?;
    Ok(())
}
