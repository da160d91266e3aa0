//! The ways out that the matrix of cases goes through, each as orders to an actor.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use super::Actor;
use crate::actor::{Op, Reply};

/// What is sent where there is room for a payload.
pub const PAYLOAD: &[u8] = b"remit-test-payload";
/// A refusal must come at once. A hang in SYN retries takes longer than this even on the fastest
/// machine, and an emulated one still answers within it.
pub const AT_ONCE_MS: f64 = 2000.0;
const CONNECT_MS: u64 = 4000;

/// How an address is put on the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6.
    V6,
    /// An IPv4 destination on an AF_INET6 socket.
    Mapped,
}

impl Family {
    /// All three.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// In case names.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }

    /// Of the socket.
    pub fn domain(self) -> i32 {
        match self {
            Self::V4 => libc::AF_INET,
            Self::V6 | Self::Mapped => libc::AF_INET6,
        }
    }

    /// Of the destination: the first or the second.
    pub fn pick(self, v4: &str, v6: &str, port: u16) -> Result<SocketAddr> {
        let ip: IpAddr = match self {
            Self::V4 | Self::Mapped => v4.parse()?,
            Self::V6 => v6.parse()?,
        };
        Ok(SocketAddr::new(ip, port))
    }
}

/// A way to send something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// connect, then send.
    Tcp,
    /// The same by MPTCP.
    Mptcp,
    /// sendto with MSG_FASTOPEN.
    FastOpen,
    /// connect with TCP_FASTOPEN_CONNECT, then send.
    FastOpenConnect,
    /// connect by io_uring.
    Uring,
    /// UDP: connect, then send.
    UdpConnected,
    /// UDP: sendto.
    UdpSendTo,
    /// UDP: sendmmsg.
    UdpSendMany,
    /// UDP-Lite: sendto.
    UdpLite,
    /// SCTP: connect.
    Sctp,
    /// A ping socket: sendto.
    Ping,
    /// A ping socket: connect, then send.
    PingConnected,
    /// A raw ICMP socket.
    RawIcmp,
    /// A raw socket with the IP header written by hand, UDP inside.
    RawHeader,
}

/// What came of an attempt.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The first step that failed, or the last one.
    pub step: &'static str,
    /// 0, or its error number.
    pub errno: i32,
    /// How long that step took.
    pub ms: f64,
    /// The socket.
    pub id: Option<usize>,
}

impl Way {
    /// TCP, UDP connected, UDP by sendto.
    pub const MAIN: [Self; 3] = [Self::Tcp, Self::UdpConnected, Self::UdpSendTo];

