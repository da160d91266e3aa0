//! A unit that is started again has a new cgroup. It is never open, and is denied no longer than
//! the daemon needs to learn of it: how long is measured here.

use std::fs;

use anyhow::Result;

use crate::{
    actor::traffic::{Transport, mono_ns},
    harness::Case,
    support::{
        Agent, Family, Fixture, claim, eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        scale,
        traffic::{Ear, Generator, IN, Lane, OUT, lane},
    },
};

/// Between two attempts: what the result can be wrong by.
const PAUSE_US: u64 = 50;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "never_open::a_restarted_unit_is_allowed_again",
        |ctx| {
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
        },
    )]
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
