//! `remit doctor` and `remit discover`, on the host that the case runs on.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    harness::Case,
    support::{Actor, Agent, Ctx, Fixture, claim, expect},
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("proof::doctor_tries_the_real_programs", doctor),
        Case::new("proof::discover_lists_who_runs_unregistered", discover),
    ]
}

fn json(fx: &Fixture, args: &[&str]) -> Result<(i32, Value)> {
    let said = fx.place().remit(&[args, &["--json"]].concat())?;
    let value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("exit {}: {}{}", said.code, said.stdout, said.stderr))?;
    Ok((said.code, value))
}

/// The hooks load and attach here; what runs as root inside a root is a way out, and says so.
fn doctor(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let _root = fx.actor("alpha")?;
    let (code, said) = json(&fx, &["doctor"])?;
    let of = |list: &str, name: &str| -> Result<String> {
        let all = said[list].as_array().context("no list")?;
        let check = all.iter().find(|check| check["name"] == name);
        let check = check.with_context(|| format!("no {name} in {said}"))?;
        Ok(check["state"].as_str().unwrap_or_default().to_owned())
    };
    for hook in [
        "cgroup/connect4",
        "cgroup/connect6",
        "cgroup_skb/egress",
        "cgroup/sock_create",
        "cgroup/post_bind4",
        "cgroup/post_bind6",
    ] {
        expect(hook, of("features", hook)?.as_str(), "ok")?;
    }
    expect("way", of("ways_out", "agents as root")?.as_str(), "open")?;
    // Whatever this host has: it was asked.
    let above = of("ways_out", "programs above the roots")?;
    claim(above == "ok" || above == "watch", || {
        format!("programs above the roots: {above}")
    })?;
    expect("exit code", code, 1)?;
    // Nothing is left of the trial.
    let left = fs::read_dir(fx.place().at("bpf").join("run"))
        .map_or(0, |entries| entries.filter_map(Result::ok).count());
    expect("pins of the trial", left, 0)?;
    expect(
        "the fence stands",
        fx.place()
            .remit(&["status", "--require", "enforcing"])?
            .code,
        0,
    )
}

/// A process that is called as an agent is: found outside, and not inside.
fn discover(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let program = ctx.dir().join("codex");
    fs::copy("/proc/self/exe", &program)?;
    let mut command = Command::new(&program);
    command
        .arg("actor")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let actor = Actor::start(command)?;
    let known = ctx.dir().join("known.toml");
    fs::write(
        &known,
        "[[agent]]\nname = \"Codex CLI\"\nexe = [\"codex\"]\nargument = []\n",
    )?;
    let known = known.display().to_string();
    let args = ["discover", "--known", &known];
    let (code, said) = json(&fx, &args)?;
    let ours = |said: &Value| -> Option<Value> {
        let all = said.as_array()?;
        let pid = u64::from(actor.pid());
        all.iter()
            .find(|one| one["pid"].as_u64() == Some(pid))
            .cloned()
    };
    let found = ours(&said).with_context(|| format!("not found: {said}"))?;
    expect("exit code", code, 1)?;
    expect(
        "what it looks like",
        found["looks_like"].as_str(),
        Some("Codex CLI"),
    )?;
    let toml = found["toml"].as_str().unwrap_or("");
    claim(
        toml.contains("id = \"codex-cli\"") && toml.contains("state = \"draft\""),
        || toml.to_owned(),
    )?;
    // The proposed entry compiles.
    let file = ctx.dir().join("codex-cli.toml");
    fs::write(&file, toml)?;
    let checked = fx.place().remit(&["check", &file.display().to_string()])?;
    expect("remit check", checked.code, 0).with_context(|| checked.stdout + &checked.stderr)?;
    fx.cgroup("alpha")?.enter(actor.pid())?;
    let (_, said) = json(&fx, &args)?;
    claim(ours(&said).is_none(), || {
        format!("listed though inside: {said}")
    })
}
