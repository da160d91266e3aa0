//! The floor: host-wide denials that a wide grant does not lift, in every form of the address.

use crate::{
    harness::Case,
    support::{Agent, Family, Fixture, Refusal, Way},
};

const METADATA_V4: &str = "169.254.169.254";
const METADATA_V6: &str = "fd00:ec2::254";

/// Grants everything on port 443, as far as a CIDR can.
fn wide() -> Agent {
    Agent::new("alpha")
        .allow("0.0.0.0/0", r#"443, "443/udp""#)
        .allow("::/0", r#"443, "443/udp""#)
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in Way::MAIN {
        for family in Family::ALL {
            cases.push(Case::new(
                format!("floor::{}_{}_beats_a_wide_grant", way.name(), family.name()),
                move |ctx| {
                    let mut fx = Fixture::start(ctx, &[wide()])?;
                    let mut actor = fx.actor("alpha")?;
                    let to = family.pick(METADATA_V4, METADATA_V6, 443)?;
                    let how = Refusal::of("alpha", "floor").by("floor.");
                    fx.refused(&mut actor, way, family, to, &how)?;
                    fx.reconcile("alpha")
                },
            ));
        }
    }
    cases.push(Case::new("floor::holds_inside_nat64", |ctx| {
        let mut fx = Fixture::start(ctx, &[wide()])?;
        let mut actor = fx.actor("alpha")?;
        for way in Way::MAIN {
            let how = Refusal::of("alpha", "floor").by("floor.");
            let hidden = "[64:ff9b::a9fe:a9fe]:443".parse()?;
            fx.refused(&mut actor, way, Family::V6, hidden, &how)?;
            let plain = "[64:ff9b::c633:640a]:443".parse()?;
            fx.arrives(&mut actor, way, Family::V6, plain)?;
        }
        fx.reconcile("alpha")
    }));
    cases.push(Case::new("floor::an_exact_address_overrides_it", |ctx| {
        let agent = Agent::new("alpha")
            .allow(METADATA_V4, r#"443, "443/udp""#)
            .allow(METADATA_V6, r#"443, "443/udp""#);
        let mut fx = Fixture::start(ctx, &[agent])?;
        let mut actor = fx.actor("alpha")?;
        for family in Family::ALL {
            for way in Way::MAIN {
                let to = family.pick(METADATA_V4, METADATA_V6, 443)?;
                fx.arrives(&mut actor, way, family, to)?;
            }
        }
        let how = Refusal::of("alpha", "floor").by("floor.");
        for to in ["169.254.169.254:80", "169.254.1.1:443"] {
            fx.refused(&mut actor, Way::Tcp, Family::V4, to.parse()?, &how)?;
        }
        fx.reconcile("alpha")
    }));
    cases.push(Case::new("floor::a_file_adds_to_it", |ctx| {
        std::fs::write(
            ctx.dir().join("floor.toml"),
            "schema = 1\n[[deny]]\nto = \"198.51.100.64/26\"\n",
        )?;
        let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
        let mut actor = fx.actor("alpha")?;
        let how = Refusal::of("alpha", "floor").by("floor.");
        fx.refused(
            &mut actor,
            Way::Tcp,
            Family::V4,
            "198.51.100.70:443".parse()?,
            &how,
        )?;
        fx.arrives(
            &mut actor,
            Way::Tcp,
            Family::V4,
            "198.51.100.10:443".parse()?,
        )?;
        fx.reconcile("alpha")
    }));
    cases
}
