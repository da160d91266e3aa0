//! The process inside the fence: it does what it is told, one JSON order a line on standard
//! input, and answers each with what the kernel said and how long it took. It judges nothing.
//!
//! An actor is an exec of this binary after the join, so all of its sockets are made inside. It
//! stays alive until its input ends, so that the daemon can read who it is.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use serde::{Deserialize, Serialize};

mod brief;
pub mod lookup;
pub mod socket;
pub mod traffic;
pub mod uring;

use lookup::Manner;
use socket::Socket;

use crate::support::netlink::{LO, add_address, link_up};

/// No argument of mount(2).
const NOTHING: Option<&str> = None;

/// One thing to do. Sockets are named by the numbers that `Socket` and `Accept` answer with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Makes a socket.
    Socket {
        domain: i32,
        kind: i32,
        protocol: i32,
    },
    /// Binds it.
    Bind { id: usize, addr: SocketAddr },
    /// Listens.
    Listen { id: usize },
    /// Takes a connection.
    Accept { id: usize, timeout_ms: u64 },
    /// Sets an option to raw bytes.
    SetOption {
        id: usize,
        level: i32,
        name: i32,
        value: Vec<u8>,
    },
    /// Connects; what is not settled by the deadline is ETIMEDOUT.
    Connect {
        id: usize,
        addr: SocketAddr,
        timeout_ms: u64,
    },
    /// Connects by io_uring.
    UringConnect { id: usize, addr: SocketAddr },
    /// Sends on a connected socket.
    Send { id: usize, data: Vec<u8> },
    /// Sends to an address, `repeat` times; the value is how often it was refused with EPERM.
    SendTo {
        id: usize,
        addr: SocketAddr,
        data: Vec<u8>,
        flags: i32,
        repeat: u32,
    },
    /// Sends one message to each address by one sendmmsg; the value is how many went.
    SendMany {
        id: usize,
        addrs: Vec<SocketAddr>,
        data: Vec<u8>,
    },
    /// Receives.
    Recv { id: usize, timeout_ms: u64 },
    /// Receives, and says where it is from.
    RecvFrom { id: usize, timeout_ms: u64 },
    /// Asks a resolver; the value is the answer's code.
    Lookup {
        domain: i32,
        manner: Manner,
        via: SocketAddr,
        question: Vec<u8>,
        timeout_ms: u64,
    },
    /// Looks names up and connects to each at once; the value is how many went well.
    LookupMany {
        via: SocketAddr,
        names: Vec<String>,
        port: u16,
    },
    /// So many at a time look one name up without pause; the value is how often.
    LookupRate {
        via: SocketAddr,
        name: String,
        millis: u64,
        askers: usize,
    },
    /// Asks for IPv4 and IPv6 addresses as Go's resolver does; the answers are the answers, by
    /// value 0 over UDP and 1 over TCP.
    LookupLikeGo {
        via: SocketAddr,
        name: String,
        timeout_ms: u64,
    },
    /// Asks the C library for a host's address.
    GetAddrInfo { host: String },
    /// Where it is bound.
    LocalAddr { id: usize },
    /// Sends a frame on a packet socket, out of a device.
    SendFrame {
        id: usize,
        device: i32,
        ethertype: u16,
        data: Vec<u8>,
    },
    /// Closes it.
    Close { id: usize },
    /// Does `ops` in a child: forked and executed anew, or only forked.
    Child { ops: Vec<Op>, exec: bool },
    /// Receives a socket from a unix socket at `path`.
    ReceiveSocket { path: String },
    /// Sends for a while without pause; the value is how often it was refused with EPERM, the
    /// first answer's value how often it was not.
    Flood {
        id: usize,
        addr: SocketAddr,
        data: Vec<u8>,
        millis: u64,
    },
    /// The same to ever another of 15 million destinations that begin with this one, and at most
    /// so many a second; 0 is without pause.
    Scatter {
        id: usize,
        addr: SocketAddr,
        data: Vec<u8>,
        millis: u64,
        per_second: u32,
    },
    /// Forks so many processes, one after the other, that name themselves `brief-PID`, connect and
    /// end; the value is how many were refused with EPERM, the answers' values how long each lived
    /// in nanoseconds.
    Brief { addr: SocketAddr, count: u32 },
    /// Whether a descriptor that it did not open itself is there: EBADF if not.
    Inherited { fd: i32 },
    /// Its own process id.
    Pid,
    /// Enters a new network namespace with these addresses on `lo`.
    NewNetwork { addrs: Vec<(IpAddr, u8)> },
    /// Enters a new mount namespace where this is `/etc/resolv.conf`.
    NewResolv { path: String },
    /// Enters the network namespace of a process.
    EnterNetwork { pid: u32 },
    /// Leaves a child behind in a session of its own, whose parent has gone; its process id.
    Daemonise,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// 0, or the error number.
    pub errno: i32,
    /// How long the call took, in milliseconds.
    pub ms: f64,
    /// A socket's number, a count of bytes or messages: as the order says.
    pub value: i64,
    /// Bytes received.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<u8>,
    /// An address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<SocketAddr>,
    /// The child's pid and its answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replies: Vec<Reply>,
}

