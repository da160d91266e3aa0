//! `cargo xtask demo`: the main job before your eyes. A daemon on a cgroup of its own, an agent
//! that reaches what its entry grants and is refused the rest, the record of the refusals, and an
//! open connection that stops when the agent is suspended. Every outcome is checked.
//!
//! What is shown goes to stdout, what prepares it to stderr.

mod agent;
mod listener;
#[path = "../../../tests/support/netlink.rs"]
#[allow(dead_code, reason = "the suite uses the rest of it")]
mod netlink;
mod stage;

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
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
    agent::{Destination, ECHOED, HOLDING, Protocol},
    listener::Listener,
    stage::{AGENT, Stage, wait_for},
};
use crate::{build, talk, workspace::Workspace};

/// What the demo's agent tries: a protocol, an address, and the reason why it is refused; none
/// where its entry grants it. The addresses are those that are set aside for documentation.
const TARGETS: [(Protocol, &str, Option<&str>); 9] = [
    (Protocol::Tcp, "198.51.100.10:443", None),
    (Protocol::Udp, "198.51.100.10:53", None),
    (Protocol::Tcp, "[2001:db8:1::10]:443", None),
    (Protocol::Udp, "[2001:db8:1::10]:53", None),
    (Protocol::Tcp, "203.0.113.20:443", Some("out_of_scope")),
    (Protocol::Udp, "203.0.113.20:53", Some("out_of_scope")),
    (Protocol::Tcp, "[2001:db8:2::20]:443", Some("out_of_scope")),
    (Protocol::Udp, "[2001:db8:2::20]:53", Some("out_of_scope")),
    (Protocol::Tcp, "127.0.0.1:5432", Some("loopback_foreign")),
];

/// How a refused attempt must look to the program that made it.
const REFUSED: &str = "EPERM";
/// A line for a refusal, also a folded one, is written within five seconds.
const REPORTED: Duration = Duration::from_secs(8);
/// The longest that a refused agent's process may take altogether.
const AGENT_TIME: Duration = Duration::from_secs(60);
/// How long data may flow before the agent is suspended.
const FLOW: Duration = Duration::from_millis(500);
/// What was on its way when the agent was suspended has arrived by then.
const SETTLED: Duration = Duration::from_millis(300);
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
    let mut stage = Stage::set(&remit)?;
    let mut checks = Checks::default();
    let shown = show(&mut stage, &listeners, &own, &mut checks);
    let left = stage.clear();
    checks.check("nothing is left behind", left.is_empty(), &left.join("; "));
    shown?;
    Ok(checks.summary())
}

/// A service for each target, in a network of the demo's own.
fn listeners() -> Result<Vec<Listener>> {
    let mut targets = Vec::new();
    for (protocol, address, refused) in TARGETS {
        let address: SocketAddr = address
            .parse()
            .with_context(|| format!("`{address}` is no address"))?;
        targets.push((protocol, address, refused));
    }
    let mut addresses: Vec<IpAddr> = targets.iter().map(|(_, at, _)| at.ip()).collect();
    addresses.sort();
    addresses.dedup();
    let lacking = stage::enter_network(&addresses)?;
    if !lacking.is_empty() {
        talk::note("this machine has no IPv6: shown for IPv4 only");
    }
    targets
        .into_iter()
        .filter(|(_, at, _)| !lacking.contains(&at.ip()))
        .map(|(protocol, at, refused)| Listener::start(protocol, at, refused))
        .collect()
}

fn show(stage: &mut Stage, listeners: &[Listener], own: &Path, checks: &mut Checks) -> Result<()> {
    let program = stage.install(own)?;
    let scope = stage.register("active", listeners)?;
    title("The registry entry of agent `demo` grants this, and nothing else:");
    print!("{}", indented(&scope));
    stage.start_daemon()?;

    title("`remit run --agent demo` starts it. It tries:");
    let all: Vec<_> = listeners
        .iter()
        .map(|listener| listener.destination)
        .collect();
    let (agent, said) = attempts(stage, &program, &all)?;
    for (listener, (to, got)) in listeners.iter().zip(&said) {
        let words = to.words();
        let seen = listener.seen();
        if listener.refused.is_none() {
            println!("    {words:<26} granted  {got}");
            checks.check(&format!("{words} answers"), got == ECHOED, got);
        } else {
            let arrived = if seen == 0 {
                "nothing arrived there"
            } else {
                "something arrived there"
            };
            println!("    {words:<26} refused  {got}, {arrived}");
            checks.check(&format!("{words} is refused at once"), got == REFUSED, got);
            let what = format!("nothing arrives at {words}");
            checks.check(&what, seen == 0, &format!("{seen} connections and bytes"));
        }
    }

    title(
        "What was recorded of it. `remit tail` prints when, who, where to, why and by which process:",
    );
    let refused: Vec<_> = listeners
        .iter()
        .filter_map(|listener| Some((listener.destination, listener.refused?)))
        .collect();
    let lines = tail(stage, &refused)?;
    drop(agent);
    print!("{}", indented(&lines));
    for (to, why) in refused {
        let what = format!("a line says {why} of {}", to.words());
        checks.check(&what, names(&lines, to, why), "no such line");
    }

    suspend(stage, listeners, &program, checks)
}

