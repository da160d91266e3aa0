//! Other system calls and protocols to the same end.

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way, claim, expect,
        listener::Listener,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        Way::Mptcp,
        Way::FastOpen,
        Way::FastOpenConnect,
        Way::Uring,
        Way::UdpSendMany,
    ]
    .into_iter()
    .map(|way| {
        let case = Case::new(format!("bypass::{}", way.name()), move |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            for family in way.families() {
                fx.arrives(&mut actor, way, *family, family.pick(IN_V4, IN_V6, 443)?)?;
                let how = Refusal::of("alpha", "out_of_scope");
                let to = family.pick(OUT_V4, OUT_V6, 443)?;
                fx.refused(&mut actor, way, *family, to, &how)?;
            }
            fx.reconcile("alpha")
        });
        way.need().into_iter().fold(case, Case::needs)
    })
    .collect();
    for way in [Way::UdpLite, Way::Sctp] {
        let case = Case::new(format!("bypass::{}_needs_any", way.name()), move |ctx| {
            let agents = [
                Agent::standard("alpha"),
                Agent::new("beta")
                    .allow("198.51.100.0/24", "\"any\"")
                    .allow("2001:db8:1::/64", "\"any\""),
            ];
            let mut fx = Fixture::start(ctx, &agents)?;
            let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
            for family in way.families() {
                let inside = family.pick(IN_V4, IN_V6, 443)?;
                let out = family.pick(OUT_V4, OUT_V6, 443)?;
                let how = Refusal::of("alpha", "socket_type")
                    .at("cgroup/sock_create")
                    .without_control();
                fx.refused(&mut alpha, way, *family, inside, &how)?;
                if way == Way::UdpLite {
                    fx.arrives(&mut beta, way, *family, inside)?;
                }
                let how = Refusal::of("beta", "out_of_scope").without_control();
                fx.refused(&mut beta, way, *family, out, &how)?;
            }
            fx.reconcile("alpha")?;
            fx.reconcile("beta")
        });
        cases.push(way.need().into_iter().fold(case, Case::needs));
    }
    cases.push(Case::new(
        "bypass::connected_udp_to_another_address",
        |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            for family in Family::ALL {
                let inside = family.pick(IN_V4, IN_V6, 443)?;
                let out = family.pick(OUT_V4, OUT_V6, 443)?;
                let id = actor.socket(family.domain(), libc::SOCK_DGRAM, 0)?;
                actor.must(&Op::Connect {
                    id,
                    addr: inside,
                    timeout_ms: 1000,
                })?;
                let listener = Listener::start(Way::UdpSendTo, out)?;
                fx.wire.drain()?;
                let tried = actor.ask(&Op::SendTo {
                    id,
                    addr: out,
                    data: PAYLOAD.to_vec(),
                    flags: 0,
                    repeat: 1,
                })?;
                expect("errno", tried.errno, libc::EPERM)?;
                listener.expect_nothing()?;
                expect("packets", fx.seen_at(out.ip())?, 0)?;
            }
            fx.reconcile("alpha")
        },
    ));
    cases.push(Case::new(
        "bypass::sendmmsg_behind_an_allowed_message",
        |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let inside = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            fx.wire.drain()?;
            let sent = actor.ask(&Op::SendMany {
                id,
                addrs: vec![inside, out, inside],
                data: PAYLOAD.to_vec(),
            })?;
            expect("messages sent before the refused one", sent.value, 1)?;
            expect("packets out of scope", fx.seen_at(out.ip())?, 0)?;
            expect("denied", fx.place().status()?.denied("alpha", None)?, 1)?;
            fx.reconcile("alpha")
        },
    ));
    cases.push(Case::new("bypass::unspecified_address", |ctx| {
        let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
        let mut actor = fx.actor("alpha")?;
        // The kernel takes 0.0.0.0 and :: for loopback, where somebody else listens.
        for (family, ip, real) in [
            (Family::V4, "0.0.0.0", "127.0.0.1"),
            (Family::V6, "::", "::1"),
            (Family::Mapped, "0.0.0.0", "127.0.0.1"),
        ] {
            for way in Way::MAIN {
                let before = fx.violations()?.len();
                let listener = Listener::start(way, family.pick(real, real, 7700)?)?;
                let tried = way.perform(&mut actor, family, family.pick(ip, ip, 7700)?)?;
                expect(way.name(), tried.errno, libc::EPERM)?;
                listener.expect_nothing()?;
                let line = fx.await_line(before, "alpha", |line| line.is_denial())?;
                expect("reason", line.text("/unmapped/reason"), "loopback_foreign")?;
            }
        }
        fx.reconcile("alpha")
    }));
    cases.push(Case::new("bypass::mapped_v4_of_a_denied_address", |ctx| {
        let agent = Agent::new("alpha").allow("::/0", r#"443, "443/udp""#);
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        // An IPv6 grant says nothing of IPv4, in whatever clothes.
        for way in Way::MAIN {
            fx.arrives(
                &mut actor,
                way,
                Family::V6,
                Family::V6.pick(IN_V4, IN_V6, 443)?,
            )?;
            let how = Refusal::of("alpha", "out_of_scope");
            let to = Family::Mapped.pick(IN_V4, IN_V6, 443)?;
            fx.refused(&mut actor, way, Family::Mapped, to, &how)?;
        }
        fx.reconcile("alpha")
    }));
    cases.push(Case::new(
        "bypass::a_nested_cgroup_of_its_own_making",
        |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let nested = fx.cgroup("alpha")?.child("made/by/itself")?;
            nested.enter(actor.pid())?;
            let how = Refusal::of("alpha", "out_of_scope");
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            for way in Way::MAIN {
                fx.refused(&mut actor, way, Family::V4, to, &how)?;
            }
            drop(actor);
            drop(nested);
            fx.reconcile("alpha")
        },
    ));
    cases.push(Case::new("bypass::disconnect_and_connect_again", |ctx| {
        let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
        let mut actor = fx.actor("alpha")?;
        let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        for (ip, errno) in [(IN_V4, 0), (OUT_V4, libc::EPERM), (IN_V4, 0)] {
            let tried = actor.ask(&Op::Connect {
                id,
                addr: Family::V4.pick(ip, ip, 443)?,
                timeout_ms: 1000,
            })?;
            expect(ip, tried.errno, errno)?;
        }
        claim(fx.place().status()?.denied("alpha", None)? == 1, || {
            "the counter".to_owned()
        })
    }));
    cases
}
