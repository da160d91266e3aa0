//! `cargo xtask demo`: the main job before your eyes. A daemon on a cgroup of its own, an agent
//! that reaches what its entry grants and is refused the rest, the record of the refusals, and an
//! open connection that stops when the agent is suspended. Every outcome is checked.

mod agent;
mod listener;
mod stage;

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use nix::unistd::geteuid;

pub use self::agent::{Options as AgentOptions, command as agent_command};
use self::{
    agent::{BEAT, Destination, ECHOED, HOLDING, Protocol},
    listener::Listener,
    stage::{AGENT, Stage, wait_for},
};
use crate::{build, talk, workspace::Workspace};

/// How a refused attempt must look to the program that made it.
const REFUSED: &str = "EPERM";
/// A line for a refusal, also a folded one, is written within five seconds.
const REPORTED: Duration = Duration::from_secs(8);
/// The longest that a refused agent's process may take altogether.
const AGENT_TIME: Duration = Duration::from_secs(60);
/// What was on its way when the agent was suspended has arrived by then.
const SETTLED: Duration = Duration::from_secs(1);
/// How long nothing more may arrive.
const QUIET: Duration = Duration::from_secs(2);

/// What `cargo xtask demo` takes.
#[derive(Args)]
pub struct Options {
    /// Show this program instead of building one
    #[arg(long, value_name = "FILE")]
    remit: Option<PathBuf>,
}

/// Builds, then shows. As an ordinary user only the showing runs as root, after a question.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let remit = match &options.remit {
        Some(remit) => remit.clone(),
        None => {
            build::set_up(workspace)?;
            build::daemon(workspace)?;
            workspace.target.join("release/remit")
        }
    };
    let own = env::current_exe().context("cannot tell the path of this program")?;
    if !geteuid().is_root() {
        let remit = remit.display();
        let again = format!("sudo {} demo --remit {remit}", own.display());
        talk::step("loading programs into the kernel takes root");
        if !talk::ask(&format!("Run `{again}`?")) {
            bail!("not run; this shows the demo: {again}");
        }
        let mut sudo = Command::new("sudo");
        sudo.arg(&own)
            .arg("demo")
            .arg("--remit")
            .arg(remit.to_string());
        let status = sudo.status().context("cannot start sudo")?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    stage::catch_interrupts()?;
    let listeners = listeners()?;
    let mut stage = Stage::set(&remit, &listeners)?;
    let mut checks = Checks::default();
    let shown = show(&mut stage, &listeners, own, &mut checks);
    talk::step("cleaning up");
    let left = stage.clear();
    checks.check("nothing is left behind", left.is_empty(), &left.join("; "));
    shown?;
    Ok(checks.summary())
}

/// One service for each combination: TCP and UDP, both families, in scope and out of it.
fn listeners() -> Result<Vec<Listener>> {
    let near = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 10));
    let far = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 20));
    // There is one loopback address in IPv6: what is out of scope there differs by its port.
    let six = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let mut listeners = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for (ip, in_scope) in [(near, true), (far, false), (six, true), (six, false)] {
            listeners.push(Listener::start(protocol, ip, in_scope)?);
        }
    }
    Ok(listeners)
}

fn show(
    stage: &mut Stage,
    listeners: &[Listener],
    own: PathBuf,
    checks: &mut Checks,
) -> Result<()> {
    talk::step("starting the daemon on a cgroup of its own");
    stage.start_daemon()?;
    talk::note("READY: programs attached, maps filled and read back");

    talk::step("an agent tries what its entry grants, and what it does not");
    let all: Vec<_> = listeners
        .iter()
        .map(|listener| listener.destination)
        .collect();
    let said = attempts(stage, &own, &all)?;
    for listener in listeners {
        let destination = listener.destination;
        let got = said
            .iter()
            .find(|(to, _)| *to == destination)
            .map_or("nothing", |(_, got)| got);
        let (scope, wanted) = if listener.in_scope {
            ("in scope", ECHOED)
        } else {
            ("out of scope", REFUSED)
        };
        checks.check(
            &format!("{destination}, {scope}: {wanted}"),
            got == wanted,
            got,
        );
        if !listener.in_scope {
            let seen = listener.seen();
            let what = format!("{destination} saw nothing of it");
            checks.check(&what, seen == 0, &format!("{seen} connections and bytes"));
        }
    }

    talk::step("what the daemon recorded: remit tail");
    let refused: Vec<_> = listeners
        .iter()
        .filter(|listener| !listener.in_scope)
        .collect();
    let mut lines = String::new();
    wait_for(REPORTED, || {
        let output = stage.remit(&["tail"]).stdin(Stdio::null()).output()?;
        lines = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(refused
            .iter()
            .all(|listener| names(&lines, listener.destination)))
    })?;
    for line in lines.lines() {
        println!("    {line}");
    }
    for listener in refused {
        let destination = listener.destination;
        let what = format!("a line names {AGENT} and {destination}");
        checks.check(&what, names(&lines, destination), "no such line");
    }

    suspend(stage, listeners, &own, checks)
}

/// Whether a line of `remit tail` tells of the agent's attempt to reach `to`.
fn names(lines: &str, to: Destination) -> bool {
    let (ip, port) = (to.address.ip().to_string(), to.address.port().to_string());
    lines
        .lines()
        .any(|line| [AGENT, &ip, &port].iter().all(|word| line.contains(*word)))
}

