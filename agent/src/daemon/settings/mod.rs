//! `remit.toml`: the daemon's settings. Every key is optional and has a default; a key that is
//! not known is an error, and all mistakes are told at once.
//!
//! This is about the daemon, never about what an agent may do: that is the registry. The text is
//! checked here and nowhere else; what comes out needs no further look.

mod reader;
#[cfg(test)]
mod tests;

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::audit::encode::Format;

/// Where the settings are when nobody names another place.
pub const DEFAULT_PATH: &str = "/etc/remit/remit.toml";

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `[paths]`.
    pub paths: Paths,
    /// `[enforcement]`.
    pub enforcement: Enforcement,
    /// `[dns]`.
    pub dns: Dns,
    /// `[log]`.
    pub log: Log,
    /// `[reconcile]`.
    pub reconcile: Reconcile,
    /// `[probe]`.
    pub probe: Probe,
    /// `[metrics]`.
    pub metrics: Metrics,
    /// `[discover]`.
    pub discover: Discover,
    /// `[limits]`.
    pub limits: Limits,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Folder of the agents' files.
    pub registry: PathBuf,
    /// Folders of named destination sets; the first that has a name wins.
    pub sets: Vec<PathBuf>,
    /// File of the host-wide denials.
    pub floor: PathBuf,
    /// Folder of what lives as long as the boot; the control socket is in it.
    pub run: PathBuf,
    /// Folder of the logs.
    pub log: PathBuf,
    /// Folder of what outlives a restart.
    pub state: PathBuf,
    /// Folder on a bpffs for pinned links and maps.
    pub bpffs: PathBuf,
    /// Mount of cgroup v2.
    pub cgroup: CgroupMount,
}

/// Where cgroup v2 is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupMount {
    /// As mountinfo says.
    Auto,
    /// At this place.
    At(PathBuf),
}

/// What is enforced where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enforcement {
    /// Cgroups below the v2 mount, each with a leading slash and none inside another.
    pub roots: Vec<String>,
    /// What becomes of processes in a root that no agent claims.
    pub unregistered: Unregistered,
    /// Whether the guards against leaving the fence are there.
    pub containment: Containment,
    /// What a registry file that does not compile does to its agent.
    pub on_bad_registry: OnBadRegistry,
    /// What a probe that fails does to its agent.
    pub on_probe_fail: OnProbeFail,
}

/// What a probe that fails does to its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnProbeFail {
    /// It is told: in the posture and the audit trail.
    Report,
    /// The agent is suspended besides.
    Deny,
}

/// What becomes of processes in a root that no agent claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unregistered {
    /// They reach nothing.
    Deny,
    /// They reach what they like, and it is reported.
    Monitor,
}

/// Whether the guards against leaving the fence are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containment {
    /// Where the kernel can.
    Auto,
    /// The daemon does not start without.
    Require,
    /// Nowhere.
    Off,
}

/// What a registry file that does not compile does to its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBadRegistry {
    /// The last good entry stays in force.
    Keep,
    /// The agent is denied.
    Deny,
}

/// The DNS guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Whether it runs.
    pub enabled: bool,
    /// Whom it asks.
    pub upstream: Vec<Upstream>,
    /// The shortest lease, whatever the answer's TTL.
    pub min_lease: Duration,
    /// The longest time that an open TCP connection outlives its TTL by.
    pub max_lease: Duration,
    /// Addresses that one name may lease.
    pub max_addresses_per_name: u64,
    /// Distinct names an hour for one wildcard grant.
    pub wildcard_budget: u64,
}

/// A resolver that the guard asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// Those of the host's resolv.conf.
    System,
    /// This one.
    At(SocketAddr),
}

/// Rotation and rates of the logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Bytes at which a file is rotated.
    pub max_size: u64,
    /// Age at which a rotated file goes.
    pub retention: Duration,
    /// Violation lines a second for one agent.
    pub per_agent_rate: u32,
    /// Bytes of violation lines a day for one agent.
    pub per_agent_daily: u64,
    /// Bytes of all rotated files together, of both logs.
    pub max_total: u64,
    /// How often what agents reached is written down; none is never.
    pub access: Option<Duration>,
    /// The key that signs the audit trail; none for one of our own in the state directory.
    pub signing_key: Option<PathBuf>,
    /// Patterns of secrets in command lines; none for the built-in ones.
    pub mask: Option<Vec<String>>,
    /// Forms in which events are written to files of their own.
    pub export: Vec<Format>,
    /// Whether events go to the systemd journal as well.
    pub journal: bool,
    /// The OpenTelemetry collector that events are sent to as well. Only builds that can have it.
    pub otlp: Option<String>,
}

