//! Faults that must stop the daemon before `READY`: a struct of another layout, a hook that is not
//! there, a map that cannot hold the registry. Each is injected into the real start; the message
//! must name it, nothing may be left of the attempt, and a fence that was in force must stay.
//!
//! The object's faults are bytes changed in the embedded object, handed to the library's own
//! `daemon::run` in a process of its own (`remit-tests daemon-with OBJECT`).

use std::{
    fs,
    io::ErrorKind,
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use agent_ebpf::abi::FINGERPRINT;
use anyhow::{Context as _, Result, bail};
use remit::{
    daemon::{self, Options, settings::Settings as Loaded},
    kernel::EMBEDDED,
};

use crate::{
    harness::Case,
    support::{
        Actor, Agent, Cgroup, Ctx, Daemon, Family, Fixture, Way, claim,
        daemon::{Place, Settings},
        expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        remit as command,
    },
};

/// How long a start may take; longer under emulation, where the verifier needs its time.
const START_SECS: u64 = 60;

/// `remit-tests daemon-with OBJECT`: the daemon's own start, with the object in a file.
pub fn daemon_with(object: &str) -> Result<ExitCode> {
    let object = fs::read(object).with_context(|| format!("cannot read {object}"))?;
    let config = std::env::var_os("REMIT_CONFIG").context("REMIT_CONFIG is not set")?;
    let settings = Loaded::load(Some(Path::new(&config)))?;
    let options = Options {
        object: object.into(),
        ..Options::default()
    };
    daemon::run(settings, options)?;
    Ok(ExitCode::SUCCESS)
}

/// Something to break, and what the message must name.
struct Fault {
    name: &'static str,
    object: fn() -> Result<Vec<u8>>,
    limits: &'static str,
    names: &'static [&'static str],
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "a_map_value_of_another_size",
        object: || resized("rows", VALUE_SIZE, 8),
        limits: "",
        names: &["`rows`", "value", "bytes"],
    },
    Fault {
        name: "a_map_key_of_another_size",
        object: || resized("exacts", KEY_SIZE, 4),
        limits: "",
        names: &["`exacts`", "key", "bytes"],
    },
    Fault {
        name: "structs_of_another_layout",
        object: other_fingerprint,
        limits: "",
        names: &["layout", "0x"],
    },
    Fault {
        name: "a_missing_hook",
        object: || renamed("remit_egress", "remit_egresX"),
        limits: "",
        names: &["`remit_egress`"],
    },
    Fault {
        name: "a_missing_judge",
        object: || renamed("remit_judge", "remit_judgX"),
        limits: "",
        names: &["`remit_judge`"],
    },
    Fault {
        name: "a_missing_map",
        object: || renamed("counters", "counterX"),
        limits: "",
        names: &["`counters`"],
    },
    Fault {
        name: "no_object",
        object: || Ok(Vec::new()),
        limits: "",
        names: &["BPF object"],
    },
    Fault {
        name: "half_an_object",
        object: || Ok(EMBEDDED[..EMBEDDED.len() / 2].to_vec()),
        limits: "",
        names: &["BPF object"],
    },
    Fault {
        name: "too_few_agents",
        object: whole,
        limits: "agents = 1",
        names: &["`agents`", "holds 1", "needs 2", "`limits.agents`"],
    },
    Fault {
        name: "too_few_rule_sets",
        object: whole,
        limits: "rule_sets = 1",
        names: &["`rulesets`", "holds 1", "`limits.rule_sets`"],
    },
    Fault {
        name: "too_few_addresses",
        object: whole,
        limits: "addresses = 1",
        names: &["`exacts`", "holds 1", "`limits.addresses`"],
    },
    Fault {
        name: "too_few_prefixes",
        object: whole,
        limits: "prefixes = 1",
        names: &["`prefixes`", "holds 1", "`limits.prefixes`"],
    },
];

/// Those that are tried over an earlier daemon's fence. (What outgrows its maps is among [`GROWN`].)
const OVER_A_FENCE: &[&str] = &[
    "structs_of_another_layout",
    "a_missing_hook",
    "a_missing_map",
    "half_an_object",
];

