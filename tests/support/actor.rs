//! The other end of an actor: orders out, answers in. See `crate::actor`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::Cgroup;
use crate::actor::{Op, Reply};

/// A process inside a cgroup. Dropping it ends it.
pub struct Actor {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Actor {
    /// Starts one in `cgroup`, joined before exec; none: outside of any fence.
    pub fn spawn(cgroup: Option<&Cgroup>) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("actor")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(cgroup) = cgroup {
            let procs = cgroup.path().join("cgroup.procs");
            let join = move || std::fs::write(&procs, "0");
            // SAFETY: the case's process has one thread, so the child may allocate.
            unsafe { command.pre_exec(join) };
        }
        Self::start(command)
    }

    /// Starts `command`, which must end in an actor.
    pub fn start(mut command: Command) -> Result<Self> {
        let mut child = command.spawn().context("cannot start an actor")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("no output")?;
        Ok(Self {
            child,
            orders,
            answers: BufReader::new(answers),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order and takes the answer.
    pub fn ask(&mut self, op: &Op) -> Result<Reply> {
        self.tell(op)?;
        self.hear()
    }

    /// Gives an order.
    pub fn tell(&mut self, op: &Op) -> Result<()> {
        let orders = self.orders.as_mut().context("the actor has ended")?;
        let mut line = serde_json::to_string(op)?;
        line.push('\n');
        orders.write_all(line.as_bytes())?;
        Ok(orders.flush()?)
    }

    /// Takes the answer.
    pub fn hear(&mut self) -> Result<Reply> {
        let mut answer = String::new();
        if self.answers.read_line(&mut answer)? == 0 {
            bail!("the actor has ended without an answer");
        }
        Ok(serde_json::from_str(&answer)?)
    }

    /// Lets it end by itself; the exit code.
    pub fn finish(&mut self) -> Result<i32> {
        self.orders = None;
        Ok(super::remit::code(self.child.wait()?))
    }

    /// The same, for what must succeed; its value.
    pub fn must(&mut self, op: &Op) -> Result<usize> {
        let reply = self.ask(op)?;
        if reply.errno != 0 {
            bail!("{op:?}: {}", std::io::Error::from_raw_os_error(reply.errno));
        }
        Ok(usize::try_from(reply.value)?)
    }

    /// A socket.
    pub fn socket(&mut self, domain: i32, kind: i32, protocol: i32) -> Result<usize> {
        self.must(&Op::Socket {
            domain,
            kind,
            protocol,
        })
    }

    /// A TCP listener on `addr`; port 0 for any. Its number and address.
    pub fn listen(&mut self, addr: SocketAddr) -> Result<(usize, SocketAddr)> {
        let id = self.bound(addr, libc::SOCK_STREAM)?;
        self.must(&Op::Listen { id })?;
        Ok((id, self.local_addr(id)?))
    }

    /// A bound socket.
    pub fn bound(&mut self, addr: SocketAddr, kind: i32) -> Result<usize> {
        let domain = if addr.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let id = self.socket(domain, kind, 0)?;
        self.must(&Op::Bind { id, addr })?;
        Ok(id)
    }

    /// Where a socket is bound.
    pub fn local_addr(&mut self, id: usize) -> Result<SocketAddr> {
        self.ask(&Op::LocalAddr { id })?.addr.context("no address")
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.orders = None;
        // It may have been killed by the test.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
