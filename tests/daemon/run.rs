//! `remit run`: exits as its command does, fences it, tells what was refused, and leaves nothing
//! behind, however either of them ends.

use std::{
    ffi::{OsStr, OsString},
    fs,
    net::UdpSocket,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    actor::{Op, Reply},
    harness::Case,
    support::{
        Actor, Agent, Ctx, Family, Fixture, Way, cgroup, claim,
        daemon::{Place, Settings},
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        remit,
        way::PAYLOAD,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("run::exits_as_the_command_does", |ctx| {
            let world = World::lay(ctx)?;
            for code in [0, 1, 3, 42, 255] {
                let said = world.run(&["exit", &code.to_string()])?;
                expect("exit code", said.code, code)
                    .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
            }
            world.nothing_stays()
        }),
        Case::new("run::a_command_that_is_not_there", |ctx| {
            let world = World::lay(ctx)?;
            let mut command = world.place.command(&["run", "--policy"])?;
            command.arg(&world.policy).args(["--", "/no/such/command"]);
            let said = remit::output(&mut command)?;
            expect("exit code", said.code, 127)?;
            claim(said.stderr.contains("/no/such/command"), || {
                format!("the message does not name it: {}", said.stderr)
            })?;
            world.nothing_stays()
        }),
        Case::new("run::fences_and_tells", |ctx| {
            let world = World::lay(ctx)?;
            let mut wire = crate::support::wire::Wire::tap()?;
            let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            let orders = serde_json::to_string(&orders()?)?;
            let said = world.run(&["probe", &orders])?;
            expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
            let first = said.stdout.lines().next().unwrap_or_default();
            let replies: Vec<Reply> = serde_json::from_str(first)
                .with_context(|| format!("the command's own output comes first: {first}"))?;
            let errnos: Vec<i32> = replies.iter().map(|reply| reply.errno).collect();
            expect(
                "errnos (socket, out, in, socket, out)",
                errnos,
                vec![0, libc::EPERM, 0, 0, libc::EPERM],
            )?;
            let told = format!("{}{}", said.stdout, said.stderr);
            for word in [OUT_V4, "out_of_scope"] {
                claim(told.contains(word), || format!("{word} is not in {told}"))?;
            }
            let leaked = wire.drain()?.iter().any(|seen| seen.ip == out.ip());
            claim(!leaked, || "it reached the wire".to_owned())?;
            world.nothing_stays()
        }),
        Case::new("run::the_command_killed", |ctx| {
            let world = World::lay(ctx)?;
            let mut actor = world.actor()?;
            let pid = actor.must(&Op::Pid)?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            expect("exit code", actor.finish()?, 137)?;
            world.nothing_stays()
        }),
        Case::new("run::remit_killed_leaves_the_fence", |ctx| {
            let world = World::lay(ctx)?;
            let mut wire = crate::support::wire::Wire::tap()?;
            let mut actor = world.actor()?;
            let pid = Pid::from_raw(i32::try_from(actor.must(&Op::Pid)?)?);
            let child = Pid::from_raw(i32::try_from(actor.must(&Op::Daemonise)?)?);
            let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            kill(Pid::from_raw(i32::try_from(actor.pid())?), Signal::SIGKILL)?;
            // Its command may end with it, or go on inside the fence; nothing else.
            for way in Way::MAIN {
                match way.perform(&mut actor, Family::V4, out) {
                    Ok(tried) => expect("errno after the kill", tried.errno, libc::EPERM)?,
                    Err(_) => eventually(2, || claim(!alive(pid), || "alive".to_owned()))?,
                }
            }
            let leaked = wire.drain()?.iter().any(|seen| seen.ip == out.ip());
            claim(!leaked, || "it reached the wire".to_owned())?;
            // While somebody is inside, no command lifts the fence.
            if alive(child) {
                world.run(&["exit", "0"])?;
                claim(!world.pins()?.is_empty(), || {
                    "the fence was lifted while a process was inside".to_owned()
                })?;
            }
            for pid in [pid, child] {
                // It may have ended by itself.
                let _ = kill(pid, Signal::SIGKILL);
                eventually(3, || claim(!alive(pid), || "alive".to_owned()))?;
            }
            expect("the next command", world.run(&["exit", "0"])?.code, 0)?;
            world.nothing_stays()
        }),
        Case::new("run::remit_killed_by_sigterm_ends_the_command", |ctx| {
            let world = World::lay(ctx)?;
            let mut actor = world.actor()?;
            let pid = Pid::from_raw(i32::try_from(actor.must(&Op::Pid)?)?);
            kill(Pid::from_raw(i32::try_from(actor.pid())?), Signal::SIGTERM)?;
            actor.finish()?;
            eventually(3, || claim(!alive(pid), || "alive".to_owned()))?;
            world.nothing_stays()
        }),
        Case::new("run::daemonised_children_end_with_the_command", |ctx| {
            let world = World::lay(ctx)?;
            let orders = serde_json::to_string(&[Op::Daemonise])?;
            let said = world.run(&["probe", &orders])?;
            expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
            let first = said.stdout.lines().next().unwrap_or_default();
            let replies: Vec<Reply> = serde_json::from_str(first)?;
            let pid = replies.first().context("no answer")?.value;
            claim(pid > 0, || "nothing was daemonised".to_owned())?;
            claim(!alive(Pid::from_raw(i32::try_from(pid)?)), || {
                "the child outlived the run".to_owned()
            })?;
            world.nothing_stays()
        }),
        Case::new("run::loopback_own_works", |ctx| {
            let world = World::lay(ctx)?;
            let mut actor = world.actor()?;
            let (listener, to) = actor.listen("127.0.0.1:0".parse()?)?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
            actor.must(&Op::Connect {
                id,
                addr: to,
                timeout_ms: 3000,
            })?;
            actor.must(&Op::Accept {
                id: listener,
                timeout_ms: 3000,
            })?;
            expect("exit code", actor.finish()?, 0)?;
            world.nothing_stays()
        }),
        Case::new("run::hands_on_no_socket", |ctx| {
            let world = World::lay(ctx)?;
            let outside = UdpSocket::bind("0.0.0.0:0")?;
            let (from, to) = (outside.as_raw_fd(), 9);
            let orders = serde_json::to_string(&[Op::Inherited { fd: to }])?;
            let mut command = world.command(&["probe", &orders])?;
            let leave_open = move || {
                // SAFETY: two numbers; the copy has no close-on-exec.
                nix::errno::Errno::result(unsafe { libc::dup2(from, to) })?;
                Ok(())
            };
            // SAFETY: a system call on numbers, in a child of a process with one thread.
            unsafe { command.pre_exec(leave_open) };
            let said = remit::output(&mut command)?;
            expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
            let first = said.stdout.lines().next().unwrap_or_default();
            let replies: Vec<Reply> = serde_json::from_str(first)?;
            let found = replies.first().context("no answer")?.errno;
            expect("errno on the inherited descriptor", found, libc::EBADF)?;
            world.nothing_stays()
        }),
        Case::new("run::a_socket_as_stdin_starts_nothing", |ctx| {
            let world = World::lay(ctx)?;
            // The same without the socket starts: it is the socket that is refused.
            expect("exit code", world.run(&["probe", "[]"])?.code, 0)?;
            let outside = UdpSocket::bind("0.0.0.0:0")?;
            let mut command = world.command(&["probe", "[]"])?;
            let said = command.stdin(OwnedFd::from(outside)).output()?;
            claim(!said.status.success(), || "it ran".to_owned())?;
            expect("output of the command", said.stdout.is_empty(), true)?;
            claim(
                String::from_utf8_lossy(&said.stderr).contains("stdin"),
                || format!("the message does not say why: {said:?}"),
            )?;
            world.nothing_stays()
        }),
        Case::new("run::as_a_registered_agent", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let exe = std::env::current_exe()?;
            let mut command = fx.place().command(&["run", "--agent", "alpha", "--"])?;
            command
                .arg(&exe)
                .arg("actor")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            let mut actor = Actor::start(command)?;
            let pid = actor.must(&Op::Pid)?;
            let own = cgroup_of(pid)?;
            claim(own.starts_with(fx.cgroup("alpha")?.path()), || {
                format!("{} is not the agent's", own.display())
            })?;
            for way in Way::MAIN {
                let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
                fx.arrives(&mut actor, way, Family::V4, to)?;
                let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                let tried = way.perform(&mut actor, Family::V4, to)?;
                expect("errno", tried.errno, libc::EPERM)?;
            }
            expect("exit code", actor.finish()?, 0)?;
            fx.reconcile("alpha")
        }),
        Case::new(
            "run::as_a_suspended_agent_starts_and_reaches_nothing",
            |ctx| {
                let agent = Agent::standard("alpha").state("suspended");
                let fx = Fixture::start(ctx, &[agent])?;
                let exe = std::env::current_exe()?;
                let mut command = fx.place().command(&["run", "--agent", "alpha", "--"])?;
                let orders = serde_json::to_string(&orders()?)?;
                command.arg(&exe).args(["probe", &orders]);
                let said = remit::output(&mut command)?;
                expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
                let first = said.stdout.lines().next().unwrap_or_default();
                let replies: Vec<Reply> = serde_json::from_str(first)?;
                let errnos: Vec<i32> = replies.iter().map(|reply| reply.errno).collect();
                expect(
                    "errnos",
                    errnos,
                    vec![0, libc::EPERM, libc::EPERM, 0, libc::EPERM],
                )
            },
        ),
        Case::new("run::a_bad_policy_starts_nothing", |ctx| {
            let world = World::lay(ctx)?;
            fs::write(&world.policy, "schema = 1\n[agent]\nid = \"x\"\ntypo = 1\n")?;
            let said = world.run(&["exit", "0"])?;
            claim(said.code != 0, || "it ran".to_owned())?;
            claim(said.stderr.contains("typo"), || {
                format!("the message does not say why: {}", said.stderr)
            })?;
            world.nothing_stays()
        }),
        Case::new("run::beside_a_daemon", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let world = World::at(ctx, fx.place().clone())?;
            let mut alpha = fx.actor("alpha")?;
            let orders = serde_json::to_string(&orders()?)?;
            let said = world.run(&["probe", &orders])?;
            expect("exit code", said.code, 0).with_context(|| said.stderr.clone())?;
            // The daemon's own fence is as it was.
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut alpha, Way::Tcp, Family::V4, to)?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            let how = crate::support::Refusal::of("alpha", "out_of_scope");
            fx.refused(&mut alpha, Way::Tcp, Family::V4, to, &how)
        }),
    ]
}

