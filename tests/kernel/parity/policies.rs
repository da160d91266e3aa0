//! Generated registry files, compiled: scopes in which prefixes of all forms overlap, with exact
//! hosts, denials, floors, ends around now, clients to serve, and addresses that need whole chains
//! of rule sets.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use agent_ebpf::abi::{Mode, State};
use anyhow::{Context as _, Result, bail};
use remit::{
    daemon,
    kernel::{Image, boot_nanos},
    policy::{AgentTables, Clock, Source, SourceKind, compile},
};

use crate::support::clock::from_now;
use crate::support::dice::Dice;

/// Addresses around which networks are put and of which questions are asked. Those of the test
/// network are among them, so that sockets can reach what the judge is asked about.
pub const ADDRESSES: &[&str] = &[
    "10.0.0.1",
    "10.0.0.2",
    "10.0.1.1",
    "10.128.3.4",
    "11.0.0.1",
    "198.51.100.10",
    "198.51.100.11",
    "198.51.100.130",
    "203.0.113.10",
    "203.0.113.77",
    "192.0.2.1",
    "192.0.2.77",
    "0.0.0.0",
    "127.0.0.1",
    "127.0.0.2",
    "126.255.255.255",
    "128.0.0.1",
    "224.0.0.1",
    "239.1.1.1",
    "255.255.255.255",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "::",
    "::1",
    "::2",
    "2001:db8:1::10",
    "2001:db8:1::11",
    "2001:db8:2::10",
    "fd00:10::1",
    "fd00:ec2::254",
    "fe80::1",
    "ff02::1",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b::198.51.100.10",
    "64:ff9b:1::203.0.113.10",
    "2002:a00:1::1",
    "2002:c633:640a::1",
    "::10.0.0.1",
    "::169.254.0.1",
];
const V4_LENGTHS: &[u8] = &[0, 1, 4, 7, 8, 9, 15, 16, 24, 25, 29, 30, 31];
const V6_LENGTHS: &[u8] = &[0, 3, 7, 8, 10, 16, 32, 48, 64, 95, 96, 97, 104, 120, 127];
const PORTS: &[&str] = &[
    "1",
    "2",
    "3/tcp",
    "4/udp",
    "443",
    "53/udp",
    "1-3",
    "2-4/udp",
    "440-450",
    "3-65535",
    "1-65535/udp",
    "any/tcp",
    "any/udp",
    "icmp",
    "any",
];
const SERVED: &[&str] = &["1", "2/udp", "1-3", "443", "any/tcp", "any"];
/// Seconds from now at which agents and grants begin or end.
const MOMENTS: &[i64] = &[-100, -1, 60, 600, 7200];
/// The share of agents that may be lost to mistakes nobody generates on purpose.
const LOST: usize = 5;

/// A compiled registry at one moment.
pub struct Registry {
    /// All agents, the pseudo-agent among them.
    pub agents: Vec<AgentTables>,
    /// The moment on both clocks.
    pub clock: Clock,
}

/// One agent's file in the making.
struct Draft {
    head: String,
    allow: Vec<String>,
    tail: String,
}

// === impl Registry ===

