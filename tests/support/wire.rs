//! Every packet that leaves a socket in the case's namespace, seen on `lo` behind all cgroup
//! programs: what was refused must not be here, whatever a listener says.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
        sockopt::RcvBufForce,
    },
};

const PACKET_OUTGOING: u8 = 4;
/// Where markers go; nothing listens there.
const MARK: &str = "127.0.0.99:9";

/// A packet, as its outermost headers describe it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Where to.
    pub ip: IpAddr,
    /// Protocol; of IPv6 the first next-header.
    pub protocol: u8,
    /// Destination port, of TCP, UDP, UDP-Lite and SCTP; else 0.
    pub port: u16,
}

/// The tap.
pub struct Wire {
    fd: OwnedFd,
    marker: UdpSocket,
    marks: u16,
}

impl Wire {
    /// Taps `lo`; only what leaves afterwards is seen.
    pub fn tap() -> Result<Self> {
        let fd = socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )
        .context("cannot tap lo")?;
        setsockopt(&fd, RcvBufForce, &(16 << 20))?;
        let marker = UdpSocket::bind("127.0.0.1:0")?;
        Ok(Self {
            fd,
            marker,
            marks: 0,
        })
    }

    /// What has left since the last call. A marker sent now ends the list, so that all that left
    /// before is in it.
    pub fn drain(&mut self) -> Result<Vec<Seen>> {
        self.marks += 1;
        let mark: SocketAddr = MARK.parse()?;
        // A refused marker (nobody listens) is reported to the next send: not of interest.
        let payload = self.marks.to_be_bytes();
        if self.marker.send_to(&payload, mark).is_err() {
            self.marker.send_to(&payload, mark)?;
        }
        let mut seen = Vec::new();
        let mut buffer = vec![0_u8; 65_536];
        for _ in 0..200_000 {
            let (length, from) = match recvfrom::<LinkAddr>(self.fd.as_raw_fd(), &mut buffer) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => bail!("the wire lost its marker"),
                Err(errno) => return Err(errno).context("cannot read the wire"),
            };
            if from.is_none_or(|from| from.pkttype() != PACKET_OUTGOING) {
                continue;
            }
            let Some(bytes) = buffer.get(..length) else {
                continue;
            };
            let Some(packet) = parse(bytes) else {
                continue;
            };
            if packet.ip == mark.ip() && packet.port == mark.port() {
                if bytes.ends_with(&payload) {
                    return Ok(seen);
                }
                continue;
            }
            seen.push(packet);
        }
        bail!("the wire does not end")
    }
}

fn parse(bytes: &[u8]) -> Option<Seen> {
    let (ip, protocol, transport) = match bytes.first()? >> 4 {
        4 => {
            let to: [u8; 4] = bytes.get(16..20)?.try_into().ok()?;
            let header = usize::from(bytes.first()? & 0xf) * 4;
            (IpAddr::from(to), *bytes.get(9)?, header)
        }
        6 => {
            let to: [u8; 16] = bytes.get(24..40)?.try_into().ok()?;
            (IpAddr::from(to), *bytes.get(6)?, 40)
        }
        _ => return None,
    };
    let port = match protocol {
        6 | 17 | 132 | 136 => bytes
            .get(transport + 2..transport + 4)
            .and_then(|port| port.try_into().ok())
            .map_or(0, u16::from_be_bytes),
        _ => 0,
    };
    Some(Seen { ip, protocol, port })
}
