//! A daemon with paths of its own: started by its contract, waited for until `READY=1`, and
//! detached at the end.

use std::{
    fs::{self, File},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Agent, Ctx, Status,
    remit::{self, Output},
    scale,
};

/// Settings that cases change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `enforcement.unregistered`.
    pub unregistered: &'static str,
    /// `enforcement.on_bad_registry`.
    pub on_bad_registry: &'static str,
    /// The inside of `[dns]`.
    pub dns: String,
    /// More keys of `[enforcement]`.
    pub enforcement: &'static str,
    /// More TOML.
    pub more: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            unregistered: "deny",
            on_bad_registry: "keep",
            dns: "enabled = false\n".to_owned(),
            enforcement: "",
            more: String::new(),
        }
    }
}

/// Where a case's Remit lives.
#[derive(Clone, Debug)]
pub struct Place {
    dir: PathBuf,
    root: String,
}

/// A running daemon. Dropping it stops it and lifts what it has pinned.
pub struct Daemon {
    place: Place,
    child: Option<Child>,
    manager: Option<UnixDatagram>,
    patience: Duration,
}

// === impl Place ===

impl Place {
    /// Writes the settings; the registry is empty.
    pub fn lay(ctx: &Ctx, settings: &Settings) -> Result<Self> {
        Self::lay_in(ctx.dir(), &ctx.root(), settings)
    }

    /// The same in another folder, for this root.
    pub fn lay_in(dir: &Path, root: &str, settings: &Settings) -> Result<Self> {
        let place = Self {
            dir: dir.to_owned(),
            root: root.to_owned(),
        };
        for name in ["agents.d", "sets.d", "run", "log", "state", "bpf"] {
            fs::create_dir_all(place.dir.join(name))?;
        }
        let floor = place.dir.join("floor.toml");
        if !floor.exists() {
            fs::write(floor, "schema = 1\n")?;
        }
        let at = place.dir.display();
        let text = format!(
            "[paths]\nregistry = \"{at}/agents.d\"\nsets = [\"{at}/sets.d\"]\n\
             floor = \"{at}/floor.toml\"\nrun = \"{at}/run\"\nlog = \"{at}/log\"\n\
             state = \"{at}/state\"\nbpffs = \"{at}/bpf\"\n\
             [enforcement]\nroots = [\"{}\"]\nunregistered = \"{}\"\ncontainment = \"off\"\n\
             on_bad_registry = \"{}\"\n{}[dns]\n{}{}",
            place.root,
            settings.unregistered,
            settings.on_bad_registry,
            settings.enforcement,
            settings.dns,
            settings.more
        );
        fs::write(place.config(), text)?;
        Ok(place)
    }

    /// The settings file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("remit.toml")
    }

    /// A file or folder of it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The root that the settings name.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Writes an agent's file as editors do: beside it, then renamed over it.
    pub fn write(&self, agent: &Agent) -> Result<()> {
        self.write_raw(&agent.id, &agent.toml(&self.root))
    }

    /// Writes any text as an agent's file.
    pub fn write_raw(&self, id: &str, text: &str) -> Result<()> {
        let path = self.at("agents.d").join(format!("{id}.toml"));
        let beside = self.at("agents.d").join(format!(".{id}.new"));
        fs::write(&beside, text)?;
        fs::rename(&beside, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// `remit ARGS` with this place's settings.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        self.command_of(&remit::binary()?, args)
    }

    /// The same of another binary.
    pub fn command_of(&self, binary: &Path, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary);
        command.env("REMIT_CONFIG", self.config()).args(args);
        Ok(command)
    }

    /// Runs `remit ARGS` to its end.
    pub fn remit(&self, args: &[&str]) -> Result<Output> {
        remit::output(&mut self.command(args)?)
    }

    /// `remit status --json`.
    pub fn status(&self) -> Result<Status> {
        Status::parse(&self.remit(&["status", "--json"])?)
    }
}

// === impl Daemon ===

impl Daemon {
    /// Starts it and waits until it is ready.
    pub fn start(place: &Place) -> Result<Self> {
        Self::start_within(place, Duration::from_secs(scale::patience(30)))
    }

