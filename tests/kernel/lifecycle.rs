//! States and times: only an active agent within its times reaches anything, and the kernel ends
//! it by itself.

use std::{thread::sleep, time::Duration};

use anyhow::Result;

use crate::{
    harness::Case,
    support::{
        Agent, Ctx, Family, Fixture, Refusal, Way,
        clock::{from_now, rfc3339, unix_now},
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
        ends(ctx, granted_until)
    }));
    cases.push(Case::new("lifecycle::agent_ends_while_in_use", |ctx| {
        ends(ctx, |at| Agent::standard("alpha").expires(at))
    }));
    cases.push(Case::new("lifecycle::agent_begins_by_itself", |ctx| {
        let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
        let mut actor = fx.actor("alpha")?;
        let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
        let begins = |at| Agent::standard("alpha").not_before(at);
        before_a_moment(&mut fx, begins, |_| {
            let tried = Way::Tcp.perform(&mut actor, Family::V4, to)?;
            expect("errno before the time", tried.errno, libc::EPERM)
        })?;
        eventually(LONGEST.unsigned_abs(), || {
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to).map(drop)
        })
    }));
    cases.push(Case::new(
        "lifecycle::grant_ends_with_the_daemon_dead",
        |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let ended = before_a_moment(&mut fx, granted_until, |fx| {
                fx.arrives(&mut actor, Way::Tcp, Family::V4, to).map(drop)
            })?;
            fx.daemon.kill()?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            wait_past(ended);
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
fn ends(ctx: &mut Ctx, until: fn(String) -> Agent) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let mut actor = fx.actor("alpha")?;
    let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
    let ended = before_a_moment(&mut fx, until, |fx| {
        for way in Way::MAIN {
            fx.arrives(&mut actor, way, Family::V4, to)?;
        }
        Ok(())
    })?;
    wait_past(ended);
    for way in Way::MAIN {
        let how = Refusal::of("alpha", "expired").by_any();
        fx.refused(&mut actor, way, Family::V4, to, &how)?;
    }
    fx.reconcile("alpha")
}

fn granted_until(at: String) -> Agent {
    Agent::new("alpha").allow_until("198.51.100.0/24", r#"443, "443/udp""#, &at)
}

/// Seconds that a moment is ahead at first, and at most.
const AHEAD: i64 = 4;
const LONGEST: i64 = 32;

/// Puts an agent in force whose scope changes at a moment, and claims something before it: in the
/// first half of the time, and if the machine was too slow for that, once more with twice of it.
/// Returns the moment.
fn before_a_moment(
    fx: &mut Fixture,
    changes: fn(String) -> Agent,
    mut claim: impl FnMut(&mut Fixture) -> Result<()>,
) -> Result<i64> {
    let mut ahead = AHEAD;
    loop {
        let moment = unix_now() + ahead;
        fx.change(&changes(rfc3339(moment)))?;
        let said = claim(fx);
        let in_time = unix_now() < moment - ahead / 2;
        if in_time || ahead >= LONGEST {
            said?;
            return Ok(moment);
        }
        ahead *= 2;
    }
}

/// Waits until a second after the moment has begun.
fn wait_past(moment: i64) {
    while unix_now() <= moment {
        sleep(Duration::from_millis(50));
    }
}
