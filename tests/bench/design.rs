//! The designs: what each puts around a lane's cgroup, for the same policy.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Addr, SPACE_BITS, ScopeKey};
use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, LpmTrie, Map, lpm_trie::Key},
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program},
};

use super::{Design, LaneSpec, Shape, folder, net::Net, nft};
use crate::support::{
    Agent, Cgroup, Ctx, Daemon, claim,
    daemon::{Place, Settings},
    eventually,
    programs::held_by,
};

/// Ports that every policy allows: TCP from the echo server's to the listener's, UDP to the sink.
pub const TCP: (u16, u16) = (7, 443);
/// See [`TCP`].
pub const UDP: (u16, u16) = (443, 443);

/// A million destinations take a busy machine minutes.
const PATIENCE: Duration = Duration::from_secs(600);

const FLOOR: &[&str] = &[
    "floor_connect4",
    "floor_connect6",
    "floor_egress",
    "floor_create",
    "floor_bind4",
    "floor_bind6",
];
const REFUSE: &[&str] = &[
    "deny_connect4",
    "deny_connect6",
    "floor_egress",
    "floor_create",
    "floor_bind4",
    "floor_bind6",
];
const PER_PACKET: &[&str] = &[
    "pp_connect4",
    "pp_connect6",
    "pp_egress",
    "pp_create",
    "floor_bind4",
    "floor_bind6",
];
const SYSTEMD: &[&str] = &["af_egress", "af_ingress"];

/// What is around a lane. Dropping it takes it down.
pub enum Fence {
    /// Nothing.
    None,
    /// Programs of the comparators' object; their links end with it.
    Programs(Ebpf),
    /// The daemon, and cgroups of the agents that do nothing.
    Remit {
        daemon: Daemon,
        ready: Duration,
        _idle: Vec<Cgroup>,
    },
    /// Rules in the lane's namespace; they end with it.
    Nft,
}

// === impl Fence ===

impl Fence {
    /// Puts one up around `root`, whose path below the mount is `path`.
    pub fn put_up(
        spec: &LaneSpec,
        ctx: &Ctx,
        object: &[u8],
        root: &Cgroup,
        path: &str,
        net: &Net,
    ) -> Result<Self> {
        let shape = &spec.shape;
        match spec.design {
            Design::Nothing => Ok(Self::None),
            Design::Floor => attach(object, root, FLOOR, shape).map(Self::Programs),
            Design::Refuse => attach(object, root, REFUSE, shape).map(Self::Programs),
            Design::PerPacket => {
                let mut ebpf = attach(object, root, PER_PACKET, shape)?;
                fill_per_packet(&mut ebpf, root, shape)?;
                Ok(Self::Programs(ebpf))
            }
            Design::Systemd => {
                let mut ebpf = attach(object, root, SYSTEMD, shape)?;
                fill_systemd(&mut ebpf, shape)?;
                Ok(Self::Programs(ebpf))
            }
            Design::Remit => remit(spec, ctx, root, path),
            Design::Nft | Design::NftCt => {
                let tracked = spec.design == Design::NftCt;
                let file = folder(ctx, &spec.name)?.join("rules.nft");
                nft::load(&file, path, shape, tracked, net).map(|()| Self::Nft)
            }
        }
    }
}

impl Fence {
    /// How long the daemon took until it was ready, and its memory in KiB.
    pub fn daemon(&self) -> Result<Option<(Duration, u64)>> {
        let Self::Remit { daemon, ready, .. } = self else {
            return Ok(None);
        };
        let status = format!("/proc/{}/status", daemon.pid()?);
        let text = fs::read_to_string(&status).with_context(|| format!("cannot read {status}"))?;
        let resident = text
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))
            .with_context(|| format!("{status} has no VmRSS"))?;
        Ok(Some((*ready, resident.parse()?)))
    }

    /// Ids of its programs.
    pub fn programs(&self) -> Result<BTreeSet<u32>> {
        match self {
            Self::None | Self::Nft => Ok(BTreeSet::new()),
            Self::Remit { daemon, .. } => held_by(daemon.pid()?),
            Self::Programs(ebpf) => ebpf
                .programs()
                // Those of other designs are in the object, but not loaded.
                .filter(|(_, program)| program.fd().is_ok())
                .map(|(_, program)| Ok(program.info()?.id()))
                .collect(),
        }
    }
}

