//! Monitor mode: what would be refused arrives and is told, the floor excepted.

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way, claim, eventually, expect,
        network::{OUT_V4, OUT_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Family::ALL
        .into_iter()
        .map(|family| {
            let name = format!("monitor::{}_arrives_and_is_told", family.name());
            Case::new(name, move |ctx| {
                let mut fx = Fixture::start(ctx, &[Agent::standard("alpha").monitor()])?;
                let mut actor = fx.actor("alpha")?;
                for way in Way::MAIN {
                    let to = family.pick(OUT_V4, OUT_V6, 443)?;
                    let before = fx.violations()?.len();
                    let counted = fx.place().status()?.monitored("alpha")?;
                    fx.arrives(&mut actor, way, family, to)?;
                    let line = fx.await_line(before, "alpha", |line| {
                        line.is_monitored() && line.text("/dst_endpoint/ip") == to.ip().to_string()
                    })?;
                    expect(
                        "action, disposition",
                        format!("{}, {}", line.0["action_id"], line.0["disposition_id"]),
                        "3, 17".to_owned(),
                    )?;
                    expect("reason", line.text("/unmapped/reason"), "out_of_scope")?;
                    claim(fx.place().status()?.monitored("alpha")? > counted, || {
                        "the counter did not move".to_owned()
                    })?;
                }
                expect("denied", fx.place().status()?.denied("alpha", None)?, 0)?;
                eventually(8, || {
                    let told: u64 = fx
                        .violations()?
                        .iter()
                        .filter(|line| line.is_monitored())
                        .map(crate::support::Line::count)
                        .sum();
                    expect("lines", told, fx.place().status()?.monitored("alpha")?)
                })
            })
        })
        .collect();
    cases.push(Case::new("monitor::lifts_a_deny", |ctx| {
        let agent = Agent::standard("alpha").deny("198.51.100.64/26").monitor();
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        let to = "198.51.100.70:443".parse()?;
        fx.arrives(&mut actor, Way::UdpSendTo, Family::V4, to)?;
        let line = fx.await_line(0, "alpha", |line| line.is_monitored())?;
        expect("reason", line.text("/unmapped/reason"), "denied")
    }));
    cases.push(Case::new("monitor::never_lifts_the_floor", |ctx| {
        let mut fx = Fixture::start(ctx, &[Agent::standard("alpha").monitor()])?;
        let mut actor = fx.actor("alpha")?;
        for family in Family::ALL {
            for way in Way::MAIN {
                let to = family.pick("169.254.169.254", "fd00:ec2::254", 443)?;
                let how = Refusal::of("alpha", "floor").by("floor.");
                fx.refused(&mut actor, way, family, to, &how)?;
            }
        }
        fx.reconcile("alpha")
    }));
    cases.push(Case::new("monitor::never_lifts_the_lifecycle", |ctx| {
        let agent = Agent::standard("alpha").monitor().state("suspended");
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
        let how = Refusal::of("alpha", "suspended").by_any();
        fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
        fx.reconcile("alpha")
    }));
    cases
}
