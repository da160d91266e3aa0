//! What an agent reached, in the log: to the byte where the wire is known, and found by a query.

use std::{
    net::{SocketAddr, TcpListener},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    sys::signal::Signal,
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    actor::{
        Op,
        lookup::{A, Manner, question, read},
    },
    harness::Case,
    names::zone::{Spec, Zone},
    support::{
        Actor, Agent, Family, Fixture, Way, claim,
        daemon::Settings,
        eventually, expect,
        listener::Listener,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        tamper::Pins,
        way::PAYLOAD,
    },
};

/// Datagrams to each destination: over several tenancies of a cache slot.
const DATAGRAMS: u32 = 4000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![exact(), without_room(), named()]
}

/// Whatever is sent, by whichever processor, is in the log once.
fn exact() -> Case {
    Case::new("evidence::what_was_reached_is_in_the_log", |ctx| {
        let settings = Settings {
            more: "[log]\naccess = \"2s\"\n".to_owned(),
            ..Settings::default()
        };
        let agents = [Agent::standard("alpha"), Agent::standard("beta")];
        let mut fx = Fixture::start_with(ctx, &agents, &settings)?;
        let mut alpha = fx.actor("alpha")?;
        let mut beta = fx.actor("beta")?;
        let (v4, v6) = (
            Family::V4.pick(IN_V4, IN_V6, 443)?,
            Family::V6.pick(IN_V4, IN_V6, 443)?,
        );
        // Before there is more on `lo` than the tap there can take.
        fx.arrives(&mut beta, Way::UdpSendTo, Family::V4, v4)?;
        for _ in 0..5 {
            fx.arrives(&mut alpha, Way::Tcp, Family::V4, v4)?;
        }
        // On one processor until that is told, then on another: what it carries there is not
        // what was told, which still lies where it was.
        let send = |alpha: &mut Actor| -> Result<()> {
            datagrams(alpha, v4)?;
            datagrams(alpha, v6)
        };
        let apart = stay_on(alpha.pid(), 0)? && stay_on(alpha.pid(), 1)?;
        stay_on(alpha.pid(), 0)?;
        send(&mut alpha)?;
        for to in [v4, v6] {
            eventually(8, || {
                let told = sums(&fx, "alpha", to, 17)?.packets;
                expect("packets of the first round", told, u64::from(DATAGRAMS))
            })?;
        }
        if apart {
            stay_on(alpha.pid(), 1)?;
        }
        for _ in 0..2 {
            send(&mut alpha)?;
            // Longer than a slot lasts: the next one carries what this one has.
            sleep(Duration::from_millis(1100));
        }
        // What is refused is not reached.
        let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
        let id = alpha.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        let reply = alpha.ask(&Op::Connect {
            id,
            addr: out,
            timeout_ms: 1000,
        })?;
        expect("errno", reply.errno, libc::EPERM)?;

        let wanted = u64::from(DATAGRAMS) * 3;
        let payload = PAYLOAD.len() as u64;
        for (to, headers) in [(v4, 28), (v6, 48)] {
            eventually(8, || {
                let sum = sums(&fx, "alpha", to, 17)?;
                expect("packets by UDP", sum.packets, wanted)?;
                expect("bytes by UDP", sum.bytes, wanted * (payload + headers))?;
                expect("connections by UDP", sum.connections, 0)
            })?;
        }
        eventually(8, || {
            let sum = sums(&fx, "alpha", v4, 6)?;
            expect("connections by TCP", sum.connections, 5)?;
            claim(sum.bytes > 5 * payload && sum.packets >= 5 * 3, || {
                format!("{sum:?}")
            })
        })?;
        expect("packets of beta", sums(&fx, "beta", v4, 17)?.packets, 1)?;
        expect(
            "packets out of scope",
            sums(&fx, "alpha", out, 6)?.packets,
            0,
        )?;

        // A new daemon tells what the old one did not, and nothing twice.
        datagrams(&mut alpha, v4)?;
        expect("exit code of the daemon", fx.daemon.terminate()?, 0)?;
        datagrams(&mut alpha, v4)?;
        fx.daemon.restart()?;
        let wanted = u64::from(DATAGRAMS) * 5;
        eventually(8, || {
            expect(
                "packets over two daemons",
                sums(&fx, "alpha", v4, 17)?.packets,
                wanted,
            )
        })?;
        sleep(Duration::from_millis(2500));
        expect(
            "packets over two daemons, later",
            sums(&fx, "alpha", v4, 17)?.packets,
            wanted,
        )
    })
}

