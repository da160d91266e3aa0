//! A lane: one design in a cgroup and a network of its own, and the process that works there.
//! All lanes are set up alike, so that nothing but the design tells them apart.

use std::{
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::{
    Design, LaneSpec, Shape,
    design::Fence,
    net::{Net, OUTSIDE},
    top,
    worker::{Done, Order},
};
use crate::support::{Cgroup, Ctx};

/// A design that is ready to be measured.
pub struct Lane {
    /// Its name.
    pub name: String,
    /// What it is.
    pub design: Design,
    /// What it looks up.
    pub shape: Shape,
    /// Its network.
    pub net: Net,
    /// What is around it. Dropped before the cgroup that it is on.
    pub fence: Fence,
    work: PathBuf,
    _root: Cgroup,
}

/// A process that works. Dropping it ends it.
pub struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

// === impl Lane ===

impl Lane {
    /// Sets one up.
    pub fn set_up(spec: &LaneSpec, ctx: &Ctx, object: &[u8]) -> Result<Self> {
        let path = format!("{}/{}", top(ctx), spec.name);
        let root = Cgroup::create(&path)?;
        let mut work = root.path().join("agent.service");
        for level in 1..spec.shape.depth {
            work.push(format!("level{level}"));
        }
        std::fs::create_dir_all(&work)
            .with_context(|| format!("cannot create {}", work.display()))?;
        let net = Net::create()?;
        let fence = Fence::put_up(spec, ctx, object, &root, &path, &net)?;
        Ok(Self {
            name: spec.name.clone(),
            design: spec.design,
            shape: spec.shape,
            net,
            fence,
            work,
            _root: root,
        })
    }

    /// Starts a process in it, on this processor.
    pub fn worker(&self, cpu: usize) -> Result<Worker> {
        let procs = self.work.join("cgroup.procs");
        let procs = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let namespace = self.net.namespace.try_clone()?;
        let enter = move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            nix::unistd::write(procs.as_fd(), b"0")?;
            Ok(())
        };
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["bench-worker", &cpu.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: two system calls on descriptors that are open already; nothing is allocated, as
        // other threads may hold the allocator's lock in the moment of the fork.
        unsafe { command.pre_exec(enter) };
        let mut child = command.spawn().context("cannot start a worker")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("no output")?;
        Ok(Worker {
            child,
            orders,
            answers: BufReader::new(answers),
        })
    }

    /// Sees that the design does what it is measured for: what is in scope passes, and what is not
    /// is refused, if the design fences at all.
    pub fn prove(&self, worker: &mut Worker) -> Result<()> {
        let inside = self.shape.hot();
        let done = worker.ask(&Order::Probe {
            to: vec![inside, OUTSIDE],
        })?;
        self.net.drain();
        let fences = match self.design {
            Design::Nothing | Design::Floor | Design::Refuse => false,
            Design::Remit | Design::PerPacket | Design::Systemd | Design::Nft | Design::NftCt => {
                true
            }
        };
        let wanted = [0, if fences { libc::EPERM } else { 0 }];
        if done.errors != wanted {
            bail!(
                "{}: datagrams to {inside} and {OUTSIDE} gave errors {:?}, wanted {wanted:?}",
                self.name,
                done.errors
            );
        }
        Ok(())
    }
}

// === impl Worker ===

impl Worker {
    /// Gives an order and takes the answer.
    pub fn ask(&mut self, order: &Order) -> Result<Done> {
        let mut line = serde_json::to_string(order)?;
        line.push('\n');
        let orders = self.orders.as_mut().context("the worker has ended")?;
        orders.write_all(line.as_bytes())?;
        orders.flush()?;
        let mut answer = String::new();
        if self.answers.read_line(&mut answer)? == 0 {
            bail!("the worker ended without an answer");
        }
        Ok(serde_json::from_str(&answer)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders = None;
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
