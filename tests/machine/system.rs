//! Hands on the machine: commands, units, registry entries and what they came to.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    agent::{Counts, Lane},
    ear,
};
use crate::support::{
    Agent, Line, Status, claim, eventually, expect,
    remit::{Output, output_within},
};

/// The program of the agents, on the machine's own disk, where the first units find it.
pub const PROGRAM: &str = "/usr/local/bin/remit-tests";
/// The slice of all agents.
pub const SLICE: &str = "/agents.slice";
const LOGS: &str = "/var/log/remit";
/// What the last process beside the driver complained of.
const BESIDE: &str = "/var/lib/remit-check/beside.log";
const UNITS: &str = "/etc/systemd/system";

/// Runs a shell command; what it says if it succeeds.
pub fn sh(command: &str) -> Result<String> {
    let said = attempt(command)?;
    if said.code != 0 {
        bail!(
            "`{command}` exits {}: {} {}",
            said.code,
            said.stdout.trim(),
            said.stderr.trim()
        );
    }
    Ok(said.stdout.trim().to_owned())
}

/// Runs a shell command to its end, whatever it comes to.
pub fn attempt(command: &str) -> Result<Output> {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", command])
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8");
    output_within(&mut shell, Duration::from_secs(200))
}

/// A property of a unit.
pub fn property(unit: &str, name: &str) -> Result<String> {
    sh(&format!("systemctl show -P {name} {unit}"))
}

/// A moment of a unit, in microseconds of the monotonic clock.
pub fn moment_us(unit: &str, name: &str) -> Result<u64> {
    let text = property(unit, &format!("{name}Monotonic"))?;
    text.parse()
        .with_context(|| format!("{unit}: {name} is `{text}`"))
}

/// Writes a unit file; `systemctl daemon-reload` is the caller's.
pub fn unit(name: &str, text: &str) -> Result<()> {
    let path = Path::new(UNITS).join(name);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// How an agent's unit is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    /// In the slice of the agents; else beside it, as a twin that nothing stops.
    pub sliced: bool,
    /// With `remit guard` before it.
    pub guarded: bool,
    /// As early in the boot as a unit can be.
    pub early: bool,
}

/// The unit `NAME.service`, an agent.
pub fn agent_unit(name: &str, setup: Setup) -> Result<()> {
    let early = if setup.early {
        // Only that it may be heard, and has something to execute.
        "DefaultDependencies=no\nAfter=remit-ear.service\nBefore=sysinit.target\n"
    } else {
        ""
    };
    let slice = if setup.sliced {
        "Slice=agents.slice\n"
    } else {
        ""
    };
    let guard = if setup.guarded {
        "ExecStartPre=+remit guard --unit %n\n"
    } else {
        ""
    };
    let target = if setup.early {
        "sysinit.target"
    } else {
        "multi-user.target"
    };
    unit(
        &format!("{name}.service"),
        &format!(
            "[Unit]\nDescription=Agent {name}\n{early}[Service]\n{slice}{guard}\
             ExecStart={PROGRAM} machine-agent {name}\n[Install]\nWantedBy={target}\n"
        ),
    )
}

/// Writes the standard entry of `name`, with other selectors than its unit if given, and has it
/// loaded.
pub fn register(name: &str, selectors: &[&str]) -> Result<()> {
    let agent = selectors
        .iter()
        .fold(Agent::standard(name), |agent, selector| {
            agent.selector(selector)
        });
    entry(&agent)?;
    sh("systemctl reload remit.service")?;
    // A reload by signal is over when the registry shows it.
    eventually(5, || remit(&["agents", name]).map(drop))
}

/// Writes an entry as editors do.
pub fn entry(agent: &Agent) -> Result<()> {
    let folder = Path::new("/etc/remit/agents.d");
    let beside = folder.join(format!(".{}.new", agent.id));
    fs::write(&beside, agent.toml(SLICE))?;
    fs::rename(&beside, folder.join(format!("{}.toml", agent.id)))
        .with_context(|| format!("cannot write the entry of {}", agent.id))
}

/// `remit ARGS`, which must succeed.
pub fn remit(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("/usr/bin/remit");
    let said = output_within(command.args(arguments), Duration::from_secs(60))?;
    if said.code != 0 {
        bail!(
            "remit {} exits {}: {} {}",
            arguments.join(" "),
            said.code,
            said.stdout.trim(),
            said.stderr.trim()
        );
    }
    Ok(said.stdout)
}

/// Waits until the daemon says that everything is enforced, but for containment, which no build has
/// yet.
pub fn enforcing() -> Result<()> {
    eventually(15, || {
        let status = status()?.0;
        let reasons = status["reasons"].as_array().cloned().unwrap_or_default();
        let only = reasons.iter().all(|reason| {
            let reason = reason.as_str().unwrap_or_default();
            reason.starts_with("containment")
        });
        claim(status["posture"] != "not_enforcing" && only, || {
            format!("{} because of {reasons:?}", status["posture"])
        })
    })
}

/// `remit status --json`.
pub fn status() -> Result<Status> {
    let mut command = Command::new("/usr/bin/remit");
    Status::parse(&output_within(
        command.args(["status", "--json"]),
        Duration::from_secs(60),
    )?)
}

/// Denied attempts of an agent that the violation logs tell of, rotated ones included, and a line.
pub fn logged(agent: &str) -> Result<(u64, Vec<Line>)> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(LOGS).with_context(|| format!("cannot list {LOGS}"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("violations.jsonl") {
            lines.extend(Line::read_all(&path)?);
        }
    }
    lines.retain(|line| line.is_denial() && line.agent() == agent);
    Ok((lines.iter().map(Line::count).sum(), lines))
}

