//! A packet such as the question means, for `BPF_PROG_TEST_RUN`: an Ethernet header that the kernel
//! takes off again, then IP and as much of the next header as the fence reads. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_ebpf::abi::Addr;

use crate::control::protocol::Question;

const ETHER: usize = 14;
/// Room for the longest header behind IP that is read, and more than the kernel insists on.
const PAYLOAD: usize = 40;
const SYN: u8 = 0x02;

/// The packet: the first of a TCP connection, or one of UDP, ICMP or another protocol.
pub fn packet(question: &Question) -> Vec<u8> {
    let mut inner = vec![0_u8; PAYLOAD];
    if matches!(question.protocol, 6 | 17) {
        put(&mut inner, 0, &40_000_u16.to_be_bytes());
        put(&mut inner, 2, &question.port.to_be_bytes());
    }
    match question.protocol {
        6 => put(&mut inner, 12, &[5 << 4, SYN]),
        17 => put(&mut inner, 4, &(PAYLOAD as u16).to_be_bytes()),
        // Echo request, in each family.
        1 => put(&mut inner, 0, &[8]),
        58 => put(&mut inner, 0, &[128]),
        _ => {}
    }
    let mut bytes = vec![0_u8; ETHER];
    // As the fence has it: a mapped address is an IPv4 one.
    match IpAddr::from(Addr::from(question.addr).effective()) {
        IpAddr::V4(to) => {
            put(&mut bytes, 12, &0x0800_u16.to_be_bytes());
            let mut ip = vec![0_u8; 20];
            let length = u16::try_from(20 + PAYLOAD).unwrap_or(u16::MAX);
            put(&mut ip, 0, &[0x45]);
            put(&mut ip, 2, &length.to_be_bytes());
            put(&mut ip, 8, &[64, question.protocol]);
            put(&mut ip, 12, &Ipv4Addr::new(192, 0, 2, 254).octets());
            put(&mut ip, 16, &to.octets());
            bytes.extend(ip);
        }
        IpAddr::V6(to) => {
            put(&mut bytes, 12, &0x86dd_u16.to_be_bytes());
            let mut ip = vec![0_u8; 40];
            put(&mut ip, 0, &[0x60]);
            put(&mut ip, 4, &(PAYLOAD as u16).to_be_bytes());
            put(&mut ip, 6, &[question.protocol, 64]);
            let from = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe);
            put(&mut ip, 8, &from.octets());
            put(&mut ip, 24, &to.octets());
            bytes.extend(ip);
        }
    }
    bytes.extend(inner);
    bytes
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    for (slot, byte) in bytes.iter_mut().skip(at).zip(what) {
        *slot = *byte;
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::decide::packet::{Bytes, Packet, parse};

    use super::*;

    struct Behind(Vec<u8>);

    impl Bytes for Behind {
        const WALKS: bool = true;

        fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
            self.0
                .get(ETHER + offset..ETHER + offset + N)?
                .try_into()
                .ok()
        }
    }

    #[test]
    fn the_fence_reads_what_was_meant() {
        for (addr, protocol, port) in [
            ("198.51.100.7", 6, 443),
            ("::ffff:198.51.100.7", 17, 53),
            ("2001:db8::7", 6, 8443),
            ("2001:db8::7", 58, 0),
            ("198.51.100.7", 1, 0),
        ] {
            let question = Question {
                agent: "a".to_owned(),
                addr: addr.parse().unwrap(),
                port,
                protocol,
            };
            let mut read = Packet::BLANK;
            let bytes = Behind(packet(&question));
            assert_eq!(parse(&bytes, &mut read), Ok(()), "{addr} {protocol}");
            assert_eq!(
                read.destination.effective(),
                Addr::from(question.addr).effective()
            );
            assert_eq!((read.protocol, read.port), (protocol, port), "{addr}");
            assert_eq!(read.tcp_flags, if protocol == 6 { SYN } else { 0 });
        }
    }
}
