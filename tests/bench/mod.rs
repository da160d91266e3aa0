//! What `cargo xtask bench` runs on the machine itself: the designs that are compared, each in a
//! cgroup and a network namespace of its own, and the processes whose work is timed. It is part of
//! the suite's binary because it needs the same guards, and so that a VM can run it.
//!
//! `remit-tests bench SPEC` takes a JSON file (see [`Spec`]) and prints JSON lines; statistics and
//! tables are the caller's. Nothing is attached outside of cgroups made here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    harness::sweep,
    support::{Cgroup, Ctx, cgroup},
};

mod design;
mod drive;
mod lane;
mod net;
mod nft;
pub mod user;
pub mod worker;

/// Cgroups of the bench start with this; the process id follows.
const PREFIX: &str = "remit-bench-";
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// What to measure.
#[derive(Debug, Deserialize)]
pub struct Spec {
    /// The object with the programs to compare with.
    pub object: PathBuf,
    /// What is set up.
    pub lanes: Vec<LaneSpec>,
    /// What is measured, one after the other.
    pub runs: Vec<Run>,
    /// What is measured after that, with the kernel's own statistics on.
    pub statistics: Vec<Run>,
    /// Rounds of each run, every one with processes of its own.
    pub rounds: u32,
    /// Cycles of each round: every lane once, in random order.
    pub cycles: u32,
    /// Length of one slice.
    pub slice_us: u64,
}

/// A design with its agents' policy.
#[derive(Clone, Debug, Deserialize)]
pub struct LaneSpec {
    /// Name in runs and results.
    pub name: String,
    /// Which design.
    pub design: Design,
    /// What it has to look up.
    pub shape: Shape,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Design {
    /// No program at all.
    Nothing,
    /// Empty programs on Remit's hooks.
    Floor,
    /// The same, but connect is refused.
    Refuse,
    /// The daemon with its object.
    Remit,
    /// A walk and a longest-prefix match for every packet.
    PerPacket,
    /// systemd's address filter.
    Systemd,
    /// nftables: a set behind a cgroup match.
    Nft,
    /// The same behind connection tracking.
    NftCt,
}

/// Size of a policy.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Shape {
    /// Destinations in the scope of the agent that works.
    pub prefixes: u32,
    /// They are single addresses; else networks of 16 addresses.
    pub hosts: bool,
    /// Agents in all; only one works.
    pub agents: u32,
    /// Levels of cgroups from the agent's own down to the working process.
    pub depth: u32,
}

/// One workload on some lanes.
#[derive(Debug, Deserialize)]
pub struct Run {
    /// What the processes do.
    pub workload: Workload,
    /// Lanes; those that are missing on this host are left out.
    pub lanes: Vec<String>,
}

/// What a process does again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// A TCP connection to a listener, reset at once.
    Connect,
    /// `sendto` to one destination.
    UdpSend,
    /// `send` on a connected socket.
    UdpConnected,
    /// `sendto` to 32 destinations in turn.
    LiveSet,
    /// `sendto` to 65,536 destinations in turn.
    ColdSet,
    /// One byte to a server and back.
    RequestResponse,
    /// A refused connect.
    Deny,
    /// 64 KiB into a TCP connection.
    Bulk,
}

/// `remit-tests bench SPEC` and `bench-user EFFORT`: measures in a child, which these arguments and
/// a name start, and cleans up behind it however it ends.
pub fn command(child: &[&str]) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: programs can't be attached");
    }
    let stats = fs::read_to_string(STATS).with_context(|| format!("cannot read {STATS}"))?;
    if stats.trim() != "0" {
        bail!(
            "kernel.bpf_stats_enabled is {}: it must be 0, for it slows programs alone",
            stats.trim()
        );
    }
    sweep_earlier();
    let handler = SigAction::new(
        SigHandler::Handler(stop),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &handler) }.context("cannot handle signals")?;
    }
    sweep::adopt_orphans().context("cannot become a subreaper")?;
    let unique = format!("{PREFIX}{}", std::process::id());
    let mut child = Command::new(std::env::current_exe()?)
        .args(child)
        .arg(&unique)
        // Where the time goes is in the daemon's log.
        .env("REMIT_LOG", "info,remit::daemon=debug")
        .spawn()
        .context("cannot start the bench")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if STOP.load(Ordering::Relaxed) {
            child.kill()?;
            child.wait()?;
            break None;
        }
        sleep(Duration::from_millis(20));
    };
    let mut left = sweep::kill_children();
    left.extend(sweep::remove_traces(
        &unique,
        &std::env::temp_dir().join(&unique),
    ));
    match status {
        Some(status) if status.success() && left.is_empty() => Ok(ExitCode::SUCCESS),
        Some(status) if status.success() => bail!("left behind: {}", left.join(", ")),
        Some(status) => bail!("the bench ended with {status}"),
        None => bail!("stopped by a signal"),
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// Removes cgroups of earlier runs that could not clean up, being killed.
fn sweep_earlier() {
    let Ok(mount) = cgroup::mount() else { return };
    for path in cgroup::find(&mount, PREFIX) {
        let owner = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix(PREFIX))
            .and_then(|rest| rest.split('.').next()?.parse::<i32>().ok());
        let runs =
            owner.is_some_and(|pid| nix::sys::signal::kill(Pid::from_raw(pid), None).is_ok());
        if !runs {
            cgroup::remove(&path);
        }
    }
}