fn title(text: &str) {
    println!("\n{text}\n");
}

fn indented(lines: &str) -> String {
    lines
        .lines()
        .map(|line| match line {
            "" => "\n".to_owned(),
            line => format!("    {line}\n"),
        })
        .collect()
}

/// What `remit tail` prints once it tells of all `refused`, or after a while.
fn tail(stage: &Stage, refused: &[(Destination, &str)]) -> Result<String> {
    let mut lines = String::new();
    wait_for(REPORTED, || {
        let output = stage.remit(&["tail"]).stdin(Stdio::null()).output()?;
        lines = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(refused.iter().all(|(to, why)| names(&lines, *to, why)))
    })?;
    Ok(lines)
}

/// Whether a line of `remit tail` says that the agent was refused `to`, and `why`.
fn names(lines: &str, to: Destination, why: &str) -> bool {
    let words = format!(" DENIED {AGENT} {} {why} ", to.words());
    lines.lines().any(|line| line.contains(&words))
}

/// Shows that an open connection carries nothing more once the agent is suspended.
fn suspend(
    stage: &Stage,
    listeners: &[Listener],
    program: &Path,
    checks: &mut Checks,
) -> Result<()> {
    let listener = listeners
        .iter()
        .find(|one| one.refused.is_none() && one.destination.protocol == Protocol::Tcp)
        .context("no TCP listener is in scope")?;
    let to = listener.destination;
    title(&format!(
        "The agent holds {} open and sends. Then its entry says state = \"suspended\":",
        to.words()
    ));
    let mut agent = Agent::start(stage, program, &["hold", &to.to_string()])?;
    let first = agent.line(AGENT_TIME)?;
    ensure!(
        first == HOLDING,
        "the agent could not connect to {to}: it said `{first}`"
    );
    let before = listener.seen();
    thread::sleep(FLOW);
    let flowed = listener.seen().saturating_sub(before);
    println!("    before  {flowed} bytes arrive in {FLOW:?}");
    checks.check("data flow over it", flowed > 0, "none arrived");

    stage.register("suspended", listeners)?;
    let output = stage
        .remit(&["reload"])
        .stdin(Stdio::null())
        .output()
        .context("cannot run remit")?;
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    checks.check("`remit reload` succeeds", output.status.success(), &why);

    thread::sleep(SETTLED);
    let settled = listener.seen();
    thread::sleep(QUIET);
    let more = listener.seen().saturating_sub(settled);
    println!("    after   {more} bytes arrive in {QUIET:?}");
    checks.check(
        "none flow after it",
        more == 0,
        &format!("{more} bytes did"),
    );
    let suspended = [(to, "suspended")];
    let lines = tail(stage, &suspended)?;
    if let Some(line) = lines.lines().find(|line| names(line, to, "suspended")) {
        println!("    {line}");
    }
    let told = names(&lines, to, "suspended");
    checks.check("a line says that it was suspended", told, "no such line");
    drop(agent);

    let (agent, said) = attempts(stage, program, &[to])?;
    drop(agent);
    let got = said.first().map_or("nothing", |(_, got)| got);
    println!("    anew    {} {got}", to.words());
    checks.check("a new connection is refused", got == REFUSED, got);
    Ok(())
}

/// Lets the agent try `destinations`; what it got for each. The agent stays until it is dropped.
fn attempts(
    stage: &Stage,
    program: &Path,
    destinations: &[Destination],
) -> Result<(Agent, Vec<(Destination, String)>)> {
    let texts: Vec<_> = destinations.iter().map(Destination::to_string).collect();
    let mut arguments = vec!["try"];
    arguments.extend(texts.iter().map(String::as_str));
    let mut agent = Agent::start(stage, program, &arguments)?;
    let mut said = Vec::new();
    for expected in destinations {
        let line = agent.line(AGENT_TIME)?;
        let (to, got) = line
            .split_once(' ')
            .with_context(|| format!("the agent said `{line}`"))?;
        let to: Destination = to.parse()?;
        ensure!(to == *expected, "the agent said `{line}` of {expected}");
        said.push((to, got.to_owned()));
    }
    Ok((agent, said))
}

/// The sample agent under `remit run`. Its end is the end of its standard input: that reaches it
/// also when this program is killed.
struct Agent {
    run: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Agent {
    fn start(stage: &Stage, program: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = stage.remit(&["run", "--agent", AGENT]);
        command
            .arg("--")
            .arg(program)
            .arg("demo-agent")
            .args(arguments);
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
        } else {
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
