//! What somebody changed by hand in the kernel is noticed, named and mended. Each of these really
//! opens the fence, or closes what is in scope: the probe shows it, before and after.

use std::{
    fs,
    mem::offset_of,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use agent_ebpf::abi::{AgentRow, Leaf, ROW_INDEX_BITS, Rule, RuleSet, ScopeKey, State};
use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    actor::{Op, traffic::payload},
    harness::Case,
    support::{
        Actor, Agent, Cgroup, Ctx, Fixture, claim,
        daemon::Settings,
        eventually, expect,
        network::IN_V4,
        scale,
        tamper::{Map, Pins, detach},
        traffic::{Ear, Generator, IN, Numbers, OUT, lanes},
    },
};

/// Seconds: twice the interval, and that for which an allow is remembered.
const MENDED_WITHIN: u64 = 3;

/// Port of an agent that is left alone; the probes use others.
const BYSTANDER_PORT: u16 = 445;

/// Out of scope, and where the ear's tap does not look: while tampered with it is reached.
const ELSEWHERE: &str = "192.0.2.10";

/// A change by hand.
struct Tampering {
    name: &'static str,
    /// Does it.
    apply: fn(&World) -> Result<()>,
    /// Who shows it, and by sending where.
    probe: (&'static str, &'static str, u16),
    /// What the probe gets while it is so; mended, the other of 0 and EPERM. None: no change.
    while_so: Option<i32>,
    /// What must be named.
    names: &'static [&'static str],
}

const TAMPERINGS: &[Tampering] = &[
    Tampering {
        name: "a link detached",
        apply: |world| detach(&world.pins.link("remit_egress")?),
        probe: ("alpha", ELSEWHERE, 443),
        while_so: Some(0),
        names: &["egress"],
    },
    Tampering {
        name: "a link unpinned",
        apply: |world| Ok(fs::remove_file(world.pins.link("remit_connect4")?)?),
        probe: ("alpha", ELSEWHERE, 443),
        while_so: None,
        names: &["connect4"],
    },
    Tampering {
        name: "an agent's word",
        apply: |world| {
            let agents = world.pins.map("agents")?;
            let other = agents.get(&world.index("beta")?)?;
            agents.set(&world.index("alpha")?, &other)
        },
        probe: ("alpha", ELSEWHERE, 443),
        while_so: Some(0),
        names: &["agents", "alpha"],
    },
    Tampering {
        name: "a row's state",
        apply: |world| {
            world.change_row("held", |row| {
                row[offset_of!(AgentRow, state)] = State::Active as u8;
            })
        },
        probe: ("held", IN_V4, 443),
        while_so: Some(0),
        names: &["rows", "held"],
    },
    Tampering {
        name: "a row's deadline",
        apply: |world| {
            world.change_row("alpha", |row| {
                row[offset_of!(AgentRow, deadline)..][..8].fill(0);
            })
        },
        probe: ("alpha", IN_V4, 443),
        while_so: Some(libc::EPERM),
        names: &["rows", "alpha"],
    },
    Tampering {
        name: "a prefix granted by hand",
        apply: |world| {
            let prefixes = world.pins.map("prefixes")?;
            let set = prefixes.get(&world.prefix("alpha", "198.51.100.0", 24)?)?;
            prefixes.set(&world.prefix("alpha", "192.0.2.0", 24)?, &set)
        },
        probe: ("alpha", ELSEWHERE, 443),
        while_so: Some(0),
        names: &["prefixes", "alpha"],
    },
    Tampering {
        name: "an address granted by hand",
        apply: |world| {
            let set =
                world
                    .pins
                    .map("prefixes")?
                    .get(&world.prefix("alpha", "198.51.100.0", 24)?)?;
            let key = world.scope_key("alpha", ELSEWHERE)?;
            world.pins.map("exacts")?.set(&key, &set)
        },
        probe: ("alpha", ELSEWHERE, 443),
        while_so: Some(0),
        names: &["exacts", "alpha"],
    },
    Tampering {
        name: "a denied prefix deleted",
        apply: |world| {
            let key = world.prefix("alpha", "198.51.100.64", 26)?;
            world.pins.map("prefixes")?.delete(&key)
        },
        probe: ("alpha", "198.51.100.70", 443),
        while_so: Some(0),
        names: &["prefixes", "alpha"],
    },
    Tampering {
        name: "a rule's ports widened",
        apply: |world| {
            let prefixes = world.pins.map("prefixes")?;
            let leaf = prefixes.get(&world.prefix("alpha", "198.51.100.0", 24)?)?;
            let set = leaf[offset_of!(Leaf, set)..][..4].to_vec();
            let rulesets = world.pins.map("rulesets")?;
            let mut rules = rulesets.get(&set)?;
            for at in 0..2 {
                let rule = offset_of!(RuleSet, rules) + at * size_of::<Rule>();
                rules[rule + offset_of!(Rule, low)..][..2].fill(0);
                rules[rule + offset_of!(Rule, high)..][..2].fill(0xff);
            }
            rulesets.set(&set, &rules)
        },
        probe: ("alpha", IN_V4, 9999),
        while_so: Some(0),
        names: &["rulesets"],
    },
    Tampering {
        name: "a cgroup claimed by hand",
        apply: |world| {
            let stranger = world.stranger.id()?.to_ne_bytes();
            world
                .pins
                .map("claims")?
                .set(&stranger, &world.index("alpha")?)
        },
        probe: ("stranger", IN_V4, 443),
        while_so: Some(0),
        names: &["claims"],
    },
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("never_open::drift_is_mended_in_time", |ctx| {
            let mut world = World::start(ctx, "1s")?;
            let (mut ear, bystander) = world.bystander()?;
            let mut slowest = Duration::ZERO;
            for tampering in TAMPERINGS {
                slowest = slowest.max(
                    mended_by_itself(&mut world, tampering)
                        .with_context(|| tampering.name.to_owned())?,
                );
            }
            let numbers = Numbers::settle(vec![bystander], &mut ear)?;
            println!(
                "{} changes by hand, the slowest mended after {} ms; a bystander: {numbers}",
                TAMPERINGS.len(),
                slowest.as_millis()
            );
            Ok(())
        }),
        Case::new("never_open::drift_is_named_by_reconcile", |ctx| {
            let mut world = World::start(ctx, "1h")?;
            let (mut ear, bystander) = world.bystander()?;
            expect("exit code without drift", world.reconcile(&[])?.0, 0)?;
            for tampering in TAMPERINGS {
                named_and_mended(&mut world, tampering)
                    .with_context(|| tampering.name.to_owned())?;
            }
            let numbers = Numbers::settle(vec![bystander], &mut ear)?;
            println!(
                "{} changes by hand; a bystander: {numbers}",
                TAMPERINGS.len()
            );
            Ok(())
        }),
    ]
}

