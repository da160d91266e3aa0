//! States and times: only an active agent within its times reaches anything, and the kernel ends
//! it by itself.

use std::{thread::sleep, time::Duration};

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way,
        clock::from_now,
        eventually, expect,
        network::{IN_V4, IN_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        refused_in_scope("draft", "draft", || Agent::standard("alpha").state("draft")),
        refused_in_scope("suspended", "suspended", || {
            Agent::standard("alpha").state("suspended")
        }),
        refused_in_scope("revoked", "revoked", || {
            Agent::standard("alpha").state("revoked")
        }),
        refused_in_scope("expired_agent", "expired", || {
            Agent::standard("alpha").expires("2020-01-01T00:00:00Z".to_owned())
        }),
        refused_in_scope("not_before", "not_yet_valid", || {
            Agent::standard("alpha").not_before(from_now(3600))
        }),
        refused_in_scope("expired_grant", "expired", || {
            let ports = r#"443, "443/udp""#;
            Agent::new("alpha")
                .allow_until("198.51.100.0/24", ports, "2020-01-01T00:00:00Z")
                .allow_until("2001:db8:1::/64", ports, "2020-01-01T00:00:00Z")
        }),
    ];
    cases.push(Case::new("lifecycle::grant_ends_while_in_use", |ctx| {
        let agent =
            Agent::new("alpha").allow_until("198.51.100.0/24", r#"443, "443/udp""#, &from_now(5));
        ends(ctx, agent)
    }));
    cases.push(Case::new("lifecycle::agent_ends_while_in_use", |ctx| {
        ends(ctx, Agent::standard("alpha").expires(from_now(5)))
    }));
    cases.push(Case::new("lifecycle::agent_begins_by_itself", |ctx| {
        let agent = Agent::standard("alpha").not_before(from_now(4));
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
        let tried = Way::Tcp.perform(&mut actor, Family::V4, to)?;
        expect("errno before the time", tried.errno, libc::EPERM)?;
        eventually(8, || {
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to).map(drop)
        })
    }));
    cases.push(Case::new(
        "lifecycle::grant_ends_with_the_daemon_dead",
        |ctx| {
            let agent = Agent::new("alpha").allow_until("198.51.100.0/24", "443", &from_now(6));
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            fx.daemon.kill()?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            sleep(Duration::from_millis(7500));
            let tried = Way::Tcp.perform(&mut actor, Family::V4, to)?;
            expect("errno after the end", tried.errno, libc::EPERM)
        },
    ));
    cases
}

fn refused_in_scope(name: &str, reason: &'static str, agent: fn() -> Agent) -> Case {
    Case::new(format!("lifecycle::{name}_reaches_nothing"), move |ctx| {
        let mut fx = Fixture::start(ctx, &[agent()])?;
        let mut actor = fx.actor("alpha")?;
        for family in Family::ALL {
            for way in Way::MAIN {
                let to = family.pick(IN_V4, IN_V6, 443)?;
                let how = Refusal::of("alpha", reason).by_any();
                fx.refused(&mut actor, way, family, to, &how)?;
            }
        }
        fx.reconcile("alpha")
    })
}

/// In scope now, refused as `expired` within the seconds after, on a connected socket as well.
fn ends(ctx: &mut crate::support::Ctx, agent: Agent) -> anyhow::Result<()> {
    let mut fx = Fixture::start(ctx, &[agent])?;
    let mut actor = fx.actor("alpha")?;
    let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
    for way in Way::MAIN {
        fx.arrives(&mut actor, way, Family::V4, to)?;
    }
    sleep(Duration::from_millis(6500));
    for way in Way::MAIN {
        let how = Refusal::of("alpha", "expired").by_any();
        fx.refused(&mut actor, way, Family::V4, to, &how)?;
    }
    fx.reconcile("alpha")
}
