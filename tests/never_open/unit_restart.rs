//! A unit that is started again has a new cgroup. It is never open, and is denied no longer than
//! the daemon needs to learn of it: how long is measured here.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    actor::traffic::{Heard, Spot, Transport, mono_ns},
    harness::Case,
    support::{
        Agent, Ctx, Family, Fixture, claim, eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        scale,
        traffic::{Ear, Generator, IN, Lane, OUT, lane},
    },
};

/// Between two attempts: what the result can be wrong by.
const PAUSE_US: u64 = 50;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::a_restarted_unit_is_allowed_again", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let rounds = scale::of(200);
            let lanes = flows()?;
            let mut ear = Ear::start(&lanes)?;
            let mut took = Vec::with_capacity(rounds);
            for _ in 0..rounds {
                let cgroup = fx.cgroup("alpha")?;
                eventually(3, || {
                    let inside = fs::read_to_string(cgroup.path().join("cgroup.procs"))?;
                    claim(inside.is_empty(), || format!("still inside: {inside}"))
                })?;
                // Also begins the ear's search for the first arrival.
                ear.report()?;
                let made = mono_ns();
                cgroup.recreate()?;
                let mut generator = Generator::paced(cgroup, lanes.clone(), PAUSE_US)?;
                generator.await_passing(IN)?;
                let (spots, wire) = ear.report()?;
                expect("packets out of scope", wire, 0)?;
                let first = spots
                    .iter()
                    .filter(|(spot, _)| spot.label == IN)
                    .map(|(_, heard)| heard.first_mono_ns)
                    .filter(|first| *first > 0)
                    .min();
                took.push(first.unwrap_or(u64::MAX).saturating_sub(made));
                for (lane, tally) in generator.stop()? {
                    claim(lane.label != OUT || tally.passed == 0, || {
                        format!("passed: {lane:?}: {tally:?}")
                    })?;
                }
            }
            ear.control(OUT)?;
            println!(
                "from the cgroup's birth to its first packet's arrival, the start of the process \
             included: {}",
                scale::percentiles(&mut took)
            );
            Ok(())
        }),
        // A root is only ever removed by an administrator, with everything in it. Its links go with
        // it, so the new one is open until the daemon has fenced it: bounded here, not denied.
        Case::new("never_open::a_root_made_again_is_fenced_again", |ctx| {
            root_made_again(ctx)
        }),
    ]
}

/// Removes the root with all that is in it, makes it again, and sends out of scope from there at
/// once: how long that arrives is how long the root was open.
fn root_made_again(ctx: &Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let lanes = flows()?;
    let mut ear = Ear::start(&lanes)?;
    let rounds = scale::of(100);
    let (mut open, mut arrivals) = (Vec::with_capacity(rounds), 0);
    for _ in 0..rounds {
        let cgroup = fx.cgroup("alpha")?;
        let root = cgroup.path().parent().context("no root")?;
        eventually(3, || Ok(fs::remove_dir(cgroup.path())?))?;
        fs::remove_dir(root)?;
        let before = ear.report()?;
        let made = mono_ns();
        fs::create_dir_all(cgroup.path())?;
        let mut generator = Generator::paced(cgroup, lanes.clone(), PAUSE_US)?;
        generator.await_refused(OUT)?;
        generator.await_passing(IN)?;
        let after = ear.report()?;
        let of_out = |report: &Vec<(Spot, Heard)>| -> (u64, u64) {
            let spots = report.iter().filter(|(spot, _)| spot.label == OUT);
            spots.fold((0, 0), |(count, last), (_, heard)| {
                (count + heard.arrivals, last.max(heard.last_mono_ns))
            })
        };
        let ((old, _), (new, last)) = (of_out(&before.0), of_out(&after.0));
        arrivals += new - old;
        open.push(if new > old {
            last.saturating_sub(made)
        } else {
            0
        });
        let most = open.last().copied().unwrap_or_default();
        claim(most < 1_000_000_000, || {
            format!("the root was open for {most} ns")
        })?;
    }
    println!(
        "a root that was removed and made again was open: {}; {arrivals} arrivals out of scope \
         meanwhile",
        scale::percentiles(&mut open)
    );
    Ok(())
}

fn flows() -> Result<Vec<Lane>> {
    let mut lanes = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (label, v4, v6) in [(IN, IN_V4, IN_V6), (OUT, OUT_V4, OUT_V6)] {
            let to = family.pick(v4, v6, 443)?;
            for transport in [Transport::SendTo, Transport::Connect] {
                lanes.push(lane(label, family, to, transport));
            }
        }
    }
    Ok(lanes)
}
