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
    /// Whether offsets that depend on the packet may be read. Where not, a packet with extension
    /// headers is [`Cause::ShortPacket`], to be tried again with bytes that may: by direct access
    /// the verifier would follow each chain of headers on its own.
    const WALKS: bool;
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
    /// TCP's flags byte (RFC 9293, section 3.1); 0 for other protocols.
    pub tcp_flags: u8,
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
    // Four bytes rather than one: the compiler turns a check for one byte into a comparison that
    // tells the verifier nothing.
    let Some([version, ..]) = bytes.read::<4>(0) else {
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
        tcp_flags: 0,
    };
    transport(bytes, 20, packet)
}

#[inline(always)]
fn parse_v6<B: Bytes>(bytes: &B) -> Result<Packet, Cause> {
    let (Some([next, _]), Some(source), Some(destination)) = (
        bytes.read::<2>(6),
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
            HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT if !B::WALKS => {
                return Err(Cause::ShortPacket);
            }
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
        tcp_flags: 0,
    };
    transport(bytes, offset, packet)
}

/// Ports and flags. Multiplied by 0 or 1 rather than read or not: a branch on the protocol here
/// would make the verifier follow each protocol on its own through all that comes after.
#[inline(always)]
fn transport<B: Bytes>(bytes: &B, offset: usize, packet: Packet) -> Result<Packet, Cause> {
    let class = Class::TABLE[packet.protocol as usize];
    let (Some(ports), Some([flags, _])) = (bytes.read::<4>(offset), bytes.read::<2>(offset + 13))
    else {
        // Too short for a TCP header. UDP's has eight bytes, other protocols may have fewer.
        if class == Class::Tcp as u8 {
            return Err(Cause::ShortPacket);
        }
        let Some(ports) = bytes.read::<4>(offset) else {
            if class == Class::Udp as u8 {
                return Err(Cause::ShortPacket);
            }
            return Ok(packet);
        };
        return Ok(with_ports(packet, ports, 0));
    };
    Ok(with_ports(packet, ports, flags))
}

#[inline(always)]
fn with_ports(packet: Packet, ports: [u8; 4], flags: u8) -> Packet {
    let has_ports = u16::from(HAS_PORTS[packet.protocol as usize]);
    Packet {
        source_port: u16::from_be_bytes([ports[0], ports[1]]).wrapping_mul(has_ports),
        port: u16::from_be_bytes([ports[2], ports[3]]).wrapping_mul(has_ports),
        tcp_flags: flags.wrapping_mul(IS_TCP[packet.protocol as usize]),
        ..packet
    }
}

/// 1 for TCP and UDP.
static HAS_PORTS: [u8; 256] = {
    let mut table = [0; 256];
    table[6] = 1;
    table[17] = 1;
    table
};

/// 1 for TCP.
static IS_TCP: [u8; 256] = {
    let mut table = [0; 256];
    table[6] = 1;
    table
};

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{vec, vec::Vec};

    use super::*;

    struct Slice<'a>(&'a [u8]);

    impl Bytes for Slice<'_> {
        const WALKS: bool = true;

        fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
            self.0.get(offset..offset + N)?.try_into().ok()
        }
    }

    fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        bytes.extend([10, 0, 0, 1, 192, 0, 2, 7]);
        bytes.extend(payload);
        bytes
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        bytes.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        bytes.extend(payload);
        bytes
    }

    fn tcp(flags: u8) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x90, 0x01, 0xbb];
        bytes.extend([0; 9]);
        bytes.push(flags);
        bytes.extend([0; 6]);
        bytes
    }

    #[test]
    fn ports_and_flags_of_both_families() {
        for bytes in [v4(6, &tcp(0x02)), v6(6, &tcp(0x02))] {
            let packet = parse(&Slice(&bytes)).unwrap();
            assert_eq!(
                (packet.source_port, packet.port, packet.tcp_flags),
                (8080, 443, 2)
            );
        }
        let packet = parse(&Slice(&v4(17, &[0, 53, 0, 99, 0, 8, 0, 0]))).unwrap();
        assert_eq!(
            (packet.source_port, packet.port, packet.tcp_flags),
            (53, 99, 0)
        );
        assert_eq!(packet.destination, Addr::v4([192, 0, 2, 7]));
        let packet = parse(&Slice(&v4(1, &[8, 0, 1, 2, 3, 4, 5, 6]))).unwrap();
        assert_eq!(
            (packet.protocol, packet.source_port, packet.port),
            (1, 0, 0)
        );
        assert!(parse(&Slice(&v4(132, &[]))).is_ok());
    }

    #[test]
    fn what_cannot_be_told_is_a_cause() {
        let mut options = v4(17, &[0; 8]);
        options[0] = 0x46;
        let mut fragment = v4(17, &[0; 8]);
        fragment[7] = 1;
        let table = [
            (Vec::new(), Cause::ShortPacket),
            (vec![0x45; 19], Cause::ShortPacket),
            (v4(6, &[0; 13]), Cause::ShortPacket),
            (v4(17, &[0; 3]), Cause::ShortPacket),
            (vec![0x15; 40], Cause::UnknownFamily),
            (options, Cause::SourceRoute),
            (fragment, Cause::Fragment),
            (v6(43, &[17, 0, 0, 0, 0, 0, 0, 0]), Cause::SourceRoute),
            (v6(60, &[43, 0, 0, 0, 0, 0, 0, 0]), Cause::SourceRoute),
            (v6(44, &[17, 0, 0, 8, 0, 0, 0, 0]), Cause::Fragment),
            (v6(0, &[0; 64]), Cause::ExtensionHeaders),
        ];
        for (bytes, cause) in table {
            assert_eq!(parse(&Slice(&bytes)), Err(cause), "{bytes:?}");
        }
    }

    #[test]
    fn extension_headers_are_walked() {
        let mut payload = vec![60, 0, 0, 0, 0, 0, 0, 0];
        payload.extend([44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.extend([17, 0, 0, 1, 0, 0, 0, 0]);
        payload.extend([0, 53, 0, 99, 0, 8, 0, 0]);
        let packet = parse(&Slice(&v6(0, &payload))).unwrap();
        assert_eq!((packet.protocol, packet.port), (17, 99));
    }

    #[test]
    fn the_tables_agree_with_the_classes() {
        for protocol in 0..=255_u8 {
            let class = Class::of(protocol);
            assert_eq!(Class::TABLE[protocol as usize], class as u8);
            assert_eq!(HAS_PORTS[protocol as usize] == 1, class.has_ports());
            assert_eq!(IS_TCP[protocol as usize] == 1, class == Class::Tcp);
        }
    }
}
