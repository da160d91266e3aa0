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

/// What the guard adds to a lookup, in turns with asking upstream directly.
pub struct Cost {
    /// Medians through the guard and directly in microseconds, and the first by the second, of each
    /// round.
    pub rounds: Vec<(f64, f64, f64)>,
    /// 99th percentiles through the guard in microseconds.
    pub late: Vec<f64>,
    /// Lookups a second through the guard, and directly.
    pub held: (f64, f64),
}

/// One round: lookups in so many milliseconds; how many, their median and 99th percentile in
/// microseconds.
fn round(actor: &mut Actor, via: &str, millis: u64, askers: usize) -> Result<(f64, f64, f64)> {
    let reply = actor.ask(&Op::LookupRate {
        via: via.parse()?,
        name: "h1.exact.example".to_owned(),
        millis,
        askers,
    })?;
    expect("errno", reply.errno, 0)?;
    claim(reply.value > 0, || "no lookup was answered".to_owned())?;
    let text = String::from_utf8_lossy(&reply.data).into_owned();
    let (median, late) = text.split_once(' ').context("no figures")?;
    Ok((reply.value as f64, median.parse()?, late.parse()?))
}

/// Measures so many `rounds` of `millis` on each side, for each number of askers.
pub fn measure(
    ctx: &Ctx,
    rounds: usize,
    millis: u64,
    askers: &[usize],
) -> Result<Vec<(usize, Cost)>> {
    let agent = Agent::new("alpha").entry(&format!(
        "[[scope.allow]]\nto = \"h1.exact.example\"\nports = [{PORT}]\n{WITHIN}"
    ));
    let zone = Zone::start(&spec())?;
    let at = zone.at.to_string();
    let mut fx = guarded(ctx, &[agent], &zone, "")?;
    let mut inside = fx.actor("alpha")?;
    let one = |askers: &usize| -> Result<(usize, Cost)> {
        let mut cost = Cost {
            rounds: Vec::new(),
            late: Vec::new(),
            held: (0.0, 0.0),
        };
        for _ in 0..rounds {
            let (bare, direct, _) = round(fx.outside(), &at, millis, *askers)?;
            let (count, through, late) = round(&mut inside, RESOLVER_V4, millis, *askers)?;
            cost.rounds
                .push((through, direct, through / direct.max(1.0)));
            cost.late.push(late);
            cost.held.0 += count;
            cost.held.1 += bare;
        }
        let seconds = millis as f64 * rounds as f64 / 1e3;
        cost.held = (cost.held.0 / seconds, cost.held.1 / seconds);
        Ok((*askers, cost))
    };
    askers.iter().map(one).collect()
}

/// Figures, no limits: how fast the machine is says nothing about the guard.
fn costs(ctx: &Ctx) -> Result<()> {
    for (askers, cost) in measure(ctx, 5, 150, &[1, 32])? {
        let mut rounds = cost.rounds;
        rounds.sort_by(|left, right| left.2.total_cmp(&right.2));
        let (through, direct, ratio) = rounds.get(rounds.len() / 2).context("no round")?;
        println!(
            "{askers} askers: median {through} us through the guard, {direct} us directly, \
             {ratio:.2} times; {:.0} a second, {:.0} directly",
            cost.held.0, cost.held.1
        );
    }
    Ok(())
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut many = once("many_names_are_reached_at_once", |ctx| many_names(ctx));
    many.deadline = Duration::from_secs(120);
    vec![many, once("what_a_lookup_costs", |ctx| costs(ctx))]
}