    /// In case names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Mptcp => "mptcp",
            Self::FastOpen => "fastopen",
            Self::FastOpenConnect => "fastopen_connect",
            Self::Uring => "io_uring",
            Self::UdpConnected => "udp_connected",
            Self::UdpSendTo => "udp_sendto",
            Self::UdpSendMany => "udp_sendmmsg",
            Self::UdpLite => "udplite",
            Self::Sctp => "sctp",
            Self::Ping => "ping",
            Self::PingConnected => "ping_connected",
            Self::RawIcmp => "raw_icmp",
            Self::RawHeader => "raw_header",
        }
    }

    /// Whether a TCP listener hears it.
    pub fn is_tcp(self) -> bool {
        matches!(
            self,
            Self::Tcp | Self::Mptcp | Self::FastOpen | Self::FastOpenConnect | Self::Uring
        )
    }

    /// Whether a UDP listener hears it.
    pub fn is_udp(self) -> bool {
        matches!(
            self,
            Self::UdpConnected | Self::UdpSendTo | Self::UdpSendMany | Self::RawHeader
        )
    }

    /// The hook that refuses it.
    pub fn hook(self, family: Family) -> &'static str {
        match self {
            Self::Tcp
            | Self::Mptcp
            | Self::FastOpen
            | Self::FastOpenConnect
            | Self::Uring
            | Self::UdpConnected
            | Self::PingConnected => match family {
                Family::V4 => "cgroup/connect4",
                Family::V6 | Family::Mapped => "cgroup/connect6",
            },
            Self::UdpSendTo
            | Self::UdpSendMany
            | Self::UdpLite
            | Self::Sctp
            | Self::Ping
            | Self::RawIcmp
            | Self::RawHeader => "cgroup_skb/egress",
        }
    }

    /// The error number of a refusal. Every kernel so far drops the error of a ping socket's send
    /// on the way to the caller, in IPv6 (`icmpv6_push_pending_frames` returns nothing): the call
    /// succeeds, and nothing leaves.
    pub fn refusal(self, family: Family) -> i32 {
        match (self, family) {
            (Self::Ping, Family::V6) => 0,
            _ => libc::EPERM,
        }
    }

    /// Type and protocol of the socket.
    pub fn socket(self, family: Family) -> (i32, i32) {
        let icmp = match family {
            Family::V4 => libc::IPPROTO_ICMP,
            Family::V6 | Family::Mapped => libc::IPPROTO_ICMPV6,
        };
        match self {
            Self::Tcp | Self::FastOpen | Self::FastOpenConnect | Self::Uring => {
                (libc::SOCK_STREAM, 0)
            }
            Self::Mptcp => (libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
            Self::UdpConnected | Self::UdpSendTo | Self::UdpSendMany => (libc::SOCK_DGRAM, 0),
            Self::UdpLite => (libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
            Self::Sctp => (libc::SOCK_STREAM, libc::IPPROTO_SCTP),
            Self::Ping | Self::PingConnected => (libc::SOCK_DGRAM, icmp),
            Self::RawIcmp => (libc::SOCK_RAW, icmp),
            Self::RawHeader => (libc::SOCK_RAW, libc::IPPROTO_RAW),
        }
    }

    /// Its protocol number on the wire.
    pub fn protocol(self, family: Family) -> u8 {
        match self {
            Self::Tcp | Self::Mptcp | Self::FastOpen | Self::FastOpenConnect | Self::Uring => 6,
            Self::UdpConnected | Self::UdpSendTo | Self::UdpSendMany | Self::RawHeader => 17,
            Self::UdpLite => 136,
            Self::Sctp => 132,
            Self::Ping | Self::PingConnected | Self::RawIcmp => match family {
                Family::V4 | Family::Mapped => 1,
                Family::V6 => 58,
            },
        }
    }

    /// Does it: a socket, and what the way is.
    pub fn perform(self, actor: &mut Actor, family: Family, to: SocketAddr) -> Result<Tried> {
        let (kind, protocol) = self.socket(family);
        let made = actor.ask(&Op::Socket {
            domain: family.domain(),
            kind,
            protocol,
        })?;
        if made.errno != 0 {
            return Ok(Tried::of("socket", &made, None));
        }
        let id = usize::try_from(made.value)?;
        for (step, op) in self.steps(id, family, to) {
            let reply = actor.ask(&op)?;
            if reply.errno != 0 {
                return Ok(Tried::of(step, &reply, Some(id)));
            }
        }
        Ok(Tried {
            step: "done",
            errno: 0,
            ms: 0.0,
            id: Some(id),
        })
    }

    /// The orders after the socket.
    pub fn steps(self, id: usize, family: Family, to: SocketAddr) -> Vec<(&'static str, Op)> {
        let data = match self {
            Self::Ping | Self::PingConnected | Self::RawIcmp => echo_request(family),
            Self::RawHeader => udp_packet(to),
            _ => PAYLOAD.to_vec(),
        };
        let connect = (
            "connect",
            Op::Connect {
                id,
                addr: to,
                timeout_ms: CONNECT_MS,
            },
        );
        let send = (
            "send",
            Op::Send {
                id,
                data: data.clone(),
            },
        );
        let option = |level, name| {
            (
                "setsockopt",
                Op::SetOption {
                    id,
                    level,
                    name,
                    value: 1_i32.to_ne_bytes().to_vec(),
                },
            )
        };
        // A raw socket takes no port: IPv4 ignores it, IPv6 insists on the protocol or 0.
        let addr = if matches!(self, Self::RawIcmp | Self::Ping) {
            SocketAddr::new(to.ip(), 0)
        } else {
            to
        };
        let send_to = |flags| {
            (
                "sendto",
                Op::SendTo {
                    id,
                    addr,
                    data: data.clone(),
                    flags,
                    repeat: 1,
                },
            )
        };
        match self {
            Self::Tcp | Self::Mptcp | Self::UdpConnected | Self::PingConnected => {
                vec![connect, send]
            }
            Self::FastOpenConnect => {
                vec![
                    option(libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
                    connect,
                    send,
                ]
            }
            Self::Sctp => vec![connect],
            Self::FastOpen => vec![send_to(libc::MSG_FASTOPEN)],
            Self::Uring => vec![
                ("io_uring connect", Op::UringConnect { id, addr: to }),
                send,
            ],
            Self::UdpSendMany => vec![(
                "sendmmsg",
                Op::SendMany {
                    id,
                    addrs: vec![to],
                    data,
                },
            )],
            Self::UdpSendTo | Self::UdpLite | Self::Ping | Self::RawIcmp | Self::RawHeader => {
                vec![send_to(0)]
            }
        }
    }
}

impl Tried {
    fn of(step: &'static str, reply: &Reply, id: Option<usize>) -> Self {
        Self {
            step,
            errno: reply.errno,
            ms: reply.ms,
            id,
        }
    }
}

/// An ICMP echo request. Raw IPv4 sockets want the checksum from the sender; for IPv6 and ping
/// sockets the kernel writes it.
pub fn echo_request(family: Family) -> Vec<u8> {
    let kind = match family {
        Family::V4 => 8,
        Family::V6 | Family::Mapped => 128,
    };
    let mut packet = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    packet.extend(PAYLOAD);
    let sum = checksum(&packet).to_be_bytes();
    packet[2..4].copy_from_slice(&sum);
    packet
}

/// An IPv4 packet with UDP inside, for IP_HDRINCL; the kernel fills in source and checksum of the
/// header. For IPv6 destinations there is none: empty.
fn udp_packet(to: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(to) = to else {
        return Vec::new();
    };
    ipv4_packet([0; 4], to.ip().octets(), 17, 0, &udp(40_000, to.port()))
}

/// An IPv4 packet; `fragment` is the flags-and-offset word.
pub fn ipv4_packet(
    from: [u8; 4],
    to: [u8; 4],
    protocol: u8,
    fragment: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0x77, 0x77]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from);
    packet.extend(to);
    let sum = checksum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet.extend(payload);
    packet
}

/// A UDP datagram without a checksum, which IPv4 allows.
pub fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(from.to_be_bytes());
    datagram.extend(to.to_be_bytes());
    datagram.extend((8 + PAYLOAD.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(PAYLOAD);
    datagram
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_rfc_1071() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            !0xddf2
        );
    }

    #[test]
    fn a_checked_packet_sums_to_zero() {
        assert_eq!(checksum(&echo_request(Family::V4)), 0);
    }
}
