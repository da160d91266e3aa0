//! What a packet leaving a socket is: its destination, ports and protocol, read from hostile
//! bytes. Bounded, so that the verifier can walk it, and pure, so that tests can too.
//!
//! What cannot be told is a [`Cause`], and the hook denies:
//! - IPv4 options and IPv6 routing headers can carry a source route, which names the real
//!   destination elsewhere than the header does (RFC 791 section 3.1; RFC 8200 section 4.4);
//! - later fragments have no ports. The stack fragments after this hook, so only raw sockets
//!   send such packets.

use crate::abi::{Addr, Cause, Class};

/// Bytes of a packet from its network header on.
pub trait Bytes {
    /// `N` bytes at `offset`, or none where the packet is shorter.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

/// What the hook needs to know of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub source: Addr,
    /// Destination.
    pub destination: Addr,
    /// Transport protocol.
    pub protocol: u8,
    /// Source port in host order; 0 where there is none.
    pub source_port: u16,
    /// Destination port in host order; 0 where there is none.
    pub port: u16,
    /// A TCP SYN without ACK.
    pub opening: bool,
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers looked at; Linux itself sends at most three.
const HEADERS: usize = 4;

/// Reads the headers of `bytes`.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B) -> Result<Packet, Cause> {
    let Some([version]) = bytes.read::<1>(0) else {
        return Err(Cause::ShortPacket);
    };
    match version >> 4 {
        4 => parse_v4(bytes, version),
        6 => parse_v6(bytes),
        _ => Err(Cause::UnknownFamily),
    }
}

#[inline(always)]
fn parse_v4<B: Bytes>(bytes: &B, version: u8) -> Result<Packet, Cause> {
    if version & 0xf != 5 {
        return Err(Cause::SourceRoute);
    }
    let Some(header) = bytes.read::<20>(0) else {
        return Err(Cause::ShortPacket);
    };
    // Anything but the first fragment: 13 bits of offset.
    if header[6] & 0x1f != 0 || header[7] != 0 {
        return Err(Cause::Fragment);
    }
    let packet = Packet {
        source: Addr::v4([header[12], header[13], header[14], header[15]]),
        destination: Addr::v4([header[16], header[17], header[18], header[19]]),
        protocol: header[9],
        source_port: 0,
        port: 0,
        opening: false,
    };
    transport(bytes, 20, packet)
}

#[inline(always)]
fn parse_v6<B: Bytes>(bytes: &B) -> Result<Packet, Cause> {
    let (Some([next]), Some(source), Some(destination)) = (
        bytes.read::<1>(6),
        bytes.read::<16>(8),
        bytes.read::<16>(24),
    ) else {
        return Err(Cause::ShortPacket);
    };
    let mut protocol = next;
    let mut offset = 40_usize;
    let mut told = false;
    for _ in 0..HEADERS {
        match protocol {
            ROUTING => return Err(Cause::SourceRoute),
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                let Some([following, length]) = bytes.read::<2>(offset) else {
                    return Err(Cause::ShortPacket);
                };
                protocol = following;
                offset += (length as usize + 1) * 8;
            }
            FRAGMENT => {
                let Some([following, _, high, low]) = bytes.read::<4>(offset) else {
                    return Err(Cause::ShortPacket);
                };
                if high != 0 || low & 0xf8 != 0 {
                    return Err(Cause::Fragment);
                }
                protocol = following;
                offset += 8;
            }
            _ => {
                told = true;
                break;
            }
        }
    }
    if !told
        && matches!(
            protocol,
            ROUTING | HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT
        )
    {
        return Err(Cause::ExtensionHeaders);
    }
    let packet = Packet {
        source: Addr::from_octets(source),
        destination: Addr::from_octets(destination),
        protocol,
        source_port: 0,
        port: 0,
        opening: false,
    };
    transport(bytes, offset, packet)
}

#[inline(always)]
fn transport<B: Bytes>(bytes: &B, offset: usize, packet: Packet) -> Result<Packet, Cause> {
    if !Class::of(packet.protocol).has_ports() {
        return Ok(packet);
    }
    let Some(ports) = bytes.read::<4>(offset) else {
        return Err(Cause::ShortPacket);
    };
    let mut opening = false;
    if matches!(Class::of(packet.protocol), Class::Tcp) {
        let Some([flags]) = bytes.read::<1>(offset + 13) else {
            return Err(Cause::ShortPacket);
        };
        opening = flags & 0x12 == 0x02;
    }
    Ok(Packet {
        source_port: u16::from_be_bytes([ports[0], ports[1]]),
        port: u16::from_be_bytes([ports[2], ports[3]]),
        opening,
        ..packet
    })
}
