//! Which kinds of internet socket a scope gives a use for.
//!
//! | type   | protocol                   | made when the scope grants |
//! |--------|----------------------------|----------------------------|
//! | stream | default, TCP, MPTCP        | always                     |
//! | dgram  | default, UDP, ICMP, ICMPv6 | always: egress judges each packet |
//! | raw    | ICMP, ICMPv6               | `icmp` or `any` somewhere  |
//! | any other pair (raw, SCTP, DCCP, UDP-Lite, …) || `any` somewhere     |
//!
//! A raw socket also receives: one for TCP sees every TCP packet of the host. So it needs a grant
//! although egress would judge what it sends.

use crate::abi::{AgentRow, SOCKETS_ANY, SOCKETS_ICMP};

/// `SOCK_STREAM`.
pub const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const SOCK_RAW: u32 = 3;
const IPPROTO_ICMP: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const IPPROTO_ICMPV6: u32 = 58;
const IPPROTO_MPTCP: u32 = 262;

/// Whether the agent may make this socket. Lifecycle and times are no concern here: a socket that
/// may reach nothing harms nobody, and programs make sockets for other ends too.
#[inline(always)]
pub fn may_create(row: &AgentRow, kind: u32, protocol: u32) -> bool {
    match (kind, protocol) {
        _ if is_plain(kind, protocol) => true,
        (SOCK_RAW, IPPROTO_ICMP | IPPROTO_ICMPV6) => {
            row.sockets & (SOCKETS_ICMP | SOCKETS_ANY) != 0
        }
        _ => row.sockets & SOCKETS_ANY != 0,
    }
}

/// Whether any process may make this socket, whatever its scope: connect and egress judge all that
/// it does.
#[inline(always)]
pub const fn is_plain(kind: u32, protocol: u32) -> bool {
    match kind {
        SOCK_STREAM => matches!(protocol, 0 | IPPROTO_TCP | IPPROTO_MPTCP),
        SOCK_DGRAM => matches!(protocol, 0 | IPPROTO_UDP | IPPROTO_ICMP | IPPROTO_ICMPV6),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sockets: u8) -> AgentRow {
        AgentRow {
            sockets,
            ..AgentRow::zeroed()
        }
    }

    #[test]
    fn each_row_of_the_table() {
        let none = row(0);
        let icmp = row(SOCKETS_ICMP);
        let any = row(SOCKETS_ANY);
        for (kind, protocol) in [(1, 0), (1, 6), (1, 262), (2, 0), (2, 17), (2, 1), (2, 58)] {
            assert!(may_create(&none, kind, protocol), "{kind} {protocol}");
        }
        for (kind, protocol) in [(3, 1), (3, 58)] {
            assert!(!may_create(&none, kind, protocol));
            assert!(may_create(&icmp, kind, protocol));
            assert!(may_create(&any, kind, protocol));
        }
        for (kind, protocol) in [
            (3, 6),
            (3, 255),
            (3, 17),
            (1, 132),
            (5, 132),
            (6, 33),
            (2, 136),
        ] {
            assert!(!may_create(&none, kind, protocol));
            assert!(!may_create(&icmp, kind, protocol), "{kind} {protocol}");
            assert!(may_create(&any, kind, protocol));
        }
    }
}
