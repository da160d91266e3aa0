//! ICMP by ping sockets and raw sockets, and raw sockets as such.

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
    for way in [Way::Ping, Way::PingConnected, Way::RawIcmp] {
        for family in [Family::V4, Family::V6] {
            let name = format!("icmp::{}_{}_keeps_to_the_scope", way.name(), family.name());
            cases.push(Case::new(name, move |ctx| {
                let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
                let mut actor = fx.actor("alpha")?;
                fx.arrives(&mut actor, way, family, family.pick(IN_V4, IN_V6, 0)?)?;
                let how = Refusal::of("alpha", "out_of_scope");
                let to = family.pick(OUT_V4, OUT_V6, 0)?;
                fx.refused(&mut actor, way, family, to, &how)?;
                fx.reconcile("alpha")
            }));
        }
    }
    for (way, families) in [
        (Way::RawIcmp, &[Family::V4, Family::V6][..]),
        (Way::RawHeader, &[Family::V4]),
    ] {
        let name = format!("icmp::{}_needs_a_grant_of_its_kind", way.name());
        cases.push(Case::new(name, move |ctx| {
            let agent = Agent::new("alpha").allow("198.51.100.0/24", "443");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            for family in families {
                let how = Refusal::of("alpha", "socket_type").at("cgroup/sock_create");
                let to = family.pick(OUT_V4, OUT_V6, 443)?;
                fx.refused(&mut actor, way, *family, to, &how)?;
            }
            fx.reconcile("alpha")
        }));
    }
    cases.push(Case::new(
        "icmp::any_lets_raw_sockets_keep_to_the_scope",
        |ctx| {
            let agent = Agent::new("alpha").allow("198.51.100.0/24", "\"any\"");
            let mut fx = Fixture::start(ctx, &[agent])?;
            let mut actor = fx.actor("alpha")?;
            for way in [Way::RawIcmp, Way::RawHeader] {
                let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
                fx.arrives(&mut actor, way, Family::V4, to)?;
                let how = Refusal::of("alpha", "out_of_scope");
                let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                fx.refused(&mut actor, way, Family::V4, to, &how)?;
            }
            fx.reconcile("alpha")
        },
    ));
    cases
}
