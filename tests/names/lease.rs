//! Leases in the kernel: how they end, what outlives them, and what a change leaves of them.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{RESOLVER_V4, Spec, Zone, ask, guarded, once, resolve};
use crate::{
    actor::{
        Op,
        lookup::{A, Manner},
    },
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, Refusal, Way, claim, eventually, expect, way::PAYLOAD,
    },
};

const NAME: &str = "api.names.example";
const ADDR: &str = "203.0.113.30:443";

fn spec() -> Spec {
    Spec::new().host(NAME, &["203.0.113.30"]).ttl(0)
}

fn agent() -> Agent {
    Agent::new("alpha").allow(NAME, "443, \"443/udp\"")
}

/// Opens a connection that stays; its number.
fn connect(actor: &mut Actor, to: SocketAddr) -> Result<usize> {
    let id = actor.must(&Op::Socket {
        domain: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: 0,
    })?;
    actor.must(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 3000,
    })?;
    Ok(id)
}

/// Looks up by a lease of two seconds and waits until it is over.
fn outlive(fx: &Fixture, actor: &mut Actor) -> Result<()> {
    let said = resolve(actor, NAME)?;
    expect("code", said.code, 0)?;
    let leased = lease(fx)?.context("no lease in status")?;
    expect("name of the lease", leased.0.as_str(), NAME)?;
    eventually(6, || {
        claim(lease(fx)?.is_none(), || "the lease goes on".to_owned())
    })
}

/// Name and address of alpha's first lease in `remit status`.
fn lease(fx: &Fixture) -> Result<Option<(String, String)>> {
    let said = fx.place().remit(&["status", "--json"])?;
    let status: serde_json::Value = serde_json::from_str(&said.stdout)?;
    let alpha = status["agents"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|agent| agent["id"] == "alpha");
    let leases = alpha.and_then(|alpha| alpha["leases"].as_array());
    let first = leases.and_then(|leases| leases.first());
    Ok(first.map(|lease| {
        let text = |key: &str| lease[key].as_str().unwrap_or_default().to_owned();
        (text("name"), text("addr"))
    }))
}

fn ends_with_its_reason(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = ADDR.parse()?;
    outlive(fx, &mut actor)?;
    let before = fx.violations()?.len();
    let expired = Refusal::of("alpha", "lease_expired").by_any();
    fx.refused(&mut actor, Way::Tcp, Family::V4, to, &expired)?;
    fx.refused(&mut actor, Way::UdpSendTo, Family::V4, to, &expired)?;
    let line = fx.await_line(before, "alpha", |line| {
        line.text("/unmapped/reason") == "lease_expired"
    })?;
    expect(
        "name in the line",
        line.text("/dst_endpoint/hostname"),
        NAME,
    )?;
    let said = fx.place().remit(&["explain", "alpha", ADDR])?;
    claim(
        said.code == 1 && said.stdout.contains("lease_expired") && said.stdout.contains(NAME),
        || format!("explain says {}: {}", said.code, said.stdout),
    )?;
    let said = resolve(&mut actor, NAME)?;
    expect("code", said.code, 0)?;
    fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
    let said = fx.place().remit(&["explain", "alpha", ADDR])?;
    claim(
        said.code == 0 && said.stdout.contains("allowed") && said.stdout.contains(NAME),
        || format!("explain says {}: {}", said.code, said.stdout),
    )?;
    fx.reconcile("alpha")
}

/// An open TCP connection goes on past the lease for `max_lease`, and is ended then; UDP ends with
/// the lease.
fn open_tcp_outlives_it_for_so_long(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = ADDR.parse()?;
    let listener = TcpListener::bind(to)?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let id = connect(&mut actor, to)?;
    let (mut stream, _) = listener.accept()?;
    eventually(6, || {
        claim(lease(fx)?.is_none(), || "it goes on".to_owned())
    })?;
    actor.must(&Op::Send {
        id,
        data: PAYLOAD.to_vec(),
    })?;
    let mut heard = [0; PAYLOAD.len()];
    stream.read_exact(&mut heard)?;
    expect("what came of it", heard.as_slice(), PAYLOAD)?;
    let over = Instant::now();
    // New ones are refused meanwhile.
    let new = actor.must(&Op::Socket {
        domain: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: 0,
    })?;
    let refused = actor.ask(&Op::Connect {
        id: new,
        addr: to,
        timeout_ms: 1000,
    })?;
    expect("errno of a new connection", refused.errno, libc::EPERM)?;
    eventually(10, || {
        let sent = actor.ask(&Op::Send {
            id,
            data: PAYLOAD.to_vec(),
        })?;
        claim(sent.errno == libc::ECONNABORTED, || {
            format!("it still sends, or ended otherwise: {}", sent.errno)
        })
    })?;
    claim(over.elapsed() > Duration::from_secs(1), || {
        format!("it went on for {:?} only", over.elapsed())
    })
}

