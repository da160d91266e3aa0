//! New programs under standing links, and moves to maps of another layout and back.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context as _, Result};

use super::Fire;
use crate::{
    harness::{Case, Need},
    support::{
        claim,
        daemon::{Place, Settings},
        expect, remit, scale,
    },
};

/// Levels of the programs' own log: each is another constant in them, and so other programs.
const LEVELS: [&str; 2] = ["error", "off"];

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::programs_replaced_in_place", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let rounds = scale::of(50);
            let mut before = links(fire.fx.place())?;
            for round in 0..rounds {
                // In order and not: what is found at the next start must be the same.
                if round % 2 == 0 {
                    fire.fx.daemon.terminate()?;
                } else {
                    fire.fx.daemon.kill()?;
                }
                let level = LEVELS[round % LEVELS.len()];
                fire.fx.daemon.restart_with(&["--kernel-log", level])?;
                let after = links(fire.fx.place())?;
                for (hook, (link, program)) in &after {
                    let (old_link, old_program) = before
                        .get(hook)
                        .with_context(|| format!("{hook} was not there"))?;
                    expect(&format!("link of {hook}"), link, old_link)?;
                    claim(program != old_program, || {
                        format!("{hook} has the old program {program:?}")
                    })?;
                }
                expect("hooks", after.len(), before.len())?;
                before = after;
            }
            let (_fx, numbers) = fire.cease()?;
            println!("{rounds} replacements: {numbers}");
            Ok(())
        }),
        Case::new("never_open::maps_migrated_there_and_back", |ctx| {
            let binaries = [remit::next_binary()?, remit::binary()?];
            let mut fire = Fire::start(ctx, &Settings::default())?;
            // There and back is one more than one.
            let rounds = scale::of(10).max(2);
            for round in 0..rounds {
                if round % 2 == 0 {
                    fire.fx.daemon.terminate()?;
                } else {
                    fire.fx.daemon.kill()?;
                }
                let mut command = Command::new(&binaries[round % binaries.len()]);
                command
                    .env("REMIT_CONFIG", fire.fx.place().config())
                    .arg("daemon");
                fire.fx.daemon.launch_as(command, &[])?;
                fire.fx.daemon.await_ready()?;
                // Both settle to a fence that takes changes.
                fire.write(round % 2 == 0)?;
                fire.reload()?;
                fire.expect_flip(round % 2 == 0)?;
            }
            let (_fx, numbers) = fire.cease()?;
            println!("{rounds} migrations: {numbers}");
            Ok(())
        })
        .needs(Need::Next),
    ]
}

/// Ids of a link and of the program under it.
type Ids = (Option<u64>, Option<u64>);

/// Those of each hook, as the daemon has read them back.
fn links(place: &Place) -> Result<BTreeMap<String, Ids>> {
    let status = place.status()?;
    let guards = status.0["guards"].as_array().context("no guards")?;
    let links: BTreeMap<_, _> = guards
        .iter()
        .filter(|guard| guard["kind"] == "link")
        .filter_map(|guard| {
            let name = format!("{} {}", guard["name"].as_str()?, guard["root"].as_str()?);
            Some((name, (guard["link_id"].as_u64(), guard["prog_id"].as_u64())))
        })
        .collect();
    claim(links.len() >= 4, || format!("too few links: {guards:?}"))?;
    Ok(links)
}
