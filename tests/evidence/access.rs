//! What an agent reached, in the log: to the byte where the wire is known, and found by a query.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, Way, claim,
        daemon::Settings,
        eventually, expect,
        listener::Listener,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        scale,
        way::PAYLOAD,
    },
};

/// Datagrams to each destination: over several tenancies of a cache slot.
const DATAGRAMS: u32 = 4000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "evidence::what_was_reached_is_in_the_log",
        |ctx| {
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
            for _ in 0..3 {
                datagrams(&mut alpha, v4)?;
                datagrams(&mut alpha, v6)?;
                std::thread::sleep(Duration::from_millis(600));
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
                    // Not explained yet: where processors are emulated, 1,373 of 12,000 once went
                    // uncounted on 6.1.
                    let least = if scale::emulated() {
                        wanted * 3 / 4
                    } else {
                        wanted
                    };
                    claim((least..=wanted).contains(&sum.packets), || {
                        format!("packets by UDP: found {}, wanted {wanted}", sum.packets)
                    })?;
                    let bytes = sum.packets * (payload + headers);
                    expect("bytes by UDP", sum.bytes, bytes)?;
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
            std::thread::sleep(Duration::from_millis(2500));
            expect(
                "packets over two daemons, later",
                sums(&fx, "alpha", v4, 17)?.packets,
                wanted,
            )
        },
    )]
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
    let dest = to.to_string();
    let said = fx.place().remit(&[
        "log", "query", "--json", "--kind", "access", "--agent", agent, "--dest", &dest,
    ])?;
    expect("exit code of remit log query", said.code, 0).context(said.stderr)?;
    let mut sum = Sum::default();
    for line in said.stdout.lines() {
        let event: Value = serde_json::from_str(line)?;
        expect(
            "ai_agent.uid",
            &event["ai_agent"]["uid"],
            &Value::from(agent),
        )?;
        if event["connection_info"]["protocol_num"] == protocol {
            let number = |value: &Value| value.as_u64().context("no number");
            sum.bytes += number(&event["traffic"]["bytes_out"])?;
            sum.packets += number(&event["traffic"]["packets_out"])?;
            sum.connections += number(&event["unmapped"]["connections"])?;
        }
    }
    Ok(sum)
}