impl Registry {
    /// About `count` agents below `root`, whose ids start with `prefix`.
    pub fn generate(dice: &mut Dice, prefix: &str, count: usize, root: &str) -> Result<Self> {
        let clock = clock_now()?;
        let mut drafts: BTreeMap<String, Draft> = (0..count)
            .map(|number| format!("{prefix}-{number}"))
            .map(|id| (id.clone(), Draft::new(dice, &id, root)))
            .collect();
        let (set, floor) = (set(), floor(dice));
        for _ in 0..12 {
            let sources: Vec<Source> = drafts
                .iter()
                .map(|(id, draft)| source(&format!("{id}.toml"), draft.text(), SourceKind::Agent))
                .chain([
                    source("near.toml", set.clone(), SourceKind::Set),
                    source("floor.toml", floor.clone(), SourceKind::Floor),
                ])
                .collect();
            let compiled = compile(&sources, clock.wall_now_ms);
            let mut dead: BTreeMap<String, Vec<usize>> = BTreeMap::new();
            let mut unusable = Vec::new();
            for finding in compiled
                .findings
                .iter()
                .filter(|finding| finding.is_error())
            {
                let Some(id) = finding.agents.first() else {
                    bail!("the generated registry is wrong: {finding}");
                };
                // A grant that does nothing is refused by contract, and happens by chance.
                let index = finding
                    .message
                    .contains("can never take effect")
                    .then(|| finding.message.split(['[', ']']).nth(1)?.parse().ok())
                    .flatten();
                match index {
                    Some(index) => dead.entry(id.clone()).or_default().push(index),
                    // So are more rules for one address than fit.
                    None if finding.message.contains("rules") => unusable.push(id.clone()),
                    None => bail!("the generated registry is wrong: {finding}"),
                }
            }
            if dead.is_empty() && unusable.is_empty() {
                if compiled.agents.len() + count / LOST < count {
                    bail!(
                        "of {count} generated agents only {} compile",
                        compiled.agents.len()
                    );
                }
                let mut unregistered = compiled.unregistered;
                unregistered.mode = dice.pick(&[Mode::Enforce, Mode::Monitor]);
                let mut agents: Vec<_> = compiled
                    .agents
                    .into_iter()
                    .map(Arc::unwrap_or_clone)
                    .collect();
                agents.push(unregistered);
                return Ok(Self { agents, clock });
            }
            for (id, mut indices) in dead {
                indices.sort_unstable();
                let draft = drafts.get_mut(&id).context("an agent nobody wrote")?;
                for index in indices.into_iter().rev() {
                    draft.allow.remove(index);
                }
            }
            for id in unusable {
                drafts.remove(&id);
            }
        }
        bail!("the compiler keeps finding dead grants")
    }

    /// All agents in the kernel's terms, by the daemon's own code.
    pub fn images(&self) -> Vec<Image> {
        self.agents
            .iter()
            .map(|tables| daemon::image(tables, &self.clock))
            .collect()
    }
}

// === impl Draft ===

impl Draft {
    fn new(dice: &mut Dice, id: &str, root: &str) -> Self {
        let state = if dice.once_in(8) {
            dice.pick(&[State::Draft, State::Suspended, State::Revoked])
        } else {
            State::Active
        };
        // An agent that would never be valid is refused by contract.
        let not_before = dice.once_in(5).then(|| dice.pick(&[-100, -1, 60, 600]));
        let expires = match not_before {
            None if dice.once_in(3) => dice.pick(MOMENTS),
            None => 86_400,
            Some(_) => 7200,
        };
        let mut head = format!(
            "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"alice@example.com\"\n[lifecycle]\n\
             state = \"{}\"\napproved_by = \"dave@example.com\"\nexpires = {}\n",
            state.name(),
            from_now(expires),
        );
        if let Some(from) = not_before {
            // A String takes all that is written to it.
            let _ = writeln!(head, "not_before = {}", from_now(from));
        }
        let mode = dice.pick(&["enforce", "enforce", "enforce", "monitor"]);
        let loopback = dice.pick(&["own", "own", "none", "any"]);
        let _ = write!(
            head,
            "[selector]\ncgroup = [\"{root}/{id}.service\"]\n[scope]\nmode = \"{mode}\"\n\
             loopback = \"{loopback}\"\n"
        );
        let allow = (0..dice.below(9)).map(|_| grant(dice)).collect();
        let mut tail = String::new();
        for _ in 0..dice.below(4) {
            let _ = writeln!(tail, "[[scope.deny]]\nto = \"{}\"", network(dice));
            if dice.once_in(2) {
                let _ = writeln!(tail, "ports = {}", ports(dice));
            }
        }
        for _ in 0..dice.below(3) {
            let from = if dice.once_in(4) {
                "loopback".to_owned()
            } else {
                network(dice)
            };
            let served = dice.pick(SERVED);
            let _ = writeln!(
                tail,
                "[[scope.serve]]\nports = [\"{served}\"]\nfrom = [\"{from}\"]"
            );
        }
        Self { head, allow, tail }
    }