    /// The same, for a registry that takes longer.
    pub fn start_within(place: &Place, patience: Duration) -> Result<Self> {
        let mut daemon = Self {
            place: place.clone(),
            child: None,
            manager: None,
            patience,
        };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts it again after [`Self::kill`] or [`Self::terminate`].
    pub fn restart(&mut self) -> Result<()> {
        self.restart_with(&[])
    }

    /// The same with further arguments.
    pub fn restart_with(&mut self, further: &[&str]) -> Result<()> {
        self.restart_as(&remit::binary()?, further)
    }

    /// Starts another binary's daemon and waits until it is ready.
    pub fn restart_as(&mut self, binary: &Path, further: &[&str]) -> Result<()> {
        let command = self.place.command_of(binary, &["daemon"])?;
        self.launch_as(command, further)?;
        self.await_ready()
    }

    /// Starts another binary's daemon and kills it `after` so long, ready or not.
    pub fn start_and_kill(&mut self, binary: &Path, after: Duration) -> Result<()> {
        let command = self.place.command_of(binary, &["daemon"])?;
        self.launch_as(command, &[])?;
        sleep(after);
        self.kill()
    }

    /// Starts it, and does not wait.
    pub fn launch(&mut self, further: &[&str]) -> Result<()> {
        let command = self.place.command(&["daemon"])?;
        self.launch_as(command, further)
    }

    /// Starts `command`, which must be a daemon with this place's settings, and does not wait.
    pub fn launch_as(&mut self, mut command: Command, further: &[&str]) -> Result<()> {
        let notify = self.place.at("notify");
        drop(fs::remove_file(&notify));
        let ready = UnixDatagram::bind(&notify)?;
        ready.set_read_timeout(Some(Duration::from_millis(20)))?;
        let err = self.place.at("daemon.err");
        let child = command
            .args(further)
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(File::options().create(true).append(true).open(&err)?)
            .stderr(File::options().create(true).append(true).open(&err)?)
            .spawn()
            .context("cannot start the daemon")?;
        self.child = Some(child);
        self.manager = Some(ready);
        Ok(())
    }

    /// Waits until it says `READY=1`.
    pub fn await_ready(&mut self) -> Result<()> {
        let (Some(child), Some(ready)) = (&mut self.child, &self.manager) else {
            bail!("no daemon was started");
        };
        let err = self.place.at("daemon.err");
        let until = Instant::now() + self.patience;
        let mut buffer = [0; 4096];
        while Instant::now() < until {
            if let Ok(length) = ready.recv(&mut buffer) {
                let said = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                if said.lines().any(|line| line == "READY=1") {
                    return Ok(());
                }
            }
            if let Some(status) = child.try_wait()? {
                self.child = None;
                bail!(
                    "the daemon ended before it was ready: {status}: {}",
                    tail(&err)
                );
            }
        }
        bail!(
            "the daemon is not ready after {} s: {}",
            self.patience.as_secs(),
            tail(&err)
        )
    }

    /// How often it tells the service manager `what` within this time.
    pub fn heard(&self, what: &str, within: Duration) -> Result<usize> {
        let manager = self.manager.as_ref().context("no daemon was started")?;
        let until = Instant::now() + within;
        let mut buffer = [0; 4096];
        let mut times = 0;
        while Instant::now() < until {
            if let Ok(length) = manager.recv(&mut buffer) {
                let said = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                times += said.lines().filter(|line| *line == what).count();
            }
        }
        Ok(times)
    }

    /// Its place.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its process id.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.child.as_ref().context("no daemon runs")?.id())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("no daemon runs")?;
        Ok(kill(Pid::from_raw(i32::try_from(child.id())?), signal)?)
    }

    /// Kills it at once: what it has pinned stays in force.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Ends it in order; its exit code.
    pub fn terminate(&mut self) -> Result<i32> {
        let Some(mut child) = self.child.take() else {
            bail!("no daemon runs");
        };
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
        let until = Instant::now() + Duration::from_secs(scale::patience(10));
        while Instant::now() < until {
            if let Some(status) = child.try_wait()? {
                return Ok(remit::code(status));
            }
            sleep(Duration::from_millis(5));
        }
        child.kill()?;
        child.wait()?;
        bail!("the daemon does not end on SIGTERM")
    }

    /// Lifts what is pinned.
    pub fn detach(&self) -> Result<Output> {
        self.place.remit(&["daemon", "--detach-all", "--yes"])
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() {
            drop(self.terminate());
        }
        // The private bpffs takes the pins along in any case, with the last process here.
        drop(self.detach());
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(5))
        .copied()
        .collect::<Vec<_>>()
        .join(" / ")
}
