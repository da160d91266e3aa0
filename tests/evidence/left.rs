//! What was refused belongs to who attempted it, as it was then: after its entry has changed, after it
//! has left the registry, and when the daemon learns of both only afterwards.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Ctx, Family, Fixture, Line, claim,
        daemon::Settings,
        eventually, expect,
        network::{OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

/// Attempts of a kind.
const MANY: u32 = 300;
/// Longer than anything may be owed.
const SETTLED: Duration = Duration::from_secs(7);

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("evidence::what_an_agent_that_left_did_is_its_own", left).once(),
        Case::new("evidence::a_line_names_the_entry_of_then", changed).once(),
    ]
}

/// Refused attempts of all kinds, [`MANY`] each; how many.
fn attempts(actor: &mut Actor) -> Result<u64> {
    let mut sum = 0;
    for family in Family::ALL {
        let addr = family.pick(OUT_V4, OUT_V6, 443)?;
        let id = actor.socket(family.domain(), libc::SOCK_DGRAM, 0)?;
        let reply = actor.ask(&Op::SendTo {
            id,
            addr,
            data: PAYLOAD.to_vec(),
            flags: 0,
            repeat: MANY,
        })?;
        expect("refused datagrams", reply.value, i64::from(MANY))?;
        actor.must(&Op::Close { id })?;
        for _ in 0..MANY / 10 {
            let id = actor.socket(family.domain(), libc::SOCK_STREAM, 0)?;
            let reply = actor.ask(&Op::Connect {
                id,
                addr,
                timeout_ms: 1_000,
            })?;
            expect("errno of connect", reply.errno, libc::EPERM)?;
            actor.must(&Op::Close { id })?;
        }
        sum += u64::from(MANY + MANY / 10);
    }
    Ok(sum)
}

fn told(fx: &Fixture, agent: &str) -> Result<u64> {
    let lines = fx.violations()?;
    let of_agent = lines
        .iter()
        .filter(|line| line.is_denial() && line.agent() == agent);
    Ok(of_agent.map(Line::count).sum())
}

/// Each has its own, once and for all.
fn all_told(fx: &Fixture, alpha: u64, beta: u64) -> Result<()> {
    eventually(8, || {
        expect("attempts of alpha in the log", told(fx, "alpha")?, alpha)?;
        expect("attempts of beta in the log", told(fx, "beta")?, beta)
    })?;
    sleep(SETTLED);
    expect("of alpha, later", told(fx, "alpha")?, alpha)?;
    expect("of beta, later", told(fx, "beta")?, beta)?;
    expect("of nobody", told(fx, "unregistered")?, 0)
}

fn left(ctx: &mut Ctx) -> Result<()> {
    let agents = ["alpha", "beta", "gamma"].map(Agent::standard);
    let mut fx = Fixture::start_with(ctx, &agents, &Settings::default())?;
    let entry = |id: &str| fx.place().at(&format!("agents.d/{id}.toml"));
    let (of_alpha, of_beta) = (entry("alpha"), entry("beta"));

    // It leaves while what it did is folded in the kernel.
    let mut actor = fx.actor("alpha")?;
    let alpha = attempts(&mut actor)?;
    fs::remove_file(of_alpha)?;
    let said = fx.place().remit(&["reload"])?;
    expect("exit code of remit reload", said.code, 0).with_context(|| said.stderr.clone())?;
    all_told(&fx, alpha, 0)?;

    // It leaves while no daemon is there to see it.
    let mut actor = fx.actor("beta")?;
    fx.daemon.terminate()?;
    let beta = attempts(&mut actor)?;
    fs::remove_file(of_beta)?;
    fx.daemon.restart()?;
    all_told(&fx, alpha, beta)?;
    // The books of one daemon are the next one's.
    fx.daemon.terminate()?;
    fx.daemon.restart()?;
    all_told(&fx, alpha, beta)?;
    verified(&fx, alpha, beta)
}

/// `remit status` and `remit log verify` know of them, and the latter misses a line of theirs.
fn verified(fx: &Fixture, alpha: u64, beta: u64) -> Result<()> {
    let status = fx.place().status()?.0;
    for (at, (id, count)) in [("alpha", alpha), ("beta", beta)].into_iter().enumerate() {
        let former = &status["former"][at];
        expect("who left", former["id"].as_str(), Some(id))?;
        expect(id, former["denied"].as_u64(), Some(count))?;
    }
    let verify = || fx.place().remit(&["log", "verify"]);
    let said = verify()?;
    let text = || format!("{}{}", said.stdout, said.stderr);
    expect("exit code of remit log verify", said.code, 0).with_context(text)?;
    let sum = format!("{0} attempts in the kernel, {0} in the log", alpha + beta);
    claim(said.stdout.contains(&sum), text)?;

    let path = fx.place().at("log/violations.jsonl");
    let lines = fs::read_to_string(&path)?;
    let of_alpha = lines
        .lines()
        .find(|line| line.contains("\"uid\":\"alpha\""))
        .context("no line of alpha")?;
    fs::write(&path, lines.replacen(&format!("{of_alpha}\n"), "", 1))?;
    let said = verify()?;
    let text = || format!("{}{}", said.stdout, said.stderr);
    expect("exit code with a line less", said.code, 1).with_context(text)?;
    claim(said.stdout.contains("agent alpha"), text)
}

fn changed(ctx: &mut Ctx) -> Result<()> {
    // The denial that comes first in the file has the first number.
    let out = ["203.0.113.0/24", "2001:db8:2::/64"];
    let other = ["192.0.2.0/25", "192.0.2.128/25"];
    let denying = |first: [&str; 2], second: [&str; 2]| {
        let all = first.into_iter().chain(second);
        all.fold(Agent::standard("alpha"), Agent::deny)
    };
    let fx = Fixture::start(ctx, &[denying(out, other)])?;
    let mut actor = fx.actor("alpha")?;
    let mut sum = attempts(&mut actor)?;
    fx.change(&denying(other, out))?;
    // Of the same kind, so that folds go on over the change.
    sum += attempts(&mut actor)?;
    eventually(8, || {
        expect("attempts in the log", told(&fx, "alpha")?, sum)
    })?;
    let lines = fx.violations()?;
    let mut named = 0;
    for line in lines.iter().filter(|line| line.agent() == "alpha") {
        expect("the reason", line.text("/unmapped/reason"), "denied")?;
        let rule = line.text("/firewall_rule/condition");
        // One that stands for what was lost of several names none.
        if line.text("/unmapped/hook") == "unknown" {
            continue;
        }
        named += line.count();
        claim(out.iter().any(|net| rule.starts_with(net)), || {
            format!("the entry that denied it is told as `{rule}`: {line:?}")
        })?;
    }
    println!("{named} of {sum} attempts in lines that name the entry");
    claim(named * 2 > sum, || format!("{named} of {sum} are named"))
}