/// An actor's sockets.
#[derive(Default)]
struct Actor {
    sockets: BTreeMap<usize, Socket>,
    next: usize,
}

/// `remit-tests actor`.
pub fn serve() -> Result<ExitCode> {
    let mut actor = Actor::default();
    let mut out = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let op: Op = serde_json::from_str(&line?).context("cannot read an order")?;
        serde_json::to_writer(&mut out, &actor.act(&op))?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `remit-tests probe ORDERS`: a list of orders as an argument, a list of answers as output.
pub fn probe(orders: &str) -> Result<ExitCode> {
    let ops: Vec<Op> = serde_json::from_str(orders).context("cannot read the orders")?;
    let replies = Actor::default().act_all(&ops);
    println!("{}", serde_json::to_string(&replies)?);
    Ok(ExitCode::SUCCESS)
}

// === impl Actor ===

impl Actor {
    /// Does the orders of a list; socket numbers count up from 0.
    fn act_all(&mut self, ops: &[Op]) -> Vec<Reply> {
        ops.iter().map(|op| self.act(op)).collect()
    }

    fn act(&mut self, op: &Op) -> Reply {
        let started = Instant::now();
        let mut reply = match self.attempt(op) {
            Ok(reply) => reply,
            Err(errno) => Reply {
                errno: errno as i32,
                ..Reply::default()
            },
        };
        reply.ms = started.elapsed().as_secs_f64() * 1000.0;
        reply
    }

    fn attempt(&mut self, op: &Op) -> nix::Result<Reply> {
        match op {
            Op::Socket {
                domain,
                kind,
                protocol,
            } => {
                let socket = Socket::open(*domain, *kind, *protocol)?;
                Ok(self.keep(socket))
            }
            Op::Bind { id, addr } => self.socket(*id)?.bind(*addr).map(|()| value(0)),
            Op::Listen { id } => self.socket(*id)?.listen().map(|()| value(0)),
            Op::Accept { id, timeout_ms } => {
                let socket = self.socket(*id)?.accept(*timeout_ms)?;
                Ok(self.keep(socket))
            }
            Op::SetOption {
                id,
                level,
                name,
                value: bytes,
            } => self
                .socket(*id)?
                .set_option(*level, *name, bytes)
                .map(|()| value(0)),
            Op::Connect {
                id,
                addr,
                timeout_ms,
            } => self
                .socket(*id)?
                .connect(*addr, *timeout_ms)
                .map(|()| value(0)),
            Op::UringConnect { id, addr } => {
                uring::connect(self.socket(*id)?, *addr).map(|()| value(0))
            }
            Op::Send { id, data } => self.socket(*id)?.send(data).map(value),
            Op::SendTo {
                id,
                addr,
                data,
                flags,
                repeat,
            } => {
                let socket = self.socket(*id)?;
                send_repeatedly(socket, *addr, data, *flags, *repeat)
            }
            Op::SendMany { id, addrs, data } => self.socket(*id)?.send_many(addrs, data).map(value),
            Op::Recv { id, timeout_ms } => {
                let data = self.socket(*id)?.recv(*timeout_ms)?;
                Ok(Reply {
                    data,
                    ..Reply::default()
                })
            }
            Op::RecvFrom { id, timeout_ms } => {
                let (data, from) = self.socket(*id)?.recv_from(*timeout_ms)?;
                Ok(Reply {
                    data,
                    addr: Some(from),
                    ..Reply::default()
                })
            }
            Op::Lookup {
                domain,
                manner,
                via,
                question,
                timeout_ms,
            } => lookup::one(*domain, *manner, *via, question, *timeout_ms),
            Op::LookupMany { via, names, port } => Ok(lookup::many(*via, names, *port)),
            Op::LookupRate {
                via,
                name,
                millis,
                askers,
            } => lookup::rate(*via, name, Duration::from_millis(*millis), *askers),
            Op::LookupLikeGo {
                via,
                name,
                timeout_ms,
            } => Ok(lookup::like_go(*via, name, *timeout_ms)),
            Op::GetAddrInfo { host } => lookup::by_libc(host),
            Op::LocalAddr { id } => Ok(Reply {
                addr: Some(self.socket(*id)?.local_addr()?),
                ..Reply::default()
            }),
            Op::SendFrame {
                id,
                device,
                ethertype,
                data,
            } => self
                .socket(*id)?
                .send_frame(*device, *ethertype, data)
                .map(value),
            Op::Close { id } => {
                self.sockets.remove(id).ok_or(Errno::EBADF)?;
                Ok(value(0))
            }
            Op::Child { ops, exec: true } => child_by_exec(ops),
            Op::Child { ops, exec: false } => child_by_fork(ops),
            Op::ReceiveSocket { path } => {
                let socket = Socket::receive(path)?;
                Ok(self.keep(socket))
            }
            Op::Flood {
                id,
                addr,
                data,
                millis,
            } => flood(self.socket(*id)?, data, *millis, 0, |_| *addr),
            Op::Scatter {
                id,
                addr,
                data,
                millis,
                per_second,
            } => flood(self.socket(*id)?, data, *millis, *per_second, |number| {
                another(*addr, number)
            }),
            Op::Brief { addr, count } => brief::live(*addr, *count),
            Op::Inherited { fd } => {
                // SAFETY: asks for the flags of a number, whatever it stands for.
                Errno::result(unsafe { libc::fcntl(*fd, libc::F_GETFD) }).map(|_| value(0))
            }
            Op::Pid => Ok(Reply {
                value: i64::from(std::process::id()),
                ..Reply::default()
            }),
            Op::NewNetwork { addrs } => new_network(addrs).map(|()| value(0)),
            Op::NewResolv { path } => {
                unshare(CloneFlags::CLONE_NEWNS)?;
                let keep = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(NOTHING, "/", NOTHING, keep, NOTHING)?;
                let over = "/etc/resolv.conf";
                mount(
                    Some(path.as_str()),
                    over,
                    NOTHING,
                    MsFlags::MS_BIND,
                    NOTHING,
                )?;
                Ok(value(0))
            }
            Op::EnterNetwork { pid } => {
                let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(errno_of)?;
                setns(namespace, CloneFlags::CLONE_NEWNET).map(|()| value(0))
            }
            Op::Daemonise => daemonise(),
        }
    }

    fn socket(&self, id: usize) -> nix::Result<&Socket> {
        self.sockets.get(&id).ok_or(Errno::EBADF)
    }

    fn keep(&mut self, socket: Socket) -> Reply {
        let id = self.next;
        self.next += 1;
        self.sockets.insert(id, socket);
        value(id)
    }
}

fn value(value: usize) -> Reply {
    Reply {
        value: i64::try_from(value).unwrap_or(i64::MAX),
        ..Reply::default()
    }
}

fn send_repeatedly(
    socket: &Socket,
    addr: SocketAddr,
    data: &[u8],
    flags: i32,
    repeat: u32,
) -> nix::Result<Reply> {
    if repeat == 1 {
        return socket.send_to(addr, data, flags).map(value);
    }
    let mut refused = 0;
    for _ in 0..repeat {
        match socket.send_to(addr, data, flags) {
            Ok(_) => {}
            Err(Errno::EPERM) => refused += 1,
            Err(errno) => return Err(errno),
        }
    }
    Ok(value(refused))
}

/// The destination with this number: 60,000 ports of each of 250 IPv4 addresses.
fn another(first: SocketAddr, number: u64) -> SocketAddr {
    let port = 1 + (number % 60_000) as u16;
    match first.ip() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            let last = 1 + (number / 60_000 % 250) as u8;
            SocketAddr::from(([a, b, c, last], port))
        }
        IpAddr::V6(ip) => SocketAddr::from((ip, port)),
    }
}