/// A connection that has outlived its lease ends when its name leaves the scope, long before it
/// would by itself.
fn a_change_ends_what_outlived_its_lease(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = ADDR.parse()?;
    let listener = TcpListener::bind(to)?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let id = connect(&mut actor, to)?;
    let (_stream, _) = listener.accept()?;
    eventually(6, || {
        claim(lease(fx)?.is_none(), || "it goes on".to_owned())
    })?;
    let send = Op::Send {
        id,
        data: PAYLOAD.to_vec(),
    };
    actor.must(&send)?;
    fx.change(&Agent::new("alpha").allow("other.names.example", "443"))?;
    eventually(3, || {
        let sent = actor.ask(&send)?;
        expect("errno after the change", sent.errno, libc::ECONNABORTED)
    })
}

/// A probe, which lends itself an address for a moment, and a lease at that address leave each other
/// alone.
fn a_probe_leaves_a_lease_alone(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = "127.0.0.1:443".parse()?;
    let probe = |fx: &Fixture| -> Result<String> {
        let said = fx.place().remit(&["probe", "alpha", "--json"])?;
        let said: serde_json::Value = serde_json::from_str(&said.stdout)?;
        claim(said[0]["verdict"] != "fail", || said.to_string())?;
        Ok(said.to_string())
    };
    // Lookups while it runs: each is leased, or refused for as long as the address is lent.
    actor.tell(&Op::LookupMany {
        via: RESOLVER_V4.parse()?,
        names: vec![NAME.to_owned(); 300],
        port: to.port(),
    })?;
    probe(fx)?;
    claim(actor.hear()?.value > 0, || "nothing was leased".to_owned())?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    connect(&mut actor, to)?;
    let said = probe(fx)?;
    claim(
        said.contains("a name has led the agent to 127.0.0.1"),
        || said,
    )?;
    connect(&mut actor, to)?;
    let said = fx.place().remit(&["reconcile"])?;
    expect("exit code of reconcile", said.code, 0).with_context(|| said.stdout.clone())
}

/// A change of the agent's entry leaves its leases, and takes those of a name that it lost.
fn a_change_keeps_what_it_still_grants(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    let to: SocketAddr = ADDR.parse()?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    fx.change(&agent().allow("198.51.100.7", "80"))?;
    fx.arrives(&mut actor, Way::Tcp, Family::V4, to)?;
    fx.change(&Agent::new("alpha").allow("other.names.example", "443"))?;
    let refused = Refusal::of("alpha", "out_of_scope");
    fx.refused(&mut actor, Way::Tcp, Family::V4, to, &refused)?;
    let said = ask(&mut actor, Manner::Connected, RESOLVER_V4, NAME, A)?;
    expect("code", said.code, 5)
}

/// Drift: a lease is expected in the kernel, and one that nobody wrote is found.
fn leases_are_no_drift(fx: &mut Fixture) -> Result<()> {
    let mut actor = fx.actor("alpha")?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let said = fx.place().remit(&["reconcile"])?;
    expect("exit code of reconcile", said.code, 0).with_context(|| said.stdout.clone())?;
    sleep(Duration::from_secs(3));
    let said = fx.place().remit(&["reconcile"])?;
    expect("exit code after its end", said.code, 0).with_context(|| said.stdout.clone())
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let short = "min_lease = \"1s\"\nmax_lease = \"4s\"\n";
    let case = move |name: &str, more: &'static str, run: fn(&mut Fixture) -> Result<()>| {
        Case::new(format!("names::{name}"), move |ctx| {
            let zone = Zone::start(&spec())?;
            let mut fx = guarded(ctx, &[agent()], &zone, more)?;
            run(&mut fx)
        })
    };
    let again = move |name: &str, more: &'static str, run: fn(&mut Fixture) -> Result<()>| {
        once(name, move |ctx| {
            let zone = Zone::start(&spec())?;
            let mut fx = guarded(ctx, &[agent()], &zone, more)?;
            run(&mut fx)
        })
    };
    vec![
        case("a_lease_ends_with_its_reason", short, ends_with_its_reason),
        case(
            "open_tcp_outlives_a_lease_for_so_long",
            short,
            open_tcp_outlives_it_for_so_long,
        ),
        again(
            "a_change_keeps_the_leases_that_it_still_grants",
            "",
            a_change_keeps_what_it_still_grants,
        ),
        again("leases_are_no_drift", short, leases_are_no_drift),
        again(
            "a_change_ends_what_outlived_its_lease",
            "min_lease = \"1s\"\nmax_lease = \"60s\"\n",
            a_change_ends_what_outlived_its_lease,
        ),
        once("a_probe_leaves_a_lease_alone", |ctx| {
            let zone = Zone::start(&Spec::new().host(NAME, &["127.0.0.1"]).accept(443))?;
            let agent = Agent::new("alpha").entry(&format!(
                "[[scope.allow]]\nto = \"{NAME}\"\nports = [443]\nwithin = [\"127.0.0.0/8\"]\n"
            ));
            let mut fx = guarded(ctx, &[agent], &zone, "")?;
            a_probe_leaves_a_lease_alone(&mut fx)
        }),
    ]
}
