//! In scope arrives; out of scope is refused, on every main way and in every family.

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in Way::MAIN {
        for family in Family::ALL {
            let (way_name, family_name) = (way.name(), family.name());
            cases.push(Case::new(
                format!("reach::{way_name}_{family_name}_in_scope_arrives"),
                move |ctx| {
                    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                    let mut actor = fx.actor("alpha")?;
                    fx.arrives(&mut actor, way, family, family.pick(IN_V4, IN_V6, 443)?)?;
                    fx.reconcile("alpha")
                },
            ));
            cases.push(Case::new(
                format!("reach::{way_name}_{family_name}_out_of_scope_is_refused"),
                move |ctx| {
                    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                    let mut actor = fx.actor("alpha")?;
                    let to = family.pick(OUT_V4, OUT_V6, 443)?;
                    let how = Refusal::of("alpha", "out_of_scope");
                    fx.refused(&mut actor, way, family, to, &how)?;
                    fx.reconcile("alpha")
                },
            ));
        }
    }
    cases
}
