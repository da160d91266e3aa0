//! With the daemon dead: a grant ends on time, who is suspended stays so, and what is born under a
//! root is denied.

use std::{thread::sleep, time::Duration};

use anyhow::Context as _;

use crate::{
    actor::traffic::{Transport, wall_ns},
    harness::Case,
    support::{
        Agent, Cgroup, Fixture, claim,
        clock::rfc3339,
        expect, scale,
        traffic::{Ear, Generator, IN, Numbers, OUT, lanes},
    },
};

/// "To the second".
const SECOND: i64 = 1_000_000_000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "never_open::grants_end_on_time_with_the_daemon_dead",
            |ctx| {
                let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                let lanes = lanes(443, &[IN, OUT])?;
                let mut ear = Ear::start(&lanes)?;
                let mut generator = Generator::start(fx.cgroup("alpha")?, lanes)?;
                generator.await_passing(IN)?;
                // Only now, so that a slow start does not use it up. Whole seconds, as the registry
                // writes them.
                let left = scale::patience(3).cast_signed();
                let end = (wall_ns() / 1_000_000_000).cast_signed() + left;
                let ports = r#"443, "443/udp""#;
                let ends = Agent::new("alpha")
                    .allow_until("198.51.100.0/24", ports, &rfc3339(end))
                    .allow_until("2001:db8:1::/64", ports, &rfc3339(end));
                fx.change(&ends)?;
                fx.daemon.kill()?;
                let end_ns = end * SECOND;
                let left = end_ns - wall_ns().cast_signed();
                claim(left > SECOND / 2, || "it took too long to begin".to_owned())?;
                sleep(Duration::from_nanos(left.unsigned_abs()) + Duration::from_millis(1500));

                let (spots, wire) = ear.report()?;
                let mut latest = i64::MIN;
                for (spot, heard) in spots.iter().filter(|(spot, _)| spot.label == IN) {
                    let late = heard.last_wall_ns.cast_signed() - end_ns;
                    claim(late.abs() < SECOND, || {
                        format!("the last arrival at {spot:?} was {late} ns after the end")
                    })?;
                    latest = latest.max(late);
                }
                let mut earliest = i64::MAX;
                for (lane, tally) in generator.stop()? {
                    if lane.transport == Transport::Stream {
                        // Nobody is there to close it, and it cannot tell: see the last arrival.
                    } else if lane.label == IN {
                        let (first, _) = tally
                            .failed_ns
                            .with_context(|| format!("never refused: {lane:?}: {tally:?}"))?;
                        earliest = earliest.min(first.cast_signed() - end_ns);
                    } else {
                        expect("passed out of scope", tally.passed, 0)?;
                    }
                }
                claim(earliest > -SECOND, || {
                    format!("refused {earliest} ns before the end")
                })?;
                expect("packets out of scope", wire, 0)?;
                ear.control(OUT)?;
                fx.daemon.restart()?;
                println!(
                    "first refusal {:+.1} ms, last arrival {:+.1} ms from the end",
                    earliest as f64 / 1e6,
                    latest as f64 / 1e6
                );
                Ok(())
            },
        ),
        Case::new(
            "never_open::the_newborn_are_denied_with_the_daemon_dead",
            |ctx| {
                let suspended = Agent::standard("held").state("suspended");
                let mut fx = Fixture::start(ctx, &[Agent::standard("alpha"), suspended])?;
                let lanes = lanes(443, &[IN, OUT])?;
                let mut ear = Ear::start(&lanes)?;
                let alpha = Generator::start(fx.cgroup("alpha")?, lanes.clone())?;
                let mut held = Generator::start(fx.cgroup("held")?, lanes.clone())?;
                held.await_refused(IN)?;
                fx.daemon.kill()?;
                held.await_refused(IN)?;
                // In the root itself, in a new cgroup below it, and in one below that.
                let root = Cgroup::create(&ctx.root())?;
                let born = root.child("born.service")?;
                let deeper = born.child("deeper")?;
                for cgroup in [&root, &born, &deeper] {
                    let mut newborn = Generator::start(cgroup, lanes.clone())?;
                    newborn.await_refused(IN)?;
                    for (lane, tally) in newborn.stop()? {
                        expect(&format!("passed on {lane:?}"), tally.passed, 0)?;
                    }
                }
                // What an agent makes below its own cgroup is its own.
                let own = fx.cgroup("alpha")?.child("worker")?;
                let mut worker = Generator::start(&own, lanes.clone())?;
                worker.await_passing(IN)?;
                for (lane, tally) in held.stop()? {
                    expect(&format!("passed on {lane:?}"), tally.passed, 0)?;
                }
                drop((deeper, born));
                // The guard of the fixture removes it.
                std::mem::forget(root);
                let numbers = Numbers::settle(vec![alpha, worker], &mut ear)?;
                drop(own);
                fx.daemon.restart()?;
                println!("{numbers}");
                Ok(())
            },
        ),
    ]
}