/// The kernel's counter for an agent and the log tell the same number of denials, and it is that
/// many at least. The agent must have ended.
pub fn accounted(agent: &str, at_least: u64) -> Result<Vec<Line>> {
    eventually(8, || {
        let counted = status()?.denied(agent, None)?;
        let (told, lines) = logged(agent)?;
        expect(&format!("denials of {agent} in the log"), told, counted)?;
        claim(told >= at_least, || {
            format!("{agent} was refused {at_least} times, and the log tells of {told}")
        })?;
        Ok(lines)
    })
}

/// What an agent that has run long enough has counted.
pub fn settled(name: &str, rounds: u64) -> Result<Counts> {
    let before = Counts::read(name).map_or(0, |counts| counts.rounds);
    eventually(15, || {
        let counts = Counts::read(name)?;
        claim(counts.rounds >= before.max(1) + rounds, || {
            format!("{name} does not go on: {counts:?}")
        })?;
        Ok(counts)
    })
}

/// Nothing of the agent got out of scope, from its first attempt on: by what the kernel told the
/// agent, and by what arrived.
pub fn fenced(name: &str) -> Result<Counts> {
    let counts = settled(name, 3)?;
    for lane in counts.side(true) {
        claim(
            lane.passed == 0 && lane.other == 0 && lane.refused > 0 && lane.refused_first,
            || format!("{name}: {lane:?}"),
        )?;
    }
    silent(name)?;
    Ok(counts)
}

/// Nothing of the agent has arrived out of scope, nor anything that did not say whose it is.
pub fn silent(name: &str) -> Result<()> {
    let heard = ear::listen()?;
    claim(
        heard.of("out", name) == 0 && ear::nameless(&heard) == 0,
        || {
            format!(
                "the ear heard {name} or somebody without a name out of scope: {:?}",
                heard.out()
            )
        },
    )
}

/// From now on all that is in scope passes and arrives.
pub fn in_scope_passes(name: &str) -> Result<()> {
    eventually(15, || {
        let before = Counts::read(name)?;
        let heard = ear::listen()?.of("in", name);
        let after = settled(name, 3)?;
        for (old, new) in before.side(false).zip(after.side(false)) {
            claim(
                new.passed >= old.passed + 2
                    && new.refused == old.refused
                    && new.other == old.other,
                || format!("{name}: {old:?}, then {new:?}"),
            )?;
        }
        let now = ear::listen()?.of("in", name);
        claim(now >= heard + 6, || {
            format!("of {name} {heard} had arrived, then {now}")
        })
    })
}

/// The sum over lanes.
pub fn sum<'a>(lanes: impl Iterator<Item = &'a Lane>, of: impl Fn(&Lane) -> u64) -> u64 {
    lanes.map(of).sum()
}

/// An agent that ran on through something that it must not have noticed.
pub struct Steady {
    name: String,
    before: Counts,
}

impl Steady {
    /// Takes note of where it is.
    pub fn note(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            before: settled(name, 1)?,
        })
    }

    /// It is the same process, went on reaching what it may, and nothing else.
    pub fn held(&self) -> Result<String> {
        let name = &self.name;
        let after = fenced(name)?;
        expect("its process", after.pid, self.before.pid)?;
        for (old, new) in self.before.side(false).zip(after.side(false)) {
            claim(
                new.passed > old.passed && new.refused == old.refused && new.other == old.other,
                || format!("{name} was disturbed: {old:?}, then {new:?}"),
            )?;
        }
        let passed = sum(after.side(false), |lane| lane.passed)
            - sum(self.before.side(false), |lane| lane.passed);
        let refused = sum(after.side(true), |lane| lane.refused)
            - sum(self.before.side(true), |lane| lane.refused);
        Ok(format!(
            "{passed} attempts in scope passed meanwhile, {refused} out of scope were refused, \
             none the other way"
        ))
    }
}

/// A process that is started beside the driver, and ended with its guard.
pub struct Beside(Child);

impl Beside {
    /// Starts a shell command.
    pub fn start(command: &str) -> Result<Self> {
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(BESIDE).with_context(|| format!("cannot make {BESIDE}"))?)
            .spawn()
            .with_context(|| format!("cannot start {command}"))?;
        Ok(Self(child))
    }

    /// Waits for its end; its exit code.
    pub fn end(mut self, secs: u64) -> Result<i32> {
        eventually(secs, || {
            let status = self.0.try_wait()?.context("it does not end")?;
            Ok(crate::support::remit::code(status))
        })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The first process of the daemon, once it runs and is ready.
pub fn daemon() -> Result<u32> {
    eventually(15, || {
        let pid: u32 = property("remit.service", "MainPID")?.parse()?;
        let state = property("remit.service", "ActiveState")?;
        claim(pid != 0 && state == "active", || {
            format!("remit.service is {state}, its process {pid}")
        })?;
        Ok(pid)
    })
}

/// What a failed case leaves for its reader.
pub fn explain() {
    let units = "remit.service remit-fence.service agents.slice";
    for command in [
        format!("systemctl --no-pager --full -n 0 status {units}"),
        "journalctl --no-pager -b -n 25 -o short-monotonic -u 'remit*' -u 'agents*'".to_owned(),
        "tail -n 3 /var/log/remit/violations.jsonl".to_owned(),
        format!("tail -n 10 {BESIDE}"),
        "ls -R /sys/fs/bpf | head -n 40".to_owned(),
    ] {
        if let Ok(said) = attempt(&command) {
            for line in said.stdout.lines().chain(said.stderr.lines()) {
                super::console(&format!(
                    "    {}",
                    line.chars().take(700).collect::<String>()
                ));
            }
        }
    }
}
