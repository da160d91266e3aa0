//! `remit run --policy` with names: the guard in the process that fences one command.

use std::{
    ffi::OsStr,
    fs,
    io::Read as _,
    net::{SocketAddr, TcpListener},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    RESOLVER_V4, RESOLVER_V6, Spec, Zone, ask,
    clients::{self, HELLO, resolv, said, web},
    lookup, once, resolve,
};
use crate::{
    actor::{
        Op,
        lookup::{A, Manner, question, read},
    },
    daemon::run::{World, alive},
    harness::{Case, Outcome},
    support::{
        Actor, Agent, Ctx, claim,
        daemon::{Place, Settings},
        eventually, expect,
        way::PAYLOAD,
    },
};

const NAME: &str = "api.names.example";
const OTHER: &str = "paste.names.example";
const ADDR: &str = "203.0.113.70";
/// A lookup that cannot be answered must say so within this.
const SOON_MS: f64 = 500.0;

fn spec() -> Spec {
    Spec::new()
        .host(NAME, &[ADDR, "2001:db8:2::70"])
        .host(OTHER, &["203.0.113.71"])
}

fn world(ctx: &Ctx, zone: &Zone, more: &str) -> Result<World> {
    let settings = Settings {
        dns: zone.settings() + more,
        ..Settings::default()
    };
    let agent = Agent::new(ctx.unique()).allow(NAME, "80, 443, \"443/udp\"");
    World::of(ctx, Place::lay(ctx, &settings)?, &agent)
}

/// The error number of connecting to `to`; nobody listens there.
fn connect(actor: &mut Actor, to: &str) -> Result<i32> {
    let to: SocketAddr = to.parse()?;
    let domain = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let id = actor.socket(domain, libc::SOCK_STREAM, 0)?;
    let reply = actor.ask(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 2000,
    })?;
    actor.must(&Op::Close { id })?;
    Ok(reply.errno)
}

/// The error number of sending a datagram to `to`.
fn send(actor: &mut Actor, to: &str) -> Result<i32> {
    let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let reply = actor.ask(&Op::SendTo {
        id,
        addr: to.parse()?,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    })?;
    actor.must(&Op::Close { id })?;
    Ok(reply.errno)
}

/// Every way to ask; what a name opens, and what it does not.
fn names_resolve(ctx: &Ctx) -> Result<()> {
    let mut zone = Zone::start(&spec())?;
    let world = world(ctx, &zone, "")?;
    let mut actor = world.actor()?;
    let v4 = format!("{ADDR}:443");
    let mapped = format!("[::ffff:{ADDR}]:443");
    let v6 = "[2001:db8:2::70]:443";
    for to in [v4.as_str(), v6, &mapped] {
        let errno = connect(&mut actor, to)?;
        expect("errno before the name was resolved", errno, libc::EPERM)
            .with_context(|| to.to_owned())?;
    }
    expect(
        "errno of a datagram before",
        send(&mut actor, &v4)?,
        libc::EPERM,
    )?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        for (domain, via) in [
            (libc::AF_INET, RESOLVER_V4),
            (libc::AF_INET6, RESOLVER_V6),
            (libc::AF_INET6, RESOLVER_V4),
        ] {
            let what = || format!("{manner:?} to {via} on a socket of family {domain}");
            let reply = lookup(&mut actor, domain, manner, via, NAME, A)?;
            expect("errno", reply.errno, 0).with_context(what)?;
            let found = read(&reply.data).with_context(what)?;
            expect("addresses", found.addresses, vec![ADDR.parse()?]).with_context(what)?;
        }
        let refused = ask(&mut actor, manner, RESOLVER_V4, OTHER, A)?;
        expect("code", refused.code, 5)?;
        claim(
            refused.reason.contains(ctx.unique()) && refused.reason.contains(OTHER),
            || format!("the reason says {:?}", refused.reason),
        )?;
    }
    for to in [v4.as_str(), &mapped] {
        let errno = connect(&mut actor, to)?;
        expect("errno after it", errno, libc::ECONNREFUSED).with_context(|| to.to_owned())?;
    }
    expect("errno of a datagram after", send(&mut actor, &v4)?, 0)?;
    for to in [v6, "203.0.113.70:22", "203.0.113.71:443"] {
        let errno = connect(&mut actor, to)?;
        expect("errno of what no name opened", errno, libc::EPERM)
            .with_context(|| to.to_owned())?;
    }
    let strange = zone.asked()?.into_iter().any(|(name, _)| name != NAME);
    claim(!strange, || "upstream heard another name".to_owned())?;
    expect("exit code", actor.finish()?, 0)?;
    world.nothing_stays()
}

