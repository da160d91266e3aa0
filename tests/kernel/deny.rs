//! A deny inside an allow beats it, and only there.

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way,
        network::{IN_V4, IN_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Family::ALL
        .into_iter()
        .map(|family| {
            let name = format!("deny::{}_inside_an_allow_wins", family.name());
            Case::new(name, move |ctx| {
                let agent = Agent::standard("alpha")
                    .deny("198.51.100.64/26")
                    .deny("2001:db8:1::99");
                let mut fx = Fixture::start(ctx, &[agent])?;
                let mut actor = fx.actor("alpha")?;
                for way in Way::MAIN {
                    let to = family.pick("198.51.100.70", "2001:db8:1::99", 443)?;
                    let how = Refusal::of("alpha", "denied").by("scope.deny[");
                    fx.refused(&mut actor, way, family, to, &how)?;
                    fx.arrives(&mut actor, way, family, family.pick(IN_V4, IN_V6, 443)?)?;
                }
                fx.reconcile("alpha")
            })
        })
        .collect();
    cases.push(Case::new("deny::holds_inside_nat64", |ctx| {
        let agent = Agent::new("alpha").allow("64:ff9b::/96", "443").deny(IN_V4);
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        let to = "[64:ff9b::c633:640a]:443".parse()?;
        let how = Refusal::of("alpha", "denied").by("scope.deny[0]");
        fx.refused(&mut actor, Way::Tcp, Family::V6, to, &how)?;
        fx.reconcile("alpha")
    }));
    cases
}
