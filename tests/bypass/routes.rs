//! Packets whose header does not tell where they go: source routes, routing headers, fragments.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;

use crate::{
    actor::Op,
    harness::{Case, Outcome},
    support::{
        Actor, Agent, Family, Fixture, claim, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        way::{PAYLOAD, ipv4_packet, udp},
    },
};

const LOOSE_SOURCE_ROUTE: u8 = 0x83;
const MORE_FRAGMENTS: u16 = 0x2000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bypass::source_route_v4", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let via: Ipv4Addr = IN_V4.parse()?;
            let mut value = vec![LOOSE_SOURCE_ROUTE, 7, 4];
            value.extend(via.octets());
            value.push(0);
            let prepare = |actor: &mut Actor| {
                let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
                actor.must(&Op::SetOption {
                    id,
                    level: libc::IPPROTO_IP,
                    name: libc::IP_OPTIONS,
                    value: value.clone(),
                })?;
                Ok(id)
            };
            // The header says IN, the option OUT.
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            faulted(&mut fx, &mut actor, prepare, to, PAYLOAD, &[IN_V4, OUT_V4])
        }),
        Case::with_outcome("bypass::segment_routing_header_v6", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            // Next header (the kernel's), 8-octet units, type, segments left, last entry, flags,
            // tag; the segments in reverse, the first a place for the destination.
            let mut value = vec![0, 4, 4, 1, 1, 0, 0, 0];
            value.extend([0; 16]);
            value.extend(IN_V6.parse::<Ipv6Addr>()?.octets());
            let prepare = |actor: &mut Actor| {
                let id = actor.socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)?;
                actor.must(&Op::SetOption {
                    id,
                    level: libc::IPPROTO_IPV6,
                    name: libc::IPV6_RTHDR,
                    value: value.clone(),
                })?;
                Ok(id)
            };
            if let Err(error) = prepare(fx.outside()) {
                return Ok(Outcome::NotTested(format!(
                    "this kernel takes no segment routing header: {error:#}"
                )));
            }
            let to = Family::V6.pick(OUT_V4, OUT_V6, 443)?;
            faulted(&mut fx, &mut actor, prepare, to, PAYLOAD, &[IN_V6, OUT_V6])?;
            Ok(Outcome::Passed)
        }),
        Case::new("bypass::routing_header_v6", |ctx| {
            let agent = Agent::new("alpha").allow("2001:db8:1::/64", "\"any\"");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            let (via, to): (Ipv6Addr, Ipv6Addr) = (IN_V6.parse()?, OUT_V6.parse()?);
            let mut body = vec![17, 2, 0, 1, 0, 0, 0, 0];
            body.extend(to.octets());
            body.extend(udp(40_000, 443));
            let packet = ipv6_packet(via, via, 43, &body);
            let addr = SocketAddr::new(via.into(), 0);
            faulted(
                &mut fx,
                &mut actor,
                raw(libc::AF_INET6),
                addr,
                &packet,
                &[IN_V6, OUT_V6],
            )
        }),
        Case::new("bypass::hop_by_hop_does_not_hide_the_ports", |ctx| {
            let agent = Agent::new("alpha")
                .allow("2001:db8:1::/64", "\"443/udp\"")
                .allow("2001:db8:1::11", "\"any\"");
            let fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            let id = actor.socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
            let to: Ipv6Addr = IN_V6.parse()?;
            for (port, errno) in [(443, 0), (444, libc::EPERM)] {
                // Eight octets of padding options, then UDP.
                let mut body = vec![17, 0, 1, 4, 0, 0, 0, 0];
                body.extend(udp(40_000, port));
                let tried = actor.ask(&Op::SendTo {
                    id,
                    addr: SocketAddr::new(to.into(), 0),
                    data: ipv6_packet(to, to, 0, &body),
                    flags: 0,
                    repeat: 1,
                })?;
                expect(&format!("errno to port {port}"), tried.errno, errno)?;
            }
            fx.reconcile("alpha")
        }),
        Case::new("bypass::fragments", |ctx| {
            let agent = Agent::new("alpha").allow("198.51.100.0/24", "\"any\"");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
            let (inside, out): (Ipv4Addr, Ipv4Addr) = (IN_V4.parse()?, OUT_V4.parse()?);
            let first = |to: Ipv4Addr| {
                ipv4_packet([0; 4], to.octets(), 17, MORE_FRAGMENTS, &udp(40_000, 443))
            };
            fx.wire.drain()?;
            for (to, packet, errno) in [
                (inside, first(inside), 0),
                (out, first(out), libc::EPERM),
                (
                    out,
                    ipv4_packet([0; 4], out.octets(), 17, 4, PAYLOAD),
                    libc::EPERM,
                ),
            ] {
                let tried = actor.ask(&Op::SendTo {
                    id,
                    addr: SocketAddr::new(to.into(), 0),
                    data: packet,
                    flags: 0,
                    repeat: 1,
                })?;
                expect(&format!("errno to {to}"), tried.errno, errno)?;
            }
            expect("packets out of scope", fx.seen_at(out.into())?, 0)?;
            // A later fragment has no ports to judge: refused in scope, too.
            let packet = ipv4_packet([0; 4], inside.octets(), 17, 4, PAYLOAD);
            let to = SocketAddr::new(inside.into(), 0);
            faulted(
                &mut fx,
                &mut actor,
                raw(libc::AF_INET),
                to,
                &packet,
                &[IN_V4, OUT_V4],
            )
        }),
        Case::new("bypass::a_packet_cut_short", |ctx| {
            let agent = Agent::new("alpha").allow("198.51.100.0/24", "\"any\"");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            let inside: Ipv4Addr = IN_V4.parse()?;
            let packet = ipv4_packet([0; 4], inside.octets(), 6, 0, &[0x9c, 0x40, 0x01]);
            let to = SocketAddr::new(inside.into(), 0);
            faulted(
                &mut fx,
                &mut actor,
                raw(libc::AF_INET),
                to,
                &packet,
                &[IN_V4],
            )
        }),
    ]
}

