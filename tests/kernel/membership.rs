//! Who belongs to an agent: nested and re-created cgroups, children by fork and exec, processes
//! that nobody claims, and two agents side by side.

use anyhow::{Context as _, Result};

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Cgroup, Family, Fixture, Refusal, Way, claim,
        daemon::Settings,
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("membership::nested_cgroups_belong", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let nested = fx.cgroup("alpha")?.child("a/b/c/d/e/f/g/h")?;
            let mut actor = Actor::spawn(Some(&nested))?;
            for family in Family::ALL {
                for way in Way::MAIN {
                    fx.arrives(&mut actor, way, family, family.pick(IN_V4, IN_V6, 443)?)?;
                    let how = Refusal::of("alpha", "out_of_scope");
                    let to = family.pick(OUT_V4, OUT_V6, 443)?;
                    fx.refused(&mut actor, way, family, to, &how)?;
                }
            }
            drop(actor);
            drop(nested);
            fx.reconcile("alpha")
        }),
        Case::new("membership::a_cgroup_born_later_is_learnt", |ctx| {
            let agent = Agent::standard("alpha").selector(&format!("{}/job-*.scope", ctx.root()));
            let root = ctx.root();
            let mut fx = Fixture::start_with_cgroups(ctx, &[agent], &[])?;
            let born = Cgroup::create(&format!("{root}/job-7.scope"))?;
            let mut actor = Actor::spawn(Some(&born))?;
            closed_then_open(&mut fx, &mut actor)?;
            let how = Refusal::of("alpha", "out_of_scope");
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)
        }),
        Case::new("membership::a_recreated_cgroup_is_never_open", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            for _ in 0..5 {
                fx.cgroup("alpha")?.recreate()?;
                let mut actor = fx.actor("alpha")?;
                closed_then_open(&mut fx, &mut actor)?;
                drop(actor);
                eventually(2, || {
                    claim(is_empty(fx.cgroup("alpha")?)?, || "busy".to_owned())
                })?;
            }
            Ok(())
        }),
        Case::new("membership::forked_children_belong", |ctx| {
            children(ctx, false)
        }),
        Case::new("membership::executed_children_belong", |ctx| {
            children(ctx, true)
        }),
        Case::new("membership::unregistered_is_refused_and_told", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let stranger = Cgroup::create(&format!("{}/stranger.service", ctx.root()))?;
            let mut actor = Actor::spawn(Some(&stranger))?;
            for family in Family::ALL {
                for way in Way::MAIN {
                    let how = Refusal::of("unregistered", "unregistered");
                    let to = family.pick(IN_V4, IN_V6, 443)?;
                    fx.refused(&mut actor, way, family, to, &how)?;
                }
            }
            drop(actor);
            drop(stranger);
            fx.reconcile("unregistered")
        }),
        Case::new("membership::unregistered_in_the_root_itself", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let root = Cgroup::create(&ctx.root())?;
            let mut actor = Actor::spawn(Some(&root))?;
            let how = Refusal::of("unregistered", "unregistered");
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
            drop(actor);
            // The guard of the fixture removes it.
            std::mem::forget(root);
            Ok(())
        }),
        Case::new(
            "membership::unregistered_monitor_arrives_and_is_told",
            |ctx| {
                let settings = Settings {
                    unregistered: "monitor",
                    ..Settings::default()
                };
                let mut fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &settings)?;
                let stranger = Cgroup::create(&format!("{}/stranger.service", ctx.root()))?;
                let mut actor = Actor::spawn(Some(&stranger))?;
                for way in Way::MAIN {
                    let before = fx.violations()?.len();
                    let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                    fx.arrives(&mut actor, way, Family::V4, to)?;
                    let line = fx.await_line(before, "unregistered", |line| line.is_monitored())?;
                    expect("reason", line.text("/unmapped/reason"), "unregistered")?;
                }
                // It does not lift what binds the registered.
                let how = Refusal::of("alpha", "out_of_scope");
                let mut alpha = fx.actor("alpha")?;
                let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                fx.refused(&mut alpha, Way::Tcp, Family::V4, to, &how)
            },
        ),
        Case::new("membership::two_agents_do_not_mix", |ctx| {
            let beta = Agent::new("beta").allow("203.0.113.0/24", r#"443, "443/udp""#);
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha"), beta])?;
            let mut actors = [fx.actor("alpha")?, fx.actor("beta")?];
            // Alternating, so that a verdict remembered for one would serve the other.
            for _ in 0..3 {
                for (id, own, other, actor) in
                    [("alpha", IN_V4, OUT_V4, 0), ("beta", OUT_V4, IN_V4, 1)]
                {
                    let actor = &mut actors[actor];
                    for way in [Way::Tcp, Way::UdpSendTo] {
                        let to = Family::V4.pick(own, own, 443)?;
                        fx.arrives(actor, way, Family::V4, to)?;
                        let tried =
                            way.perform(actor, Family::V4, Family::V4.pick(other, other, 443)?)?;
                        expect(&format!("errno of {id}"), tried.errno, libc::EPERM)?;
                    }
                }
            }
            let status = fx.place().status()?;
            for id in ["alpha", "beta"] {
                expect("denied", status.denied(id, None)?, 6)?;
                fx.reconcile(id)?;
            }
            Ok(())
        }),
        Case::new("membership::joining_while_running", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = Actor::spawn(None)?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            fx.cgroup("alpha")?.enter(actor.pid())?;
            let how = Refusal::of("alpha", "out_of_scope");
            for way in Way::MAIN {
                fx.refused(&mut actor, way, Family::V4, to, &how)?;
            }
            fx.reconcile("alpha")
        }),
    ]
}