/// A place without a daemon, and a policy whose agent's id no other cgroup has in its name.
pub struct World {
    place: Place,
    policy: PathBuf,
    id: String,
    root: String,
}

impl World {
    fn lay(ctx: &Ctx) -> Result<Self> {
        Self::at(ctx, Place::lay(ctx, &Settings::default())?)
    }

    fn at(ctx: &Ctx, place: Place) -> Result<Self> {
        Self::of(ctx, place, &Agent::standard(ctx.unique()))
    }

    /// One for this agent, whose id is the case's own name: the runner finds what is left behind by
    /// it.
    pub fn of(ctx: &Ctx, place: Place, agent: &Agent) -> Result<Self> {
        let id = agent.id.clone();
        let policy = ctx.dir().join(format!("{id}.toml"));
        fs::write(&policy, agent.toml(&ctx.root()))?;
        Ok(Self {
            place,
            policy,
            id,
            root: ctx.root(),
        })
    }

    /// `remit run --policy P -- remit-tests ARGS`.
    fn command(&self, args: &[&str]) -> Result<Command> {
        let exe: OsString = std::env::current_exe()?.into();
        let mut command = self.command_of(&exe)?;
        command.args(args);
        Ok(command)
    }

    /// `remit run --policy P -- PROGRAM`, to be given its arguments.
    pub fn command_of(&self, program: &OsStr) -> Result<Command> {
        let mut command = self.place.command(&["run", "--policy"])?;
        command.arg(&self.policy).arg("--").arg(program);
        Ok(command)
    }

