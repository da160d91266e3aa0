//! The two route-netlink requests that a test network needs: a link up, an address on it; and the
//! one of sock_diag that ends a connection, to see whether this kernel has it. Messages are built by hand: a crate for it would bring more code than the sixty lines here.

use std::{
    io,
    net::{IpAddr, SocketAddrV4},
    os::fd::AsRawFd,
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// The loopback device has index 1 in every network namespace.
pub const LO: i32 = 1;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE_CREATE: u16 = 0x100 | 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const IFF_UP: u32 = 1;

/// Brings a device up in the namespace of the calling thread.
pub fn link_up(index: i32) -> io::Result<()> {
    let mut body = vec![0_u8, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    request(SockProtocol::NetlinkRoute, RTM_NEWLINK, flags, &body)
}

/// Takes a device down in the namespace of the calling thread.
pub fn link_down(index: i32) -> io::Result<()> {
    let mut body = vec![0_u8, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(0_u32.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    request(SockProtocol::NetlinkRoute, RTM_NEWLINK, flags, &body)
}

/// Adds an address with a prefix to a device. On `lo` a whole IPv4 prefix becomes local, as
/// 127.0.0.0/8 is; of an IPv6 prefix only the address.
pub fn add_address(index: i32, ip: IpAddr, prefix: u8) -> io::Result<()> {
    let (family, octets) = match ip {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
    };
    let mut body = vec![family as u8, prefix, IFA_F_NODAD, 0];
    body.extend(index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend((4 + octets.len() as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(&octets);
    }
    request(
        SockProtocol::NetlinkRoute,
        RTM_NEWADDR,
        NLM_F_REQUEST | NLM_F_ACK | NLM_F_REPLACE_CREATE,
        &body,
    )
}

/// Ends a TCP connection over IPv4 from `local` to `remote`, whichever that is.
pub fn destroy(local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<()> {
    let mut body = vec![libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0];
    body.extend(u32::MAX.to_ne_bytes());
    body.extend(local.port().to_be_bytes());
    body.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        body.extend(ip.octets());
        body.extend([0; 12]);
    }
    body.extend(0_u32.to_ne_bytes()); // any device
    body.extend([0xff; 8]); // any cookie
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    request(SockProtocol::NetlinkSockDiag, SOCK_DESTROY, flags, &body)
}

fn request(protocol: SockProtocol, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0_u8; 8]);
    message.extend(body);
    send(fd.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0_u8; 512];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let Some(code) = answer[..length].get(16..20) else {
        return Err(io::Error::other("short netlink answer"));
    };
    match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
