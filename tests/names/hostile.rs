//! What an agent may try with DNS, and what a zone may answer.

use std::{collections::BTreeSet, fs, net::SocketAddr};

use anyhow::{Context as _, Result};

use super::{RESOLVER_V4, Spec, Zone, ask, guarded, lookup, once, resolve};
use crate::{
    actor::{
        Op,
        lookup::{A, AAAA, ANY, Manner, TXT, question, read},
    },
    harness::Case,
    support::{Agent, Family, Fixture, Refusal, Way, claim, eventually, expect},
};

const NAME: &str = "api.names.example";
/// A lookup of one agent must not take longer than this while another floods.
const QUICK_MS: f64 = 500.0;

fn many_addresses() -> Vec<String> {
    (0..1000)
        .map(|at| format!("198.51.{}.{}", 100 + at / 250, at % 250))
        .collect()
}

fn spec() -> Spec {
    let many = many_addresses();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    Spec::new()
        .host(NAME, &["203.0.113.60"])
        .host(
            "inward.names.example",
            &[
                "10.0.0.9",
                "127.0.0.1",
                "169.254.169.254",
                "0.0.0.0",
                "::1",
                "fd00:10::1",
            ],
        )
        .host("many.names.example", &many)
        .alias("loop.names.example", "pool.names.example")
        .alias("pool.names.example", "loop.names.example")
        .alias("alias.names.example", "outside.other.example")
        .host("outside.other.example", &["203.0.113.61"])
        .numbered("wild.example", [203, 0, 113, 1])
        .cut("many.names.example")
}

fn agents() -> [Agent; 2] {
    let alpha = [
        NAME,
        "inward.names.example",
        "many.names.example",
        "loop.names.example",
        "alias.names.example",
        "*.wild.example",
    ]
    .iter()
    .fold(Agent::new("alpha"), |agent, name| agent.allow(name, "443"));
    [alpha, Agent::new("beta").allow(NAME, "443").loopback("any")]
}

/// Data in labels, in types that carry any, or in more names than a wildcard may have: upstream
/// never hears of it.
fn nothing_goes_out_in_questions(fx: &Fixture, zone: &mut Zone) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let long = format!("{0}.{0}.{0}.names.example", "x".repeat(60));
    for name in [
        "secret.names.example",
        "api.names.example.evil.example",
        long.as_str(),
    ] {
        for manner in [Manner::Unconnected, Manner::Tcp] {
            let said = ask(&mut actor, manner, RESOLVER_V4, name, A)?;
            expect("code", said.code, 5).with_context(|| name.to_owned())?;
        }
    }
    for kind in [TXT, ANY, 10, 15, 16, 2, 6, 12, 48, 252] {
        let said = ask(&mut actor, Manner::Connected, RESOLVER_V4, NAME, kind)?;
        expect("code", said.code, 5).with_context(|| format!("type {kind}"))?;
    }
    let mut refused = 0;
    for number in 0..40 {
        let name = format!("h{number}.wild.example");
        let said = ask(&mut actor, Manner::Connected, RESOLVER_V4, &name, A)?;
        if said.code == 5 {
            claim(said.reason.contains("wildcard"), || said.reason.clone())?;
            refused += 1;
        }
    }
    expect("names over the budget of 20", refused, 20)?;
    let asked: BTreeSet<String> = zone.asked()?.into_iter().map(|(name, _)| name).collect();
    let strange: Vec<&String> = asked
        .iter()
        .filter(|name| *name != NAME && !name.ends_with(".wild.example"))
        .collect();
    claim(strange.is_empty(), || format!("upstream heard {strange:?}"))?;
    claim(asked.len() <= 21, || format!("{} names", asked.len()))
}

/// Other ports and protocols of DNS are destinations like any other.
fn other_ports_are_not_turned(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let refused = Refusal::of("alpha", "out_of_scope");
    for port in [853, 5353, 5355, 8053] {
        for family in Family::ALL {
            for way in [Way::Tcp, Way::UdpSendTo, Way::UdpConnected] {
                let to = family.pick("203.0.113.62", "2001:db8:2::10", port)?;
                fx.refused(
                    &mut actor,
                    way,
                    family,
                    to,
                    &refused.clone().without_control(),
                )?;
            }
        }
    }
    Ok(())
}

/// Answers that point inward open nothing, chains lead nowhere, and a name opens so many addresses
/// and no more.
fn answers_open_what_they_may(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    for kind in [A, AAAA] {
        let name = "inward.names.example";
        let said = ask(&mut actor, Manner::Connected, RESOLVER_V4, name, kind)?;
        expect("addresses that point inward", said.addresses, Vec::new())?;
        claim(!said.reason.is_empty(), || "no reason".to_owned())?;
    }
    let refused = Refusal::of("alpha", "out_of_scope").without_control();
    let to = "10.0.0.9:443".parse()?;
    fx.refused(&mut actor, Way::Tcp, Family::V4, to, &refused)?;
    let said = ask(
        &mut actor,
        Manner::Connected,
        RESOLVER_V4,
        "loop.names.example",
        A,
    )?;
    expect("code of a circle", said.code, 2)?;
    // The name that was asked decides, not where its alias leads.
    let said = ask(
        &mut actor,
        Manner::Connected,
        RESOLVER_V4,
        "alias.names.example",
        A,
    )?;
    expect(
        "through an alias",
        said.addresses,
        vec!["203.0.113.61".parse()?],
    )?;
    let to: SocketAddr = "203.0.113.61:443".parse()?;
    fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
    let said = ask(
        &mut actor,
        Manner::Connected,
        RESOLVER_V4,
        "outside.other.example",
        A,
    )?;
    expect("the alias's end", said.code, 5)?;
    let said = ask(
        &mut actor,
        Manner::Tcp,
        RESOLVER_V4,
        "many.names.example",
        A,
    )?;
    expect("addresses of one name", said.addresses.len(), 64)
}

