//! No space left: for the logs, for the state, for the marker beside the registry file. What is in
//! force stays in force, what is decided takes effect, and what could not be written is told.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use serde_json::json;

use super::Fire;
use crate::{
    harness::Case,
    support::{
        Ctx, api, claim,
        daemon::Settings,
        expect, scale,
        traffic::{IN, Numbers},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::logs_and_state_on_a_full_disk", |ctx| {
            for name in ["log", "state"] {
                small(ctx, name)?;
            }
            let mut fire = Fire::start(ctx, &Settings::default())?;
            for name in ["log", "state"] {
                fill(&ctx.dir().join(name))?;
            }
            let rounds = scale::of(40);
            for round in 0..rounds {
                // What cannot be written down comes into force all the same.
                let wide = round % 2 == 0;
                fire.write(wide)?;
                api::ask(fire.fx.place(), "POST", "/reload", None)?;
                fire.expect_flip(wide)?;
                if round == rounds / 2 {
                    fire.fx.daemon.kill()?;
                    // As if it had been killed in the middle of a line, and no room for its end.
                    tear(&ctx.dir().join("log/violations.jsonl"))?;
                    fire.fx.daemon.restart()?;
                    fire.expect_flip(wide)?;
                }
            }
            let status = fire.fx.place().status()?;
            claim(
                status.0["reasons"]
                    .as_array()
                    .is_some_and(|reasons| !reasons.is_empty()),
                || format!("the full disk is not told: {}", status.0),
            )?;
            for name in ["log", "state"] {
                grow(&ctx.dir().join(name))?;
            }
            // With space again, the lines add up to the last attempt: see `cease`.
            let (_fx, numbers) = fire.cease()?;
            println!("{rounds} changes on a full disk: {numbers}");
            Ok(())
        }),
        Case::new("never_open::a_suspension_on_a_full_disk_holds", |ctx| {
            // The settings' folders are on the small disks before anything is in them.
            for name in ["log", "state", "agents.d"] {
                small(ctx, name)?;
            }
            let mut fire = Fire::start(ctx, &Settings::default())?;
            for name in ["log", "state", "agents.d"] {
                fill(&ctx.dir().join(name))?;
            }
            let body = json!({ "reason": "a drill" });
            let path = "/agents/changing/suspend";
            let answer = api::ask(fire.fx.place(), "POST", path, Some(&body))?;
            fire.changing.await_refused(IN)?;
            claim(
                answer.body["durable"] == false || answer.status >= 500,
                || format!("nothing could be written, and it says: {answer:?}"),
            )?;
            claim(answer.body.to_string().contains("space"), || {
                format!("the answer does not say why: {answer:?}")
            })?;
            for name in ["log", "state", "agents.d"] {
                grow(&ctx.dir().join(name))?;
            }
            // With space again, it can be made durable.
            let answer = api::ask(fire.fx.place(), "POST", path, Some(&body))?;
            expect("HTTP status", answer.status, 200).with_context(|| format!("{answer:?}"))?;
            expect("durable", answer.body["durable"].as_bool(), Some(true))
                .with_context(|| format!("{answer:?}"))?;
            fire.fx.daemon.kill()?;
            fire.fx.daemon.restart()?;
            fire.changing.await_refused(IN)?;
            drop(fire.changing);
            // The other agent never noticed.
            let numbers = Numbers::settle(vec![fire.steady], &mut fire.ear)?;
            println!("suspended on a full disk: {numbers}");
            Ok(())
        }),
    ]
}

/// A disk of 256 KiB at a folder of the case.
fn small(ctx: &Ctx, name: &str) -> Result<()> {
    let at = ctx.dir().join(name);
    fs::create_dir_all(&at)?;
    mount(
        Some("tmpfs"),
        &at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=256k,mode=755"),
    )
    .with_context(|| format!("cannot mount a small disk on {}", at.display()))
}

/// Makes room.
fn grow(at: &Path) -> Result<()> {
    mount(
        None::<&str>,
        at,
        None::<&str>,
        MsFlags::MS_REMOUNT,
        Some("size=64m"),
    )
    .with_context(|| format!("cannot grow {}", at.display()))
}

/// Takes all space that is left.
fn fill(dir: &Path) -> Result<()> {
    pour(&mut File::create(dir.join("filler"))?, 512)
}

/// Takes all space that is left in a file's last page, and ends it in the middle of a line.
fn tear(file: &Path) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(file)?;
    // The beginning of a line, and a long one.
    match file.write(b"\"") {
        Ok(_) => pour(&mut file, 1),
        Err(error) if error.kind() == ErrorKind::StorageFull => Ok(()),
        Err(error) => Err(error).context("cannot tear the log"),
    }
}

/// Writes until nothing more fits, in pieces of `size` bytes.
fn pour(file: &mut File, size: usize) -> Result<()> {
    let piece = vec![b'x'; size];
    loop {
        match file.write(&piece) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error).context("cannot fill the disk"),
        }
    }
}