fn flood(
    socket: &Socket,
    data: &[u8],
    millis: u64,
    per_second: u32,
    to: impl Fn(u64) -> SocketAddr,
) -> nix::Result<Reply> {
    let began = Instant::now();
    let until = began + Duration::from_millis(millis);
    let (mut refused, mut passed, mut made) = (0, 0, 0_u64);
    loop {
        let now = Instant::now();
        if now >= until {
            break;
        }
        let due = now.duration_since(began).as_secs_f64() * f64::from(per_second);
        if per_second > 0 && made as f64 > due {
            std::thread::sleep(Duration::from_micros(100));
            continue;
        }
        let number = made;
        made += 1;
        match socket.send_to(to(number), data, 0) {
            Err(Errno::EPERM) => refused += 1,
            // A full socket buffer means that the fence let it through.
            Ok(_) | Err(Errno::EAGAIN | Errno::ECONNREFUSED) => passed += 1,
            Err(errno) => return Err(errno),
        }
    }
    Ok(Reply {
        replies: vec![value(passed)],
        ..value(refused)
    })
}

fn new_network(addrs: &[(IpAddr, u8)]) -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    link_up(LO).map_err(errno_of)?;
    for (ip, prefix) in addrs {
        add_address(LO, *ip, *prefix).map_err(errno_of)?;
    }
    Ok(())
}