fn mended_by_itself(world: &mut World, tampering: &Tampering) -> Result<Duration> {
    let lines = world.fx.audit()?.len();
    world.probe_is(tampering, false)?;
    let began = Instant::now();
    (tampering.apply)(world)?;
    if tampering.while_so.is_some() {
        loop {
            if world.probe_is(tampering, false).is_ok() {
                break;
            }
            let most = Duration::from_secs(scale::patience(MENDED_WITHIN));
            claim(began.elapsed() < most, || {
                format!("not mended after {most:?}")
            })?;
        }
    }
    let took = began.elapsed();
    eventually(4, || {
        let all = world.fx.audit()?;
        let told = all.get(lines..).unwrap_or_default().iter().any(|line| {
            let text = line.0.to_string();
            line.0["class_uid"] == 2004 && tampering.names.iter().all(|name| text.contains(name))
        });
        claim(told, || {
            format!("no line of 2004 names {:?}", tampering.names)
        })
    })?;
    // Mended for good: there is nothing left to find.
    let (code, answer) = world.reconcile(&[])?;
    expect("exit code of reconcile", code, 0).with_context(|| answer.to_string())?;
    world.probe_is(tampering, false)?;
    Ok(took)
}

fn named_and_mended(world: &mut World, tampering: &Tampering) -> Result<()> {
    world.probe_is(tampering, false)?;
    (tampering.apply)(world)?;
    // What was allowed a moment ago is remembered for a second.
    eventually(2, || world.probe_is(tampering, true))?;
    let (code, answer) = world.reconcile(&[])?;
    expect("exit code of reconcile", code, 1).with_context(|| answer.to_string())?;
    named(&answer, tampering)?;
    let said = world.fx.place().remit(&["reconcile"])?;
    expect("exit code of reconcile", said.code, 1)?;
    for name in tampering.names {
        claim(said.stdout.contains(name), || {
            format!("it does not print {name}: {}", said.stdout)
        })?;
    }
    // Looking changes nothing. (Another processor may remember an allow for a second.)
    eventually(2, || world.probe_is(tampering, true))?;
    let (code, answer) = world.reconcile(&["--repair"])?;
    expect("exit code of reconcile --repair", code, 0).with_context(|| answer.to_string())?;
    named(&answer, tampering)?;
    eventually(2, || world.probe_is(tampering, false))?;
    let (code, answer) = world.reconcile(&[])?;
    expect("exit code of reconcile afterwards", code, 0).with_context(|| answer.to_string())
}

fn named(answer: &Value, tampering: &Tampering) -> Result<()> {
    let drift = answer["drift"].as_array().context("no list of drift")?;
    let text = drift.iter().map(Value::to_string).collect::<String>();
    for name in tampering.names {
        claim(text.contains(name), || {
            format!("the drift does not name {name}: {answer}")
        })?;
    }
    Ok(())
}