/// What was refused is told when the command has ended.
fn refusals_are_told(ctx: &Ctx) -> Result<()> {
    let zone = Zone::start(&spec())?;
    let world = world(ctx, &zone, "")?;
    let via = RESOLVER_V4.parse()?;
    let asks = [NAME, OTHER].map(|name| Op::Lookup {
        domain: libc::AF_INET,
        manner: Manner::Connected,
        via,
        question: question(name, A),
        timeout_ms: 5000,
    });
    let orders = serde_json::to_string(&asks)?;
    let said = world.run(&["probe", &orders])?;
    expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
    claim(
        said.stderr.contains(OTHER) && said.stderr.contains("may not resolve"),
        || format!("it is not told: {}", said.stderr),
    )?;
    claim(!said.stderr.contains(NAME), || {
        format!("more is told: {}", said.stderr)
    })?;
    world.nothing_stays()
}

/// Without the process that guards, nothing resolves any more, at once, and the fence stands.
fn ends_with_its_guard(ctx: &Ctx) -> Result<()> {
    let zone = Zone::start(&spec())?;
    let world = world(ctx, &zone, "")?;
    let mut actor = world.actor()?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let pid = Pid::from_raw(i32::try_from(actor.must(&Op::Pid)?)?);
    let remit = Pid::from_raw(i32::try_from(actor.pid())?);
    kill(remit, Signal::SIGKILL)?;
    // Its first thread may be gone before that which holds the guard's sockets.
    let threads = || fs::read_dir(format!("/proc/{remit}/task")).map_or(0, Iterator::count);
    eventually(3, || {
        claim(!alive(remit) && threads() <= 1, || "alive".to_owned())
    })?;
    for manner in [Manner::Unconnected, Manner::Connected, Manner::Tcp] {
        // Its command may end with it.
        match lookup(&mut actor, libc::AF_INET, manner, RESOLVER_V4, NAME, A) {
            Ok(reply) => {
                expect("errno without a guard", reply.errno, libc::ECONNREFUSED)?;
                claim(reply.ms < SOON_MS, || format!("after {:.0} ms", reply.ms))?;
                let errno = connect(&mut actor, "203.0.113.71:443")?;
                expect("errno of what no name opened", errno, libc::EPERM)?;
            }
            Err(_) => eventually(2, || claim(!alive(pid), || "it hangs".to_owned()))?,
        }
    }
    // It may have ended by itself.
    let _ = kill(pid, Signal::SIGKILL);
    eventually(3, || claim(!alive(pid), || "alive".to_owned()))?;
    expect("the next command", world.run(&["exit", "0"])?.code, 0)?;
    world.nothing_stays()
}

/// In a network namespace that the command makes, lookups are refused until an endpoint is there.
fn a_namespace_of_its_own(ctx: &Ctx) -> Result<()> {
    let zone = Zone::start(&spec())?;
    let world = world(ctx, &zone, "")?;
    let mut actor = world.actor()?;
    actor.must(&Op::NewNetwork {
        addrs: vec![(ADDR.parse()?, 32), ("192.0.2.53".parse()?, 32)],
    })?;
    eventually(5, || {
        let reply = lookup(
            &mut actor,
            libc::AF_INET,
            Manner::Connected,
            RESOLVER_V4,
            NAME,
            A,
        )?;
        claim(matches!(reply.errno, 0 | libc::ECONNREFUSED), || {
            format!("errno {}", reply.errno)
        })?;
        expect("errno", reply.errno, 0)?;
        expect("code", read(&reply.data).context("no answer")?.code, 0)
    })?;
    let errno = connect(&mut actor, &format!("{ADDR}:443"))?;
    expect("errno of the connect", errno, libc::ECONNREFUSED)?;
    expect("exit code", actor.finish()?, 0)?;
    world.nothing_stays()
}