/// A registry that outgrows the limits, and the maps of the standing fence: limits of both starts, the form of
/// the grants that come on top (none: another agent), and what the message must name.
type Grown = (
    &'static str,
    &'static str,
    Option<fn(u8) -> String>,
    &'static [&'static str],
);
const GROWN: &[Grown] = &[
    (
        "agents",
        "agents = 2",
        None,
        &["`agents`", "holds 2", "needs 3", "`limits.agents`"],
    ),
    (
        "addresses",
        "addresses = 60",
        Some(|at| format!("192.0.2.{at}")),
        &["`exacts`", "holds 60", "`limits.addresses`"],
    ),
    (
        "prefixes",
        "prefixes = 60",
        Some(|at| format!("10.{at}.0.0/16")),
        &["`prefixes`", "holds 60", "`limits.prefixes`"],
    ),
    (
        "rule_sets",
        "rule_sets = 60",
        Some(|at| format!("192.0.2.{at}")),
        &["`rulesets`", "holds 60", "`limits.rule_sets`"],
    ),
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    let fresh = FAULTS.iter().map(|fault| {
        Case::new(format!("faults::{}_stops_it", fault.name), move |ctx| {
            stops(ctx, fault)
        })
    });
    let over = FAULTS
        .iter()
        .filter(|fault| OVER_A_FENCE.contains(&fault.name))
        .map(|fault| {
            Case::new(
                format!("faults::{}_leaves_the_fence", fault.name),
                move |ctx| leaves_the_fence(ctx, fault),
            )
        });
    let sound = Case::new("faults::without_any_it_starts", |ctx| {
        let place = Place::lay(ctx, &Settings::default())?;
        let _root = Cgroup::create(&ctx.root())?;
        place.write(&agent())?;
        let ended = start(&place, &whole()?)?;
        claim(ended.ready, || format!("it is not ready: {}", ended.said))?;
        expect(
            "detach",
            place.remit(&["daemon", "--detach-all", "--yes"])?.code,
            0,
        )
    });
    let grown = GROWN.iter().map(|grown| {
        Case::new(
            format!("faults::too_many_{}_leave_the_fence", grown.0),
            move |ctx| outgrown(ctx, grown),
        )
    });
    let resized = Case::new("faults::other_limits_adopt_a_standing_fence", |ctx| {
        let mut fx = Fixture::start_with(ctx, &[agent()], &limits("agents = 8\nrule_sets = 100"))?;
        let mut actor = fx.actor("alpha")?;
        let allowed = Family::V4.pick(IN_V4, IN_V6, 443)?;
        let denied = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
        // Room to grow that a fresh start would make is no need, and less of it takes nothing
        // away that is there.
        for settings in [
            Settings::default(),
            limits("agents = 1\naddresses = 1\nprefixes = 1\nrule_sets = 1"),
        ] {
            fx.daemon.kill()?;
            Place::lay(ctx, &settings)?;
            fx.daemon.restart()?;
            fx.arrives(&mut actor, Way::Tcp, Family::V4, allowed)?;
            let tried = Way::Tcp.perform(&mut actor, Family::V4, denied)?;
            expect("errno out of scope", tried.errno, libc::EPERM)?;
        }
        Ok(())
    });
    fresh
        .chain(over)
        .chain(grown)
        .chain([sound, resized])
        .collect()
}

/// With more than one agent, address, prefix and rule set.
fn agent() -> Agent {
    Agent::standard("alpha")
        .allow("198.51.100.77", "80")
        .allow("198.51.100.78", "81")
}

fn stops(ctx: &Ctx, fault: &Fault) -> Result<()> {
    let root = Cgroup::create(&ctx.root())?;
    let place = Place::lay(ctx, &limits(fault.limits))?;
    place.write(&agent())?;
    let cgroup = root.child("alpha.service")?;
    let mut actor = Actor::spawn(Some(&cgroup))?;
    refused_start(&place, &(fault.object)()?, fault.names)?;

    // Nothing is attached: what is out of scope arrives, as on any host without Remit.
    let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
    let tried = Way::UdpSendTo.perform(&mut actor, Family::V4, to)?;
    expect("errno without a fence", tried.errno, 0)?;
    let pins = pins(&place)?;
    claim(pins.is_empty(), || format!("it left pins: {pins:?}"))?;

    // And the place is as good as new.
    let place = Place::lay(ctx, &Settings::default())?;
    let daemon = Daemon::start(&place)?;
    let tried = Way::UdpSendTo.perform(&mut actor, Family::V4, to)?;
    // Its socket's cgroup is what counts, and a new one was made for this.
    expect("errno in the fence", tried.errno, libc::EPERM)?;
    drop(actor);
    drop(daemon);
    Ok(())
}

fn leaves_the_fence(ctx: &Ctx, fault: &Fault) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[agent()])?;
    let mut actor = fx.actor("alpha")?;
    fx.daemon.kill()?;
    stands_after(&mut fx, &mut actor, fault.object, fault.names)?;
    fx.daemon.restart()?;
    in_force(&mut fx, &mut actor)
}

