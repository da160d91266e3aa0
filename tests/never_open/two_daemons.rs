//! Two daemons cannot fight over one root, whatever else they keep apart.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Fire;
use crate::{
    harness::Case,
    support::{
        Ctx, claim,
        daemon::{Place, Settings},
        expect, remit,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::two_daemons_of_one_run_directory", |ctx| {
            let fire = Fire::start(ctx, &Settings::default())?;
            let place = fire.fx.place().clone();
            let second = place.remit(&["daemon"])?;
            claim(second.code != 0, || "it started".to_owned())?;
            claim(second.stderr.contains("another daemon"), || {
                second.stderr.clone()
            })?;
            let (_fx, numbers) = fire.cease()?;
            println!("{numbers}");
            Ok(())
        }),
        Case::new("never_open::two_daemons_of_one_root", |ctx| {
            let mut fire = Fire::start(ctx, &Settings::default())?;
            let other = Place::lay_in(&ctx.dir().join("other"), &ctx.root(), &Settings::default())?;
            expect_refused(ctx, &other)?;
            // The first one takes changes as before.
            fire.write(true)?;
            fire.reload()?;
            fire.expect_flip(true)?;
            let (fx, numbers) = fire.cease()?;
            drop(fx);
            println!("{numbers}");
            Ok(())
        }),
    ]
}

/// A second daemon must end by itself, name the root, and leave no pins.
fn expect_refused(ctx: &Ctx, place: &Place) -> Result<()> {
    let mut command = place.command(&["daemon"])?;
    let said = remit::output_within(&mut command, Duration::from_secs(20))
        .context("the second daemon did not end by itself")?;
    claim(said.code != 0, || "it started".to_owned())?;
    claim(said.stderr.contains(&ctx.root()), || {
        format!("the message does not name the root: {}", said.stderr)
    })?;
    let mut left = Vec::new();
    super::files(&place.at("bpf"), &mut left)?;
    left.retain(|path| path.extension().is_none_or(|kind| kind != "debug"));
    expect("pins of the second", left.len(), 0).with_context(|| format!("{left:?}"))?;
    Ok(())
}
