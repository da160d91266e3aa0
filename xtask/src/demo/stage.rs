//! What the demo stands on: a network, a folder, a bpffs and a cgroup of its own, and a daemon that
//! knows nothing else. All of it is gone afterwards, whatever happened in between.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    net::IpAddr,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
    unistd::Pid,
};
use tempfile::TempDir;

use super::{
    listener::Listener,
    netlink::{LO, add_address, link_up},
};
use crate::talk;

/// How long the daemon may take to load, attach and read back.
const START: Duration = Duration::from_secs(30);
/// How long a process may take to end when asked.
const END: Duration = Duration::from_secs(5);
/// The pause between two looks at something.
const LOOK: Duration = Duration::from_millis(50);

/// The demo's agent.
pub const AGENT: &str = "demo";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_signal(_: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Turns Ctrl-C and SIGTERM into an error of the next wait, so that cleaning up still happens.
pub fn catch_interrupts() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed at any moment.
        unsafe { sigaction(signal, &action) }
            .with_context(|| format!("cannot catch {}", signal.as_str()))?;
    }
    Ok(())
}

/// Waits until `done` says yes. False when `limit` passes first, an error when interrupted.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let began = Instant::now();
    loop {
        ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
        if done()? {
            return Ok(true);
        }
        if began.elapsed() >= limit {
            return Ok(false);
        }
        thread::sleep(LOOK);
    }
}

/// Enters a network of the demo's own: only `lo`, with `addresses` on it. Outside 127.0.0.0/8 and
/// ::1 they are as good as remote to Remit, and nothing can leave the machine. Mounts are the
/// demo's own, too: the last process in here takes them along. Returns the addresses that this
/// machine cannot have, for want of IPv6.
pub fn enter_network(addresses: &[IpAddr]) -> Result<Vec<IpAddr>> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("cannot enter new network and mount namespaces")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make mounts private")?;
    link_up(LO).context("cannot bring lo up")?;
    let mut lacking = Vec::new();
    for ip in addresses.iter().filter(|ip| !ip.is_loopback()) {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        match add_address(LO, *ip, length) {
            Err(_) if ip.is_ipv6() => lacking.push(*ip),
            added => added.with_context(|| format!("cannot add {ip} to lo"))?,
        }
    }
    Ok(lacking)
}

/// Everything the demo has made on this machine.
pub struct Stage {
    folder: TempDir,
    remit: PathBuf,
    /// Below the cgroup v2 mount, with a leading slash.
    slice: String,
    cgroups: PathBuf,
    mounted: bool,
    daemon: Option<Child>,
}

