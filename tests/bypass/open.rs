//! What stands open without containment: cgroup programs never see it. `doctor` tells of it.

use std::{
    io::{IoSlice, Write as _},
    net::{Ipv4Addr, UdpSocket},
    os::{fd::AsRawFd as _, unix::net::UnixListener},
};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, Way, claim, expect,
        listener::Listener,
        netlink::LO,
        network::{OUT_V4, OUT_V6},
        way::{PAYLOAD, ipv4_packet, udp},
    },
};

const ETH_P_IP: u16 = 0x0800;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bypass::af_packet_is_open_without_containment", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let out: Ipv4Addr = OUT_V4.parse()?;
            let id = actor.socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
            fx.wire.drain()?;
            let tried = actor.ask(&Op::SendFrame {
                id,
                device: LO,
                ethertype: ETH_P_IP,
                data: ipv4_packet([198, 51, 100, 1], out.octets(), 17, 0, &udp(40_000, 443)),
            })?;
            expect("errno", tried.errno, 0)?;
            claim(fx.seen_at(out.into())? == 1, || {
                "no frame on the wire: closed, or not tested".to_owned()
            })
        }),
        Case::new(
            "bypass::a_socket_from_outside_is_open_without_containment",
            |ctx| {
                let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                let mut actor = fx.actor("alpha")?;
                let path = ctx.dir().join("pass.sock");
                let listener = UnixListener::bind(&path)?;
                actor.tell(&Op::ReceiveSocket {
                    path: path.display().to_string(),
                })?;
                let (mut stream, _) = listener.accept()?;
                let passed = UdpSocket::bind("0.0.0.0:0")?;
                let fds = [passed.as_raw_fd()];
                sendmsg::<UnixAddr>(
                    stream.as_raw_fd(),
                    &[IoSlice::new(b"x")],
                    &[ControlMessage::ScmRights(&fds)],
                    MsgFlags::empty(),
                    None,
                )?;
                stream.flush()?;
                let got = actor.hear()?;
                expect("errno of the receipt", got.errno, 0)?;
                sends(&mut actor, usize::try_from(got.value)?)
            },
        ),
        Case::new(
            "bypass::a_socket_made_before_entry_is_open_without_containment",
            |ctx| {
                let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                let mut actor = Actor::spawn(None)?;
                let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
                fx.cgroup("alpha")?.enter(actor.pid())?;
                sends(&mut actor, id)
            },
        ),
    ]
}

/// Out of scope, and it arrives all the same.
fn sends(actor: &mut Actor, id: usize) -> anyhow::Result<()> {
    let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
    let listener = Listener::start(Way::UdpSendTo, to)?;
    let tried = actor.ask(&Op::SendTo {
        id,
        addr: to,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    })?;
    expect("errno", tried.errno, 0)?;
    listener.expect_payload()
}
