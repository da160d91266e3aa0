//! The state directory lost or tampered with, while the daemon runs and while it does not.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::Result;

use super::Fire;
use crate::{
    harness::Case,
    support::{Dice, daemon::Settings, scale},
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "never_open::state_lost_and_tampered_with",
        |ctx| {
            let (mut dice, seed) = Dice::new("REMIT_SEED")?;
            println!("REMIT_SEED={seed}");
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let state = ctx.dir().join("state");
            let rounds = scale::of(80);
            let (mut lost, mut spoiled) = (0, 0);
            for round in 0..rounds {
                let wide = round % 2 == 0;
                let stopped = dice.once_in(2);
                if stopped {
                    fire.fx.daemon.kill()?;
                }
                if dice.once_in(2) {
                    match fs::remove_dir_all(&state) {
                        Err(error) if error.kind() != ErrorKind::NotFound => {
                            return Err(error.into());
                        }
                        _ => lost += 1,
                    }
                } else {
                    spoiled += spoil(&mut dice, &state)?;
                }
                fire.write(wide)?;
                if stopped {
                    fire.fx.daemon.restart()?;
                } else {
                    fire.reload()?;
                }
                // The registry's files are whole: they count, whatever the state says.
                fire.expect_flip(wide)?;
            }
            let (_fx, numbers) = fire.cease()?;
            println!("state lost {lost} times, {spoiled} files spoiled: {numbers}");
            Ok(())
        },
    )]
}

/// Cuts or changes a byte of every file below `dir`; how many there were.
fn spoil(dice: &mut Dice, dir: &Path) -> Result<usize> {
    let mut spoiled = 0;
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(0);
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            spoiled += spoil(dice, &path)?;
            continue;
        }
        let mut bytes = fs::read(&path)?;
        if bytes.is_empty() {
            continue;
        }
        let at = dice.below(bytes.len());
        if dice.once_in(2) {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << dice.below(8);
        }
        fs::write(&path, bytes)?;
        spoiled += 1;
    }
    Ok(spoiled)
}
