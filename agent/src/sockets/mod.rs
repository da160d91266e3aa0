//! TCP connections as the kernel lists them, in whichever network namespace, and their end by
//! force. Knows nothing of agents: who is asked about and what ends is the caller's choice.
//!
//! sock_diag (linux/inet_diag.h) lists a namespace's sockets with the cgroup in which each was made
//! (since Linux 5.8), and `SOCK_DESTROY` ends one: its program gets `ECONNABORTED` at once, where it
//! would otherwise wait for answers to packets that egress drops.

mod namespace;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::netlink::{
    More, NLM_F_ACK, NLM_F_DUMP, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, attributes, bytes,
};

pub use namespace::{Namespace, Namespaces};

/// `INET_DIAG_CGROUP_ID`, linux/inet_diag.h.
const CGROUP_ID: u16 = 21;
/// `INET_DIAG_SKV6ONLY`: of listeners only.
const V6_ONLY: u16 = 11;
/// Bytes of `inet_diag_sockid`, and where it starts in `inet_diag_msg`.
const ID: usize = 48;
const ID_AT: usize = 4;
const IPPROTO_TCP: u8 = 6;
const SYN_SENT: u8 = 2;
const SYN_RECV: u8 = 3;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;
/// All but those without a connection; what is left of a closed one says `TIME_WAIT` mostly.
const STATES: u32 = !(1 << TIME_WAIT | 1 << CLOSE);
/// Bytes of `inet_diag_msg`; attributes follow.
const MESSAGE: usize = 72;

/// States of a TCP socket (net/tcp_states.h) that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for the answer to its first packet.
    SynSent,
    /// A client's first packet came; not yet a connection.
    SynReceived,
    /// Waits for clients.
    Listen,
    /// Every other state of a connection.
    Connected,
}

/// A TCP socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// This end, as the socket has it: v4-mapped on an IPv6 socket.
    pub local: SocketAddr,
    /// The other end; unspecified of a listener.
    pub remote: SocketAddr,
    /// What it is doing.
    pub state: State,
    /// The id of the cgroup in which it was made. None for what is no full socket: a half-open
    /// request, and what is left of a closed connection.
    pub cgroup: Option<u64>,
    /// Of a listener: whether it takes no clients of IPv4.
    pub v6_only: bool,
    id: [u8; ID],
    family: u8,
}

/// What became of a connection that was to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It ended.
    Now,
    /// It was gone already.
    Before,
}

/// Why the kernel was not asked, or did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel was built without it, or the module is missing.
    #[error("this kernel cannot {0}")]
    Unsupported(&'static str),
    /// All else.
    #[error("cannot {what}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

const NO_LIST: &str = "list TCP sockets (CONFIG_INET_DIAG, module tcp_diag)";
const NO_DESTROY: &str = "end TCP connections (CONFIG_INET_DIAG_DESTROY)";

// === impl Namespace ===

impl Namespace {
    /// All TCP sockets of the namespace but those that have ended: subflows of MPTCP among them.
    ///
    /// # Errors
    /// When the kernel cannot, or does not.
    pub fn connections(&mut self) -> Result<Vec<Connection>, Error> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut torn = false;
            let mut list = |content: &[u8]| {
                match parse(content) {
                    Some(connection) => found.push(connection),
                    None => torn = true,
                }
                More::Wanted
            };
            let body = request(family as u8, STATES, &[0; ID]);
            let asked = self
                .netlink
                .ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body, &mut list);
            match asked {
                Ok(()) if torn => {
                    return Err(failed(
                        "list TCP sockets",
                        io::Error::other("the kernel's answer cannot be read"),
                    ));
                }
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    return Err(Error::Unsupported(NO_LIST));
                }
                Err(error) => return Err(failed("list TCP sockets", error)),
            }
        }
        Ok(found)
    }

    /// Ends a connection that this namespace listed. The cookie in it sees to it that no other
    /// one with the same addresses ends in its place.
    ///
    /// # Errors
    /// When the kernel cannot, or does not.
    pub fn destroy(&mut self, connection: &Connection) -> Result<Ended, Error> {
        let body = request(connection.family, u32::MAX, &connection.id);
        let asked = self
            .netlink
            .ask(SOCK_DESTROY, NLM_F_ACK, &body, |_| More::Wanted);
        match asked {
            Ok(()) => Ok(Ended::Now),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => Ok(Ended::Before),
                Some(libc::EOPNOTSUPP) => Err(Error::Unsupported(NO_DESTROY)),
                _ => Err(failed("end a TCP connection", error)),
            },
        }
    }
}

fn failed(what: &'static str, source: io::Error) -> Error {
    Error::Failed { what, source }
}

