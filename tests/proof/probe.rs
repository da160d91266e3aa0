//! `remit probe`: PASS with all of the evidence, FAIL with the reason, UNKNOWN for whatever is not
//! clear.

use std::{fs, os::unix::net::UnixStream};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{probe_of, probed, reconciled};
use crate::{
    evidence::metrics::scrape,
    harness::{Case, Outcome},
    support::{
        Agent, Ctx, Fixture,
        bpf::{Open, Pinned},
        claim,
        daemon::Settings,
        eventually, expect,
        netlink::{LO, link_down},
        scale,
        tamper::Pins,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("proof::probe_passes_with_all_its_evidence", passes),
        Case::new("proof::probe_goes_by_the_registry", by_the_registry),
        Case::new("proof::probe_of_the_unreachable_is_unknown", unreachable).once(),
        Case::with_outcome("proof::probe_with_a_broken_log_fails", |ctx| {
            if scale::emulated() {
                let why = "a folder in the log's place cannot be opened as one on this file system";
                return Ok(Outcome::NotTested(why.to_owned()));
            }
            broken_log(ctx).map(|()| Outcome::Passed)
        }),
        Case::new("proof::probe_that_fails_on_schedule_denies", scheduled),
    ]
}

fn attempts(said: &Value) -> Result<&Vec<Value>> {
    said["attempts"].as_array().context("no attempts")
}