/// Nobody but the agent's own lookups reaches an endpoint.
fn endpoints_are_closed(fx: &mut Fixture) -> Result<()> {
    let mut alpha = fx.actor("alpha")?;
    let mut beta = fx.actor("beta")?;
    expect("code", resolve(&mut alpha, NAME)?.code, 0)?;
    expect("code", resolve(&mut beta, NAME)?.code, 0)?;
    let ports = endpoints(fx.daemon.pid()?)?;
    claim(ports.len() == 2, || format!("endpoints at {ports:?}"))?;
    for port in ports {
        let at: SocketAddr = format!("127.0.0.1:{port}").parse()?;
        for actor in [&mut alpha, &mut beta] {
            for manner in [Manner::Connected, Manner::Unconnected, Manner::Tcp] {
                let reply = lookup(actor, libc::AF_INET, manner, &at.to_string(), NAME, A)?;
                expect("errno", reply.errno, libc::EPERM)
                    .with_context(|| format!("{manner:?} to {at}"))?;
            }
        }
        // From outside the fence it is nobody's question.
        let said = ask(fx.outside(), Manner::Connected, &at.to_string(), NAME, A)?;
        expect("code", said.code, 5)?;
        claim(!said.reason.contains("alpha"), || said.reason.clone())?;
    }
    Ok(())
}

/// UDP ports of IPv4 loopback at which `pid` listens.
pub fn endpoints(pid: u32) -> Result<BTreeSet<u16>> {
    let mut inodes = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(to) = fs::read_link(entry?.path()) else {
            continue;
        };
        let to = to.to_string_lossy().into_owned();
        if let Some(inode) = to.strip_prefix("socket:[") {
            inodes.insert(inode.trim_end_matches(']').to_owned());
        }
    }
    let table = fs::read_to_string(format!("/proc/{pid}/net/udp"))?;
    let mut ports = BTreeSet::new();
    for line in table.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(inode)) = (words.get(1), words.get(9)) else {
            continue;
        };
        if let Some(port) = local.strip_prefix("0100007F:")
            && inodes.contains(*inode)
        {
            ports.insert(u16::from_str_radix(port, 16)?);
        }
    }
    Ok(ports)
}

/// While one agent floods the guard with questions, broken ones among them, another's are answered,
/// and the daemon does not grow.
fn a_flood_is_the_flooder_s_alone(fx: &mut Fixture) -> Result<()> {
    let mut alpha = fx.actor("alpha")?;
    let mut beta = fx.actor("beta")?;
    let pid = fx.daemon.pid()?;
    let via: SocketAddr = RESOLVER_V4.parse()?;
    let before = resident(pid)?;
    let mut slowest = 0.0_f64;
    let id = alpha.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    for data in [question("flood.example", A), vec![0xff; 700], vec![0; 3]] {
        alpha.tell(&Op::Flood {
            id,
            addr: via,
            data,
            millis: 700,
        })?;
        for _ in 0..10 {
            let reply = lookup(
                &mut beta,
                libc::AF_INET,
                Manner::Connected,
                RESOLVER_V4,
                NAME,
                A,
            )?;
            expect("errno of the other agent's lookup", reply.errno, 0)?;
            slowest = slowest.max(reply.ms);
            let said = read(&reply.data).context("no answer")?;
            expect("its code", said.code, 0)?;
        }
        alpha.hear()?;
    }
    let grown = resident(pid)?.saturating_sub(before);
    claim(grown < 64 << 10, || {
        format!("the daemon grew by {grown} KiB")
    })?;
    eventually(5, || {
        expect(
            "code of the flooder's own",
            resolve(&mut alpha, NAME)?.code,
            0,
        )
    })?;
    claim(slowest < QUICK_MS, || {
        format!("the other agent's lookup took {slowest:.0} ms")
    })?;
    println!("the daemon grew by {grown} KiB; the other agent waited {slowest:.1} ms at most");
    Ok(())
}

/// Resident memory in KiB.
fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmRSS")?.parse()?)
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn(&mut Fixture, &mut Zone) -> Result<()>| {
        once(name, move |ctx| {
            let mut zone = Zone::start(&spec())?;
            let mut fx = guarded(ctx, &agents(), &zone, "wildcard_budget = 20\n")?;
            run(&mut fx, &mut zone)
        })
    };
    vec![
        case("nothing_goes_out_in_questions", |fx, zone| {
            nothing_goes_out_in_questions(fx, zone)
        }),
        case("other_ports_of_dns_are_not_turned", |fx, _| {
            other_ports_are_not_turned(fx)
        }),
        case("answers_open_what_they_may", |fx, _| {
            answers_open_what_they_may(fx)
        }),
        Case::new("names::endpoints_are_closed_to_all_else", |ctx| {
            let zone = Zone::start(&spec())?;
            endpoints_are_closed(&mut guarded(ctx, &agents(), &zone, "")?)
        }),
        case("a_flood_is_the_flooders_alone", |fx, _| {
            a_flood_is_the_flooder_s_alone(fx)
        }),
    ]
}
