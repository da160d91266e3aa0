//! The way to the guard and back.

use std::{
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, Result};

use super::{RESOLVER_V4, RESOLVER_V6, Spec, Zone, ask, guarded, lookup, once, resolve};
use crate::{
    actor::{
        Op,
        lookup::{A, Manner, question, read},
    },
    evidence::metrics::scrape,
    harness::Case,
    support::{Agent, Family, Fixture, Refusal, Way, claim, expect},
};

const NAME: &str = "api.names.example";
const OTHER: &str = "paste.names.example";
const MANY: &str = "many.names.example";
const ADDR: &str = "203.0.113.20";

fn spec() -> Spec {
    let many: Vec<String> = (1..=60).map(|at| format!("2001:db8:2::{at}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).chain([ADDR]).collect();
    Spec::new()
        .host(NAME, &[ADDR])
        .host(OTHER, &["203.0.113.21"])
        .host(MANY, &many)
}

fn agent() -> Agent {
    Agent::new("alpha").allow(NAME, "443").allow(MANY, "443")
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

/// One socket that asks one resolver after the other hears from each.
fn several_are_asked_in_turn(fx: &Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    for via in [
        "192.0.2.53:53",
        "192.0.2.54:53",
        "127.0.0.53:53",
        RESOLVER_V4,
    ] {
        let addr: SocketAddr = via.parse()?;
        actor.must(&Op::SendTo {
            id,
            addr,
            data: question(NAME, A),
            flags: 0,
            repeat: 1,
        })?;
        let reply = actor.ask(&Op::RecvFrom {
            id,
            timeout_ms: 5000,
        })?;
        expect("errno", reply.errno, 0).with_context(|| via.to_owned())?;
        expect("where it came from", reply.addr, Some(addr))?;
        expect("code", read(&reply.data).context("no answer")?.code, 0)?;
    }
    Ok(())
}

/// Both families at once, by UDP and where that is cut by TCP.
fn what_go_does_is_answered(fx: &Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    for via in [RESOLVER_V4, RESOLVER_V6] {
        let reply = actor.ask(&Op::LookupLikeGo {
            via: via.parse()?,
            name: MANY.to_owned(),
            timeout_ms: 5000,
        })?;
        for (reply, (family, by_tcp, addresses)) in
            reply.replies.iter().zip([("A", 0, 1), ("AAAA", 1, 60)])
        {
            let what = || format!("{family} from {via}");
            expect("errno", reply.errno, 0).with_context(what)?;
            expect("by TCP", reply.value, by_tcp).with_context(what)?;
            expect("where it came from", reply.addr, Some(via.parse()?)).with_context(what)?;
            let said = read(&reply.data).with_context(what)?;
            expect("addresses", said.addresses.len(), addresses).with_context(what)?;
        }
        expect("answers", reply.replies.len(), 2)?;
    }
    Ok(())
}

/// A resolver that the scope grants, to an agent with names: the guard is asked all the same.
fn a_granted_resolver_is_the_guard_all_the_same(fx: &mut Fixture, zone: &mut Zone) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    fx.wire.drain()?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        let said = ask(&mut actor, manner, RESOLVER_V4, OTHER, A)?;
        expect("code", said.code, 5)?;
        claim(said.reason.contains("alpha"), || said.reason.clone())?;
    }
    let resolver: SocketAddr = RESOLVER_V4.parse()?;
    let leaked = fx.wire.drain()?.iter().any(|seen| seen.ip == resolver.ip());
    claim(!leaked, || "the resolver itself was asked".to_owned())?;
    expect("what upstream was asked", zone.asked()?, Vec::new())?;
    // Another port of it is a destination like any other.
    let refused = Refusal::of("alpha", "out_of_scope").without_control();
    let other = SocketAddr::new(resolver.ip(), 853);
    fx.refused(&mut actor, Way::Tcp, Family::V4, other, &refused)
}

/// What is scraped of lookups.
fn metric(fx: &Fixture, name: &str) -> Result<Option<f64>> {
    let socket = UnixStream::connect(fx.place().at("run/remit.sock"))?;
    Ok(scrape(socket, "/v1/metrics")?.get(name).copied())
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
            for (name, wanted) in [
                (r#"remit_dns_leases{agent="alpha"}"#, 1.0),
                (
                    r#"remit_dns_lookups_total{agent="alpha",outcome="answered",reason=""}"#,
                    1.0,
                ),
                (r#"remit_dns_lookup_seconds_count{part="guard"}"#, 1.0),
                (r#"remit_dns_lookup_seconds_count{part="upstream"}"#, 1.0),
            ] {
                expect(name, metric(&fx, name)?, Some(wanted))?;
            }
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
            let refused =
                r#"remit_dns_lookups_total{agent="alpha",outcome="refused",reason="name"}"#;
            expect("refusals in metrics", metric(&fx, refused)?, Some(3.0))?;
            expect("what upstream was asked", zone.asked()?, Vec::new())
        }),
        once("one_socket_asks_several_resolvers_in_turn", |ctx| {
            let zone = Zone::start(&spec())?;
            several_are_asked_in_turn(&guarded(ctx, &[agent()], &zone, "")?)
        }),
        once("what_go_does_is_answered", |ctx| {
            let zone = Zone::start(&spec())?;
            what_go_does_is_answered(&guarded(ctx, &[agent()], &zone, "")?)
        }),
        once("a_granted_resolver_is_the_guard_all_the_same", |ctx| {
            let mut zone = Zone::start(&spec())?;
            let agent = agent().allow("192.0.2.53", "53, \"53/udp\"");
            let mut fx = guarded(ctx, &[agent], &zone, "")?;
            a_granted_resolver_is_the_guard_all_the_same(&mut fx, &mut zone)
        }),
    ]
}