/// An `inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut body = vec![family, IPPROTO_TCP, 0, 0];
    body.extend(states.to_ne_bytes());
    body.extend(id);
    body
}

/// An `inet_diag_msg` with its attributes.
fn parse(content: &[u8]) -> Option<Connection> {
    let [family, state] = bytes(content, 0)?;
    let id: [u8; ID] = bytes(content, ID_AT)?;
    let address = |at| -> Option<IpAddr> {
        match i32::from(family) {
            libc::AF_INET => Some(Ipv4Addr::from(bytes::<4>(&id, at)?).into()),
            libc::AF_INET6 => Some(Ipv6Addr::from(bytes::<16>(&id, at)?).into()),
            _ => None,
        }
    };
    let port = |at| bytes(&id, at).map(u16::from_be_bytes);
    let mut connection = Connection {
        local: SocketAddr::new(address(4)?, port(0)?),
        remote: SocketAddr::new(address(20)?, port(2)?),
        state: match state {
            SYN_SENT => State::SynSent,
            SYN_RECV | NEW_SYN_RECV => State::SynReceived,
            LISTEN => State::Listen,
            _ => State::Connected,
        },
        cgroup: None,
        v6_only: false,
        id,
        family,
    };
    for (kind, value) in attributes(content.get(MESSAGE..)?) {
        match kind {
            CGROUP_ID => connection.cgroup = bytes(value, 0).map(u64::from_ne_bytes),
            V6_ONLY => connection.v6_only = value.first().is_some_and(|only| *only != 0),
            _ => {}
        }
    }
    Some(connection)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    fn message(family: i32, state: u8, local: &[u8], remote: &[u8]) -> Vec<u8> {
        let mut bytes = vec![family as u8, state, 0, 0];
        bytes.extend(443_u16.to_be_bytes());
        bytes.extend(50_000_u16.to_be_bytes());
        for address in [local, remote] {
            let mut address = address.to_vec();
            address.resize(16, 0);
            bytes.extend(address);
        }
        bytes.extend([0; 12]);
        bytes.resize(MESSAGE, 0);
        bytes.extend([12, 0, CGROUP_ID as u8, 0]);
        bytes.extend(4711_u64.to_ne_bytes());
        bytes.extend([5, 0, V6_ONLY as u8, 0, 1, 0, 0, 0]);
        bytes
    }

    #[test]
    fn addresses_of_both_families_and_the_cgroup() {
        let v4 = message(libc::AF_INET, 1, &[192, 0, 2, 1], &[192, 0, 2, 2]);
        let v4 = parse(&v4).unwrap();
        assert_eq!(v4.local, "192.0.2.1:443".parse().unwrap());
        assert_eq!(v4.remote, "192.0.2.2:50000".parse().unwrap());
        assert_eq!((v4.state, v4.cgroup), (State::Connected, Some(4711)));
        let mut octets = [0; 16];
        octets[15] = 1;
        let v6 = message(libc::AF_INET6, LISTEN, &octets, &[0; 16]);
        let v6 = parse(&v6).unwrap();
        assert_eq!(v6.local, "[::1]:443".parse().unwrap());
        assert_eq!((v6.state, v6.v6_only), (State::Listen, true));
    }

    #[test]
    fn a_torn_message_is_none() {
        let whole = message(libc::AF_INET, 1, &[192, 0, 2, 1], &[192, 0, 2, 2]);
        for length in 0..MESSAGE {
            assert_eq!(parse(&whole[..length]), None);
        }
        assert_eq!(parse(&whole[..MESSAGE + 11]).unwrap().cgroup, None);
        assert_eq!(parse(&message(1, 1, &[], &[])), None);
    }

    /// Where the kernel has sock_diag and this is root, an own connection of this process ends.
    #[test]
    #[ignore = "needs root"]
    fn a_listed_connection_ends_and_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let (mut ends, stays) = (
            TcpStream::connect(to).unwrap(),
            TcpStream::connect(to).unwrap(),
        );
        let mut namespaces = Namespaces::of([std::process::id(), u32::MAX]);
        let mut namespace = namespaces.next().unwrap().unwrap();
        assert!(namespaces.next().is_none());
        let list = namespace.connections().unwrap();
        let find = |local| {
            list.iter()
                .find(|one| one.local == local && one.remote == to)
                .unwrap()
        };
        let doomed = find(ends.local_addr().unwrap());
        assert_eq!(doomed.cgroup, find(stays.local_addr().unwrap()).cgroup);
        assert!(doomed.cgroup.is_some());
        assert_eq!(namespace.destroy(doomed).unwrap(), Ended::Now);
        let error = ends.read(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        assert_eq!(namespace.destroy(doomed).unwrap(), Ended::Before);
        stays
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let error = (&stays).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