/// Sends what cannot be told: refused as a fault, counted and told, and nothing leaves; from
/// outside the same does.
fn faulted(
    fx: &mut Fixture,
    actor: &mut Actor,
    prepare: impl Fn(&mut Actor) -> Result<usize>,
    addr: SocketAddr,
    data: &[u8],
    silent: &[&str],
) -> Result<()> {
    let before = fx.violations()?.len();
    let counted = fx.place().status()?.denied("alpha", Some("fault"))?;
    let id = prepare(actor)?;
    fx.wire.drain()?;
    let tried = actor.ask(&send(id, addr, data))?;
    expect("errno", tried.errno, libc::EPERM)?;
    let seen = fx.wire.drain()?;
    for ip in silent {
        let ip: IpAddr = ip.parse()?;
        expect(
            "packets",
            seen.iter().filter(|seen| seen.ip == ip).count(),
            0,
        )?;
    }
    fx.await_line(before, "alpha", |line| {
        line.text("/unmapped/reason") == "fault"
            && line.text("/unmapped/hook") == "cgroup_skb/egress"
    })?;
    expect(
        "faults counted",
        fx.place().status()?.denied("alpha", Some("fault"))?,
        counted + 1,
    )?;
    let id = prepare(fx.outside())?;
    let tried = fx.outside().ask(&send(id, addr, data))?;
    expect("control: errno outside the fence", tried.errno, 0)?;
    let seen = fx.wire.drain()?;
    claim(
        seen.iter()
            .any(|seen| silent.iter().any(|ip| seen.ip.to_string() == *ip)),
        || "control: nothing left from outside the fence".to_owned(),
    )?;
    fx.reconcile("alpha")
}

fn send(id: usize, addr: SocketAddr, data: &[u8]) -> Op {
    Op::SendTo {
        id,
        addr,
        data: data.to_vec(),
        flags: 0,
        repeat: 1,
    }
}

fn raw(domain: i32) -> impl Fn(&mut Actor) -> Result<usize> {
    move |actor| actor.socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

fn ipv6_packet(from: Ipv6Addr, to: Ipv6Addr, next: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((body.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(body);
    packet
}
