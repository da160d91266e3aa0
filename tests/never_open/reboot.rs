//! A reboot: the kernel has forgotten everything, and the registry's files were torn by the crash.
//! What was last in force comes back from the state directory, and what cannot be read denies.

use std::fs;

use anyhow::{Context as _, Result};

use super::{changing, steady, unpin};
use crate::{
    harness::Case,
    support::{
        Fixture, claim, eventually, expect,
        traffic::{Ear, FLIP, Generator, IN, Numbers, OUT, lanes},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::a_reboot_with_every_file_torn", |ctx| {
            let mut fx = Fixture::start(ctx, &[steady(), changing(false)])?;
            fx.change(&changing(true))?;
            fx.daemon.kill()?;
            unpin(&fx.place().at("bpf"))?;
            tear_all(&fx)?;
            fx.daemon.restart()?;
            let steady = lanes(super::STEADY_PORT, &[IN, OUT])?;
            let changing = lanes(super::CHANGING_PORT, &[IN, OUT, FLIP])?;
            let mut ear = Ear::start(&[steady.clone(), changing.clone()].concat())?;
            let mut changing = Generator::start(fx.cgroup("changing")?, changing)?;
            let steady = Generator::start(fx.cgroup("steady")?, steady)?;
            // The last good entry is the wide one.
            changing.await_passing(IN)?;
            changing.await_passing(FLIP)?;
            changing.await_refused(OUT)?;
            let status = fx.place().status()?;
            for id in ["steady", "changing"] {
                let finding = status.agent(id)?["finding"].as_str().unwrap_or_default();
                claim(!finding.is_empty(), || {
                    format!("status does not say that the file of {id} is torn")
                })?;
            }
            // A reload that finds nothing better changes nothing.
            fx.place().remit(&["reload"])?;
            changing.await_passing(FLIP)?;
            let numbers = Numbers::settle(vec![steady, changing], &mut ear)?;
            println!("{numbers}");
            Ok(())
        }),
        Case::new("never_open::a_reboot_with_its_own_state_spoiled", |ctx| {
            let mut fx = Fixture::start(ctx, &[steady(), changing(false)])?;
            fx.daemon.kill()?;
            unpin(&fx.place().at("bpf"))?;
            tear_all(&fx)?;
            // One agent's last good entry is spoiled as well: now nothing is known of it.
            let mut found = Vec::new();
            super::files(&fx.place().at("state"), &mut found)?;
            let of_changing = found
                .iter()
                .find(|path| path.to_string_lossy().contains("changing"))
                .with_context(|| format!("no state of changing in {found:?}"))?;
            let mut bytes = fs::read(of_changing)?;
            let middle = bytes.len() / 2;
            *bytes.get_mut(middle).context("an empty state file")? ^= 1;
            fs::write(of_changing, bytes)?;
            fx.daemon.restart()?;
            let steady = lanes(super::STEADY_PORT, &[IN, OUT])?;
            let changing = lanes(super::CHANGING_PORT, &[IN, OUT])?;
            let mut ear = Ear::start(&[steady.clone(), changing.clone()].concat())?;
            let mut changing = Generator::start(fx.cgroup("changing")?, changing)?;
            let steady = Generator::start(fx.cgroup("steady")?, steady)?;
            changing.await_refused(IN)?;
            for (lane, tally) in changing.stop()? {
                expect(&format!("passed on {lane:?}"), tally.passed, 0)?;
            }
            eventually(3, || {
                let lines = fx.audit()?;
                let told = lines.iter().any(|line| {
                    line.0["class_uid"] == 2004 && line.0.to_string().contains("changing")
                });
                claim(told, || "no 2004 tells of the spoiled state".to_owned())
            })?;
            // The others are as they were, and a mended file ends it.
            let mut steady = steady;
            steady.await_passing(IN)?;
            fx.place().write(&super::changing(false))?;
            fx.place().write(&super::steady())?;
            fs::write(fx.place().at("floor.toml"), "schema = 1\n")?;
            expect(
                "exit code of reload",
                fx.place().remit(&["reload"])?.code,
                0,
            )?;
            let lanes = lanes(super::CHANGING_PORT, &[IN, OUT])?;
            let mut changing = Generator::start(fx.cgroup("changing")?, lanes)?;
            changing.await_passing(IN)?;
            let numbers = Numbers::settle(vec![steady, changing], &mut ear)?;
            println!("{numbers}");
            Ok(())
        }),
    ]
}

/// Leaves half of each file of the registry.
fn tear_all(fx: &Fixture) -> Result<()> {
    for file in [
        "agents.d/steady.toml",
        "agents.d/changing.toml",
        "floor.toml",
    ] {
        let path = fx.place().at(file);
        let bytes = fs::read(&path)?;
        fs::write(&path, &bytes[..bytes.len() / 2])?;
    }
    Ok(())
}
