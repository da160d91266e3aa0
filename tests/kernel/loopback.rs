//! Loopback: `own` reaches the agent's own sockets, both ways, and nobody else's; `none` and
//! `any`; and grants by address.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{
    actor::Op,
    harness::Case,
    support::{Actor, Agent, Family, Fixture, Refusal, Way, claim, expect, way::PAYLOAD},
};

const PORT: u16 = 7700;

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::ALL {
        let name = family.name();
        cases.push(Case::new(
            format!("loopback::{name}_own_tcp_both_ways"),
            move |ctx| {
                let fx = Fixture::start(ctx, &[Agent::new("alpha")])?;
                let (mut server, mut client) = (fx.actor("alpha")?, fx.actor("alpha")?);
                tcp_both_ways(&mut server, &mut client, family)?;
                // In one process, too.
                tcp_both_ways_alone(&mut client, family)?;
                expect("denied", fx.place().status()?.denied("alpha", None)?, 0)
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_own_udp_both_ways"),
            move |ctx| {
                let fx = Fixture::start(ctx, &[Agent::new("alpha")])?;
                let (mut server, mut client) = (fx.actor("alpha")?, fx.actor("alpha")?);
                for connected in [false, true] {
                    udp_both_ways(&mut server, &mut client, family, connected)?;
                }
                expect("denied", fx.place().status()?.denied("alpha", None)?, 0)
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_foreign_listener_is_refused"),
            move |ctx| {
                let mut fx = Fixture::start(ctx, &[Agent::new("alpha")])?;
                let mut actor = fx.actor("alpha")?;
                for way in Way::MAIN {
                    let to = family.pick("127.0.0.1", "::1", PORT)?;
                    let how = Refusal::of("alpha", "loopback_foreign");
                    fx.refused(&mut actor, way, family, to, &how)?;
                }
                fx.reconcile("alpha")
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_another_agents_listener_is_refused"),
            move |ctx| {
                let agents = [Agent::new("alpha"), Agent::new("beta")];
                let fx = Fixture::start(ctx, &agents)?;
                let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
                let (_, to) = beta.listen(family.pick("127.0.0.1", "::1", 0)?)?;
                let tried = Way::Tcp.perform(&mut alpha, family, to)?;
                expect("errno", tried.errno, libc::EPERM)?;
                fx.await_line(0, "alpha", |line| {
                    line.text("/unmapped/reason") == "loopback_foreign"
                })?;
                fx.reconcile("alpha")
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_none_refuses_its_own"),
            move |ctx| {
                let fx = Fixture::start(ctx, &[Agent::new("alpha").loopback("none")])?;
                let (mut server, mut client) = (fx.actor("alpha")?, fx.actor("alpha")?);
                let (_, to) = server.listen(family.pick("127.0.0.1", "::1", 0)?)?;
                let tried = Way::Tcp.perform(&mut client, family, to)?;
                expect("errno", tried.errno, libc::EPERM)?;
                fx.await_line(0, "alpha", |line| {
                    line.text("/unmapped/reason") == "loopback_foreign"
                })?;
                fx.reconcile("alpha")
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_any_reaches_all_of_it"),
            move |ctx| {
                let mut fx = Fixture::start(ctx, &[Agent::new("alpha").loopback("any")])?;
                let mut actor = fx.actor("alpha")?;
                for way in Way::MAIN {
                    let to = family.pick("127.0.0.1", "::1", PORT)?;
                    fx.arrives(&mut actor, way, family, to)?;
                }
                Ok(())
            },
        ));
        cases.push(Case::new(
            format!("loopback::{name}_a_grant_reaches_its_port_alone"),
            move |ctx| {
                let ports = format!("{PORT}, \"{PORT}/udp\"");
                let agent = Agent::new("alpha")
                    .allow("127.0.0.1", &ports)
                    .allow("::1", &ports);
                let mut fx = Fixture::start(ctx, &[agent])?;
                let mut actor = fx.actor("alpha")?;
                for way in Way::MAIN {
                    let to = family.pick("127.0.0.1", "::1", PORT)?;
                    fx.arrives(&mut actor, way, family, to)?;
                    let to = family.pick("127.0.0.1", "::1", PORT + 1)?;
                    let how = Refusal::of("alpha", "loopback_foreign");
                    fx.refused(&mut actor, way, family, to, &how)?;
                }
                fx.reconcile("alpha")
            },
        ));
    }
    cases.push(Case::new(
        "loopback::where_nobody_listens_is_not_its_own",
        |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::new("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            for way in Way::MAIN {
                let before = fx.violations()?.len();
                let to: SocketAddr = "127.0.0.1:7799".parse()?;
                fx.wire.drain()?;
                let tried = way.perform(&mut actor, Family::V4, to)?;
                expect(way.name(), tried.errno, libc::EPERM)?;
                let left = fx.wire.drain()?;
                claim(left.iter().all(|seen| seen.port != to.port()), || {
                    format!("on the wire: {left:?}")
                })?;
                fx.await_line(before, "alpha", |line| {
                    line.text("/unmapped/reason") == "loopback_foreign"
                })?;
            }
            fx.reconcile("alpha")
        },
    ));
    cases
}

fn address(family: Family) -> Result<SocketAddr> {
    family.pick("127.0.0.1", "::1", 0)
}

fn tcp_both_ways(server: &mut Actor, client: &mut Actor, family: Family) -> Result<()> {
    let (listener, to) = server.listen(address(family)?)?;
    let id = client.socket(family.domain(), libc::SOCK_STREAM, 0)?;
    client.must(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 3000,
    })?;
    let accepted = server.must(&Op::Accept {
        id: listener,
        timeout_ms: 3000,
    })?;
    exchange(client, id, server, accepted)
}

fn tcp_both_ways_alone(actor: &mut Actor, family: Family) -> Result<()> {
    let (listener, to) = actor.listen(address(family)?)?;
    let id = actor.socket(family.domain(), libc::SOCK_STREAM, 0)?;
    actor.must(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 3000,
    })?;
    let accepted = actor.must(&Op::Accept {
        id: listener,
        timeout_ms: 3000,
    })?;
    for (from, to) in [(id, accepted), (accepted, id)] {
        actor.must(&Op::Send {
            id: from,
            data: PAYLOAD.to_vec(),
        })?;
        let got = actor.ask(&Op::Recv {
            id: to,
            timeout_ms: 3000,
        })?;
        expect("bytes", got.data.as_slice(), PAYLOAD)?;
    }
    Ok(())
}

fn udp_both_ways(
    server: &mut Actor,
    client: &mut Actor,
    family: Family,
    connected: bool,
) -> Result<()> {
    let bound = server.bound(address(family)?, libc::SOCK_DGRAM)?;
    let to = server.local_addr(bound)?;
    let id = client.socket(family.domain(), libc::SOCK_DGRAM, 0)?;
    let data = PAYLOAD.to_vec();
    if connected {
        client.must(&Op::Connect {
            id,
            addr: to,
            timeout_ms: 3000,
        })?;
        client.must(&Op::Send { id, data })?;
    } else {
        client.must(&Op::SendTo {
            id,
            addr: to,
            data,
            flags: 0,
            repeat: 1,
        })?;
    }
    let got = server.ask(&Op::Recv {
        id: bound,
        timeout_ms: 3000,
    })?;
    expect("bytes at the server", got.data.as_slice(), PAYLOAD)?;
    let port = client.local_addr(id)?.port();
    server.must(&Op::SendTo {
        id: bound,
        addr: SocketAddr::new(to.ip(), port),
        data: b"answer".to_vec(),
        flags: 0,
        repeat: 1,
    })?;
    let got = client.ask(&Op::Recv {
        id,
        timeout_ms: 3000,
    })?;
    expect("bytes at the client", got.data.as_slice(), b"answer")
}

fn exchange(a: &mut Actor, a_id: usize, b: &mut Actor, b_id: usize) -> Result<()> {
    a.must(&Op::Send {
        id: a_id,
        data: PAYLOAD.to_vec(),
    })?;
    let got = b.ask(&Op::Recv {
        id: b_id,
        timeout_ms: 3000,
    })?;
    expect("bytes at the server", got.data.as_slice(), PAYLOAD)?;
    b.must(&Op::Send {
        id: b_id,
        data: b"answer".to_vec(),
    })?;
    let got = a.ask(&Op::Recv {
        id: a_id,
        timeout_ms: 3000,
    })?;
    expect("bytes at the client", got.data.as_slice(), b"answer")
}