fn outgrown(ctx: &Ctx, (_, narrow, grants, names): &Grown) -> Result<()> {
    let mut fx = Fixture::start_with(ctx, &[agent()], &limits(narrow))?;
    let mut actor = fx.actor("alpha")?;
    fx.daemon.kill()?;
    match grants {
        None => fx.place().write(&Agent::standard("beta"))?,
        Some(to) => {
            let many = (1..=80).fold(agent(), |agent, at| {
                agent.allow(&to(at), &(1000 + u32::from(at)).to_string())
            });
            fx.place().write(&many)?;
        }
    }
    stands_after(&mut fx, &mut actor, whole, names)?;
    // The advice helps, and the fence does not come down for it.
    Place::lay(ctx, &Settings::default())?;
    fx.daemon.restart()?;
    in_force(&mut fx, &mut actor)
}

/// A start that is refused over a standing fence changes nothing.
fn stands_after(
    fx: &mut Fixture,
    actor: &mut Actor,
    object: fn() -> Result<Vec<u8>>,
    names: &[&str],
) -> Result<()> {
    let before = pins(fx.place())?;
    claim(!before.is_empty(), || "nothing is pinned".to_owned())?;
    refused_start(fx.place(), &object()?, names)?;
    expect("pins", pins(fx.place())?, before)?;
    proves_nothing(fx.place())?;
    in_force(fx, actor)
}

/// Nobody who asks for proof is told that all is well, though the old fence stands.
fn proves_nothing(place: &Place) -> Result<()> {
    for question in [
        &["status", "--require", "enforcing"][..],
        &["status"],
        &["reconcile"],
        &["probe", "alpha"],
    ] {
        let said = place.remit(question)?;
        expect(&format!("exit code of {question:?}"), said.code, 3)
            .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
    }
    Ok(())
}

/// In scope arrives, out of scope is refused.
fn in_force(fx: &mut Fixture, actor: &mut Actor) -> Result<()> {
    for family in Family::ALL {
        for way in Way::MAIN {
            let to = family.pick(OUT_V4, OUT_V6, 443)?;
            let tried = way.perform(actor, family, to)?;
            expect("errno out of scope", tried.errno, libc::EPERM)?;
            fx.arrives(actor, way, family, family.pick(IN_V4, IN_V6, 443)?)?;
        }
    }
    Ok(())
}

fn limits(keys: &str) -> Settings {
    let more = if keys.is_empty() {
        String::new()
    } else {
        format!("[limits]\n{keys}\n")
    };
    Settings {
        more,
        ..Settings::default()
    }
}

fn refused_start(place: &Place, object: &[u8], names: &[&str]) -> Result<()> {
    let ended = start(place, object)?;
    claim(!ended.ready, || "it said READY".to_owned())?;
    claim(ended.code != 0, || format!("exit 0: {}", ended.said))?;
    for name in names {
        claim(ended.said.contains(name), || {
            format!("the message does not name {name}: {}", ended.said)
        })?;
    }
    println!("{}", ended.said.trim());
    Ok(())
}

/// A start that ended, by itself or because it became ready and was told to.
struct Ended {
    ready: bool,
    code: i32,
    said: String,
}

/// Starts the daemon with `object`, and watches what it tells the service manager until it ends.
fn start(place: &Place, object: &[u8]) -> Result<Ended> {
    let file = place.at("object.o");
    fs::write(&file, object)?;
    let notify = place.at("notify");
    drop(fs::remove_file(&notify));
    let manager = UnixDatagram::bind(&notify)?;
    manager.set_read_timeout(Some(Duration::from_millis(20)))?;
    let err = place.at("daemon.err");
    let mut child = Command::new("/proc/self/exe")
        .arg("daemon-with")
        .arg(&file)
        .env("REMIT_CONFIG", place.config())
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&err)?)
        .spawn()
        .context("cannot start the daemon")?;
    let until = Instant::now() + Duration::from_secs(START_SECS);
    let mut ready = false;
    let status = loop {
        ready |= hears_ready(&manager)?;
        if let Some(status) = child.try_wait()? {
            ready |= hears_ready(&manager)?;
            break status;
        }
        if ready || Instant::now() > until {
            child.kill()?;
            break child.wait()?;
        }
    };
    Ok(Ended {
        ready,
        code: command::code(status),
        said: fs::read_to_string(&err)?,
    })
}

