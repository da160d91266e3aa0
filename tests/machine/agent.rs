//! What runs as an agent: from its first instruction on it tries, one lane after the other and over
//! and over, what its entry grants and what it does not, and keeps count in a file.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    actor::{socket::Socket, traffic::mono_ns},
    support::{
        Family, cgroup,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    },
};

/// Where agents and the ear leave their counts: there before any disk is.
pub const COUNTS: &str = "/run/remit-check";
/// The port of every lane.
pub const PORT: u16 = 443;

/// Rounds without a pause, so that the first moments are covered closely.
const HASTY_ROUNDS: u64 = 20;
const PAUSE: Duration = Duration::from_millis(60);
/// Nothing is far away: what takes longer hangs.
const CONNECT_MS: u64 = 1500;

/// What an agent has tried.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Counts {
    /// Its process.
    pub pid: u32,
    /// When it began, in nanoseconds of the monotonic clock.
    pub began_ns: u64,
    /// Rounds through all lanes.
    pub rounds: u64,
    /// Each lane.
    pub lanes: Vec<Lane>,
}

/// One way to one destination.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Lane {
    /// `out tcp mapped`.
    pub name: String,
    /// Attempts that the kernel let through.
    pub passed: u64,
    /// Attempts that ended with EPERM.
    pub refused: u64,
    /// Attempts that ended otherwise.
    pub other: u64,
    /// The last of these.
    pub errno: i32,
    /// Whether the very first attempt was refused.
    pub refused_first: bool,
}

// === impl Counts ===

impl Counts {
    /// What the agent `name` has counted so far; an error if it never ran.
    pub fn read(name: &str) -> Result<Self> {
        let path = Self::file(name);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{name} left no counts at {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{name} counts {text}"))
    }

    /// Where.
    pub fn file(name: &str) -> PathBuf {
        Path::new(COUNTS).join(format!("{name}.json"))
    }

    /// The lanes in (or out of) scope.
    pub fn side(&self, out: bool) -> impl Iterator<Item = &Lane> {
        let begin = if out { "out " } else { "in " };
        self.lanes
            .iter()
            .filter(move |lane| lane.name.starts_with(begin))
    }
}

/// `remit-tests machine-agent NAME`: until it is ended.
pub fn serve(name: &str) -> Result<ExitCode> {
    let began_ns = mono_ns();
    let lanes = lanes()?;
    let mut counts = Counts {
        pid: std::process::id(),
        began_ns,
        rounds: 0,
        lanes: lanes.iter().map(|lane| lane.count.clone()).collect(),
    };
    fs::create_dir_all(COUNTS).with_context(|| format!("cannot make {COUNTS}"))?;
    loop {
        for (lane, count) in lanes.iter().zip(&mut counts.lanes) {
            match lane.attempt(name) {
                Ok(()) => count.passed += 1,
                Err(Errno::EPERM) => {
                    count.refused_first |= counts.rounds == 0;
                    count.refused += 1;
                }
                Err(errno) => {
                    count.other += 1;
                    count.errno = errno as i32;
                }
            }
        }
        counts.rounds += 1;
        write(&Counts::file(name), &counts)?;
        if counts.rounds > HASTY_ROUNDS {
            sleep(PAUSE);
        }
    }
}

/// `remit-tests machine-container NAME`: moves into a cgroup below its own, as a container's first
/// process is, and is an agent there. Its own cgroup must be delegated to it.
pub fn contain(name: &str) -> Result<ExitCode> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("no cgroup of its own")?;
    let inner = cgroup::mount()?.join(own).join("container");
    fs::create_dir_all(&inner).with_context(|| format!("cannot make {}", inner.display()))?;
    fs::write(inner.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot enter {}", inner.display()))?;
    serve(name)
}

/// Replaces a file of counts in one step.
pub fn write(path: &Path, counts: &impl Serialize) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, serde_json::to_vec(counts)?)
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

struct Attempts {
    family: Family,
    to: SocketAddr,
    tcp: bool,
    count: Lane,
}

fn lanes() -> Result<Vec<Attempts>> {
    let mut lanes = Vec::new();
    // What must be refused comes first.
    for (side, v4, v6) in [("out", OUT_V4, OUT_V6), ("in", IN_V4, IN_V6)] {
        for family in Family::ALL {
            for tcp in [false, true] {
                let name = format!(
                    "{side} {} {}",
                    if tcp { "tcp" } else { "udp" },
                    family.name()
                );
                lanes.push(Attempts {
                    family,
                    to: family.pick(v4, v6, PORT)?,
                    tcp,
                    count: Lane {
                        name,
                        ..Lane::default()
                    },
                });
            }
        }
    }
    if lanes.len() != 12 {
        bail!("{} lanes", lanes.len());
    }
    Ok(lanes)
}

impl Attempts {
    /// One attempt on a socket of its own; what arrives is the agent's name.
    fn attempt(&self, name: &str) -> nix::Result<()> {
        let kind = if self.tcp {
            libc::SOCK_STREAM
        } else {
            libc::SOCK_DGRAM
        };
        let socket = Socket::open(self.family.domain(), kind, 0)?;
        let said = format!("{name}\n");
        if self.tcp {
            socket.connect(self.to, CONNECT_MS)?;
            socket.send(said.as_bytes())?;
        } else {
            socket.send_to(self.to, said.as_bytes(), 0)?;
        }
        Ok(())
    }
}
