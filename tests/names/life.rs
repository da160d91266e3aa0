//! The guard through the daemon's life: other network namespaces, a daemon that is gone, one that
//! takes over, an agent that is suspended or gets names later.

use std::net::{SocketAddr, TcpListener, UdpSocket};

use anyhow::{Context as _, Result};

use super::{
    RESOLVER_V4, RESOLVER_V6, Spec, Zone, ask, guarded, hostile::endpoints, lookup, resolve,
};
use crate::{
    actor::{
        Op,
        lookup::{A, Manner, read},
    },
    harness::Case,
    support::{Agent, Family, Fixture, Way, claim, eventually, expect},
};

const NAME: &str = "api.names.example";
const ADDR: &str = "203.0.113.40:443";
/// A lookup that cannot be answered must say so within this.
const SOON_MS: f64 = 500.0;

fn spec() -> Spec {
    Spec::new().host(NAME, &["203.0.113.40"])
}

fn agent() -> Agent {
    Agent::new("alpha").allow(NAME, "443")
}

/// In a network namespace of its own the agent is refused until an endpoint is there, and served
/// from then on.
fn a_namespace_of_its_own_is_served(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let addrs = [("203.0.113.40", 32), ("192.0.2.53", 32)];
    let addrs = addrs
        .iter()
        .map(|(ip, len)| Ok((ip.parse()?, *len)))
        .collect::<Result<_>>()?;
    actor.must(&Op::NewNetwork { addrs })?;
    for (domain, via) in [
        (libc::AF_INET, RESOLVER_V4),
        (libc::AF_INET6, RESOLVER_V6),
        (libc::AF_INET6, RESOLVER_V4),
    ] {
        for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
            eventually(5, || {
                let reply = lookup(&mut actor, domain, manner, via, NAME, A)?;
                claim(
                    matches!(reply.errno, 0 | libc::ECONNREFUSED) && reply.ms < SOON_MS,
                    || format!("errno {} after {:.0} ms", reply.errno, reply.ms),
                )?;
                expect("errno", reply.errno, 0)?;
                let said = read(&reply.data).context("no answer")?;
                expect("code", said.code, 0)
            })?;
        }
    }
    // The lease counts there as anywhere: the connect is refused by nobody listening.
    let id = actor.must(&Op::Socket {
        domain: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: 0,
    })?;
    let reply = actor.ask(&Op::Connect {
        id,
        addr: ADDR.parse()?,
        timeout_ms: 1000,
    })?;
    expect("errno of the connect", reply.errno, libc::ECONNREFUSED)
}

/// While the daemon is down no lookup hangs or leaves, leases go on, and the next daemon answers.
fn a_daemon_that_is_gone_is_told_at_once(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = ADDR.parse()?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let ports = endpoints(fx.daemon.pid()?)?;
    fx.daemon.kill()?;
    // Somebody takes the guard's place, and gets nothing.
    let stand_ins = ports
        .iter()
        .map(|port| {
            let socket = UdpSocket::bind(("127.0.0.1", *port))?;
            socket.set_nonblocking(true)?;
            Ok((socket, TcpListener::bind(("127.0.0.1", *port))?))
        })
        .collect::<std::io::Result<Vec<_>>>()?;
    claim(!stand_ins.is_empty(), || "no endpoint was found".to_owned())?;
    fx.wire.drain()?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        for (domain, via) in [
            (libc::AF_INET, RESOLVER_V4),
            (libc::AF_INET6, RESOLVER_V6),
            (libc::AF_INET6, RESOLVER_V4),
        ] {
            let reply = lookup(&mut actor, domain, manner, via, NAME, A)?;
            expect("errno while it is down", reply.errno, libc::ECONNREFUSED)
                .with_context(|| format!("{manner:?} to {via}"))?;
            claim(reply.ms < SOON_MS, || {
                format!("only after {:.0} ms", reply.ms)
            })?;
            // The wire's own markers are answered by ICMP.
            let mut seen = fx.wire.drain()?;
            seen.retain(|packet| matches!(packet.protocol, 6 | 17));
            claim(seen.is_empty(), || {
                format!("{manner:?} to {via} of family {domain}, on the wire: {seen:?}")
            })?;
        }
    }
    fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
    for (socket, _) in &stand_ins {
        let heard = socket.recv(&mut [0; 512]);
        claim(heard.is_err(), || format!("a stand-in heard {heard:?}"))?;
    }
    drop(stand_ins);
    fx.daemon.restart()?;
    // What was leased before is not known by name, and stands.
    fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
    eventually(5, || {
        let said = ask(&mut actor, Manner::Connected, RESOLVER_V4, NAME, A)?;
        expect("code", said.code, 0)
    })?;
    let status = fx.place().status()?;
    claim(status.denied("alpha", Some("fault"))? == 9, || {
        "not every refused lookup is counted".to_owned()
    })?;
    fx.reconcile("alpha")
}