    /// Runs this binary with `args` to its end.
    pub fn run(&self, args: &[&str]) -> Result<remit::Output> {
        remit::output(&mut self.command(args)?)
    }

    /// An actor as the command.
    pub fn actor(&self) -> Result<Actor> {
        let mut command = self.command(&["actor"])?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Actor::start(command)
    }

    /// What is pinned, by path.
    fn pins(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        files(&self.place.at("bpf"), &mut found);
        Ok(found)
    }

    /// No pins, and no cgroups but an empty root.
    pub fn nothing_stays(&self) -> Result<()> {
        eventually(3, || {
            let pins = self.pins()?;
            claim(pins.is_empty(), || format!("pins stay: {pins:?}"))?;
            let mut cgroups = Vec::new();
            for found in cgroup::find(&cgroup::mount()?, &self.id) {
                // An empty root may stay.
                if found.ends_with(self.root.trim_start_matches('/')) {
                    let inside = fs::read_dir(&found)?.flatten().map(|entry| entry.path());
                    cgroups.extend(inside.filter(|path| path.is_dir()));
                } else {
                    cgroups.push(found);
                }
            }
            claim(cgroups.is_empty(), || format!("cgroups stay: {cgroups:?}"))?;
            let run = self.place.at("bpf/run");
            let left: Vec<_> = fs::read_dir(run).into_iter().flatten().flatten().collect();
            claim(left.is_empty(), || {
                format!("folders of pins stay: {left:?}")
            })
        })?;
        for root in cgroup::find(&cgroup::mount()?, &self.id) {
            cgroup::remove(&root);
        }
        Ok(())
    }
}

