//! The commands that ask: exit codes and JSON by the contract, and answers that match what the
//! kernel does.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, Way, claim,
        daemon::{Place, Settings},
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    },
};

/// Destination as `explain` takes it; way, family and address to try; whether it is in scope.
const ASKED: &[(&str, Way, Family, &str, u16, bool)] = &[
    ("198.51.100.10:443", Way::Tcp, Family::V4, IN_V4, 443, true),
    (
        "198.51.100.10:443/udp",
        Way::UdpSendTo,
        Family::V4,
        IN_V4,
        443,
        true,
    ),
    ("198.51.100.10:444", Way::Tcp, Family::V4, IN_V4, 444, false),
    (
        "198.51.100.70:443",
        Way::Tcp,
        Family::V4,
        "198.51.100.70",
        443,
        false,
    ),
    (
        "203.0.113.10:443/tcp",
        Way::Tcp,
        Family::V4,
        OUT_V4,
        443,
        false,
    ),
    (
        "[2001:db8:1::10]:443",
        Way::Tcp,
        Family::V6,
        IN_V6,
        443,
        true,
    ),
    (
        "[2001:db8:2::10]:443/udp",
        Way::UdpConnected,
        Family::V6,
        OUT_V6,
        443,
        false,
    ),
    (
        "169.254.169.254:443",
        Way::Tcp,
        Family::V4,
        "169.254.169.254",
        443,
        false,
    ),
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("explain::says_what_the_kernel_does", |ctx| {
            let agent = Agent::standard("alpha").deny("198.51.100.64/26");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            for (dest, way, family, ip, port, allowed) in ASKED {
                explained(fx.place(), "alpha", dest, *allowed)?;
                let to = family.pick(ip, ip, *port)?;
                if *allowed {
                    fx.arrives(&mut actor, *way, *family, to)?;
                } else {
                    let tried = way.perform(&mut actor, *family, to)?;
                    expect(dest, tried.errno, libc::EPERM)?;
                }
            }
            Ok(())
        }),
        Case::new("explain::works_offline", |ctx| {
            let place = Place::lay(ctx, &Settings::default())?;
            place.write(&Agent::standard("alpha").deny("198.51.100.64/26"))?;
            for (dest, _, _, _, _, allowed) in ASKED {
                explained(&place, "alpha", dest, *allowed)?;
            }
            let said = place.remit(&["explain", "alpha", "198.51.100.70:443"])?;
            claim(said.stdout.contains("alpha.toml:"), || {
                format!("it names no file and line: {}", said.stdout)
            })?;
            let said = place.remit(&["explain", "nobody", "198.51.100.10:443"])?;
            claim(said.code != 0, || "an unknown agent is allowed".to_owned())
        }),
        Case::new("explain::counts_nothing", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            for _ in 0..5 {
                explained(fx.place(), "alpha", "203.0.113.10:443", false)?;
            }
            expect("denied", fx.place().status()?.denied("alpha", None)?, 0)?;
            expect("lines", fx.violations()?.len(), 0)
        }),
        Case::new("status::has_the_promised_shape", |ctx| {
            let fx = Fixture::start(
                ctx,
                &[Agent::standard("alpha"), Agent::new("beta").monitor()],
            )?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            Way::Tcp.perform(&mut actor, Family::V4, to)?;
            let said = fx.place().remit(&["status", "--json"])?;
            expect("exit code", said.code, 0).with_context(|| said.stdout.clone())?;
            let status: Value = serde_json::from_str(&said.stdout)?;
            let alpha = fx.place().status()?.agent("alpha")?.clone();
            expect("state", alpha["state"].as_str(), Some("active"))?;
            expect("mode", alpha["mode"].as_str(), Some("enforce"))?;
            expect("denied", alpha["denied"].as_u64(), Some(1))?;
            expect(
                "by_reason.out_of_scope",
                alpha["by_reason"]["out_of_scope"].as_u64(),
                Some(1),
            )?;
            expect("processes", alpha["processes"].as_u64(), Some(1))?;
            claim(alpha["revision"].as_u64().is_some(), || {
                "no revision".to_owned()
            })?;
            let guards = status["guards"].as_array().context("no guards")?;
            for name in ["connect4", "connect6", "egress", "sock_create"] {
                claim(
                    guards.iter().any(|guard| {
                        guard["name"]
                            .as_str()
                            .is_some_and(|found| found.contains(name))
                            && guard["state"] == "live"
                    }),
                    || format!("no live guard {name}: {guards:?}"),
                )?;
            }
            let beta = fx.place().status()?.agent("beta")?.clone();
            expect("mode", beta["mode"].as_str(), Some("monitor"))?;
            eventually(7, || {
                let agent = fx.place().status()?.agent("alpha")?.clone();
                claim(agent["last_violation"].is_object(), || {
                    "no last violation".to_owned()
                })
            })
        }),
        Case::new("status::without_a_daemon_cannot_tell", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            fx.daemon.terminate()?;
            expect("exit code", fx.place().remit(&["status"])?.code, 3)
        }),
        Case::new("agents::lists_what_is_in_force", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha"), Agent::new("beta")])?;
            let said = fx.place().remit(&["agents", "--json"])?;
            expect("exit code", said.code, 0)?;
            for id in ["alpha", "beta"] {
                claim(said.stdout.contains(&format!("\"{id}\"")), || {
                    format!("{id} is not in {}", said.stdout)
                })?;
            }
            expect("exit code", fx.place().remit(&["agents", "alpha"])?.code, 0)?;
            let unknown = fx.place().remit(&["agents", "nobody"])?.code;
            claim(unknown != 0, || "nobody is an agent".to_owned())
        }),
        Case::new("tail::shows_each_line_once", |ctx| {
            let agents = [Agent::standard("alpha"), Agent::new("beta")];
            let fx = Fixture::start(ctx, &agents)?;
            refuse_once(&mut fx.actor("alpha")?, OUT_V4)?;
            refuse_once(&mut fx.actor("beta")?, OUT_V4)?;
            fx.await_line(0, "alpha", |_| true)?;
            fx.await_line(0, "beta", |_| true)?;
            let said = fx.place().remit(&["tail", "--agent", "alpha", "--json"])?;
            expect("exit code", said.code, 0)?;
            let lines: Vec<Value> = said
                .stdout
                .lines()
                .map(serde_json::from_str)
                .collect::<Result<_, _>>()?;
            let logged: Vec<Value> = fx
                .violations()?
                .into_iter()
                .filter(|line| line.agent() == "alpha")
                .map(|line| line.0)
                .collect();
            expect("raw lines", lines, logged)?;
            let said = fx.place().remit(&["tail", "--agent", "alpha"])?;
            expect("lines for people", said.stdout.lines().count(), 1)?;
            for word in ["alpha", OUT_V4, "out_of_scope"] {
                claim(said.stdout.contains(word), || {
                    format!("{word} is not in {}", said.stdout)
                })?;
            }
            Ok(())
        }),
        Case::new("check::finds_every_mistake_of_every_file", |ctx| {
            let place = Place::lay(ctx, &Settings::default())?;
            place.write(&Agent::standard("alpha"))?;
            expect("exit code", place.remit(&["check"])?.code, 0)?;
            let bad = Agent::new("beta")
                .allow("10.1.2.3/8", "443")
                .entry("typo = 1\n");
            place.write(&bad)?;
            place.write_raw("gamma", "schema = 1\n[agent]\nid = \"delta\"\n")?;
            let said = place.remit(&["check"])?;
            expect("exit code", said.code, 1)?;
            let text = format!("{}{}", said.stdout, said.stderr);
            for word in [
                "beta.toml:",
                "gamma.toml:",
                "error:",
                "^",
                "typo",
                "10.1.2.3/8",
            ] {
                claim(text.contains(word), || format!("{word} is not in {text}"))?;
            }
            expect("usage", place.remit(&["no-such-command"])?.code, 2)
        }),
    ]
}

fn explained(place: &Place, id: &str, dest: &str, allowed: bool) -> Result<()> {
    let said = place.remit(&["explain", id, dest])?;
    let wanted = if allowed { 0 } else { 1 };
    expect(&format!("exit code of explain {dest}"), said.code, wanted)
        .with_context(|| format!("{}{}", said.stdout, said.stderr))
}

fn refuse_once(actor: &mut Actor, ip: &str) -> Result<()> {
    let to = Family::V4.pick(ip, ip, 443)?;
    let tried = Way::Tcp.perform(actor, Family::V4, to)?;
    expect("errno", tried.errno, libc::EPERM)
}
