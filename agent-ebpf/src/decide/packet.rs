//! What a packet leaving a socket is: its destination, ports and protocol, read from hostile
//! bytes. Bounded, so that the verifier can walk it, and pure, so that tests can too.
//!
//! What cannot be told is a [`Cause`], and the hook denies:
//! - IPv4 options and IPv6 routing headers can carry a source route, which names the real
//!   destination elsewhere than the header does (RFC 791 section 3.1; RFC 8200 section 4.4);
//! - later fragments have no ports. The stack fragments after this hook, so only raw sockets
//!   send such packets.

use crate::{
    abi::{Addr, Cause},
    verifier::{hide8, hide32},
};

/// Bytes of a packet from its network header on.
pub trait Bytes {
    /// Whether offsets that depend on the packet may be read. Where not, a packet with extension
    /// headers is [`Cause::ShortPacket`], to be tried again with bytes that may: by direct access
    /// the verifier would follow each chain of headers on its own.
    const WALKS: bool;
    /// `N` bytes at `offset`, or none where the packet is shorter.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// Four bytes at `offset`, as a word of this machine.
    #[inline(always)]
    fn word(&self, offset: usize) -> Option<u32> {
        self.read::<4>(offset).map(u32::from_ne_bytes)
    }
}

/// What the hook needs to know of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, zerocopy::FromBytes)]
#[repr(C)]
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

impl Packet {
    /// Nothing known yet.
    pub const BLANK: Self = Self {
        source: Addr::UNKNOWN,
        destination: Addr::UNKNOWN,
        protocol: 0,
        source_port: 0,
        port: 0,
        tcp_flags: 0,
    };
}

/// Reads the headers of `bytes` into `packet`. Into memory and not as a result, for the compiler
/// may compute with the fields of a result that failed, which are registers never set: the
/// verifier of 6.1 refuses that.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B, packet: &mut Packet) -> Result<(), Cause> {
    // Four bytes rather than one: the compiler turns a check for one byte into a comparison that
    // tells the verifier nothing.
    let Some([version, ..]) = bytes.read::<4>(0) else {
        return Err(Cause::ShortPacket);
    };
    match version >> 4 {
        4 => parse_v4(bytes, version, packet),
        6 => parse_v6(bytes, packet),
        _ => Err(Cause::UnknownFamily),
    }
}

/// Reads where an everyday packet goes, TCP or UDP right behind a plain header, to an address as it
/// stands: destination, protocol and port. False says nothing but that [`parse`] must be asked;
/// where it is true, `parse` says the same.
#[inline(always)]
pub fn glance<B: Bytes>(bytes: &B, packet: &mut Packet) -> bool {
    let Some((destination, protocol, port)) = flow(bytes) else {
        return false;
    };
    packet.destination = destination;
    packet.protocol = protocol;
    packet.port = port;
    true
}

#[inline(always)]
fn flow<B: Bytes>(bytes: &B) -> Option<(Addr, u8, u16)> {
    // What lies farthest first, so that one check of the length serves all.
    let v4_ports = bytes.word(20)?;
    let [first, ..] = bytes.word(0)?.to_ne_bytes();
    if first == 0x45 {
        return flow_v4(bytes, v4_ports);
    }
    if first >> 4 == 6 {
        return flow_v6(bytes);
    }
    None
}

#[inline(always)]
fn flow_v4<B: Bytes>(bytes: &B, ports: u32) -> Option<(Addr, u8, u16)> {
    /// The 13 bits of a fragment's offset, in the word that they share with the identification.
    const OFFSET: u32 = u32::from_ne_bytes([0, 0, 0x1f, 0xff]);
    if bytes.word(4)? & OFFSET != 0 {
        return None;
    }
    let [_, protocol, ..] = bytes.word(8)?.to_ne_bytes();
    let destination = bytes.word(16)?;
    if destination == 0 || !has_header(bytes, protocol, 20) {
        return None;
    }
    let destination = Addr::from_v4_word(destination);
    Some((destination, protocol, u32::from_be(ports) as u16))
}