fn is_empty(cgroup: &Cgroup) -> Result<bool> {
    Ok(std::fs::read_to_string(cgroup.path().join("cgroup.procs"))?.is_empty())
}

/// In a new cgroup: out of scope never leaves; in scope passes within a second.
fn closed_then_open(fx: &mut Fixture, actor: &mut Actor) -> Result<()> {
    let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
    let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
    fx.wire.drain()?;
    let secs = if std::env::var_os("REMIT_TEST_VM").is_some() {
        5
    } else {
        1
    };
    eventually(secs, || {
        for way in Way::MAIN {
            let tried = way.perform(actor, Family::V4, out)?;
            expect("errno out of scope", tried.errno, libc::EPERM)?;
        }
        let tried = Way::UdpSendTo.perform(actor, Family::V4, inside)?;
        expect("errno in scope", tried.errno, 0)
    })?;
    expect("packets out of scope", fx.seen_at(out.ip())?, 0)
}

fn children(ctx: &mut crate::support::Ctx, exec: bool) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let mut actor = fx.actor("alpha")?;
    let before = fx.violations()?.len();
    fx.wire.drain()?;
    let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
    let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
    let ops = vec![
        Op::Socket {
            domain: libc::AF_INET,
            kind: libc::SOCK_DGRAM,
            protocol: 0,
        },
        send_to(out),
        send_to(inside),
        Op::Socket {
            domain: libc::AF_INET,
            kind: libc::SOCK_STREAM,
            protocol: 0,
        },
        Op::Connect {
            id: 1,
            addr: out,
            timeout_ms: 3000,
        },
    ];
    let reply = actor.ask(&Op::Child { ops, exec })?;
    let errnos: Vec<i32> = reply.replies.iter().map(|reply| reply.errno).collect();
    expect(
        "errnos of the child",
        errnos,
        vec![0, libc::EPERM, 0, 0, libc::EPERM],
    )?;
    let child = u64::try_from(reply.value).context("no pid")?;
    for hook in ["cgroup_skb/egress", "cgroup/connect4"] {
        fx.await_line(before, "alpha", |line| {
            line.text("/unmapped/hook") == hook && line.number("/actor/process/pid") == Some(child)
        })?;
    }
    expect("packets out of scope", fx.seen_at(out.ip())?, 0)?;
    fx.reconcile("alpha")
}

fn send_to(addr: std::net::SocketAddr) -> Op {
    Op::SendTo {
        id: 0,
        addr,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    }
}