/// What is used while nobody empties the ring and it is full is summed up in a map, and told from
/// there.
fn without_room() -> Case {
    // A processor's cache has fewer places, so each datagram carries what another left there.
    const PORTS: u16 = 10_000;
    const ROUNDS: u16 = 5;
    let name = "evidence::what_found_no_room_in_the_ring_is_in_the_log";
    let case = Case::new(name, |ctx| {
        let settings = Settings {
            more: "[log]\naccess = \"2s\"\n".to_owned(),
            ..Settings::default()
        };
        let agents = [Agent::new("alpha")
            .allow("198.51.100.0/24", "\"1-65535/udp\"")
            .allow("2001:db8:1::/64", "\"1-65535/udp\"")];
        let fx = Fixture::start_with(ctx, &agents, &settings)?;
        let mut alpha = fx.actor("alpha")?;
        let summed_up = Pins::below(&fx.place().at("bpf")).map("access")?;
        fx.daemon.signal(Signal::SIGSTOP)?;
        let sent = (|| {
            let mut sent = 0;
            for _ in 0..ROUNDS {
                for family in [Family::V4, Family::V6] {
                    sent += to_each_port(&mut alpha, family, PORTS)?;
                }
            }
            Ok::<_, anyhow::Error>(sent)
        })();
        let found = summed_up.keys();
        fx.daemon.signal(Signal::SIGCONT)?;
        let (sent, found) = (sent?, found?.len());
        expect("datagrams", sent, u64::from(PORTS) * u64::from(ROUNDS) * 2)?;
        claim(found > 1000, || {
            format!("the ring had room: {found} destinations are summed up")
        })?;
        eventually(30, || {
            let told = all_of(&fx, "alpha")?;
            expect("packets in the log", told.packets, sent)
        })?;
        let payload = PAYLOAD.len() as u64;
        let told = all_of(&fx, "alpha")?;
        let bytes = sent * payload + sent / 2 * (28 + 48);
        expect("bytes in the log", told.bytes, bytes)?;
        println!("{sent} datagrams, {found} destinations summed up without room in the ring");
        Ok(())
    });
    case.once()
}

/// One datagram to each port from 1 on.
fn to_each_port(actor: &mut Actor, family: Family, ports: u16) -> Result<u64> {
    let ip = family.pick(IN_V4, IN_V6, 1)?.ip();
    let domain = if ip.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let id = actor.socket(domain, libc::SOCK_DGRAM, 0)?;
    let ports: Vec<u16> = (1..=ports).collect();
    let mut sent = 0;
    for ports in ports.chunks(1000) {
        let reply = actor.ask(&Op::SendMany {
            id,
            addrs: ports
                .iter()
                .map(|port| SocketAddr::new(ip, *port))
                .collect(),
            data: PAYLOAD.to_vec(),
        })?;
        expect("errno", reply.errno, 0)?;
        sent += u64::try_from(reply.value)?;
    }
    actor.must(&Op::Close { id })?;
    Ok(sent)
}