/// The child: sets up the lanes and measures.
pub fn run(spec: &str, unique: &str) -> Result<ExitCode> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let text = fs::read_to_string(spec).with_context(|| format!("cannot read {spec}"))?;
    let spec: Spec = serde_json::from_str(&text).with_context(|| format!("cannot read {spec}"))?;
    let ctx = Ctx::enter(unique)?;
    let [server, client] = cpus()?;
    pin(server)?;
    say(&json!({ "host": host(server, client)? }));
    let object =
        fs::read(&spec.object).with_context(|| format!("cannot read {}", spec.object.display()))?;
    // Dropped after the lanes, whose cgroups are in it.
    let _top = Cgroup::create(&top(&ctx))?;
    let mut lanes = Vec::new();
    for lane in &spec.lanes {
        match lane::Lane::set_up(lane, &ctx, &object) {
            Ok(lane) => lanes.push(lane),
            // Only what is no part of this project may be missing, and it is said.
            Err(error) if matches!(lane.design, Design::Nft | Design::NftCt) => {
                say(&json!({ "missing": lane.name, "why": format!("{error:#}") }));
            }
            Err(error) => return Err(error.context(format!("lane {}", lane.name))),
        }
    }
    for lane in &lanes {
        if let Some((ready, resident)) = lane.fence.daemon()? {
            let ready = ready.as_millis() as u64;
            say(&json!({ "lane": lane.name, "ready_ms": ready, "resident_kib": resident }));
        }
    }
    for run in &spec.runs {
        drive::run(&spec, run, &lanes, client)
            .with_context(|| format!("workload {:?}", run.workload))?;
    }
    if !spec.statistics.is_empty() {
        // For the whole machine while the descriptor is open; never beside what is timed.
        let _enabled = aya::sys::enable_stats(aya::sys::Stats::RunTime)
            .context("the kernel does not count its programs' time")?;
        for run in &spec.statistics {
            drive::statistics(&spec, run, &lanes, client)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One result, as a line.
fn say(value: &serde_json::Value) {
    println!("{value}");
}

/// The two processors to use: one for servers and the daemon, one for the process that is timed.
/// A machine with one has both on it.
fn cpus() -> Result<[usize; 2]> {
    let set = nix::sched::sched_getaffinity(Pid::from_raw(0)).context("cannot tell processors")?;
    let mut allowed = (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true));
    let first = allowed.next().context("no processor")?;
    Ok([first, allowed.next().unwrap_or(first)])
}

/// Binds the calling thread, and all that it starts, to one processor.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    nix::sched::sched_setaffinity(Pid::from_raw(0), &set)
        .with_context(|| format!("cannot bind to processor {cpu}"))
}

/// What the numbers were measured on.
fn host(server: usize, client: usize) -> Result<serde_json::Value> {
    let names = nix::sys::utsname::uname()?;
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name)?.split_once(':'))
            .map_or_else(
                || "unknown".to_owned(),
                |(_, value)| value.trim().to_owned(),
            )
    };
    let processors = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    Ok(json!({
        "kernel": names.release().to_string_lossy(),
        "arch": names.machine().to_string_lossy(),
        "cpu": field("model name"),
        "cpus": processors,
        "server_cpu": server,
        "client_cpu": client,
        "load": load.split(' ').next().unwrap_or_default(),
    }))
}

/// Where the bench's own cgroups are, below the v2 mount.
fn top(ctx: &Ctx) -> String {
    format!("/{}.slice", ctx.unique())
}

/// Folder of a lane's files.
fn folder(ctx: &Ctx, lane: &str) -> Result<PathBuf> {
    let path: &Path = ctx.dir();
    let folder = path.join(lane);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}
