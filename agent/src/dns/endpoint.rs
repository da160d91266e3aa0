//! Where an agent's questions arrive: a UDP and a TCP socket on loopback, of each family, in the
//! network namespace of the agent. Each agent has its own, so that the flood of one fills nobody
//! else's buffers.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns};

/// Length of a DNS header, and of a message without anything else.
pub const HEADER: usize = 12;
/// The third octet of a message that asks for the server's status (RFC 1035, section 4.1.1), which
/// no resolver does: whoever opened an endpoint asks so whether somebody is there.
pub const STATUS: u8 = 2 << 3;

/// Whether a message is a header that asks for the server's status.
pub fn is_status(bytes: &[u8]) -> bool {
    bytes.len() == HEADER && bytes.get(2) == Some(&STATUS)
}

/// Tries at finding a port that is free for UDP and TCP.
const TRIES: usize = 16;

/// The sockets of one endpoint.
#[derive(Debug)]
pub struct Sockets {
    /// Of IPv4 and, where there is any, of IPv6.
    pub(super) pairs: Vec<Pair>,
}

/// UDP and TCP at the same address and port.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) udp: UdpSocket,
    pub(super) tcp: TcpListener,
    pub(super) at: SocketAddr,
}

// === impl Sockets ===

impl Sockets {
    /// Sockets in the network namespace of the caller.
    ///
    /// # Errors
    /// When there is no IPv4 loopback, or no port left.
    pub fn open() -> io::Result<Self> {
        let mut pairs = vec![Pair::open(Ipv4Addr::LOCALHOST.into())?];
        // A namespace may have no IPv6; what is asked over it is refused then.
        pairs.extend(Pair::open(Ipv6Addr::LOCALHOST.into()));
        Ok(Self { pairs })
    }

    /// Sockets in the network namespace `netns`. A thread goes there, opens them and ends: sockets
    /// stay in the namespace in which they were made.
    ///
    /// # Errors
    /// As [`Self::open`], or when the namespace can't be entered.
    pub fn open_in(netns: OwnedFd) -> io::Result<Self> {
        let opened = thread::Builder::new()
            .name("remit-netns".into())
            .spawn(move || {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Self::open()
            })?
            .join();
        opened.unwrap_or_else(|_panic| Err(io::Error::other("the thread in the namespace died")))
    }

    /// Handles of all of them, to mark them by.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn handles(&self) -> io::Result<Vec<OwnedFd>> {
        let each = self
            .pairs
            .iter()
            .flat_map(|pair| [pair.udp.as_fd(), pair.tcp.as_fd()]);
        each.map(|socket| socket.try_clone_to_owned()).collect()
    }

    /// Where IPv4 questions go.
    pub fn v4(&self) -> Option<SocketAddr> {
        self.pairs
            .iter()
            .map(|pair| pair.at)
            .find(SocketAddr::is_ipv4)
    }

    /// Where IPv6 questions go; none where the namespace has no IPv6.
    pub fn v6(&self) -> Option<SocketAddr> {
        self.pairs
            .iter()
            .map(|pair| pair.at)
            .find(SocketAddr::is_ipv6)
    }
}

// === impl Pair ===

impl Pair {
    fn open(addr: std::net::IpAddr) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..TRIES {
            let udp = UdpSocket::bind((addr, 0))?;
            let at = udp.local_addr()?;
            match TcpListener::bind(at) {
                Ok(tcp) => {
                    udp.set_nonblocking(true)?;
                    tcp.set_nonblocking(true)?;
                    return Ok(Self { udp, tcp, at });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