/// Shows that an open connection carries nothing more once the agent is suspended.
fn suspend(
    stage: &Stage,
    listeners: &[Listener],
    own: &PathBuf,
    checks: &mut Checks,
) -> Result<()> {
    talk::step("the agent holds a connection open, and is suspended");
    let listener = listeners
        .iter()
        .find(|listener| listener.in_scope && listener.destination.protocol == Protocol::Tcp)
        .context("no TCP listener is in scope")?;
    let to = listener.destination;
    let mut agent = Agent::start(stage, own, &["hold", &to.to_string()])?;
    let first = agent.line(AGENT_TIME)?;
    ensure!(
        first == HOLDING,
        "the agent could not connect to {to}: it said `{first}`"
    );
    let before = listener.seen();
    thread::sleep(BEAT * 10);
    let flowed = listener.seen().saturating_sub(before);
    checks.check(
        "data flow over the open connection",
        flowed > 0,
        "none arrived",
    );

    let knows = stage
        .remit(&["suspend", "--help"])
        .output()?
        .status
        .success();
    let mut command = if knows {
        stage.remit(&["suspend", AGENT, "--reason", "shown in the demo"])
    } else {
        stage.register("suspended", listeners)?;
        stage.remit(&["reload"])
    };
    talk::note(if knows {
        "remit suspend"
    } else {
        "state = \"suspended\", then remit reload"
    });
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("cannot run remit")?;
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    checks.check("the suspension is accepted", output.status.success(), &why);

    thread::sleep(SETTLED);
    let settled = listener.seen();
    thread::sleep(QUIET);
    let more = listener.seen().saturating_sub(settled);
    checks.check(
        "nothing more arrives over it",
        more == 0,
        &format!("{more} bytes did"),
    );
    drop(agent);

    let said = attempts(stage, own, &[to])?;
    let got = said.first().map_or("nothing", |(_, got)| got);
    checks.check(&format!("{to}, suspended: {REFUSED}"), got == REFUSED, got);
    Ok(())
}

/// Lets the agent try `destinations`; what it got for each.
fn attempts(
    stage: &Stage,
    own: &PathBuf,
    destinations: &[Destination],
) -> Result<Vec<(Destination, String)>> {
    let texts: Vec<_> = destinations.iter().map(Destination::to_string).collect();
    let mut arguments = vec!["try"];
    arguments.extend(texts.iter().map(String::as_str));
    let mut agent = Agent::start(stage, own, &arguments)?;
    let mut said = Vec::new();
    for _ in destinations {
        let line = agent.line(AGENT_TIME)?;
        let (to, got) = line
            .split_once(' ')
            .with_context(|| format!("the agent said `{line}`"))?;
        println!("    {to:<24} {got}");
        said.push((to.parse()?, got.to_owned()));
    }
    Ok(said)
}

/// The sample agent under `remit run`. Its end is the end of its standard input: that reaches it
/// also when this program is killed.
struct Agent {
    run: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Agent {
    fn start(stage: &Stage, own: &PathBuf, arguments: &[&str]) -> Result<Self> {
        let mut command = stage.remit(&["run", "--agent", AGENT]);
        command.arg("--").arg(own).arg("demo-agent").args(arguments);
        let mut run = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start `remit run`")?;
        let input = run.stdin.take();
        let output = run.stdout.take().context("`remit run` has no output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { run, input, lines })
    }

    /// The next line that the agent says.
    fn line(&mut self, limit: Duration) -> Result<String> {
        let mut line = None;
        let mut ended = false;
        wait_for(limit, || {
            match self.lines.try_recv() {
                Ok(said) => line = Some(said),
                Err(mpsc::TryRecvError::Empty) => {}
                Err(mpsc::TryRecvError::Disconnected) => ended = true,
            }
            Ok(line.is_some() || ended)
        })?;
        match line {
            Some(line) => Ok(line),
            None if ended => {
                let status = self.run.wait().context("cannot wait for `remit run`")?;
                bail!("`remit run` ended with {status} before the agent had said everything")
            }
            None => bail!("the agent said nothing for {} s", limit.as_secs()),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.input.take());
        let ended = wait_for(Duration::from_secs(5), || {
            Ok(self.run.try_wait()?.is_some())
        });
        if !matches!(ended, Ok(true)) {
            stage::stop(&mut self.run);
        }
    }
}

/// What was promised, and whether it came so.
#[derive(Default)]
struct Checks {
    kept: usize,
    broken: Vec<String>,
}

impl Checks {
    /// Notes whether `promise` holds; `instead` says what came, for one that does not.
    fn check(&mut self, promise: &str, holds: bool, instead: &str) {
        if holds {
            self.kept += 1;
            println!("    ok      {promise}");
        } else {
            println!("    BROKEN  {promise}: {instead}");
            self.broken.push(format!("{promise}: {instead}"));
        }
    }

    fn summary(self) -> ExitCode {
        println!();
        for broken in &self.broken {
            println!("not as promised: {broken}");
        }
        let all = self.kept + self.broken.len();
        println!("demo: {} of {all} checks as promised", self.kept);
        if self.broken.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
