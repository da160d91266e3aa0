//! What cases are written with: guards that undo themselves on drop, a network of many addresses
//! on `lo`, a daemon with paths of its own, actors inside the fence, and the evidence — status,
//! log, and the wire.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

pub mod actor;
pub mod api;
pub mod bpf;
pub mod cgroup;
pub mod clock;
pub mod daemon;
pub mod dice;
pub mod evidence;
pub mod fixture;
pub mod listener;
pub mod netlink;
pub mod network;
pub mod programs;
pub mod registry;
pub mod remit;
pub mod scale;
pub mod tamper;
pub mod traffic;
pub mod way;
pub mod wire;

pub use actor::Actor;
pub use cgroup::Cgroup;
pub use daemon::Daemon;
pub use dice::Dice;
pub use evidence::{Line, Status};
pub use fixture::{Fixture, Refusal};
pub use registry::Agent;
pub use way::{Family, Way};

/// A case's place: a name that nothing else on the machine has, and a folder.
pub struct Ctx {
    unique: String,
    dir: PathBuf,
}

impl Ctx {
    /// Enters network and mount namespaces of the case's own and sets the network up. The
    /// process has one thread yet; all that it starts inherits them.
    pub fn enter(unique: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(unique);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        network::enter()?;
        Ok(Self {
            unique: unique.to_owned(),
            dir,
        })
    }

    /// `remit-test-PID-N`.
    pub fn unique(&self) -> &str {
        &self.unique
    }

    /// The case's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root that the case's daemon governs.
    pub fn root(&self) -> String {
        format!("/{}.slice", self.unique)
    }

    /// Prints what the daemon said and logged, for the reader of a failure.
    pub fn explain(&self) {
        for name in ["daemon.err", "log/violations.jsonl"] {
            let text = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in lines.iter().skip(lines.len().saturating_sub(12)) {
                eprintln!("{name}: {}", line.chars().take(1500).collect::<String>());
            }
        }
    }
}

/// Asks until `f` has an answer, or the deadline passes; then the last reason is the error. On
/// emulated processors everything takes longer.
pub fn eventually<T>(secs: u64, mut f: impl FnMut() -> Result<T>) -> Result<T> {
    let secs = scale::patience(secs);
    let until = Instant::now() + Duration::from_secs(secs);
    loop {
        match f() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= until => {
                return Err(error.context(format!("still so after {secs} s")));
            }
            Err(_) => sleep(Duration::from_millis(20)),
        }
    }
}

/// An error unless the two are equal.
pub fn expect<T: PartialEq + Debug>(what: &str, found: T, wanted: T) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    Err(anyhow!("{what}: found {found:?}, wanted {wanted:?}"))
}

/// An error unless it holds.
pub fn claim(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if !holds {
        bail!(what());
    }
    Ok(())
}
