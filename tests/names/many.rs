//! Many names, each resolved and reached at once, and what a lookup costs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{RESOLVER_V4, Spec, Zone, guarded, once};
use crate::{
    actor::Op,
    harness::Case,
    support::{Actor, Agent, Ctx, claim, expect, scale},
};

/// Where everybody listens.
const PORT: u16 = 443;
const WITHIN: &str = "within = [\"10.0.0.0/8\"]\n";

fn spec() -> Spec {
    Spec::new()
        .numbered("exact.example", [10, 77, 0, 1])
        .numbered("wild.example", [10, 78, 0, 1])
        .accept(PORT)
}

/// Resolves and connects in one go; all of it has to go well.
fn all_go_well(actor: &mut Actor, names: Vec<String>) -> Result<Duration> {
    let (began, count) = (Instant::now(), names.len());
    let reply = actor.ask(&Op::LookupMany {
        via: RESOLVER_V4.parse()?,
        names,
        port: PORT,
    })?;
    let went_well = usize::try_from(reply.value)?;
    expect("resolved and reached", went_well, count)
        .with_context(|| String::from_utf8_lossy(&reply.data).into_owned())?;
    Ok(began.elapsed())
}

/// A grant of each of 10,000 names, and of one wildcard.
fn many_names(ctx: &Ctx) -> Result<()> {
    let (exact, wild) = if scale::emulated() && !scale::full() {
        (200, 90)
    } else {
        (10_000, 900)
    };
    let mut agent = Agent::new("alpha");
    for number in 0..exact {
        agent = agent.entry(&format!(
            "[[scope.allow]]\nto = \"h{number}.exact.example\"\nports = [{PORT}]\n{WITHIN}"
        ));
    }
    agent = agent.entry(&format!(
        "[[scope.allow]]\nto = \"*.wild.example\"\nports = [{PORT}]\n{WITHIN}"
    ));
    let zone = Zone::start(&spec())?;
    let fx = guarded(ctx, &[agent], &zone, "")?;
    let mut actor = fx.actor("alpha")?;
    let names = |count, base: &str| (0..count).map(|n| format!("h{n}.{base}")).collect();
    let took = all_go_well(&mut actor, names(exact, "exact.example"))?;
    let more = all_go_well(&mut actor, names(wild, "wild.example"))?;
    expect("denials", fx.place().status()?.denied("alpha", None)?, 0)?;
    println!("{exact} exact names in {took:?}, {wild} of a wildcard in {more:?}, no denial");
    Ok(())
}

/// One round: lookups in so many milliseconds; their median and 99th percentile in microseconds.
fn round(actor: &mut Actor, via: &str, millis: u64) -> Result<(u64, u64, u64)> {
    let reply = actor.ask(&Op::LookupRate {
        via: via.parse()?,
        name: "h1.exact.example".to_owned(),
        millis,
    })?;
    expect("errno", reply.errno, 0)?;
    let text = String::from_utf8_lossy(&reply.data).into_owned();
    let (median, late) = text.split_once(' ').context("no figures")?;
    Ok((u64::try_from(reply.value)?, median.parse()?, late.parse()?))
}

/// What the guard adds to a lookup, in turns with asking upstream directly. Figures, no limits: how
/// fast the machine is says nothing about the guard.
fn costs(ctx: &Ctx) -> Result<()> {
    const ROUNDS: usize = 10;
    const MILLIS: u64 = 150;
    let agent = Agent::new("alpha").entry(&format!(
        "[[scope.allow]]\nto = \"h1.exact.example\"\nports = [{PORT}]\n{WITHIN}"
    ));
    let zone = Zone::start(&spec())?;
    let at = zone.at.to_string();
    let mut fx = guarded(ctx, &[agent], &zone, "")?;
    let mut inside = fx.actor("alpha")?;
    let (mut ratios, mut direct, mut guarded, mut held) = (vec![], vec![], vec![], 0);
    for _ in 0..ROUNDS {
        let (_, bare, _) = round(fx.outside(), &at, MILLIS)?;
        let (count, through, late) = round(&mut inside, RESOLVER_V4, MILLIS)?;
        claim(count > 0, || "no lookup was answered".to_owned())?;
        ratios.push(through * 100 / bare.max(1));
        direct.push(bare);
        guarded.push((through, late));
        held += count;
    }
    ratios.sort_unstable();
    direct.sort_unstable();
    guarded.sort_unstable();
    let (through, late) = guarded[ROUNDS / 2];
    println!(
        "median {through} us (99 % {late} us) through the guard, {} us directly: {}.{:02} times; \
         {} a second by one asker",
        direct[ROUNDS / 2],
        ratios[ROUNDS / 2] / 100,
        ratios[ROUNDS / 2] % 100,
        held * 1000 / (MILLIS * ROUNDS as u64)
    );
    Ok(())
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut many = once("many_names_are_reached_at_once", |ctx| many_names(ctx));
    many.deadline = Duration::from_secs(120);
    vec![many, once("what_a_lookup_costs", |ctx| costs(ctx))]
}
