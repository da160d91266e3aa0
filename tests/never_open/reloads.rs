//! Reloads that widen and narrow.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use super::{Fire, resident};
use crate::{
    actor::{Op, traffic::payload},
    harness::Case,
    support::{
        Family,
        daemon::Settings,
        expect, scale,
        traffic::{FLIP, FLIP_V4, FLIP_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new("never_open::reloads_widen_and_narrow", |ctx| {
        let fire = Fire::start(ctx, &Settings::default())?;
        let mut actor = fire.fx.actor("changing")?;
        let sockets = [
            (
                Family::V4,
                actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?,
            ),
            (
                Family::V6,
                actor.socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)?,
            ),
        ];
        let rounds = scale::of(500);
        let mut took = Vec::with_capacity(rounds);
        let before = resident(fire.fx.daemon.pid()?)?;
        for round in 0..rounds {
            let wide = round % 2 == 0;
            fire.write(wide)?;
            let asked = Instant::now();
            fire.reload()?;
            took.push(asked.elapsed().as_nanos() as u64);
            // Once the command has answered, the change is in force.
            for (family, id) in sockets {
                let reply = actor.ask(&Op::SendTo {
                    id,
                    addr: family.pick(FLIP_V4, FLIP_V6, super::CHANGING_PORT)?,
                    data: payload(FLIP).to_vec(),
                    flags: 0,
                    repeat: 1,
                })?;
                let wanted = if wide { 0 } else { libc::EPERM };
                expect(&format!("errno after reload {round}"), reply.errno, wanted)?;
            }
            // Time for a few turns of the traffic in this state.
            sleep(Duration::from_millis(10));
        }
        let after = resident(fire.fx.daemon.pid()?)?;
        drop(actor);
        let (_fx, numbers) = fire.cease()?;
        println!(
            "{rounds} reloads, {}; daemon {before} KiB before, {after} KiB after: {numbers}",
            scale::percentiles(&mut took)
        );
        Ok(())
    })]
}
