//! A flood of refusals: folded, rate-limited, and accounted for to the last one.

use anyhow::Result;

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, Refusal, Way, claim, expect,
        network::{OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

const ATTEMPTS: u32 = 5000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("flood::of_one_kind_is_counted_to_the_last", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            flood(&mut actor, OUT_V4, ATTEMPTS)?;
            expect(
                "the kernel's counter",
                fx.place().status()?.denied("alpha", None)?,
                u64::from(ATTEMPTS),
            )?;
            fx.reconcile("alpha")?;
            let lines = fx.violations()?.len();
            claim(lines < 100, || format!("{lines} lines for one kind"))?;
            expect("packets", fx.seen_at(OUT_V4.parse()?)?, 0)
        }),
        Case::new("flood::of_many_kinds_is_counted_to_the_last", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            // More kinds than the fold table has slots, and than the rate has lines.
            let mut made: u64 = 0;
            for round in 0..4_u16 {
                for port in 1000..2000_u16 {
                    let to = Family::V4.pick(OUT_V4, OUT_V6, port + round)?;
                    let reply = actor.ask(&send_to(id, to, 1))?;
                    expect("errno", reply.errno, libc::EPERM)?;
                    made += 1;
                }
            }
            expect(
                "the kernel's counter",
                fx.place().status()?.denied("alpha", None)?,
                made,
            )?;
            fx.reconcile("alpha")
        }),
        Case::new("flood::does_not_drown_another_agent", |ctx| {
            let agents = [Agent::standard("alpha"), Agent::standard("beta")];
            let mut fx = Fixture::start(ctx, &agents)?;
            let (mut alpha, mut beta) = (fx.actor("alpha")?, fx.actor("beta")?);
            let id = alpha.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            alpha.tell(&Op::Flood {
                id,
                addr: Family::V4.pick(OUT_V4, OUT_V6, 9)?,
                data: PAYLOAD.to_vec(),
                millis: 3000,
            })?;
            let to = Family::V4.pick("203.0.113.77", OUT_V6, 443)?;
            let how = Refusal::of("beta", "out_of_scope").without_control();
            for way in Way::MAIN {
                fx.refused(&mut beta, way, Family::V4, to, &how)?;
            }
            let flooded = alpha.hear()?;
            expect(
                "the kernel's counter",
                fx.place().status()?.denied("alpha", None)?,
                u64::try_from(flooded.value)?,
            )?;
            fx.reconcile("alpha")?;
            fx.reconcile("beta")
        }),
        Case::new("flood::every_line_has_its_number", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            for host in 1..60 {
                flood(&mut actor, &format!("203.0.113.{host}"), 3)?;
            }
            fx.reconcile("alpha")?;
            let lines = fx.violations()?;
            for (index, line) in lines.iter().enumerate() {
                let first = lines
                    .first()
                    .and_then(|line| line.number("/metadata/sequence"))
                    .unwrap_or_default();
                expect(
                    "metadata.sequence",
                    line.number("/metadata/sequence"),
                    Some(first + index as u64),
                )?;
            }
            expect("packets", fx.seen_at(OUT_V4.parse()?)?, 0)
        }),
    ]
}

/// Sends that must all be refused.
fn flood(actor: &mut Actor, ip: &str, attempts: u32) -> Result<()> {
    let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let to = Family::V4.pick(ip, ip, 443)?;
    let reply = actor.ask(&send_to(id, to, attempts))?;
    expect("errno", reply.errno, 0)?;
    expect("refused", reply.value, i64::from(attempts))?;
    actor.must(&Op::Close { id })?;
    Ok(())
}

fn send_to(id: usize, addr: std::net::SocketAddr, repeat: u32) -> Op {
    Op::SendTo {
        id,
        addr,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat,
    }
}
