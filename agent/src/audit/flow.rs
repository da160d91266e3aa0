//! Community ID, version 1: the same word for a flow in every tool that sees it, whichever way it
//! looks. Pure.

use std::net::{IpAddr, SocketAddr};

use base64ct::{Base64, Encoding as _};
use sha1::{Digest as _, Sha1};

/// The id of a TCP, UDP or SCTP flow; none for other protocols, and where a port is not settled.
pub fn community_id(protocol: u8, one: SocketAddr, other: SocketAddr) -> Option<String> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const SCTP: u8 = 132;
    if !matches!(protocol, TCP | UDP | SCTP) || one.port() == 0 || other.port() == 0 {
        return None;
    }
    let bytes = |end: SocketAddr| match end.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut ends = [(bytes(one), one.port()), (bytes(other), other.port())];
    if ends.iter().map(|(ip, _)| ip.len()).min() != ends.iter().map(|(ip, _)| ip.len()).max() {
        return None;
    }
    // Whoever is smaller comes first.
    ends.sort();
    let [(first, first_port), (second, second_port)] = &ends;
    const SEED: [u8; 2] = [0, 0];
    let digest = Sha1::new()
        .chain_update(SEED)
        .chain_update(first)
        .chain_update(second)
        .chain_update([protocol, 0])
        .chain_update(first_port.to_be_bytes())
        .chain_update(second_port.to_be_bytes())
        .finalize();
    Some(format!("1:{}", Base64::encode_string(&digest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_specification() {
        // github.com/corelight/community-id-spec: baseline/baseline_deflt.json.
        for (protocol, one, other, id) in [
            (
                6,
                "128.232.110.120:34855",
                "66.35.250.204:80",
                "1:LQU9qZlK+B5F3KDmev6m5PMibrg=",
            ),
            (
                17,
                "192.168.1.52:54585",
                "8.8.8.8:53",
                "1:d/FP5EW3wiY1vCndhwleRRKHowQ=",
            ),
        ] {
            let (one, other) = (one.parse().unwrap(), other.parse().unwrap());
            assert_eq!(community_id(protocol, one, other).as_deref(), Some(id));
            assert_eq!(community_id(protocol, other, one).as_deref(), Some(id));
        }
    }

    #[test]
    fn what_is_not_settled_has_none() {
        let end = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (a, b) = (end("10.0.0.1:5"), end("10.0.0.2:443"));
        assert_eq!(community_id(1, a, b), None);
        assert_eq!(community_id(6, end("10.0.0.1:0"), b), None);
        assert_eq!(community_id(6, end("[2001:db8::1]:5"), b), None);
        let mapped = end("[::ffff:10.0.0.1]:5");
        assert_eq!(community_id(6, mapped, b), community_id(6, a, b));
    }
}