#[inline(always)]
fn flow_v6<B: Bytes>(bytes: &B) -> Option<(Addr, u8, u16)> {
    let ports = bytes.word(40)?;
    let [_, _, protocol, _] = bytes.word(4)?.to_ne_bytes();
    let words = [
        bytes.word(24)?,
        bytes.word(28)?,
        bytes.word(32)?,
        bytes.word(36)?,
    ];
    let is_unspecified = words[0] == 0 && words[1] == 0 && words[3] == 0;
    if is_unspecified || !has_header(bytes, protocol, 40) {
        return None;
    }
    Some((Addr { words }, protocol, u32::from_be(ports) as u16))
}

/// Reads the rest of a packet that [`glance`] has told of; false where it cannot.
#[inline(always)]
pub fn complete<B: Bytes>(bytes: &B, packet: &mut Packet) -> bool {
    let Some(first) = bytes.word(0) else {
        return false;
    };
    let offset = if first.to_ne_bytes()[0] == 0x45 {
        let Some(source) = bytes.word(12) else {
            return false;
        };
        packet.source = Addr::from_v4_word(source);
        20
    } else {
        for (at, word) in packet.source.words.iter_mut().enumerate() {
            let Some(read) = bytes.word(8 + 4 * at) else {
                return false;
            };
            *word = read;
        }
        40
    };
    let Some(ports) = bytes.word(offset) else {
        return false;
    };
    packet.source_port = (u32::from_be(ports) >> 16) as u16;
    packet.tcp_flags = 0;
    if packet.protocol == 6 {
        let Some(word) = bytes.word(offset + 12) else {
            return false;
        };
        packet.tcp_flags = word.to_ne_bytes()[1];
    }
    true
}

/// Whether this is UDP, or TCP with its flags at hand, as [`parse`] wants them.
#[inline(always)]
fn has_header<B: Bytes>(bytes: &B, protocol: u8, offset: usize) -> bool {
    match protocol {
        17 => true,
        6 => bytes.word(offset + 12).is_some(),
        _ => false,
    }
}

#[inline(always)]
fn parse_v4<B: Bytes>(bytes: &B, version: u8, packet: &mut Packet) -> Result<(), Cause> {
    if version & 0xf != 5 {
        return Err(Cause::SourceRoute);
    }
    // One after the other: read together and matched at the end, a value that could not be read
    // is still carried along, and the verifier of 6.1 refuses that.
    let Some(destination) = bytes.read::<4>(16) else {
        return Err(Cause::ShortPacket);
    };
    let Some(source) = bytes.read::<4>(12) else {
        return Err(Cause::ShortPacket);
    };
    let Some([_, protocol]) = bytes.read::<2>(8) else {
        return Err(Cause::ShortPacket);
    };
    let Some([high, low]) = bytes.read::<2>(6) else {
        return Err(Cause::ShortPacket);
    };
    // Anything but the first fragment: 13 bits of offset.
    if high & 0x1f != 0 || low != 0 {
        return Err(Cause::Fragment);
    }
    packet.source = Addr::v4(source);
    packet.destination = Addr::v4(destination);
    packet.protocol = protocol;
    transport(bytes, 20, packet)
}

#[inline(always)]
fn parse_v6<B: Bytes>(bytes: &B, packet: &mut Packet) -> Result<(), Cause> {
    // The last bytes first, so that one check serves all; words rather than arrays, and into their
    // place at once, which leaves the compiler no copies to lose track of.
    let Some(destination) = words(bytes, 24) else {
        return Err(Cause::ShortPacket);
    };
    packet.destination = destination;
    let Some(source) = words(bytes, 8) else {
        return Err(Cause::ShortPacket);
    };
    packet.source = source;
    let Some([next, _]) = bytes.read::<2>(6) else {
        return Err(Cause::ShortPacket);
    };
    let mut protocol = next;
    let mut offset = 40_usize;
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
            _ => break,
        }
    }
    match protocol {
        ROUTING => return Err(Cause::SourceRoute),
        HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT => return Err(Cause::ExtensionHeaders),
        _ => {}
    }
    packet.protocol = protocol;
    transport(bytes, offset, packet)
}