fn passes(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let _actor = fx.actor("alpha")?;
    let before = fx.place().status()?.denied("alpha", None)?;
    let lines_before = fx.violations()?.len();
    let said = probed(fx.place(), "alpha", 0)?;
    let all = attempts(&said)?;
    // Each hook, family and protocol; the agent's own loopback; what was granted; the tables.
    for family in ["IPv4", "IPv6", "mapped IPv4"] {
        for way in ["TCP connect", "UDP connect", "UDP send"] {
            let name = format!("{family} {way}");
            let of: Vec<_> = all.iter().filter(|one| one["name"] == *name).collect();
            expect(&format!("attempts: {name}"), of.len(), 2)?;
            let wanted = |text: &str| {
                of.iter()
                    .any(|one| one["wanted"].as_str().unwrap_or("").starts_with(text))
            };
            claim(wanted("must be refused") && wanted("must arrive"), || {
                format!("{of:?}")
            })?;
        }
    }
    for hook in [
        "cgroup/connect4",
        "cgroup/connect6",
        "cgroup_skb/egress",
        "cgroup/sock_create",
    ] {
        claim(all.iter().any(|one| one["hook"] == hook), || {
            format!("{hook} was not tried: {all:?}")
        })?;
    }
    let refused = all.iter().filter(|one| {
        one["wanted"]
            .as_str()
            .unwrap_or("")
            .starts_with("must be refused")
    });
    let refused = refused.count();

    // The lines are on the disk, marked, and square with the counters; none is the agent's own.
    let run = said["run"].as_str().context("no run")?.to_owned();
    let lines = fx.violations()?;
    let marked: Vec<_> = lines
        .iter()
        .skip(lines_before)
        .filter(|line| line.text("/unmapped/probe") == run)
        .collect();
    expect("marked lines", marked.len(), refused)?;
    let status = fx.place().status()?;
    let after = status.denied("alpha", None)?;
    expect("counted", after - before, refused as u64)?;
    let last = &status.agent("alpha")?["last_violation"];
    claim(last.is_null(), || {
        format!("a probe is no violation: {last}")
    })?;
    expect(
        "status says what it came to",
        status.agent("alpha")?["last_probe"]["verdict"].as_str(),
        Some("pass"),
    )?;
    let socket = UnixStream::connect(fx.place().at("run/remit.sock"))?;
    let metrics = scrape(socket, "/v1/metrics")?;
    for (name, wanted) in [
        (r#"remit_probes_total{verdict="pass"}"#, 1.0),
        (r#"remit_probe_verdict{agent="alpha",verdict="pass"}"#, 1.0),
        (r#"remit_probe_verdict{agent="alpha",verdict="fail"}"#, 0.0),
    ] {
        expect(name, metrics.get(name).copied(), Some(wanted))?;
    }
    let began = said["began_ms"].as_i64().context("no time")? as f64 / 1000.0;
    let at = r#"remit_probe_timestamp_seconds{agent="alpha"}"#;
    let at = metrics.get(at).copied().unwrap_or_default();
    claim((at - began).abs() < 0.01, || format!("{at} is not {began}"))?;
    fx.reconcile("alpha")?;

    // `remit tail` leaves out what a probe made, unless it is asked for.
    let of_probe = |args: &[&str]| -> Result<usize> {
        let said = fx.place().remit(args)?;
        Ok(said.stdout.lines().count())
    };
    expect("lines in tail", of_probe(&["tail", "--all"])?, lines_before)?;
    expect(
        "lines in tail --probes",
        of_probe(&["tail", "--all", "--probes"])?,
        lines_before + marked.len(),
    )?;

    // Nothing of it stays: no cgroup, no grant, no drift.
    let below = fs::read_dir(fx.cgroup("alpha")?.path())?
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .count();
    expect("cgroups below the agent's", below, 0)?;
    let (code, drift) = reconciled(fx.place(), false)?;
    expect("exit code of remit reconcile", code, 0).with_context(|| drift.to_string())?;
    let granted = all
        .iter()
        .filter(|one| one["wanted"] == "must arrive")
        .filter_map(|one| one["to"].as_str())
        .find(|to| to.starts_with("127.0.0.1:"))
        .context("nothing was granted")?;
    let explained = fx.place().remit(&["explain", "alpha", granted])?;
    expect("the grant is gone", explained.code, 1)?;

    let audit = fx.audit()?;
    let events: Vec<_> = audit
        .iter()
        .filter(|line| line.0["class_uid"] == 2003)
        .collect();
    expect("events", events.len(), 1)?;
    expect("its code", events[0].text("/metadata/event_code"), "RM3101")?;
    println!(
        "{} attempts, {refused} refused, in {} ms",
        all.len(),
        said["took_ms"]
    );
    Ok(())
}

/// Monitor mode, an agent that is suspended, one that may make raw sockets, one with another rule
/// for loopback, one without a cgroup.
fn by_the_registry(ctx: &mut Ctx) -> Result<()> {
    let agents = [
        Agent::standard("watched").monitor(),
        Agent::standard("held"),
        Agent::standard("raw").allow("192.0.2.0/24", "\"any\""),
        Agent::standard("closed").loopback("none"),
        Agent::standard("nowhere"),
    ];
    let fx = Fixture::start_with_cgroups(ctx, &agents, &["watched", "held", "raw", "closed"])?;
    fx.place()
        .remit(&["suspend", "held", "--reason", "for the test"])?;
    let watched = probed(fx.place(), "watched", 0)?;
    claim(
        watched
            .to_string()
            .contains("must arrive, told as out_of_scope"),
        || watched.to_string(),
    )?;
    let held = probed(fx.place(), "held", 0)?;
    claim(
        attempts(&held)?
            .iter()
            .filter(|one| one["hook"] != "map" && one["hook"] != "cgroup/sock_create")
            .all(|one| one["wanted"] == "must be refused as suspended"),
        || held.to_string(),
    )?;
    let raw = probed(fx.place(), "raw", 0)?;
    claim(!raw.to_string().contains("raw socket"), || raw.to_string())?;
    let closed = probed(fx.place(), "closed", 0)?;
    claim(
        attempts(&closed)?.iter().any(|one| {
            one["name"] == "IPv4 TCP to itself"
                && one["wanted"] == "must be refused as loopback_foreign"
        }),
        || closed.to_string(),
    )?;
    let nowhere = probed(fx.place(), "nowhere", 3)?;
    claim(
        nowhere["why"][0]
            .as_str()
            .unwrap_or("")
            .contains("no cgroup"),
        || nowhere.to_string(),
    )?;
    // Of several the worst counts, and `alpha` is no agent.
    expect("all", fx.place().remit(&["probe"])?.code, 3)?;
    expect("nobody", fx.place().remit(&["probe", "alpha"])?.code, 1)
}

fn unreachable(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    probed(fx.place(), "alpha", 0)?;
    link_down(LO)?;
    let said = probed(fx.place(), "alpha", 3)?;
    claim(
        attempts(&said)?.iter().all(|one| one["verdict"] != "fail"),
        || said.to_string(),
    )?;
    println!("{}", said["why"]);
    Ok(())
}

fn broken_log(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    probed(fx.place(), "alpha", 0)?;
    let log = fx.place().at("log/violations.jsonl");
    fs::remove_file(&log)?;
    fs::create_dir(&log)?;
    let said = probed(fx.place(), "alpha", 1)?;
    let why = said["why"][0].as_str().unwrap_or("").to_owned();
    claim(why.contains("the log is broken"), || said.to_string())?;
    println!("{why}");
    let status = fx.place().status()?;
    expect("posture", status.0["posture"].as_str(), Some("degraded"))?;
    claim(
        status.0["guards"].as_array().is_some_and(|guards| {
            guards
                .iter()
                .any(|guard| guard["name"] == "violation log" && guard["state"] == "degraded")
        }),
        || status.0["guards"].to_string(),
    )?;
    // It heals.
    fs::remove_dir(&log)?;
    probed(fx.place(), "alpha", 0)?;
    eventually(7, || {
        let code = fx.place().remit(&["status", "--require", "enforcing"])?;
        expect("exit code of remit status", code.code, 0).with_context(|| code.stderr)
    })
}

fn scheduled(ctx: &mut Ctx) -> Result<()> {
    let settings = Settings {
        enforcement: "on_probe_fail = \"deny\"\n",
        more: "[reconcile]\nevery = \"1h\"\n[probe]\nevery = \"1s\"\n".to_owned(),
        ..Settings::default()
    };
    let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &settings)?;
    let events = |code: &str| -> Result<usize> {
        let audit = fx.audit()?;
        let found = audit
            .iter()
            .filter(|line| line.text("/metadata/event_code") == code);
        Ok(found.count())
    };
    eventually(20, || {
        claim(events("RM3101")? > 0, || "no probe has passed".to_owned())
    })?;
    let pins = Pins::below(&fx.place().at("bpf"));
    let link = Pinned::open(&pins.link("remit_egress")?)?;
    link.replace(&Open::egress()?)?;
    eventually(20, || {
        claim(events("RM3102")? > 0, || "no probe has failed".to_owned())?;
        let status = fx.place().status()?;
        let agent = status.agent("alpha")?;
        expect("state", agent["state"].as_str(), Some("suspended"))?;
        let reason = agent["hold"]["reason"].as_str().unwrap_or("").to_owned();
        claim(reason.contains("the probe of its fence failed"), || reason)
    })?;
    let (code, _) = probe_of(fx.place(), "alpha")?;
    expect("egress is still open", code, 1)
}
