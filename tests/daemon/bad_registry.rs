//! A bad file takes nothing away from others: it is said, and the agent keeps its last good
//! entry, or is denied where the settings say so.

use anyhow::{Context as _, Result};

use crate::{
    harness::Case,
    support::{
        Agent, Ctx, Family, Fixture, Way, claim,
        daemon::Settings,
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("reload::one_bad_file_keeps_its_last_good_entry", |ctx| {
            let mut fx = start(ctx, "keep")?;
            let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
            let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            break_alpha(&fx)?;
            fx.place()
                .write(&Agent::new("beta").allow("203.0.113.0/24", r#"443, "443/udp""#))?;
            let said = fx.place().remit(&["reload"])?;
            expect("exit code", said.code, 1)?;
            let text = format!("{}{}", said.stdout, said.stderr);
            claim(text.contains("alpha.toml:"), || {
                format!("the answer does not name the file: {text}")
            })?;
            // The bad file's agent goes on as it was, the other's change is in.
            for way in Way::MAIN {
                fx.arrives(&mut alpha, way, Family::V4, inside)?;
                fx.arrives(&mut beta, way, Family::V4, out)?;
                for (actor, to) in [(&mut alpha, out), (&mut beta, inside)] {
                    let tried = way.perform(actor, Family::V4, to)?;
                    expect("errno", tried.errno, libc::EPERM)?;
                }
            }
            let status = fx.place().status()?;
            let finding = status.agent("alpha")?["finding"]
                .as_str()
                .unwrap_or_default();
            claim(!finding.is_empty(), || {
                "status says nothing of it".to_owned()
            })?;
            claim(status.agent("beta")?["finding"].is_null(), || {
                "status blames beta".to_owned()
            })?;
            claim(status.0["registry"]["errors"].as_u64() > Some(0), || {
                "status counts no errors".to_owned()
            })?;
            refused_load_is_logged(&fx)?;

            fx.change(&Agent::standard("alpha"))?;
            let status = fx.place().status()?;
            claim(status.agent("alpha")?["finding"].is_null(), || {
                "the finding stays after the mend".to_owned()
            })
        }),
        Case::new("reload::one_bad_file_denies_where_it_is_told_to", |ctx| {
            let mut fx = start(ctx, "deny")?;
            let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
            let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut alpha, Way::Tcp, Family::V4, inside)?;
            break_alpha(&fx)?;
            expect("exit code", fx.place().remit(&["reload"])?.code, 1)?;
            let tried = Way::Tcp.perform(&mut alpha, Family::V4, inside)?;
            expect("errno of alpha", tried.errno, libc::EPERM)?;
            fx.arrives(&mut beta, Way::Tcp, Family::V4, inside)
                .map(drop)
        }),
        Case::new(
            "reload::a_bad_file_at_start_denies_its_agent_alone",
            |ctx| {
                let mut fx = start(ctx, "keep")?;
                fx.daemon.terminate()?;
                fx.daemon.detach()?;
                std::fs::remove_dir_all(fx.place().at("state"))?;
                std::fs::create_dir(fx.place().at("state"))?;
                break_alpha(&fx)?;
                fx.daemon.restart()?;
                fx.await_cgroup("beta")?;
                let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
                let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
                let tried = Way::Tcp.perform(&mut alpha, Family::V4, inside)?;
                expect("errno of alpha", tried.errno, libc::EPERM)?;
                fx.arrives(&mut beta, Way::Tcp, Family::V4, inside)
                    .map(drop)
            },
        ),
        Case::new("reload::good_loads_are_logged", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            fx.change(&Agent::standard("alpha").deny("198.51.100.64/26"))?;
            eventually(3, || {
                let lines = fx.audit()?;
                let loads = lines
                    .iter()
                    .filter(|line| line.0["class_uid"] == 5019)
                    .count();
                claim(loads >= 2, || format!("{loads} loads are logged"))?;
                claim(lines.iter().any(|line| line.0["class_uid"] == 6002), || {
                    "the start is not logged".to_owned()
                })?;
                let numbers: Vec<u64> = lines
                    .iter()
                    .filter_map(|line| line.number("/metadata/sequence"))
                    .collect();
                claim(
                    numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
                    || format!("gaps in {numbers:?}"),
                )
            })
        }),
    ]
}

fn start(ctx: &Ctx, on_bad_registry: &'static str) -> Result<Fixture> {
    let settings = Settings {
        on_bad_registry,
        ..Settings::default()
    };
    let beta = Agent::new("beta").allow("198.51.100.0/24", r#"443, "443/udp""#);
    Fixture::start_with(ctx, &[Agent::standard("alpha"), beta], &settings)
}

/// A typing mistake in a grant that would have been wider.
fn break_alpha(fx: &Fixture) -> Result<()> {
    let bad = Agent::standard("alpha")
        .allow("203.0.113.0/24", "443")
        .entry("port = 443\n");
    fx.place().write(&bad)
}

fn refused_load_is_logged(fx: &Fixture) -> Result<()> {
    eventually(3, || {
        let lines = fx.audit()?;
        lines
            .iter()
            .find(|line| line.0["class_uid"] == 5019 && line.0.to_string().contains("alpha"))
            .map(drop)
            .with_context(|| format!("no 5019 that names alpha in {lines:?}"))
    })
}
