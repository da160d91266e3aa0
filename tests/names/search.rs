//! Search domains: those of the `resolv.conf` that the asking process sees, which in a container is
//! not the host's.

use std::fs;

use anyhow::{Context as _, Result};
use nix::{sys::stat::Mode, unistd::mkfifo};

use super::{RESOLVER_V4, Spec, Zone, clients::resolv, guarded, lookup, once};
use crate::{
    actor::{
        Op,
        lookup::{A, Manner, Said, read},
    },
    harness::Case,
    support::{Actor, Agent, Ctx, Fixture, claim, expect},
};

const NAME: &str = "db.second.example";
const ADDR: &str = "203.0.113.80";
const REFUSED: u8 = 5;
const NO_SUCH_NAME: u8 = 3;
/// Whatever an agent's files are, a lookup is answered within this.
const SOON_MS: f64 = 1000.0;

/// An actor of alpha's that sees this as `/etc/resolv.conf`.
fn actor_with(ctx: &Ctx, fx: &Fixture, name: &str, text: Option<&str>) -> Result<Actor> {
    let path = ctx.dir().join(name);
    match text {
        Some(text) => fs::write(&path, text)?,
        None => mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?,
    }
    let mut actor = fx.actor("alpha")?;
    let path = path.display().to_string();
    actor.must(&Op::NewResolv { path })?;
    Ok(actor)
}

fn said(actor: &mut Actor, name: &str) -> Result<Said> {
    let reply = lookup(
        actor,
        libc::AF_INET,
        Manner::Connected,
        RESOLVER_V4,
        name,
        A,
    )?;
    expect("errno", reply.errno, 0)?;
    claim(reply.ms < SOON_MS, || format!("after {:.0} ms", reply.ms))?;
    read(&reply.data).context("no answer")
}

/// Out of scope is REFUSED, and below a search domain of who asks NXDOMAIN, so that a resolver goes
/// on to the next.
fn by_who_asks(ctx: &Ctx) -> Result<()> {
    resolv(ctx)?;
    let mut zone = Zone::start(&Spec::new().host(NAME, &[ADDR]))?;
    let agent = Agent::new("alpha").allow(NAME, "443");
    let fx = guarded(ctx, &[agent], &zone, "")?;
    let mut host = fx.actor("alpha")?;
    let text = "search first.example second.example\nnameserver 192.0.2.53\n";
    let mut inside = actor_with(ctx, &fx, "own.conf", Some(text))?;
    for (own, name, code) in [
        (false, "db.first.example", REFUSED),
        (true, "db.first.example", NO_SUCH_NAME),
        (true, "other.second.example", NO_SUCH_NAME),
        (true, "db.first.example.evil.example", REFUSED),
        (true, "first.example", REFUSED),
        (true, NAME, 0),
    ] {
        let actor = if own { &mut inside } else { &mut host };
        let said = said(actor, name)?;
        expect(&format!("code of {name}"), said.code, code)?;
        claim(code == 0 || said.reason.contains(name), || {
            format!("the reason for {name} is {:?}", said.reason)
        })?;
    }
    // musl tries one domain after the other.
    for (actor, found) in [(&mut host, false), (&mut inside, true)] {
        let reply = actor.ask(&Op::GetAddrInfo {
            host: "db".to_owned(),
        })?;
        let addr = reply.addr.map(|addr| addr.ip());
        expect(
            "found by the first label",
            addr,
            found.then(|| ADDR.parse()).transpose()?,
        )?;
    }
    let strange = zone.asked()?.into_iter().any(|(name, _)| name != NAME);
    claim(!strange, || "upstream heard another name".to_owned())?;
    // What cannot be read at once is not waited for, nor what never ends.
    let mut stuck = actor_with(ctx, &fx, "fifo", None)?;
    let long = format!("search {}\n", "long.example ".repeat(20_000));
    let mut long = actor_with(ctx, &fx, "long.conf", Some(&long))?;
    for actor in [&mut stuck, &mut long] {
        expect("code", said(actor, "db.first.example")?.code, REFUSED)?;
        expect("code", said(actor, NAME)?.code, 0)?;
    }
    Ok(())
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![once("search_domains_are_those_of_who_asks", |ctx| {
        by_who_asks(ctx)
    })]
}
