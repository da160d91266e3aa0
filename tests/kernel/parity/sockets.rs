//! Real sockets inside the fence against memory's decision: the way from a system call to the
//! verdict, which the judge cannot show.

use std::net::{IpAddr, SocketAddr};

use agent_ebpf::{
    abi::Hook,
    decide::{Attempt, Decision, Peer, decide},
};
use anyhow::{Context as _, Result};
use remit::{
    kernel::{Capacity, boot_nanos},
    policy::{AgentTables, Clock, MemoryRules},
};

use super::{World, by_chance, policies::Registry};
use crate::{
    actor::Op,
    support::{Actor, Cgroup, Ctx, Family, claim, dice::Dice, way::PAYLOAD},
};

/// Agents, and attempts by each.
const AGENTS: usize = 24;
const ATTEMPTS: usize = 12;
/// What must have been compared.
const ENOUGH: usize = 150;
/// Where the sender of `sendto` is bound, since a served reply goes by its port.
const LOCAL_PORT: u16 = 2;
/// Where the agent itself listens on loopback, and where somebody else does.
const OWN_PORT: u16 = 3;
const FOREIGN_PORT: u16 = 4;
const DESTINATIONS_V4: &[&str] = &[
    "10.0.0.1",
    "10.0.1.1",
    "10.128.3.4",
    "198.51.100.10",
    "198.51.100.11",
    "198.51.100.130",
    "203.0.113.10",
    "203.0.113.77",
    "192.0.2.1",
    "192.0.2.77",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "127.0.0.1",
    "127.0.0.1",
    "0.0.0.0",
];
const DESTINATIONS_V6: &[&str] = &[
    "2001:db8:1::10",
    "2001:db8:1::11",
    "2001:db8:2::10",
    "fd00:10::1",
    "fd00:ec2::254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::c633:640a",
    "::1",
    "::",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    ConnectTcp,
    ConnectUdp,
    SendTo,
}

/// What a loopback attempt would meet.
fn peer(call: Call, to: SocketAddr) -> Peer {
    match (call, to.port()) {
        (Call::ConnectTcp, OWN_PORT) if to.is_ipv4() => Peer::Own,
        (Call::ConnectTcp, FOREIGN_PORT) if to.is_ipv4() => Peer::Foreign,
        // The sender itself.
        (Call::SendTo, LOCAL_PORT) => Peer::Own,
        _ => Peer::Nobody,
    }
}

pub fn fare(ctx: &mut Ctx) -> Result<()> {
    by_chance(|dice| {
        let world = World::new(ctx)?;
        let registry = Registry::generate(dice, "s", AGENTS, &ctx.root())?;
        let images = registry.images();
        let mut enforcer = world.open(Capacity::for_images(&images))?;
        enforcer.apply(&images)?;
        let mut cgroups = Vec::new();
        for tables in registry.agents.iter().take(AGENTS) {
            if tables.id.starts_with('(') {
                // A cgroup that nobody claims is the pseudo-agent's.
                cgroups.push((tables, world.root.child("nobody.service")?));
            } else {
                cgroups.push((tables, world.root.child(&format!("{}.service", tables.id))?));
            }
        }
        let mut wanted: Vec<(u64, &str)> = Vec::new();
        for (tables, cgroup) in cgroups
            .iter()
            .filter(|(tables, _)| !tables.id.starts_with('('))
        {
            wanted.push((cgroup.id()?, tables.id.as_str()));
        }
        enforcer.attribute(&wanted)?;
        let mut outside = Actor::spawn(None)?;
        outside.listen(SocketAddr::new("127.0.0.1".parse()?, FOREIGN_PORT))?;

        let (mut compared, mut refused) = (0, 0);
        for (tables, cgroup) in &cgroups {
            let outcomes = try_all(dice, tables, cgroup, &registry.clock)?;
            compared += outcomes.len();
            refused += outcomes.iter().filter(|refused| **refused).count();
        }
        claim(compared >= ENOUGH, || {
            format!("only {compared} were compared")
        })?;
        claim(refused > 20 && compared - refused > 20, || {
            format!("{refused} of {compared} were refused: too one-sided")
        })?;
        Ok(format!("{compared} attempts, {refused} refused"))
    })
}