/// What was reached by a name is found by that name.
fn named() -> Case {
    const NAME: &str = "api.names.example";
    const ADDR: &str = "203.0.113.30:443";
    let name = "evidence::what_was_reached_by_name_says_so";
    let case = Case::new(name, |ctx| {
        let zone = Zone::start(&Spec::new().host(NAME, &["203.0.113.30"]))?;
        let settings = Settings {
            dns: zone.settings(),
            more: "[log]\naccess = \"1s\"\n".to_owned(),
            ..Settings::default()
        };
        let agents = [Agent::new("alpha").allow(NAME, "443")];
        let fx = Fixture::start_with(ctx, &agents, &settings)?;
        let mut alpha = fx.actor("alpha")?;
        let reply = alpha.ask(&Op::Lookup {
            domain: libc::AF_INET,
            manner: Manner::Connected,
            via: "192.0.2.53:53".parse()?,
            question: question(NAME, A),
            timeout_ms: 5000,
        })?;
        let said = read(&reply.data).context("no answer")?;
        expect("code of the answer", said.code, 0)?;
        let to: SocketAddr = ADDR.parse()?;
        let _listener = TcpListener::bind(to)?;
        let id = alpha.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        alpha.must(&Op::Connect {
            id,
            addr: to,
            timeout_ms: 3000,
        })?;
        eventually(8, || {
            let said = fx
                .place()
                .remit(&["log", "query", "--json", "--kind", "access", "--dest", NAME])?;
            let line = said.stdout.lines().next().context("no line of that name")?;
            let event: Value = serde_json::from_str(line)?;
            expect(
                "name",
                event["dst_endpoint"]["hostname"].as_str(),
                Some(NAME),
            )?;
            expect(
                "address",
                event["dst_endpoint"]["ip"].as_str(),
                Some("203.0.113.30"),
            )?;
            expect(
                "connections",
                event["unmapped"]["connections"].as_u64(),
                Some(1),
            )?;
            let said = fx.place().remit(&["log", "query", "--dest", NAME])?;
            claim(said.stdout.contains(&format!("{ADDR} {NAME}")), || {
                said.stdout
            })
        })
    });
    case.once()
}

/// Keeps a process on one processor; false where there is no such.
fn stay_on(pid: u32, cpu: usize) -> Result<bool> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    match sched_setaffinity(Pid::from_raw(i32::try_from(pid)?), &set) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn datagrams(actor: &mut Actor, to: SocketAddr) -> Result<()> {
    let listener = Listener::start(Way::UdpSendTo, to)?;
    let domain = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let id = actor.socket(domain, libc::SOCK_DGRAM, 0)?;
    let reply = actor.ask(&Op::SendTo {
        id,
        addr: to,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: DATAGRAMS,
    })?;
    expect("errno", reply.errno, 0)?;
    expect("refused", reply.value, 0)?;
    actor.must(&Op::Close { id })?;
    drop(listener);
    Ok(())
}

/// What the log says of a destination.
#[derive(Debug, Default)]
struct Sum {
    bytes: u64,
    packets: u64,
    connections: u64,
}

/// By `remit log query`, as anybody would ask.
fn sums(fx: &Fixture, agent: &str, to: SocketAddr, protocol: u64) -> Result<Sum> {
    asked(fx, agent, &["--dest", &to.to_string()], Some(protocol))
}

/// What the log says of all that an agent reached.
fn all_of(fx: &Fixture, agent: &str) -> Result<Sum> {
    asked(fx, agent, &[], None)
}

fn asked(fx: &Fixture, agent: &str, further: &[&str], protocol: Option<u64>) -> Result<Sum> {
    let mut arguments = vec![
        "log", "query", "--json", "--kind", "access", "--agent", agent,
    ];
    arguments.extend(further);
    let said = fx.place().remit(&arguments)?;
    expect("exit code of remit log query", said.code, 0).context(said.stderr)?;
    let mut sum = Sum::default();
    for line in said.stdout.lines() {
        let event: Value = serde_json::from_str(line)?;
        expect(
            "ai_agent.uid",
            &event["ai_agent"]["uid"],
            &Value::from(agent),
        )?;
        let of = &event["connection_info"]["protocol_num"];
        if protocol.is_none_or(|protocol| *of == protocol) {
            let number = |value: &Value| value.as_u64().context("no number");
            sum.bytes += number(&event["traffic"]["bytes_out"])?;
            sum.packets += number(&event["traffic"]["packets_out"])?;
            sum.connections += number(&event["unmapped"]["connections"])?;
        }
    }
    Ok(sum)
}