/// A suspended agent resolves nothing; resumed, it does again.
fn a_suspended_agent_resolves_nothing(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let said = fx
        .place()
        .remit(&["suspend", "alpha", "--reason", "a test"])?;
    expect("exit code of suspend", said.code, 0)?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        let reply = lookup(&mut actor, libc::AF_INET, manner, RESOLVER_V4, NAME, A)?;
        expect("errno while suspended", reply.errno, libc::EPERM)
            .with_context(|| format!("{manner:?}"))?;
    }
    let said = fx
        .place()
        .remit(&["resume", "alpha", "--reason", "a test"])?;
    expect("exit code of resume", said.code, 0)?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)
}

/// The hooks that cost others something are there while an agent uses names, and not otherwise.
fn hooks_come_and_go_with_names(fx: &mut Fixture) -> Result<()> {
    let hooks = |fx: &Fixture| -> Result<Vec<String>> {
        let said = fx.place().remit(&["status", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&said.stdout)?;
        let guards = status["guards"].as_array().cloned().unwrap_or_default();
        let mut names: Vec<String> = guards
            .iter()
            .filter(|guard| guard["state"] == "live")
            .filter_map(|guard| guard["name"].as_str())
            .filter(|name| name.contains("msg") || name.contains("peername") || *name == "dns")
            .map(str::to_owned)
            .collect();
        names.sort();
        Ok(names)
    };
    let wanted = [
        "cgroup/getpeername4",
        "cgroup/getpeername6",
        "cgroup/recvmsg4",
        "cgroup/recvmsg6",
        "cgroup/sendmsg4",
        "cgroup/sendmsg6",
        "dns",
    ];
    expect("hooks", hooks(fx)?, wanted.map(str::to_owned).to_vec())?;
    fx.change(&Agent::new("alpha").allow("198.51.100.7", "443"))?;
    expect("hooks without names", hooks(fx)?, Vec::new())?;
    let mut actor = fx.actor("alpha")?;
    let reply = lookup(
        &mut actor,
        libc::AF_INET,
        Manner::Connected,
        RESOLVER_V4,
        NAME,
        A,
    )?;
    expect("errno without names", reply.errno, libc::EPERM)?;
    fx.change(&agent())?;
    expect(
        "hooks again",
        hooks(fx)?,
        wanted.map(str::to_owned).to_vec(),
    )?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let said = fx.place().remit(&["reconcile"])?;
    expect("exit code of reconcile", said.code, 0)
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn(&mut Fixture) -> Result<()>| {
        Case::new(format!("names::{name}"), move |ctx| {
            let zone = Zone::start(&spec())?;
            let mut fx = guarded(ctx, &[agent()], &zone, "")?;
            run(&mut fx)
        })
    };
    vec![
        case(
            "a_namespace_of_its_own_is_served",
            a_namespace_of_its_own_is_served,
        ),
        case(
            "a_daemon_that_is_gone_is_told_at_once",
            a_daemon_that_is_gone_is_told_at_once,
        ),
        case(
            "a_suspended_agent_resolves_nothing",
            a_suspended_agent_resolves_nothing,
        ),
        case("hooks_come_and_go_with_names", hooks_come_and_go_with_names),
    ]
}