/// What the kernel itself puts into every bpffs (kernel/bpf/preload).
const BORN_WITH_IT: [&str; 2] = ["maps.debug", "progs.debug"];

fn files(dir: &std::path::Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            files(&entry.path(), found);
        } else if !BORN_WITH_IT.iter().any(|name| entry.file_name() == *name) {
            found.push(entry.path());
        }
    }
}

/// UDP out of scope and in scope, TCP out of scope.
fn orders() -> Result<Vec<Op>> {
    let send_to = |addr| Op::SendTo {
        id: 0,
        addr,
        data: PAYLOAD.to_vec(),
        flags: 0,
        repeat: 1,
    };
    let out = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
    Ok(vec![
        Op::Socket {
            domain: libc::AF_INET,
            kind: libc::SOCK_DGRAM,
            protocol: 0,
        },
        send_to(out),
        send_to(Family::V4.pick(IN_V4, IN_V6, 443)?),
        Op::Socket {
            domain: libc::AF_INET,
            kind: libc::SOCK_STREAM,
            protocol: 0,
        },
        Op::Connect {
            id: 1,
            addr: out,
            timeout_ms: 3000,
        },
    ])
}

/// Whether a process runs; a zombie does not.
pub fn alive(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            let (_, tail) = stat.rsplit_once(')')?;
            Some(!tail.trim_start().starts_with('Z'))
        })
        .unwrap_or(false)
}

/// The cgroup that a process is in.
fn cgroup_of(pid: usize) -> Result<PathBuf> {
    let place = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = place
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("no cgroup")?;
    Ok(cgroup::mount()?.join(path))
}