/// How often registry and kernel are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reconcile {
    /// None is off.
    pub every: Option<Duration>,
}

/// How often each agent's fence is tried from inside.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Probe {
    /// None is off.
    pub every: Option<Duration>,
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Metrics {
    /// None is off.
    pub listen: Option<SocketAddr>,
}

/// What is looked for outside the roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discover {
    /// Whether traffic to model APIs is observed.
    pub traffic: bool,
    /// The APIs' host names, lower case and without a trailing dot; none for the built-in ones.
    pub apis: Option<Vec<String>>,
    /// The cgroup below the v2 mount whose processes are observed, with a leading slash.
    pub cgroup: String,
}

/// Bounds of the kernel maps; none means sized from the registry, with room to grow.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// Agents.
    pub agents: Option<u32>,
    /// Prefixes, of all agents together.
    pub prefixes: Option<u32>,
    /// Exact addresses, of all agents together.
    pub addresses: Option<u32>,
    /// Distinct blocks of rules.
    pub rule_sets: Option<u32>,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read settings `{}`", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file says what makes no sense; all of it, in the file's order.
    #[error("{}", Lines(.0))]
    Invalid(Vec<Mistake>),
}

/// One mistake in the file. Displays as `FILE:LINE:COL: error: …` with the line and carets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file, as it was named.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// The line itself.
    excerpt: String,
    /// Characters to underline.
    width: usize,
    /// What to do, where it is not plain.
    pub help: Option<String>,
}

// === impl Settings ===

impl Settings {
    /// Reads the file at `path`, which must be there; or without `path` the one at
    /// [`DEFAULT_PATH`], which may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, SettingsError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match fs::read_to_string(file) {
            Ok(text) => Self::parse(&file.display().to_string(), &text),
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(SettingsError::Read {
                path: file.to_owned(),
                source,
            }),
        }
    }

    /// Reads settings from `text`; `name` stands for the file in messages.
    pub fn parse(name: &str, text: &str) -> Result<Self, SettingsError> {
        let (settings, mistakes) = reader::read(name, text);
        if mistakes.is_empty() {
            return Ok(settings);
        }
        Err(SettingsError::Invalid(mistakes))
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.paths.run.join("remit.sock")
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            registry: "/etc/remit/agents.d".into(),
            sets: vec!["/etc/remit/sets.d".into(), "/usr/share/remit/sets".into()],
            floor: "/etc/remit/floor.toml".into(),
            run: "/run/remit".into(),
            log: "/var/log/remit".into(),
            state: "/var/lib/remit".into(),
            bpffs: "/sys/fs/bpf/remit".into(),
            cgroup: CgroupMount::Auto,
        }
    }
}

impl Default for Enforcement {
    fn default() -> Self {
        Self {
            roots: vec!["/agents.slice".to_owned()],
            unregistered: Unregistered::Deny,
            containment: Containment::Auto,
            on_bad_registry: OnBadRegistry::Keep,
            on_probe_fail: OnProbeFail::Report,
        }
    }
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            enabled: true,
            upstream: vec![Upstream::System],
            min_lease: Duration::from_secs(60),
            max_lease: Duration::from_secs(3_600),
            max_addresses_per_name: 64,
            wildcard_budget: 1_000,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            max_size: 256 << 20,
            retention: Duration::from_secs(190 * 86_400),
            per_agent_rate: 200,
            per_agent_daily: 64 << 20,
            max_total: 8 << 30,
            access: Some(Duration::from_secs(300)),
            signing_key: None,
            mask: None,
            export: Vec::new(),
            journal: false,
            otlp: None,
        }
    }
}

impl Default for Discover {
    fn default() -> Self {
        Self {
            traffic: false,
            apis: None,
            cgroup: "/".to_owned(),
        }
    }
}

impl Default for Reconcile {
    fn default() -> Self {
        Self {
            every: Some(Duration::from_secs(5)),
        }
    }
}

// === impl Mistake ===

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line, column) = (&self.file, self.line, self.column);
        write!(f, "{file}:{line}:{column}: error: {}", self.message)?;
        let gutter = line.to_string().len();
        write!(f, "\n{line} | {}", self.excerpt)?;
        write!(f, "\n{:gutter$} | ", "")?;
        // Tabs stay tabs, so that the carets stand below what they mean.
        for c in self.excerpt.chars().take(column - 1) {
            write!(f, "{}", if c == '\t' { '\t' } else { ' ' })?;
        }
        write!(f, "{}", "^".repeat(self.width))?;
        if let Some(help) = &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        Ok(())
    }
}

/// Mistakes, one after the other.
struct Lines<'m>(&'m [Mistake]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, mistake) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n\n")?;
            }
            mistake.fmt(f)?;
        }
        Ok(())
    }
}