/// Some attempts of one agent: whether each was refused.
fn try_all(
    dice: &mut Dice,
    tables: &AgentTables,
    cgroup: &Cgroup,
    clock: &Clock,
) -> Result<Vec<bool>> {
    let mut actor = Actor::spawn(Some(cgroup))?;
    let (own, _) = actor.listen(SocketAddr::new("127.0.0.1".parse()?, OWN_PORT))?;
    let mut outcomes = Vec::new();
    for _ in 0..ATTEMPTS {
        let family = dice.pick(&Family::ALL);
        let list = match family {
            Family::V4 | Family::Mapped => DESTINATIONS_V4,
            Family::V6 => DESTINATIONS_V6,
        };
        let ip: IpAddr = dice.pick(list).parse()?;
        let to = SocketAddr::new(ip, dice.pick(&[1, 2, 3, 4, 5, 53, 443, 445, 9000]));
        let call = dice.pick(&[Call::ConnectTcp, Call::ConnectUdp, Call::SendTo]);
        let before = refuses(tables, clock, call, family, to);
        let errno = attempt(&mut actor, call, family, to)?;
        if before != refuses(tables, clock, call, family, to) {
            // Something began or ended meanwhile.
            continue;
        }
        let refused = errno == libc::EPERM;
        claim(refused == before, || {
            format!(
                "agent {} by {call:?} ({}) to {to}: errno {errno}, memory decides {:?}",
                tables.id,
                family.name(),
                decision(tables, clock, call, family, to),
            )
        })?;
        claim(
            matches!(errno, 0 | libc::EPERM | libc::ECONNREFUSED),
            || format!("{call:?} ({}) to {to}: errno {errno}", family.name()),
        )?;
        outcomes.push(refused);
    }
    actor.must(&Op::Close { id: own })?;
    Ok(outcomes)
}

fn refuses(
    tables: &AgentTables,
    clock: &Clock,
    call: Call,
    family: Family,
    to: SocketAddr,
) -> bool {
    match decision(tables, clock, call, family, to) {
        Decision::Allow { .. } | Decision::Monitor { .. } => false,
        Decision::Deny { .. } | Decision::Fault(_) => true,
    }
}

fn decision(
    tables: &AgentTables,
    clock: &Clock,
    call: Call,
    family: Family,
    to: SocketAddr,
) -> Decision {
    let rules = MemoryRules::new(tables, clock, peer(call, to));
    let hook = match (call, family) {
        (Call::SendTo, _) => Hook::Egress,
        (_, Family::V4) => Hook::Connect4,
        (_, Family::V6 | Family::Mapped) => Hook::Connect6,
    };
    let attempt = Attempt {
        addr: agent_ebpf::abi::Addr::from(to.ip()).effective(),
        port: to.port(),
        local_port: if call == Call::SendTo { LOCAL_PORT } else { 0 },
        protocol: if call == Call::ConnectTcp { 6 } else { 17 },
        hook,
        tcp_flags: 0,
        now: boot_nanos(),
    };
    decide(&rules, rules.row(), &attempt)
}

/// Does it; the error number, 0 for none.
fn attempt(actor: &mut Actor, call: Call, family: Family, to: SocketAddr) -> Result<i32> {
    let kind = if call == Call::ConnectTcp {
        libc::SOCK_STREAM
    } else {
        libc::SOCK_DGRAM
    };
    let id = actor.socket(family.domain(), kind, 0)?;
    let reply = if call == Call::SendTo {
        let any: IpAddr = if family == Family::V4 {
            "0.0.0.0".parse()?
        } else {
            "::".parse()?
        };
        let addr = SocketAddr::new(any, LOCAL_PORT);
        actor.must(&Op::Bind { id, addr }).context("bind")?;
        actor.ask(&Op::SendTo {
            id,
            addr: to,
            data: PAYLOAD.to_vec(),
            flags: 0,
            repeat: 1,
        })?
    } else {
        actor.ask(&Op::Connect {
            id,
            addr: to,
            timeout_ms: 8000,
        })?
    };
    actor.must(&Op::Close { id })?;
    Ok(reply.errno)
}