/// Loads an object of its own for this lane and attaches these programs.
fn attach(object: &[u8], root: &Cgroup, names: &[&str], shape: &Shape) -> Result<Ebpf> {
    let sized = |map: &str| match (map, names) {
        ("pp_prefixes", PER_PACKET) | ("af_allow", SYSTEMD) => shape.prefixes,
        _ => 1,
    };
    let mut loader = EbpfLoader::new();
    for map in ["pp_prefixes", "af_allow"] {
        loader.map_max_entries(map, sized(map));
    }
    let mut ebpf = loader
        .load(object)
        .context("cannot load the comparators' object")?;
    let cgroup = File::open(root.path())?;
    for name in names {
        let program = ebpf
            .program_mut(name)
            .with_context(|| format!("the object has no program {name}"))?;
        match program {
            Program::CgroupSkb(program) => {
                program.load()?;
                let way = if name.ends_with("ingress") {
                    CgroupSkbAttachType::Ingress
                } else {
                    CgroupSkbAttachType::Egress
                };
                program.attach(&cgroup, way, CgroupAttachMode::Single)?;
            }
            Program::CgroupSockAddr(program) => {
                program.load()?;
                program.attach(&cgroup, CgroupAttachMode::Single)?;
            }
            Program::CgroupSock(program) => {
                program.load()?;
                program.attach(&cgroup, CgroupAttachMode::Single)?;
            }
            _ => anyhow::bail!("{name} is of another type than it should be"),
        }
    }
    Ok(ebpf)
}

fn map<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Map> {
    ebpf.map_mut(name)
        .with_context(|| format!("the object has no map {name}"))
}

fn fill_per_packet(ebpf: &mut Ebpf, root: &Cgroup, shape: &Shape) -> Result<()> {
    const SCOPE: u32 = 1;
    let service = fs::metadata(root.path().join("agent.service"))?.ino();
    HashMap::try_from(map(ebpf, "pp_claims")?)?.insert(service, SCOPE, 0)?;
    let ports = |(first, last): (u16, u16)| u64::from(first) << 16 | u64::from(last);
    let rule = ports(TCP) << 32 | ports(UDP);
    let mut prefixes: LpmTrie<_, ScopeKey, u64> = LpmTrie::try_from(map(ebpf, "pp_prefixes")?)?;
    for (addr, length) in destinations(shape) {
        let key = ScopeKey {
            space: SCOPE.into(),
            addr: Addr::v4(addr.octets()),
        };
        let bits = SPACE_BITS + 96 + u32::from(length);
        prefixes.insert(&Key::new(bits, key), rule, 0)?;
    }
    Ok(())
}

fn fill_systemd(ebpf: &mut Ebpf, shape: &Shape) -> Result<()> {
    let mut allow: LpmTrie<_, [u8; 4], u64> = LpmTrie::try_from(map(ebpf, "af_allow")?)?;
    for (addr, length) in destinations(shape) {
        allow.insert(&Key::new(length.into(), addr.octets()), 1, 0)?;
    }
    Ok(())
}

/// The whole scope.
pub fn destinations(shape: &Shape) -> impl Iterator<Item = (Ipv4Addr, u8)> {
    (0..shape.prefixes).map(|number| shape.destination(number))
}

/// The scope as set files, none so long that the daemon refuses to read it.
fn set_files(shape: &Shape, ports: &str) -> Vec<(String, String)> {
    const ENTRIES: usize = 20_000;
    let all: Vec<_> = destinations(shape).collect();
    let texts = all.chunks(ENTRIES).enumerate().map(|(number, part)| {
        let name = format!("net{number}");
        let mut text = format!("schema = 1\n[set]\nname = \"{name}\"\n");
        for (addr, length) in part {
            // A String takes all that is written to it.
            let _ = write!(text, "[[allow]]\nto = \"{addr}");
            if *length < 32 {
                let _ = write!(text, "/{length}");
            }
            let _ = write!(text, "\"\nports = [{ports}]\n");
        }
        (name, text)
    });
    texts.collect()
}

/// The daemon on a registry of this shape.
fn remit(spec: &LaneSpec, ctx: &Ctx, root: &Cgroup, path: &str) -> Result<Fence> {
    // Every entry has a rule set of its own here, for each is told apart in the log; by itself the
    // daemon makes room for 65,536.
    let sets = 2 * (spec.shape.prefixes + spec.shape.agents) + 4096;
    let settings = Settings {
        more: format!("[limits]\nrule_sets = {sets}\n"),
        ..Settings::default()
    };
    let place = Place::lay_in(&folder(ctx, &spec.name)?, path, &settings)?;
    let mut agent = Agent::new("agent");
    let ports = format!(r#""{}-{}", "{}/udp""#, TCP.0, TCP.1, UDP.0);
    for (name, text) in set_files(&spec.shape, &ports) {
        let path = place.at("sets.d").join(format!("{name}.toml"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        agent = agent.allow(&format!("@{name}"), &ports);
    }
    place.write(&agent)?;
    let mut idle = Vec::new();
    for number in 1..spec.shape.agents {
        let id = format!("idle{number}");
        place.write(&Agent::new(&id).allow("198.51.100.0/24", "443"))?;
        idle.push(root.child(&format!("{id}.service"))?);
    }
    let began = Instant::now();
    let daemon = Daemon::start_within(&place, PATIENCE)?;
    let ready = began.elapsed();
    let service = fs::metadata(root.path().join("agent.service"))?.ino();
    eventually(10, || {
        let known = daemon.place().status()?.cgroups("agent")?;
        claim(known.contains(&service), || {
            format!("the daemon does not know cgroup {service}: {known:?}")
        })
    })?;
    Ok(Fence::Remit {
        daemon,
        ready,
        _idle: idle,
    })
}