impl Stage {
    /// Makes the folder, the bpffs and the configuration. `remit` is the program to show.
    pub fn set(remit: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("remit-demo-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        let mut stage = Self {
            folder,
            remit: remit.to_owned(),
            slice: format!("/remit-demo-{}.slice", std::process::id()),
            cgroups: cgroup2_mount()?,
            mounted: false,
            daemon: None,
        };
        for part in ["agents.d", "sets.d", "run", "log", "state", "bpf"] {
            let part = stage.path(part);
            fs::create_dir(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let bpf = stage.path("bpf");
        mount(
            Some("bpf"),
            &bpf,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount a bpffs on {}", bpf.display()))?;
        stage.mounted = true;
        stage.write("remit.toml", &stage.settings())?;
        stage.write("floor.toml", "schema = 1\n")?;
        Ok(stage)
    }

    /// A path below the demo's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn settings(&self) -> String {
        let folder = self.folder.path().display();
        let slice = &self.slice;
        format!(
            r#"[paths]
registry = "{folder}/agents.d"
sets = ["{folder}/sets.d"]
floor = "{folder}/floor.toml"
run = "{folder}/run"
log = "{folder}/log"
state = "{folder}/state"
bpffs = "{folder}/bpf"

[enforcement]
roots = ["{slice}"]
containment = "off"

[dns]
enabled = false
"#
        )
    }

    /// Writes the agent's registry entry: exactly the listeners in scope, nothing else. Returns the
    /// part about its scope.
    pub fn register(&self, state: &str, listeners: &[Listener]) -> Result<String> {
        let slice = &self.slice;
        let mut grants: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
        for listener in listeners.iter().filter(|one| one.refused.is_none()) {
            let to = listener.destination;
            let port = format!("\"{}/{}\"", to.address.port(), to.protocol.word());
            grants.entry(to.address.ip()).or_default().push(port);
        }
        let scope: Vec<_> = grants
            .iter()
            .map(|(ip, ports)| {
                format!(
                    "[[scope.allow]]\nto = \"{ip}\"\nports = [{}]\n",
                    ports.join(", ")
                )
            })
            .collect();
        let scope = scope.join("\n");
        let entry = format!(
            r#"schema = 1

[agent]
id = "{AGENT}"
name = "Demo agent"
purpose = "Shows what Remit lets through and what it refuses"
owner = "alice@example.com"

[lifecycle]
state = "{state}"
approved_by = "dave@example.com"
expires = 2099-12-31T00:00:00Z

[selector]
cgroup = ["{slice}/{AGENT}.service"]

{scope}"#
        );
        self.write(&format!("agents.d/{AGENT}.toml"), &entry)?;
        Ok(scope)
    }

    /// Puts the sample agent's program, a copy of `own`, where every user can execute it.
    pub fn install(&self, own: &Path) -> Result<PathBuf> {
        let program = self.path("agent");
        let failed = || format!("cannot copy {} to {}", own.display(), program.display());
        fs::copy(own, &program).with_context(failed)?;
        // The daemon's own folders below stay its own.
        fs::set_permissions(self.folder.path(), fs::Permissions::from_mode(0o711))
            .with_context(failed)?;
        Ok(program)
    }

    /// `remit SUBCOMMAND --config …`, ready for more arguments.
    pub fn remit(&self, subcommand: &[&str]) -> Command {
        let mut command = Command::new(&self.remit);
        command
            .args(subcommand)
            .arg("--config")
            .arg(self.path("remit.toml"));
        command
    }

    /// Starts the daemon and waits until it says that it enforces.
    pub fn start_daemon(&mut self) -> Result<()> {
        let address = self.path("notify");
        let notify = UnixDatagram::bind(&address).context("cannot listen for READY")?;
        notify
            .set_nonblocking(true)
            .context("cannot listen for READY")?;
        let log = self.path("daemon.log");
        let file =
            fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = self.remit(&["daemon"]);
        command
            .env("NOTIFY_SOCKET", &address)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command
            .stderr(file)
            .spawn()
            .context("cannot start the daemon")?;
        let daemon = self.daemon.insert(child);
        let mut ended = None;
        let ready = wait_for(START, || {
            ended = daemon.try_wait().context("cannot watch the daemon")?;
            Ok(ended.is_some() || is_ready(&notify)?)
        });
        let said = || fs::read_to_string(&log).unwrap_or_default();
        match (ready?, ended) {
            (true, None) => Ok(()),
            (_, Some(status)) => bail!("the daemon ended with {status}; it said:\n{}", said()),
            (false, None) => {
                bail!(
                    "no READY=1 from the daemon in {} s; it said:\n{}",
                    START.as_secs(),
                    said()
                )
            }
        }
    }

    /// Takes everything away again and says what could not be.
    pub fn clear(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        let slice = self.cgroups.join(self.slice.trim_start_matches('/'));
        if slice.exists() {
            // Only processes that the demo started are below its own cgroup.
            let _ = fs::write(slice.join("cgroup.kill"), "1");
        }
        if let Some(mut daemon) = self.daemon.take() {
            stop(&mut daemon);
            let mut detach = self.remit(&["daemon", "--detach-all", "--yes"]);
            match detach.stdin(Stdio::null()).output() {
                Ok(output) if output.status.success() => {}
                Ok(output) => left.push(format!(
                    "`remit daemon --detach-all` ended with {}: {}",
                    output.status,
                    String::from_utf8_lossy(&output.stderr).trim()
                )),
                Err(error) => left.push(format!("cannot run remit to detach: {error}")),
            }
        }
        // A cgroup is busy for a moment after its last process ended.
        let began = Instant::now();
        while let Err(error) = remove_cgroups(&slice) {
            if began.elapsed() > END {
                left.push(format!("cannot remove {}: {error}", slice.display()));
                break;
            }
            thread::sleep(LOOK);
        }
        if self.mounted {
            self.mounted = false;
            if let Err(error) = umount2(&self.path("bpf"), MntFlags::MNT_DETACH) {
                left.push(format!(
                    "cannot unmount {}: {error}",
                    self.path("bpf").display()
                ));
            }
        }
        left
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for problem in self.clear() {
            talk::note(&problem);
        }
    }
}

/// Whether the daemon has sent READY=1. systemd's protocol: variables, one a line.
fn is_ready(notify: &UnixDatagram) -> Result<bool> {
    let mut buffer = [0; 4096];
    loop {
        match notify.recv(&mut buffer) {
            Ok(length) => {
                let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                if text.lines().any(|line| line == "READY=1") {
                    return Ok(true);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error).context("cannot read the daemon's notification"),
        }
    }
}

/// Asks `child` to end, and insists after a while.
pub fn stop(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // Not yet waited for, so the pid is still this child's, also when it has ended.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let began = Instant::now();
    while began.elapsed() < END {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(LOOK);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Removes a cgroup and those below it; one that is not there is removed.
fn remove_cgroups(cgroup: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// Where cgroup v2 is mounted: not always at the top.
fn cgroup2_mount() -> Result<PathBuf> {
    let text =
        fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    cgroup2_in(&text).context("no cgroup v2 is mounted, and Remit governs nothing without it")
}

fn cgroup2_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let place = before.split(' ').nth(4)?;
        (after.split(' ').next()? == "cgroup2").then(|| PathBuf::from(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_mount_is_found_below_a_hybrid_one() {
        let text = "24 1 0:22 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw\n\
                    25 24 0:23 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            cgroup2_in(text),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(
            cgroup2_in("24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"),
            None
        );
    }

    #[test]
    fn ready_is_one_variable_among_others() {
        let folder = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(folder.path().join("n")).unwrap();
        notify.set_nonblocking(true).unwrap();
        let daemon = UnixDatagram::unbound().unwrap();
        daemon.connect(folder.path().join("n")).unwrap();
        daemon.send(b"STATUS=loading\nNOTREADY=1").unwrap();
        assert!(!is_ready(&notify).unwrap());
        daemon.send(b"STATUS=enforcing\nREADY=1\n").unwrap();
        assert!(is_ready(&notify).unwrap());
    }
}
