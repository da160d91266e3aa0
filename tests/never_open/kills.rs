//! kill -9 at random moments: while it starts, while it reloads, while it does nothing.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::Fire;
use crate::{
    harness::Case,
    support::{Dice, api, daemon::Settings, scale},
};

/// Longer than a reload of two agents takes, so that some kills come after it.
const RELOAD: Duration = Duration::from_millis(30);

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new("never_open::kills_at_random_moments", |ctx| {
        let (mut dice, seed) = Dice::new("REMIT_SEED")?;
        println!("REMIT_SEED={seed}");
        let mut fire = Fire::start(ctx, &Settings::default())?;
        let started = Instant::now();
        fire.fx.daemon.kill()?;
        fire.fx.daemon.restart()?;
        let start = started.elapsed();
        let wanted = scale::of(200);
        let (mut starting, mut reloading, mut idle) = (0, 0, 0);
        let mut wide = false;
        while starting + reloading + idle < wanted {
            if dice.once_in(2) {
                wide = !wide;
                fire.write(wide)?;
                if dice.once_in(2) {
                    fire.fx.daemon.signal(Signal::SIGHUP)?;
                } else {
                    // The answer is not waited for: nobody will give it.
                    api::send(
                        &fire.fx.place().at("run/remit.sock"),
                        "POST",
                        "/reload",
                        None,
                    )?;
                }
                sleep(RELOAD.mul_f64(share(&mut dice)));
                reloading += 1;
            } else {
                sleep(Duration::from_millis(50).mul_f64(share(&mut dice)));
                idle += 1;
            }
            fire.fx.daemon.kill()?;
            // Now and then several starts in a row come to nothing.
            while starting + reloading + idle < wanted && dice.once_in(2) {
                fire.fx.daemon.launch(&[])?;
                sleep(start.mul_f64(share(&mut dice)));
                fire.fx.daemon.kill()?;
                starting += 1;
            }
            fire.fx.daemon.restart()?;
        }
        fire.write(!wide)?;
        fire.reload()?;
        fire.expect_flip(!wide)?;
        let (_fx, numbers) = fire.cease()?;
        println!(
            "{} kills ({starting} starting, {reloading} reloading, {idle} idle): {numbers}",
            starting + reloading + idle
        );
        Ok(())
    })]
}

/// From 0 to 1.
fn share(dice: &mut Dice) -> f64 {
    dice.below(1001) as f64 / 1000.0
}
