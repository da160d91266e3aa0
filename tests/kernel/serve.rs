//! Served clients are answered, others are not: replies are egress, too.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{
    actor::Op,
    harness::Case,
    support::{Actor, Agent, Family, Fixture, Refusal, Way, expect, way::PAYLOAD},
};

const PORT: u16 = 8080;

fn server() -> Agent {
    Agent::new("alpha").serve(
        "8080, \"8080/udp\"",
        r#""10.0.0.0/8", "fd00:10::/64", "loopback""#,
    )
}

/// Destination at the agent; a client in `from`; another.
fn places(family: Family) -> Result<(SocketAddr, SocketAddr, SocketAddr)> {
    Ok((
        family.pick("198.51.100.20", "2001:db8:1::10", PORT)?,
        family.pick("10.0.0.5", "fd00:10::1", 0)?,
        family.pick("192.0.2.7", "fd00:20::1", 0)?,
    ))
}

/// 6.1 does not show the hook an IPv6 SYN-ACK (6.12 does): the other client believes itself
/// connected. It must not get anything that the agent says.
fn only_shakes_hands(
    fx: &mut Fixture,
    actor: &mut Actor,
    listener: usize,
    client: usize,
) -> Result<()> {
    println!("this kernel does not judge IPv6 SYN-ACKs: the handshake alone got through");
    let accepted = actor.must(&Op::Accept {
        id: listener,
        timeout_ms: 3000,
    })?;
    actor.ask(&Op::Send {
        id: accepted,
        data: PAYLOAD.to_vec(),
    })?;
    let got = fx.outside().ask(&Op::Recv {
        id: client,
        timeout_ms: 1500,
    })?;
    expect("bytes at the other client", got.data.len(), 0)?;
    fx.await_line(0, "alpha", |line| {
        line.text("/unmapped/reason") == "out_of_scope"
            && line.text("/unmapped/hook") == "cgroup_skb/egress"
    })
    .map(drop)
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for family in Family::ALL {
        let name = family.name();
        cases.push(Case::new(
            format!("serve::{name}_tcp_clients_in_the_list_and_no_others"),
            move |ctx| {
                let mut fx = Fixture::start(ctx, &[server()])?;
                let mut actor = fx.actor("alpha")?;
                let (to, client, other) = places(family)?;
                let listener = listen(&mut actor, family)?;

                let id = client_socket(fx.outside(), client)?;
                fx.outside().must(&Op::Connect {
                    id,
                    addr: to,
                    timeout_ms: 3000,
                })?;
                let accepted = actor.must(&Op::Accept {
                    id: listener,
                    timeout_ms: 3000,
                })?;
                actor.must(&Op::Send {
                    id: accepted,
                    data: PAYLOAD.to_vec(),
                })?;
                let got = fx.outside().ask(&Op::Recv {
                    id,
                    timeout_ms: 3000,
                })?;
                expect("answer", got.data.as_slice(), PAYLOAD)?;

                let id = client_socket(fx.outside(), other)?;
                let tried = fx.outside().ask(&Op::Connect {
                    id,
                    addr: to,
                    timeout_ms: 1500,
                })?;
                if family == Family::V6 && tried.errno == 0 {
                    return only_shakes_hands(&mut fx, &mut actor, listener, id);
                }
                expect("errno of the other client", tried.errno, libc::ETIMEDOUT)?;
                fx.outside().must(&Op::Close { id })?;
                fx.await_line(0, "alpha", |line| {
                    line.text("/dst_endpoint/ip") == other.ip().to_string()
                        && line.text("/unmapped/reason") == "out_of_scope"
                        && line.text("/unmapped/hook") == "cgroup_skb/egress"
                })?;
                expect("packets to the other client", fx.seen_at(other.ip())?, 0)
            },
        ));
        cases.push(Case::new(
            format!("serve::{name}_udp_clients_in_the_list_and_no_others"),
            move |ctx| {
                let mut fx = Fixture::start(ctx, &[server()])?;
                let mut actor = fx.actor("alpha")?;
                let (to, client, other) = places(family)?;
                let bound = actor.bound(to_any(family, PORT)?, libc::SOCK_DGRAM)?;
                for (from, errno) in [(client, 0), (other, libc::EPERM)] {
                    let id = fx.outside().bound(from, libc::SOCK_DGRAM)?;
                    let from = fx.outside().local_addr(id)?;
                    fx.outside().must(&send_to(id, to))?;
                    let got = actor.ask(&Op::Recv {
                        id: bound,
                        timeout_ms: 3000,
                    })?;
                    expect("request", got.data.as_slice(), PAYLOAD)?;
                    let answered = actor.ask(&send_to(bound, from))?;
                    expect("errno of the answer", answered.errno, errno)?;
                    let got = fx.outside().ask(&Op::Recv {
                        id,
                        timeout_ms: if errno == 0 { 3000 } else { 300 },
                    })?;
                    expect("answered", got.errno == 0, errno == 0)?;
                }
                fx.await_line(0, "alpha", |line| {
                    line.text("/dst_endpoint/ip") == other.ip().to_string()
                })?;
                fx.reconcile("alpha")
            },
        ));
        cases.push(Case::new(
            format!("serve::{name}_is_no_way_out"),
            move |ctx| {
                let mut fx = Fixture::start(ctx, &[server()])?;
                let mut actor = fx.actor("alpha")?;
                let to = family.pick("10.0.0.5", "fd00:10::1", PORT)?;
                let how = Refusal::of("alpha", "out_of_scope");
                for way in Way::MAIN {
                    fx.refused(&mut actor, way, family, to, &how)?;
                }
                // Nor from the served port.
                let id = actor.socket(family.domain(), libc::SOCK_STREAM, 0)?;
                actor.must(&Op::Bind {
                    id,
                    addr: to_any(family, PORT)?,
                })?;
                let tried = actor.ask(&Op::Connect {
                    id,
                    addr: to,
                    timeout_ms: 3000,
                })?;
                expect("errno from the served port", tried.errno, libc::EPERM)?;
                fx.reconcile("alpha")
            },
        ));
    }
    cases.push(Case::new("serve::nothing_without_the_entry", |ctx| {
        let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
        let mut actor = fx.actor("alpha")?;
        let (to, client, _) = places(Family::V4)?;
        listen(&mut actor, Family::V4)?;
        let id = client_socket(fx.outside(), client)?;
        let tried = fx.outside().ask(&Op::Connect {
            id,
            addr: to,
            timeout_ms: 1500,
        })?;
        expect("errno of the client", tried.errno, libc::ETIMEDOUT)
    }));
    cases.push(Case::new("serve::loopback_clients", |ctx| {
        let mut fx = Fixture::start(ctx, &[server()])?;
        let mut actor = fx.actor("alpha")?;
        let listener = listen(&mut actor, Family::V4)?;
        let id = client_socket(fx.outside(), "127.0.0.1:0".parse()?)?;
        fx.outside().must(&Op::Connect {
            id,
            addr: SocketAddr::new("127.0.0.1".parse()?, PORT),
            timeout_ms: 3000,
        })?;
        let accepted = actor.must(&Op::Accept {
            id: listener,
            timeout_ms: 3000,
        })?;
        actor.must(&Op::Send {
            id: accepted,
            data: PAYLOAD.to_vec(),
        })?;
        let got = fx.outside().ask(&Op::Recv {
            id,
            timeout_ms: 3000,
        })?;
        expect("answer", got.data.as_slice(), PAYLOAD)
    }));
    cases
}

fn to_any(family: Family, port: u16) -> Result<SocketAddr> {
    let ip = match family {
        Family::V4 => "0.0.0.0",
        Family::V6 | Family::Mapped => "::",
    };
    Ok(SocketAddr::new(ip.parse()?, port))
}

/// A listener on all addresses; for mapped clients on an IPv6 socket.
fn listen(actor: &mut Actor, family: Family) -> Result<usize> {
    Ok(actor.listen(to_any(family, PORT)?)?.0)
}

fn client_socket(outside: &mut Actor, from: SocketAddr) -> Result<usize> {
    outside.bound(from, libc::SOCK_STREAM)
}

fn send_to(id: usize, addr: SocketAddr) -> Op {
    Op::SendTo {
        id,
        addr,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    }
}
