//! The way to the guard and back.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use super::{RESOLVER_V4, RESOLVER_V6, Spec, Zone, ask, guarded, lookup, resolve};
use crate::{
    actor::lookup::{A, Manner, read},
    harness::Case,
    support::{Agent, Family, Fixture, Refusal, Way, claim, expect},
};

const NAME: &str = "api.names.example";
const OTHER: &str = "paste.names.example";
const ADDR: &str = "203.0.113.20";

fn spec() -> Spec {
    Spec::new()
        .host(NAME, &[ADDR])
        .host(OTHER, &["203.0.113.21"])
}

fn agent() -> Agent {
    Agent::new("alpha").allow(NAME, "443")
}

/// Every manner and every kind of socket, to IPv4 and IPv6 resolvers.
fn every_way_to_ask_is_answered_from_where_it_asked(fx: &Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        for (domain, via, from) in [
            (libc::AF_INET, RESOLVER_V4, RESOLVER_V4),
            (libc::AF_INET6, RESOLVER_V6, RESOLVER_V6),
            (libc::AF_INET6, RESOLVER_V4, "[::ffff:192.0.2.53]:53"),
            (libc::AF_INET, "127.0.0.53:53", "127.0.0.53:53"),
        ] {
            let what = || format!("{manner:?} to {via} on a socket of family {domain}");
            let reply = lookup(&mut actor, domain, manner, via, NAME, A)?;
            expect("errno", reply.errno, 0).with_context(what)?;
            let from: SocketAddr = from.parse()?;
            expect("where it came from", reply.addr, Some(from)).with_context(what)?;
            let said = read(&reply.data).with_context(what)?;
            expect("code", said.code, 0).with_context(what)?;
            expect("addresses", said.addresses, vec![ADDR.parse::<IpAddr>()?])
                .with_context(what)?;
        }
    }
    Ok(())
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "names::every_way_to_ask_is_answered_from_where_it_asked",
            |ctx| {
                let zone = Zone::start(&spec())?;
                let fx = guarded(ctx, &[agent()], &zone, "")?;
                every_way_to_ask_is_answered_from_where_it_asked(&fx)
            },
        ),
        Case::new("names::a_name_opens_its_address_and_no_other", |ctx| {
            let zone = Zone::start(&spec())?;
            let mut fx = guarded(ctx, &[agent()], &zone, "")?;
            let mut actor = fx.actor("alpha")?;
            let to: SocketAddr = format!("{ADDR}:443").parse()?;
            let refused = Refusal::of("alpha", "out_of_scope");
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &refused)?;
            let said = resolve(&mut actor, NAME)?;
            expect("addresses", said.addresses, vec![to.ip()])?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
            let other: SocketAddr = format!("{ADDR}:80").parse()?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, other, &refused)?;
            let other: SocketAddr = "203.0.113.21:443".parse()?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, other, &refused)?;
            fx.reconcile("alpha")
        }),
        Case::new("names::another_name_is_refused_with_the_reason", |ctx| {
            let mut zone = Zone::start(&spec())?;
            let fx = guarded(ctx, &[agent()], &zone, "")?;
            let mut actor = fx.actor("alpha")?;
            let before = fx.violations()?.len();
            for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
                let said = ask(&mut actor, manner, RESOLVER_V4, OTHER, A)?;
                expect("code", said.code, 5)?;
                claim(
                    said.reason.contains("alpha") && said.reason.contains(OTHER),
                    || format!("the reason says {:?}", said.reason),
                )?;
            }
            let line = fx.await_line(before, "alpha", |line| line.0["class_uid"] == 4003)?;
            expect("event", line.text("/metadata/event_code"), "RM1101")?;
            expect("name", line.text("/query/hostname"), OTHER)?;
            expect("reason", line.text("/unmapped/reason"), "name_not_in_scope")?;
            expect("resolver", line.text("/dst_endpoint/ip"), "192.0.2.53")?;
            let pid = line.number("/actor/process/pid");
            expect("process", pid, Some(u64::from(actor.pid())))?;
            expect("what upstream was asked", zone.asked()?, Vec::new())
        }),
    ]
}