/// Agents to tamper with, each with a process that shows what it may.
struct World {
    // Before their cgroups.
    actors: Vec<(&'static str, Actor, usize)>,
    stranger: Cgroup,
    pins: Pins,
    fx: Fixture,
}

impl World {
    fn start(ctx: &Ctx, every: &str) -> Result<Self> {
        let settings = Settings {
            more: format!("[reconcile]\nevery = \"{every}\"\n"),
            ..Settings::default()
        };
        let ports = r#"445, "445/udp""#;
        let agents = [
            Agent::standard("alpha").deny("198.51.100.64/26"),
            Agent::new("beta").allow("192.0.2.0/24", r#"443, "443/udp""#),
            Agent::standard("held").state("suspended"),
            Agent::new("bystander")
                .allow("198.51.100.0/24", ports)
                .allow("2001:db8:1::/64", ports),
        ];
        let fx = Fixture::start_with(ctx, &agents, &settings)?;
        let stranger = Cgroup::create(&format!("{}/stranger.service", ctx.root()))?;
        let mut actors = Vec::new();
        for id in ["alpha", "held", "stranger"] {
            let mut actor = if id == "stranger" {
                Actor::spawn(Some(&stranger))?
            } else {
                fx.actor(id)?
            };
            let socket = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            actors.push((id, actor, socket));
        }
        Ok(Self {
            actors,
            stranger,
            pins: Pins::below(&fx.place().at("bpf")),
            fx,
        })
    }

    /// Traffic of an agent that nobody tampers with. It stays in scope, for a hole in a hook is a
    /// hole for all.
    fn bystander(&self) -> Result<(Ear, Generator)> {
        let inside = lanes(BYSTANDER_PORT, &[IN])?;
        let ear = Ear::start(&[inside.clone(), lanes(BYSTANDER_PORT, &[OUT])?].concat())?;
        let mut generator = Generator::paced(self.fx.cgroup("bystander")?, inside, 2000)?;
        generator.await_passing(IN)?;
        Ok((ear, generator))
    }

    /// The probe's answer, as it should be while tampered with or else.
    fn probe_is(&mut self, tampering: &Tampering, tampered: bool) -> Result<()> {
        let (id, ip, port) = tampering.probe;
        let (_, actor, socket) = self
            .actors
            .iter_mut()
            .find(|(name, ..)| *name == id)
            .context("no such actor")?;
        let reply = actor.ask(&Op::SendTo {
            id: *socket,
            addr: SocketAddr::new(ip.parse()?, port),
            data: payload("probe").to_vec(),
            flags: 0,
            repeat: 1,
        })?;
        let wanted = match (tampering.while_so, tampered) {
            (Some(errno), true) => errno,
            (Some(0), false) | (None, _) => libc::EPERM,
            (Some(_), false) => 0,
        };
        expect(
            &format!("errno of {id} to {ip}:{port}"),
            reply.errno,
            wanted,
        )
    }

    /// `remit reconcile --json …`: exit code and answer.
    fn reconcile(&self, further: &[&str]) -> Result<(i32, Value)> {
        let mut args = vec!["reconcile", "--json"];
        args.extend(further);
        let said = self.fx.place().remit(&args)?;
        let answer = serde_json::from_str(&said.stdout)
            .with_context(|| format!("not JSON: {}{}", said.stdout, said.stderr))?;
        Ok((said.code, answer))
    }

    /// An agent's index, as a key.
    fn index(&self, id: &str) -> Result<Vec<u8>> {
        let names = self.pins.map("names")?;
        for key in names.keys()? {
            let name = names.get(&key)?;
            let end = name
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(name.len());
            if name.get(..end) == Some(id.as_bytes()) {
                return Ok(key);
            }
        }
        anyhow::bail!("no index of {id}")
    }

    /// The map of rows and the key of an agent's row.
    fn row(&self, id: &str) -> Result<(Map, Vec<u8>)> {
        let word = self.pins.map("agents")?.get(&self.index(id)?)?;
        let word = u64::from_ne_bytes(word.as_slice().try_into()?);
        let index = u32::try_from(word & ((1 << ROW_INDEX_BITS) - 1))?;
        Ok((self.pins.map("rows")?, index.to_ne_bytes().to_vec()))
    }

    fn change_row(&self, id: &str, change: fn(&mut [u8])) -> Result<()> {
        let (rows, key) = self.row(id)?;
        let mut row = rows.get(&key)?;
        change(&mut row);
        rows.set(&key, &row)
    }

    /// A key of `exacts` in an agent's scope.
    fn scope_key(&self, id: &str, ip: &str) -> Result<Vec<u8>> {
        let (rows, key) = self.row(id)?;
        let row = rows.get(&key)?;
        let mut key = vec![0; size_of::<ScopeKey>()];
        let policy = offset_of!(AgentRow, policy);
        key[offset_of!(ScopeKey, space)..][..8].copy_from_slice(&row[policy..][..8]);
        let octets = ip.parse::<Ipv4Addr>()?.to_ipv6_mapped().octets();
        key[offset_of!(ScopeKey, addr)..][..16].copy_from_slice(&octets);
        Ok(key)
    }

    /// A key of `prefixes`: the bits of the space, those of the mapped prefix, and the address.
    fn prefix(&self, id: &str, ip: &str, bits: u32) -> Result<Vec<u8>> {
        let mut key = (64 + 96 + bits).to_ne_bytes().to_vec();
        key.extend(self.scope_key(id, ip)?);
        Ok(key)
    }
}