/// The address at `offset`.
#[inline(always)]
fn words<B: Bytes>(bytes: &B, offset: usize) -> Option<Addr> {
    let d = u32::from_ne_bytes(bytes.read::<4>(offset + 12)?);
    let c = u32::from_ne_bytes(bytes.read::<4>(offset + 8)?);
    let b = u32::from_ne_bytes(bytes.read::<4>(offset + 4)?);
    let a = u32::from_ne_bytes(bytes.read::<4>(offset)?);
    Some(Addr {
        words: [hide32(a), hide32(b), hide32(c), hide32(d)],
    })
}

/// Ports and flags. Multiplied by 0 or 1 rather than read or not: a branch on the protocol here
/// would make the verifier follow each protocol on its own through all that comes after.
#[inline(always)]
fn transport<B: Bytes>(bytes: &B, offset: usize, packet: &mut Packet) -> Result<(), Cause> {
    let protocol = packet.protocol as usize;
    let (ports, has_ports) = match bytes.read::<4>(offset) {
        Some(ports) => (u32::from_be_bytes(ports), 1),
        None => (0, 0),
    };
    let (ports, has_ports) = (hide32(ports), hide32(has_ports));
    let (flags, has_flags) = match bytes.read::<2>(offset + 13) {
        Some([flags, _]) => (flags, 1),
        None => (0, 0),
    };
    let (flags, has_flags) = (hide8(flags), hide32(has_flags));
    let wants_ports = u32::from(HAS_PORTS[protocol]);
    let wants_flags = u32::from(IS_TCP[protocol]);
    if wants_ports & (has_ports ^ 1) | wants_flags & (has_flags ^ 1) != 0 {
        return Err(Cause::ShortPacket);
    }
    let ports = ports.wrapping_mul(wants_ports);
    packet.source_port = (ports >> 16) as u16;
    packet.port = ports as u16;
    packet.tcp_flags = flags.wrapping_mul(wants_flags as u8);
    Ok(())
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
    use crate::abi::Class;

    struct Slice<'a>(&'a [u8]);

    impl Bytes for Slice<'_> {
        const WALKS: bool = true;

        fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
            self.0.get(offset..offset + N)?.try_into().ok()
        }
    }

    fn parse(bytes: &Slice<'_>) -> Result<Packet, Cause> {
        let mut packet = Packet::BLANK;
        super::parse(bytes, &mut packet).map(|()| packet)
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
    fn a_glance_says_what_a_look_says() {
        let mut fragment = v4(17, &[0, 53, 0, 99, 0, 8, 0, 0]);
        fragment[7] = 1;
        let mut unspecified = v4(17, &[0, 53, 0, 99, 0, 8, 0, 0]);
        unspecified[16..20].fill(0);
        let mut told = 0;
        let mut packets = vec![fragment, unspecified, v6(0, &[0; 64]), vec![0x15; 60]];
        for protocol in [1, 6, 17, 58, 132] {
            for build in [v4, v6] {
                let whole = build(protocol, &tcp(0x02));
                packets.extend((0..=whole.len()).map(|end| whole[..end].to_vec()));
            }
        }
        for bytes in packets {
            let slice = Slice(&bytes);
            let mut whole = Packet::BLANK;
            if glance(&slice, &mut whole) {
                told += 1;
                let mut packet = parse(&slice).unwrap();
                packet.destination = packet.destination.effective();
                assert!(complete(&slice, &mut whole), "{bytes:?}");
                assert_eq!(whole, packet, "{bytes:?}");
            }
        }
        assert!(told > 20, "{told}");
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
