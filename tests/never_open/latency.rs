//! From the moment at which a revocation is sent to the last packet that arrives: on an open TCP
//! connection and on a UDP flow, one agent after the other of many.

use std::{thread::sleep, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    actor::traffic::{Transport, mono_ns},
    harness::Case,
    support::{
        Agent, Family, Fixture, api, claim,
        daemon::Settings,
        expect,
        network::{IN_V4, IN_V6},
        scale,
        traffic::{Ear, Generator, IN, Lane, lane},
    },
};

/// Silence that ends a measurement.
const SILENCE: Duration = Duration::from_millis(50);
/// Between two packets of a flow: what the result can be wrong by.
const PAUSE_US: u64 = 50;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new("never_open::revoke_to_last_packet", |ctx| {
        let count = if scale::full() { 1000 } else { 20 };
        let names: Vec<String> = (0..count).map(|at| format!("agent-{at:04}")).collect();
        let agents: Vec<Agent> = names.iter().map(|id| Agent::standard(id)).collect();
        let fx = Fixture::start_with(ctx, &agents, &Settings::default())?;
        let Took {
            mut tcp,
            mut udp,
            mut answers,
        } = revoke(&fx, &names)?;
        for (what, nanos) in [("TCP", &tcp), ("UDP", &udp)] {
            let most = nanos.iter().max().copied().unwrap_or_default();
            claim(most < scale::patience(1) * 1_000_000_000, || {
                format!("a packet on {what} arrived {most} ns after the revocation was sent")
            })?;
        }
        println!(
            "revoke to last packet, TCP: {}; UDP: {}; to the answer: {}",
            scale::percentiles(&mut tcp),
            scale::percentiles(&mut udp),
            scale::percentiles(&mut answers)
        );
        Ok(())
    })]
}

/// From each revocation to what followed it, in nanoseconds.
pub struct Took {
    /// To the last packet on an open TCP connection.
    pub tcp: Vec<u64>,
    /// To the last packet of a UDP flow.
    pub udp: Vec<u64>,
    /// To the answer.
    pub answers: Vec<u64>,
}

/// Revokes these agents one after the other, each while its traffic runs.
pub fn revoke(fx: &Fixture, names: &[String]) -> Result<Took> {
    let both: Vec<Vec<Lane>> = [Family::V4, Family::V6]
        .iter()
        .map(|family| flows(*family))
        .collect::<Result<_>>()?;
    let mut ear = Ear::start(&both.concat())?;
    let mut took = Took {
        tcp: Vec::new(),
        udp: Vec::new(),
        answers: Vec::new(),
    };
    for (id, lanes) in names.iter().zip(both.iter().cycle()) {
        let mut generator = Generator::paced(fx.cgroup(id)?, lanes.clone(), PAUSE_US)?;
        generator.await_passing(IN)?;
        let body = json!({ "reason": "a drill" });
        let path = format!("/agents/{id}/revoke");
        let asked = mono_ns();
        let answer = api::ask(fx.place(), "POST", &path, Some(&body))?;
        took.answers.push(mono_ns() - asked);
        expect("HTTP status", answer.status, 200).with_context(|| format!("{answer:?}"))?;
        sleep(SILENCE);
        let (last_tcp, last_udp, arrivals) = lasts(&mut ear, lanes)?;
        took.tcp.push(last_tcp.saturating_sub(asked));
        took.udp.push(last_udp.saturating_sub(asked));
        // That was the last one.
        sleep(SILENCE / 5);
        let (_, _, later) = lasts(&mut ear, lanes)?;
        expect(
            &format!("arrivals from {id} after the silence"),
            later,
            arrivals,
        )?;
    }
    Ok(took)
}

/// An open TCP connection and a UDP flow.
fn flows(family: Family) -> Result<Vec<Lane>> {
    let to = family.pick(IN_V4, IN_V6, 443)?;
    Ok(vec![
        lane(IN, family, to, Transport::Stream),
        lane(IN, family, to, Transport::Connected),
    ])
}

/// Last arrivals by TCP and by UDP at what the lanes go to, and how many there were in all.
fn lasts(ear: &mut Ear, lanes: &[Lane]) -> Result<(u64, u64, u64)> {
    let (spots, _) = ear.report()?;
    let (mut tcp, mut udp, mut arrivals) = (0, 0, 0);
    for (spot, heard) in spots {
        if !lanes.iter().any(|lane| lane.to == spot.at) {
            continue;
        }
        let last = if spot.tcp { &mut tcp } else { &mut udp };
        *last = heard.last_mono_ns;
        arrivals += heard.arrivals;
    }
    Ok((tcp, udp, arrivals))
}