/// The double fork of old daemons.
fn daemonise() -> nix::Result<Reply> {
    let (mut reader, mut writer) = std::io::pipe().map_err(errno_of)?;
    // SAFETY: an actor has one thread, so the child may do whatever the parent might.
    if let nix::unistd::ForkResult::Parent { child } = unsafe { nix::unistd::fork() }? {
        drop(writer);
        nix::sys::wait::waitpid(child, None)?;
        let mut pid = [0; 4];
        reader.read_exact(&mut pid).map_err(errno_of)?;
        return Ok(Reply {
            value: i64::from(u32::from_ne_bytes(pid)),
            ..Reply::default()
        });
    }
    // It cannot fail in a child that leads no group.
    let _ = nix::unistd::setsid();
    // SAFETY: as above.
    if let Ok(nix::unistd::ForkResult::Parent { .. }) = unsafe { nix::unistd::fork() } {
        // SAFETY: ends the child without running the parent's destructors a second time.
        unsafe { libc::_exit(0) }
    }
    drop(writer.write_all(&std::process::id().to_ne_bytes()));
    drop(writer);
    // It must not keep the pipes of its ancestors open: they would wait for it.
    let _ = nix::unistd::close(0);
    let _ = nix::unistd::close(1);
    let _ = nix::unistd::close(2);
    std::thread::sleep(Duration::from_secs(120));
    // SAFETY: as above.
    unsafe { libc::_exit(0) }
}

fn child_by_exec(ops: &[Op]) -> nix::Result<Reply> {
    let orders = serde_json::to_string(ops).map_err(|_| Errno::EINVAL)?;
    let child = Command::new("/proc/self/exe")
        .args(["probe", &orders])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(errno_of)?;
    let pid = child.id();
    let output = child.wait_with_output().map_err(errno_of)?;
    let replies = serde_json::from_slice(&output.stdout).map_err(|_| Errno::EPROTO)?;
    Ok(Reply {
        value: i64::from(pid),
        replies,
        ..Reply::default()
    })
}

fn child_by_fork(ops: &[Op]) -> nix::Result<Reply> {
    let (reader, writer) = std::io::pipe().map_err(errno_of)?;
    // SAFETY: an actor has one thread, so the child may do whatever the parent might.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            drop(reader);
            let replies = Actor::default().act_all(ops);
            drop(serde_json::to_writer(writer, &replies));
            // SAFETY: ends the child without running the parent's destructors a second time.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            drop(writer);
            let replies = serde_json::from_reader(reader).map_err(|_| Errno::EPROTO)?;
            nix::sys::wait::waitpid(child, None)?;
            Ok(Reply {
                value: i64::from(child.as_raw()),
                replies,
                ..Reply::default()
            })
        }
    }
}

fn errno_of(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