/// A lease ends by itself, and an open connection so much later.
fn leases_end(ctx: &Ctx) -> Result<()> {
    let zone = Zone::start(&spec().ttl(0))?;
    let world = world(ctx, &zone, "min_lease = \"1s\"\nmax_lease = \"2s\"\n")?;
    let mut actor = world.actor()?;
    let to: SocketAddr = format!("{ADDR}:443").parse()?;
    let listener = TcpListener::bind(to)?;
    expect("code", resolve(&mut actor, NAME)?.code, 0)?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    actor.must(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 2000,
    })?;
    let (mut stream, _) = listener.accept()?;
    eventually(6, || {
        expect(
            "errno of a new one",
            connect(&mut actor, &to.to_string())?,
            libc::EPERM,
        )
    })?;
    actor.must(&Op::Send {
        id,
        data: PAYLOAD.to_vec(),
    })?;
    stream.read_exact(&mut [0; PAYLOAD.len()])?;
    eventually(8, || {
        let sent = actor.ask(&Op::Send {
            id,
            data: PAYLOAD.to_vec(),
        })?;
        expect("errno of the open one", sent.errno, libc::ECONNABORTED)
    })?;
    expect("exit code", actor.finish()?, 0)?;
    world.nothing_stays()
}

/// An unmodified program.
fn curl(ctx: &Ctx) -> Result<Outcome> {
    if let Some(missing) = clients::missing(&[
        &["python3", "-c", "import ssl, zipfile"],
        &["curl", "--version"],
    ]) {
        return Ok(Outcome::NotTested(missing));
    }
    resolv(ctx)?;
    let zone = Zone::start(&spec())?;
    let world = world(ctx, &zone, "")?;
    let _web = web(ctx.dir())?;
    for (name, reached) in [(NAME, true), (OTHER, false)] {
        let mut command = world.command_of(OsStr::new("curl"))?;
        let url = format!("http://{name}/hello");
        command.args(["-sS", "--noproxy", "*", "--max-time", "20", &url]);
        let (went_well, text) = said(&mut command)?;
        claim(
            went_well == reached && text.contains(HELLO) == reached,
            || format!("with {name}: {text}"),
        )?;
        claim(text.contains("may not resolve") != reached, || {
            format!("told of {name}: {text}")
        })?;
    }
    world.nothing_stays()?;
    Ok(Outcome::Passed)
}

/// A grant of a name that nothing resolves is told, and nothing starts.
fn without_a_guard_nothing_starts(ctx: &Ctx) -> Result<()> {
    let place = Place::lay(ctx, &Settings::default())?;
    let agent = Agent::new(ctx.unique()).allow(NAME, "443");
    let world = World::of(ctx, place, &agent)?;
    let said = world.run(&["exit", "0"])?;
    expect("exit code", said.code, 1)?;
    claim(said.stderr.contains("dns.enabled"), || said.stderr.clone())?;
    world.nothing_stays()
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("names::alone_names_resolve_and_nothing_else", |ctx| {
            names_resolve(ctx)
        }),
        once("alone_refusals_are_told", |ctx| refusals_are_told(ctx)),
        once("alone_without_its_guard_nothing_resolves", |ctx| {
            ends_with_its_guard(ctx)
        }),
        once("alone_a_namespace_of_its_own_is_served", |ctx| {
            a_namespace_of_its_own(ctx)
        }),
        once("alone_leases_end", |ctx| leases_end(ctx)),
        Case::with_outcome("names::alone_client_curl", |ctx| curl(ctx)),
        once("alone_without_a_guard_nothing_starts", |ctx| {
            without_a_guard_nothing_starts(ctx)
        }),
    ]
}
