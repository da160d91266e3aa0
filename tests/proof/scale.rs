//! What a comparison costs where the registry is large.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

use super::reconciled;
use crate::{
    harness::Case,
    support::{
        Agent, Cgroup, Ctx, Daemon, claim,
        daemon::{Place, Settings},
        expect, scale,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut case = Case::new("proof::reconcile_of_a_thousand_agents", thousand);
    case.deadline = Duration::from_secs(150);
    vec![case]
}

/// Resident memory of a process and its peak, in KiB.
fn memory(pid: u32) -> Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .with_context(|| format!("no {name}"))
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

fn thousand(ctx: &mut Ctx) -> Result<()> {
    let agents = if scale::emulated() { 50 } else { 1_000 };
    let settings = Settings {
        more: "[reconcile]\nevery = \"1h\"\n".to_owned(),
        ..Settings::default()
    };
    let _root = Cgroup::create(&ctx.root())?;
    let place = Place::lay(ctx, &settings)?;
    for number in 0..agents {
        let id = format!("agent-{number}");
        let agent = (0..10).fold(Agent::new(&id), |agent, grant| {
            let (high, low) = (number / 256, number % 256);
            agent.allow(&format!("10.{high}.{low}.{}/31", grant * 2), "443")
        });
        place.write(&agent)?;
    }
    let daemon = Daemon::start_within(&place, Duration::from_secs(90))?;
    let pid = daemon.pid()?;
    let (before, _) = memory(pid)?;
    let mut took = Vec::new();
    for _ in 0..3 {
        let (code, said) = reconciled(&place, false)?;
        expect("exit code of remit reconcile", code, 0).with_context(|| said.to_string())?;
        claim(said["entries"].as_u64() >= Some(agents * 10), || {
            format!("compared {}", said["entries"])
        })?;
        took.push(said["took_ms"].as_u64().context("no time")?);
    }
    let (after, peak) = memory(pid)?;
    took.sort_unstable();
    println!(
        "{agents} agents, {} grants: {:?} ms with the registry compiled afresh; resident {} MiB \
         before, {} MiB after, {} MiB at most",
        agents * 10,
        took,
        before >> 10,
        after >> 10,
        peak >> 10
    );
    Ok(())
}
