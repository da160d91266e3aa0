//! Sockets that were opened before a change: a narrowed scope ends them (TCP: see `open_tcp`), a
//! widened one serves at once, and no change has a moment in which anything is open.

use anyhow::Result;

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Agent, Ctx, Family, Fixture, Refusal, Way, claim, eventually, expect,
        listener::Listener,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("change::connected_udp_is_refused_after_narrowing", |ctx| {
            udp_ends(ctx, Agent::new("alpha"), "out_of_scope")
        }),
        Case::new("change::connected_udp_is_refused_after_a_deny", |ctx| {
            udp_ends(ctx, Agent::standard("alpha").deny(IN_V4), "denied")
        }),
        Case::new("change::connected_udp_is_refused_after_suspension", |ctx| {
            udp_ends(
                ctx,
                Agent::standard("alpha").state("suspended"),
                "suspended",
            )
        }),
        Case::new("change::a_wider_scope_serves_at_once", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            let how = Refusal::of("alpha", "out_of_scope");
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
            fx.change(&Agent::standard("alpha").allow("203.0.113.0/24", r#"443, "443/udp""#))?;
            for way in Way::MAIN {
                fx.arrives(&mut actor, way, Family::V4, to)?;
            }
            Ok(())
        }),
        Case::new("change::a_written_file_is_enough", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            fx.place().write(&Agent::new("alpha"))?;
            eventually(10, || {
                let tried = Way::UdpConnected.perform(&mut actor, Family::V4, to)?;
                expect("errno", tried.errno, libc::EPERM)
            })
        }),
        Case::new("change::an_agent_that_goes_becomes_unregistered", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            std::fs::remove_file(fx.place().at("agents.d/alpha.toml"))?;
            expect("exit code", fx.place().remit(&["reload"])?.code, 0)?;
            let how = Refusal::of("unregistered", "unregistered");
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)
        }),
        Case::new("change::no_reload_has_an_open_moment", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let (mut inside, mut outside) = (fx.actor("alpha")?, fx.actor("alpha")?);
            let inside_id = inside.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            let outside_id = outside.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            fx.wire.drain()?;
            let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            inside.tell(&flood(inside_id, Family::V4.pick(IN_V4, IN_V6, 443)?))?;
            outside.tell(&flood(outside_id, out))?;
            for round in 0..10 {
                let other = format!("198.51.100.{}", 100 + round);
                fx.change(&Agent::standard("alpha").deny(&other))?;
            }
            let (kept, refused) = (inside.hear()?, outside.hear()?);
            expect("in scope: errno", kept.errno, 0)?;
            expect("in scope: refused", kept.value, 0)?;
            expect("out of scope: errno", refused.errno, 0)?;
            claim(refused.value > 0, || "the flood did not run".to_owned())?;
            let passed = refused.replies.first().map_or(-1, |reply| reply.value);
            expect("out of scope: let through", passed, 0)?;
            fx.reconcile("alpha")
        }),
    ]
}

fn udp_ends(ctx: &Ctx, after: Agent, reason: &str) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let mut actor = fx.actor("alpha")?;
    for family in Family::ALL {
        let to = family.pick(IN_V4, IN_V6, 443)?;
        if family != Family::V4 {
            fx.change(&Agent::standard("alpha"))?;
        }
        let listener = Listener::start(Way::UdpConnected, to)?;
        let id = actor.socket(family.domain(), libc::SOCK_DGRAM, 0)?;
        actor.must(&connect(id, to))?;
        actor.must(&send(id))?;
        listener.expect_payload()?;
        if family == Family::V6 && reason == "denied" {
            fx.change(&after.clone().deny(IN_V6))?;
        } else {
            fx.change(&after)?;
        }
        let before = fx.violations()?.len();
        fx.wire.drain()?;
        let tried = actor.ask(&send(id))?;
        expect("errno after the change", tried.errno, libc::EPERM)?;
        listener.expect_nothing()?;
        expect("packets after the change", fx.seen_at(to.ip())?, 0)?;
        fx.await_line(before, "alpha", |line| {
            line.text("/unmapped/reason") == reason
                && line.text("/unmapped/hook") == "cgroup_skb/egress"
        })?;
    }
    fx.reconcile("alpha")
}

fn connect(id: usize, addr: std::net::SocketAddr) -> Op {
    Op::Connect {
        id,
        addr,
        timeout_ms: 3000,
    }
}

fn send(id: usize) -> Op {
    Op::Send {
        id,
        data: PAYLOAD.to_vec(),
    }
}

fn flood(id: usize, addr: std::net::SocketAddr) -> Op {
    Op::Flood {
        id,
        addr,
        data: PAYLOAD.to_vec(),
        millis: 2000,
    }
}
