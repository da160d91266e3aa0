//! What `reconcile` finds beside the kernel's tables.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::reconciled;
use crate::{
    harness::Case,
    support::{
        Actor, Agent, Cgroup, Ctx, Fixture, cgroup, claim, daemon::Settings, eventually, expect,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("proof::reconcile_finds_who_left_the_fence", left),
        Case::new("proof::reconcile_finds_what_is_not_in_force", not_in_force),
    ]
}

fn of_kind<'v>(said: &'v Value, list: &str, kind: &str) -> Vec<&'v Value> {
    let all = said[list].as_array().into_iter().flatten();
    all.filter(|one| one["kind"] == kind).collect()
}

/// A process that was inside is found outside, and goes back when somebody asks for it; an unclaimed
/// cgroup is a notice.
fn left(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let actor = fx.actor("alpha")?;
    // Seen inside first.
    expect("nothing differs", reconciled(fx.place(), false)?.0, 0)?;

    let stray = Cgroup::create(&format!("{}/stray.service", ctx.root()))?;
    let _nobody = Actor::spawn(Some(&stray))?;
    let (code, said) = reconciled(fx.place(), false)?;
    expect("a notice is no drift", code, 0).with_context(|| said.to_string())?;
    let notices = of_kind(&said, "notices", "unclaimed_cgroup");
    expect("unclaimed cgroups", notices.len(), 1).with_context(|| said.to_string())?;
    claim(
        notices[0]["what"]
            .as_str()
            .unwrap_or("")
            .ends_with("stray.service"),
        || said.to_string(),
    )?;

    let elsewhere = Cgroup::create(&format!("/{}.outside", ctx.unique()))?;
    elsewhere.enter(actor.pid())?;
    let (code, said) = reconciled(fx.place(), false)?;
    expect("it has left", code, 1)?;
    let found = of_kind(&said, "drift", "process_outside");
    expect("processes outside", found.len(), 1).with_context(|| said.to_string())?;
    let found = found[0];
    expect("its agent", found["agent"].as_str(), Some("alpha"))?;
    claim(
        found["what"]
            .as_str()
            .unwrap_or("")
            .contains(&actor.pid().to_string())
            && found["remedy"].as_str().unwrap_or("").contains("--repair"),
        || found.to_string(),
    )?;
    // The daemon's own comparison tells of it and moves nobody.
    eventually(12, || {
        let audit = fx.audit()?;
        claim(
            audit.iter().any(|line| {
                line.text("/metadata/event_code") == "RM3001"
                    && line.text("/message").contains("process_outside")
            }),
            || "not in the audit log".to_owned(),
        )
    })?;
    let (code, said) = reconciled(fx.place(), true)?;
    expect("put back", code, 0).with_context(|| said.to_string())?;
    let procs = fs::read_to_string(fx.cgroup("alpha")?.path().join("cgroup.procs"))?;
    claim(
        procs.lines().any(|pid| pid == actor.pid().to_string()),
        || procs,
    )?;
    expect("nothing differs", reconciled(fx.place(), false)?.0, 0)?;
    drop(actor);
    cgroup::remove(elsewhere.path());
    Ok(())
}

/// Entries that are approved and not in force, and the reverse.
fn not_in_force(ctx: &mut Ctx) -> Result<()> {
    let settings = Settings {
        // Room for the two and the pseudo-agent.
        more: "[limits]\nagents = 3\n".to_owned(),
        ..Settings::default()
    };
    let agents = [Agent::standard("alpha"), Agent::standard("beta")];
    let fx = Fixture::start_with(ctx, &agents, &settings)?;
    let began = std::time::Instant::now();
    for id in ["gamma", "delta"] {
        fx.place().write(&Agent::standard(id))?;
    }
    let (code, said) = reconciled(fx.place(), false)?;
    expect("there is no room for it", code, 1).with_context(|| said.to_string())?;
    let found = of_kind(&said, "drift", "approved_not_enforced");
    claim(found.iter().any(|one| one["agent"] == "gamma"), || {
        said.to_string()
    })?;
    println!("noticed by reconcile in {} ms", began.elapsed().as_millis());
    eventually(7, || {
        let status = fx.place().remit(&["status", "--require", "enforcing"])?;
        expect("exit code of remit status", status.code, 1)
    })?;
    println!("noticed by status in {} ms", began.elapsed().as_millis());
    let (code, said) = reconciled(fx.place(), true)?;
    expect("cannot be mended", code, 1)?;
    let found = of_kind(&said, "drift", "approved_not_enforced");
    claim(
        found
            .iter()
            .all(|one| one["repaired"] == false && one["error"].is_string()),
        || said.to_string(),
    )?;
    expect("probe", fx.place().remit(&["probe", "gamma"])?.code, 1)?;
    for id in ["gamma", "delta"] {
        fs::remove_file(fx.place().at("agents.d").join(format!("{id}.toml")))?;
    }
    eventually(7, || {
        fx.place().remit(&["reload"])?;
        expect("all is well", reconciled(fx.place(), false)?.0, 0)
    })?;

    // A file that cannot be used any more: its last good entry is in force, which is a notice.
    fx.place().write_raw("beta", "schema = 1\nnonsense\n")?;
    fx.place().remit(&["reload"])?;
    let (code, said) = reconciled(fx.place(), false)?;
    expect("by the settings' wish", code, 0).with_context(|| said.to_string())?;
    let kept = of_kind(&said, "notices", "enforced_not_approved");
    expect("kept entries", kept.len(), 1).with_context(|| said.to_string())
}
