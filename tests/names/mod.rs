//! Names: lookups that are turned to the DNS guard, and what they open.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};

use crate::{
    actor::{
        Op, Reply,
        lookup::{A, Manner, Said, question, read},
    },
    harness::Case,
    support::{Actor, Agent, Ctx, Fixture, daemon::Settings, expect},
};

mod alone;
mod clients;
mod hostile;
mod lease;
mod life;
pub mod many;
mod search;
mod turn;
pub mod zone;

use zone::{Spec, Zone};

/// All cases here.
pub fn cases() -> Vec<Case> {
    [
        turn::cases(),
        lease::cases(),
        life::cases(),
        hostile::cases(),
        many::cases(),
        search::cases(),
        alone::cases(),
        clients::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A case that shows the same on every kernel: in an emulated machine it only takes long.
fn once(name: &str, run: impl Fn(&mut Ctx) -> Result<()> + 'static) -> Case {
    Case::new(format!("names::{name}"), run).once()
}

/// A resolver as agents name it: nobody listens there.
const RESOLVER_V4: &str = "192.0.2.53:53";
const RESOLVER_V6: &str = "[2001:db8:2::53]:53";

/// A daemon whose guard asks `zone`, with these agents.
fn guarded(ctx: &Ctx, agents: &[Agent], zone: &Zone, more: &str) -> Result<Fixture> {
    let settings = Settings {
        dns: zone.settings() + more,
        ..Settings::default()
    };
    Fixture::start_with(ctx, agents, &settings)
}

/// Asks as `manner` says on an IPv4 socket; what comes back must come from `via`.
fn ask(actor: &mut Actor, manner: Manner, via: &str, name: &str, kind: u16) -> Result<Said> {
    let reply = lookup(actor, libc::AF_INET, manner, via, name, kind)?;
    expect("errno of the lookup", reply.errno, 0)?;
    expect("where the answer is from", reply.addr, Some(via.parse()?))?;
    read(&reply.data).context("no answer")
}

/// The same without a judgement.
fn lookup(
    actor: &mut Actor,
    domain: i32,
    manner: Manner,
    via: &str,
    name: &str,
    kind: u16,
) -> Result<Reply> {
    actor.ask(&Op::Lookup {
        domain,
        manner,
        via: via.parse::<SocketAddr>()?,
        question: question(name, kind),
        timeout_ms: 5000,
    })
}

/// Looks `name` up by UDP; its addresses.
fn resolve(actor: &mut Actor, name: &str) -> Result<Said> {
    ask(actor, Manner::Connected, RESOLVER_V4, name, A)
}
