//! The process whose work is timed. It lives in a lane's cgroup and namespace, bound to one
//! processor, and waits for orders: a line of JSON in, a line of JSON out. Between orders it
//! sleeps. An operation with another outcome than the workload's ends it: numbers of something
//! that did not happen are worth nothing.

use std::{
    io::{BufRead as _, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, connect, send, sendto, setsockopt,
        socket, sockopt,
    },
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};

use super::{
    Workload,
    net::{DISCARD, ECHO, OUTSIDE, PORT},
};

/// Bytes of a datagram.
const PAYLOAD: [u8; 32] = [0x52; 32];
/// Bytes of one bulk write.
const CHUNK: usize = 64 << 10;

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Gets ready: destinations of what follows.
    Prepare {
        /// The workload of what follows.
        workload: Workload,
        /// Destinations, used in turn.
        to: Vec<Ipv4Addr>,
    },
    /// Works for so long.
    Slice {
        /// In microseconds.
        micros: u64,
    },
    /// Sends one datagram to each, and tells the errors.
    Probe {
        /// Destinations.
        to: Vec<Ipv4Addr>,
    },
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Operations.
    pub ops: u64,
    /// Processor time of the thread.
    pub cpu_ns: u64,
    /// Time.
    pub wall_ns: u64,
    /// Of a probe: the error of each send, 0 for none.
    pub errors: Vec<i32>,
}

/// `remit-tests bench-worker CPU`.
pub fn serve(cpu: &str) -> Result<ExitCode> {
    super::pin(cpu.parse().context("no processor number")?)?;
    let mut task: Option<Task> = None;
    for line in std::io::stdin().lock().lines() {
        let done = match serde_json::from_str(&line?)? {
            Order::Prepare { workload, to } => {
                task = Some(Task::prepare(workload, &to)?);
                Done::default()
            }
            Order::Slice { micros } => {
                let task = task.as_mut().context("nothing is prepared")?;
                slice(task, micros * 1000)?
            }
            Order::Probe { to } => probe(&to)?,
        };
        let mut out = std::io::stdout().lock();
        serde_json::to_writer(&mut out, &done)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn probe(to: &[Ipv4Addr]) -> Result<Done> {
    let socket = open(SockType::Datagram)?;
    let errors = to
        .iter()
        .map(|ip| {
            let sent = sendto(
                socket.as_raw_fd(),
                &PAYLOAD,
                &at(*ip, PORT),
                MsgFlags::empty(),
            );
            sent.map_or_else(|error| error as i32, |_| 0)
        })
        .collect();
    Ok(Done {
        errors,
        ..Done::default()
    })
}

/// Sockets and destinations of a workload.
enum Task {
    Connect(SockaddrIn),
    Send {
        socket: OwnedFd,
        to: Vec<SockaddrIn>,
        next: usize,
    },
    Connected(OwnedFd),
    Exchange(TcpStream),
    Deny(OwnedFd, SockaddrIn),
    Bulk(TcpStream, Vec<u8>),
}

/// Works until the time is up.
fn slice(task: &mut Task, wall: u64) -> Result<Done> {
    let (cpu_start, start) = (clock(ClockId::CLOCK_THREAD_CPUTIME_ID)?, now()?);
    let batch = task.batch();
    let mut ops = 0;
    let end = loop {
        for _ in 0..batch {
            task.step()?;
        }
        ops += batch;
        let time = now()?;
        if time - start >= wall {
            break time;
        }
    };
    Ok(Done {
        ops,
        cpu_ns: clock(ClockId::CLOCK_THREAD_CPUTIME_ID)? - cpu_start,
        wall_ns: end - start,
        errors: Vec::new(),
    })
}

fn now() -> Result<u64> {
    clock(ClockId::CLOCK_MONOTONIC)
}

fn clock(id: ClockId) -> Result<u64> {
    let time = clock_gettime(id)?;
    Ok(u64::try_from(time.tv_sec())? * 1_000_000_000 + u64::try_from(time.tv_nsec())?)
}

fn open(kind: SockType) -> Result<OwnedFd> {
    socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).context("cannot make a socket")
}

fn at(ip: Ipv4Addr, port: u16) -> SockaddrIn {
    SockaddrIn::from(SocketAddrV4::new(ip, port))
}

// === impl Task ===

impl Task {
    fn prepare(workload: Workload, to: &[Ipv4Addr]) -> Result<Self> {
        let first = *to.first().context("no destination")?;
        Ok(match workload {
            Workload::Connect => Self::Connect(at(first, PORT)),
            Workload::UdpSend | Workload::LiveSet | Workload::ColdSet => Self::Send {
                socket: open(SockType::Datagram)?,
                to: to.iter().map(|ip| at(*ip, PORT)).collect(),
                next: 0,
            },
            Workload::UdpConnected => {
                let socket = open(SockType::Datagram)?;
                connect(socket.as_raw_fd(), &at(first, PORT)).context("cannot connect")?;
                Self::Connected(socket)
            }
            Workload::RequestResponse => {
                let stream = TcpStream::connect((first, ECHO)).context("cannot connect")?;
                stream.set_nodelay(true)?;
                Self::Exchange(stream)
            }
            Workload::Deny => Self::Deny(open(SockType::Stream)?, at(OUTSIDE, PORT)),
            Workload::Bulk => {
                let stream = TcpStream::connect((first, DISCARD)).context("cannot connect")?;
                Self::Bulk(stream, vec![0x52; CHUNK])
            }
        })
    }

    /// Operations between two looks at the clock: enough that the clock costs nothing beside
    /// them.
    fn batch(&self) -> u64 {
        match self {
            Self::Connect(_) => 4,
            Self::Send { .. } | Self::Connected(_) | Self::Deny(..) => 16,
            Self::Exchange(_) | Self::Bulk(..) => 1,
        }
    }

    fn step(&mut self) -> Result<()> {
        match self {
            Self::Connect(to) => {
                let socket = open(SockType::Stream)?;
                // Closing resets: no TIME_WAIT is left, which would exhaust the ports.
                let linger = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                setsockopt(&socket, sockopt::Linger, &linger)?;
                connect(socket.as_raw_fd(), to).context("connect failed")?;
            }
            Self::Send { socket, to, next } => {
                let destination = to.get(*next).context("no destination")?;
                *next = if *next + 1 == to.len() { 0 } else { *next + 1 };
                sendto(socket.as_raw_fd(), &PAYLOAD, destination, MsgFlags::empty())
                    .context("sendto failed")?;
            }
            Self::Connected(socket) => {
                send(socket.as_raw_fd(), &PAYLOAD, MsgFlags::empty()).context("send failed")?;
            }
            Self::Exchange(stream) => {
                let mut byte = [0x52];
                stream.write_all(&byte).context("no request")?;
                stream.read_exact(&mut byte).context("no response")?;
            }
            Self::Deny(socket, to) => match connect(socket.as_raw_fd(), to) {
                Err(Errno::EPERM | Errno::ECONNREFUSED) => {}
                Err(error) => bail!("not refused, but: {error}"),
                Ok(()) => bail!("connected, though out of scope"),
            },
            Self::Bulk(stream, chunk) => stream.write_all(chunk).context("bulk write failed")?,
        }
        Ok(())
    }
}