fn hears_ready(manager: &UnixDatagram) -> Result<bool> {
    let mut buffer = [0; 4096];
    match manager.recv(&mut buffer) {
        Ok(length) => {
            let said = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
            Ok(said.lines().any(|line| line == "READY=1"))
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// What is pinned. (The top of a bpffs has files of the kernel's own, with a dot in their names,
/// which pins cannot have.)
fn pins(place: &Place) -> Result<Vec<String>> {
    let mut found = files(&place.at("bpf"))?;
    found.retain(|path| !path.ends_with(".debug"));
    Ok(found)
}

/// Every file below `directory`, sorted.
fn files(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path.display().to_string());
        }
    }
    found.sort();
    Ok(found)
}

// === broken objects ===

/// Offsets in `struct bpf_map_def`, as aya writes it into the section `maps`.
const KEY_SIZE: usize = 4;
const VALUE_SIZE: usize = 8;

fn whole() -> Result<Vec<u8>> {
    Ok(EMBEDDED.to_vec())
}

/// The object with a size in a map's definition grown by `by`.
fn resized(map: &str, field: usize, by: u32) -> Result<Vec<u8>> {
    let mut object = whole()?;
    let elf = Elf(EMBEDDED);
    let at = elf.symbol(map)?.at + field;
    let size = elf.u32(at)?;
    let place = object.get_mut(at..at + 4).context("short object")?;
    place.copy_from_slice(&(size + by).to_le_bytes());
    Ok(object)
}

/// The object with another name of a symbol, of the same length.
fn renamed(symbol: &str, name: &str) -> Result<Vec<u8>> {
    let mut object = whole()?;
    let at = Elf(EMBEDDED).symbol(symbol)?.name_at;
    let place = object
        .get_mut(at..at + symbol.len())
        .context("short object")?;
    place.copy_from_slice(name.as_bytes());
    Ok(object)
}

/// The object with one bit of each copy of the fingerprint turned.
fn other_fingerprint() -> Result<Vec<u8>> {
    let mut object = whole()?;
    let bytes = FINGERPRINT.to_le_bytes();
    let (low, high) = bytes.split_at(4);
    let mut found = 0;
    for at in 0..object.len().saturating_sub(16) {
        // A 64-bit constant in code: opcode 0x18, and each half at offset 4 of its slot.
        let is_load = EMBEDDED[at] == 0x18
            && EMBEDDED[at + 4..at + 8] == *low
            && EMBEDDED[at + 12..at + 16] == *high;
        if is_load {
            object[at + 4] ^= 1;
            found += 1;
        } else if EMBEDDED[at..at + 8] == bytes {
            object[at] ^= 1;
            found += 1;
        }
    }
    claim(found > 0, || {
        "the object does not hold its fingerprint".to_owned()
    })?;
    Ok(object)
}

/// A 64-bit little-endian ELF file, as far as its symbols go.
struct Elf<'a>(&'a [u8]);

/// Where a symbol's name and its content are in the file.
struct Symbol {
    name_at: usize,
    at: usize,
}

// === impl Elf ===

impl Elf<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let bytes = self.0.get(at..at + N).context("short object")?;
        Ok(bytes.try_into()?)
    }

    fn u16(&self, at: usize) -> Result<usize> {
        Ok(u16::from_le_bytes(self.bytes(at)?).into())
    }

    fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: usize) -> Result<usize> {
        Ok(usize::try_from(u64::from_le_bytes(self.bytes(at)?))?)
    }

    /// The header of a section.
    fn section(&self, index: usize) -> Result<usize> {
        Ok(self.u64(0x28)? + index * self.u16(0x3a)?)
    }

    fn symbol(&self, wanted: &str) -> Result<Symbol> {
        const SYMTAB: u32 = 2;
        const ENTRY: usize = 24;
        for index in 0..self.u16(0x3c)? {
            let header = self.section(index)?;
            if self.u32(header + 4)? != SYMTAB {
                continue;
            }
            let (table, size) = (self.u64(header + 0x18)?, self.u64(header + 0x20)?);
            let strings = self.section(usize::try_from(self.u32(header + 0x28)?)?)?;
            let strings = self.u64(strings + 0x18)?;
            for entry in (table..table + size).step_by(ENTRY) {
                let name_at = strings + usize::try_from(self.u32(entry)?)?;
                let name = self.0.get(name_at..).unwrap_or_default();
                if !name.starts_with(wanted.as_bytes()) || name.get(wanted.len()) != Some(&0) {
                    continue;
                }
                let home = self.section(self.u16(entry + 6)?)?;
                return Ok(Symbol {
                    name_at,
                    at: self.u64(home + 0x18)? + self.u64(entry + 8)?,
                });
            }
        }
        bail!("the object has no symbol {wanted}")
    }
}
