//! Registry files that are torn in the middle of a write: the last good entry stays in force,
//! whoever asks for the reload; and a storm of writes that is taken in a few times.

use std::{
    fs,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::{CHANGING_PORT, Fire};
use crate::{
    actor::{Op, traffic::payload},
    harness::Case,
    support::{
        Dice, Family, api, claim,
        daemon::Settings,
        eventually, expect, scale,
        traffic::{FLIP, FLIP_V4, FLIP_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let cases = vec![
        Case::new("never_open::registry_files_torn_mid_write", |ctx| {
            let (mut dice, seed) = Dice::new("REMIT_SEED")?;
            println!("REMIT_SEED={seed}");
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let rounds = scale::of(200);
            let files = [
                "agents.d/steady.toml",
                "agents.d/changing.toml",
                "floor.toml",
            ];
            let mut torn = 0;
            for round in 0..rounds {
                let wide = round % 2 == 0;
                // A good change, so that "the last good entry" is another one each time.
                fire.write(wide)?;
                fire.reload()?;
                fire.expect_flip(wide)?;
                for file in files {
                    let path = fire.fx.place().at(file);
                    let good = fs::read(&path)?;
                    tear(&mut dice, &path, &good)?;
                    torn += 1;
                    let asked = ask_for_a_reload(&mut dice, &fire)?;
                    if asked || dice.once_in(2) {
                        // What the others hold is as it was, and so is what the torn file holds.
                        fire.expect_flip(wide)?;
                    }
                    if dice.once_in(8) {
                        fire.fx.daemon.kill()?;
                        fire.fx.daemon.restart()?;
                        fire.expect_flip(wide)?;
                    }
                    // In place, as a careless editor does: torn for a moment once more.
                    fs::write(&path, &good)?;
                }
                fire.reload()?;
                fire.expect_flip(wide)?;
            }
            let (_fx, numbers) = fire.cease()?;
            println!("{torn} torn files: {numbers}");
            Ok(())
        }),
        Case::new("never_open::a_storm_of_writes_is_coalesced", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let mut actor = fire.fx.actor("changing")?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            let to = Family::V4.pick(FLIP_V4, FLIP_V6, CHANGING_PORT)?;
            let send = Op::SendTo {
                id,
                addr: to,
                data: payload(FLIP).to_vec(),
                flags: 0,
                repeat: 1,
            };
            let writes = 1000;
            let before = loads(&fire)?;
            let began = Instant::now();
            for write in 0..writes {
                // Each is another entry; the last one is wide.
                fire.write(write % 2 == 1)?;
                sleep(Duration::from_millis(1));
            }
            let storm = began.elapsed();
            let began = Instant::now();
            eventually(5, || {
                expect("errno after the storm", actor.ask(&send)?.errno, 0)
            })?;
            let settled = began.elapsed();
            sleep(Duration::from_millis(500));
            let loads = loads(&fire)? - before;
            claim(loads * 20 <= writes, || {
                format!("{loads} loads for {writes} writes")
            })?;
            drop(actor);
            fire.expect_flip(true)?;
            let (_fx, numbers) = fire.cease()?;
            println!(
                "{writes} writes in {} ms were {loads} loads, the last in force {} ms later: {numbers}",
                storm.as_millis(),
                settled.as_millis()
            );
            Ok(())
        }),
    ];
    // How files are read is the same on every kernel.
    cases.into_iter().map(Case::once).collect()
}

/// Puts part of a file, or something else, where the file was.
fn tear(dice: &mut Dice, path: &Path, good: &[u8]) -> Result<()> {
    // At least the last line is missing, which holds something that no entry goes without.
    let whole = good.len().saturating_sub(4);
    let cut = dice.below(whole.max(1));
    let torn = match dice.below(4) {
        0 | 1 => good[..cut].to_vec(),
        2 => {
            let mut torn = good[..cut].to_vec();
            torn.extend((0..dice.below(300)).map(|_| dice.roll() as u8));
            torn.push(0xff);
            torn
        }
        _ => {
            let mut torn = good.to_vec();
            torn.extend_from_slice(b"\n[[scope.allow]]\nto = \"0.0.0.0/0\"\nports = [\"any\"");
            torn
        }
    };
    let torn = if path.ends_with("floor.toml") && torn.is_empty() {
        // Nothing at all is what no floor is, too; half of its one line is not.
        b"sche".to_vec()
    } else {
        torn
    };
    fs::write(path, torn).with_context(|| path.display().to_string())
}

/// By one of the three ways; whether the answer was waited for.
fn ask_for_a_reload(dice: &mut Dice, fire: &Fire) -> Result<bool> {
    match dice.below(3) {
        0 => {
            let answer = api::ask(fire.fx.place(), "POST", "/reload", None)?;
            claim(answer.body["ok"] != true, || {
                format!("a torn file is well: {}", answer.body)
            })?;
            Ok(true)
        }
        1 => {
            fire.fx.daemon.signal(Signal::SIGHUP)?;
            Ok(false)
        }
        // The watch on the folder finds it.
        _ => {
            if dice.once_in(3) {
                sleep(Duration::from_millis(250));
            }
            Ok(false)
        }
    }
}

/// Loads in the audit log.
fn loads(fire: &Fire) -> Result<usize> {
    let lines = fire.fx.audit()?;
    Ok(lines
        .iter()
        .filter(|line| line.0["class_uid"] == 5019)
        .count())
}