    fn text(&self) -> String {
        format!("{}{}{}", self.head, self.allow.concat(), self.tail)
    }
}

/// A grant; now and then with an end, or with so many ports that the address takes a chain.
fn grant(dice: &mut Dice) -> String {
    let to = if dice.once_in(10) {
        "@near".to_owned()
    } else {
        network(dice)
    };
    let ports = if dice.once_in(6) {
        scattered(dice)
    } else {
        ports(dice)
    };
    let mut text = format!("[[scope.allow]]\nto = \"{to}\"\nports = {ports}\n");
    if dice.once_in(3) {
        let _ = writeln!(text, "expires = {}", from_now(dice.pick(MOMENTS)));
    }
    text
}

/// A network around one of the addresses, or anywhere; IPv4 now and then written as mapped.
fn network(dice: &mut Dice) -> String {
    let ip: IpAddr = if dice.once_in(8) {
        Ipv4Addr::from(dice.roll() as u32).into()
    } else {
        // Constants that parse, as each run of the suite shows.
        let text = dice.pick(ADDRESSES);
        text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    };
    let exact = dice.once_in(3);
    match ip {
        IpAddr::V4(v4) => {
            let len = if exact { 32 } else { dice.pick(V4_LENGTHS) };
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            let network = Ipv4Addr::from(u32::from(v4) & mask);
            if dice.once_in(6) {
                format!("::ffff:{network}/{}", len + 96)
            } else {
                format!("{network}/{len}")
            }
        }
        IpAddr::V6(v6) => {
            let len = if exact { 128 } else { dice.pick(V6_LENGTHS) };
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            format!("{}/{len}", Ipv6Addr::from(u128::from(v6) & mask))
        }
    }
}

fn ports(dice: &mut Dice) -> String {
    let (first, second) = (dice.pick(PORTS), dice.pick(PORTS));
    if first == second || dice.once_in(2) {
        format!("[\"{first}\"]")
    } else {
        format!("[\"{first}\", \"{second}\"]")
    }
}

/// Up to 24 single ports with gaps between them.
fn scattered(dice: &mut Dice) -> String {
    let count = 9 + dice.below(16);
    let suffix = dice.pick(&["", "/udp"]);
    let listed: Vec<String> = (0..count)
        .map(|at| format!("\"{}{suffix}\"", 2 * at + 1))
        .collect();
    format!("[{}]", listed.join(", "))
}

/// Exact addresses, which the floor gives way to, so that no grant here can be dead.
fn set() -> String {
    let mut text = "schema = 1\n[set]\nname = \"near\"\n".to_owned();
    for (to, ports) in [
        ("192.0.2.77", "[\"any\"]"),
        ("169.254.170.2", "[\"443\", \"1-3\"]"),
        ("2001:db8:1::11", "[\"any/tcp\", \"icmp\"]"),
    ] {
        let _ = write!(text, "[[allow]]\nto = \"{to}\"\nports = {ports}\n");
    }
    text
}

fn floor(dice: &mut Dice) -> String {
    let mut text = "schema = 1\n".to_owned();
    for to in ["198.51.100.128/25", "2001:db8:2::/48", "10.128.0.0/9"] {
        if dice.once_in(2) {
            let _ = writeln!(text, "[[deny]]\nto = \"{to}\"");
        }
    }
    let _ = writeln!(
        text,
        "[[deny]]\nto = \"203.0.113.77\"\nports = {}",
        ports(dice)
    );
    text
}

fn source(path: &str, text: String, kind: SourceKind) -> Source {
    Source {
        path: path.into(),
        text,
        kind,
    }
}

/// Both clocks, now.
pub fn clock_now() -> Result<Clock> {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(Clock::at(boot_nanos(), i64::try_from(wall.as_millis())?))
}
