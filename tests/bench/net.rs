//! A lane's network: a namespace with `lo` alone, on which a whole network of destinations is
//! local, and the servers there. The servers' sockets are of no fenced cgroup, so what is timed is
//! one side of the traffic only.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
        sockopt,
    },
};

use super::Shape;
use crate::support::netlink::{LO, add_address, link_up};

/// Port of the listener and of the datagram sink.
pub const PORT: u16 = 443;
/// Port of the server that sends back what it gets.
pub const ECHO: u16 = 7;
/// Port of the server that throws away what it gets.
pub const DISCARD: u16 = 9;
/// In nobody's scope.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Destinations of the workload that keeps to a few.
pub const LIVE: u32 = 32;
/// Destinations of the workload that no cache holds.
pub const COLD: u32 = 65_536;
/// Room for the datagrams of one slice.
const RECEIVE_BUFFER: usize = 256 << 20;

/// A namespace with its servers.
pub struct Net {
    /// The namespace, to be entered.
    pub namespace: File,
    listener: TcpListener,
    sink: UdpSocket,
}

// === impl Shape ===

impl Shape {
    /// The destination with this number, and its prefix length.
    pub fn destination(&self, number: u32) -> (Ipv4Addr, u8) {
        const NET: u32 = 10 << 24;
        if self.hosts {
            // Spread: no two share a cache line of anything sorted by address.
            (Ipv4Addr::from_bits(NET + 16 + 3 * number), 32)
        } else {
            (Ipv4Addr::from_bits(NET + 16 + 16 * number), 28)
        }
    }

    /// One address in the middle of the scope.
    pub fn hot(&self) -> Ipv4Addr {
        self.destination(self.prefixes / 2).0
    }

    /// Addresses spread over the scope.
    pub fn live(&self) -> Vec<Ipv4Addr> {
        (0..LIVE)
            .map(|index| {
                let number = u64::from(index) * u64::from(self.prefixes) / u64::from(LIVE);
                self.destination(number as u32).0
            })
            .collect()
    }

    /// Many, in an order that no prefetcher guesses.
    pub fn cold(&self) -> Vec<Ipv4Addr> {
        (0..COLD)
            .map(|index| {
                // An odd factor: each number below the power of two comes once.
                let number = index.wrapping_mul(40_503) % COLD;
                self.destination(number % self.prefixes.max(1)).0
            })
            .collect()
    }
}

// === impl Net ===

impl Net {
    /// Makes one. The calling thread stays where it is.
    pub fn create() -> Result<Self> {
        thread::spawn(Self::create_here)
            .join()
            .map_err(|_| anyhow!("the thread that makes a namespace panicked"))?
    }

    fn create_here() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        link_up(LO).context("cannot bring lo up")?;
        for (ip, prefix) in [([10, 0, 0, 1], 8), ([203, 0, 113, 1], 24)] {
            add_address(LO, ip.into(), prefix).context("cannot add an address to lo")?;
        }
        let path = "/proc/sys/net/core/somaxconn";
        fs::write(path, "65535").with_context(|| format!("cannot write {path}"))?;
        let listener = listen_at(PORT)?;
        listener.set_nonblocking(true)?;
        let sink = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        sink.set_nonblocking(true)?;
        setsockopt(&sink, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .context("cannot enlarge the sink's buffer")?;
        serve(listen_at(ECHO)?, echo);
        serve(listen_at(DISCARD)?, discard);
        Ok(Self {
            namespace: File::open("/proc/thread-self/ns/net")?,
            listener,
            sink,
        })
    }

    /// Takes away what a slice has left. Connections were reset by the client, so this sends
    /// nothing.
    pub fn drain(&self) {
        while self.listener.accept().is_ok() {}
        let mut buffer = [0; 64];
        while self.sink.recv(&mut buffer).is_ok() {}
    }
}

/// A listener with the longest queue: a slice's connections wait there until it is over.
fn listen_at(port: u16) -> Result<TcpListener> {
    let fd: OwnedFd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    bind(fd.as_raw_fd(), &any).with_context(|| format!("cannot bind port {port}"))?;
    listen(&fd, Backlog::MAXALLOWABLE)?;
    Ok(fd.into())
}

/// Serves each connection in a thread. They end with the process.
fn serve(listener: TcpListener, with: fn(TcpStream)) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || with(stream));
        }
    });
}

fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    // Without it the answer waits for more. It fails only on a socket that is gone already.
    drop(stream.set_nodelay(true));
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

fn discard(mut stream: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
}
