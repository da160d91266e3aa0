//! Numbers and words of the kernel as people say them.

use agent_ebpf::abi::Reason;

/// The reason as a person would give it.
pub(super) const fn detail(reason: Reason) -> &'static str {
    match reason {
        Reason::OutOfScope => "destination not in scope",
        Reason::Denied => "destination denied by the scope",
        Reason::Floor => "destination denied on this host",
        Reason::Expired => "the agent's registration or the grant has expired",
        Reason::NotYetValid => "the agent's registration is not valid yet",
        Reason::Suspended => "the agent is suspended",
        Reason::Revoked => "the agent is revoked",
        Reason::Draft => "the agent is not approved",
        Reason::Unregistered => "no agent claims this process",
        Reason::NameNotInScope => "name not in scope",
        Reason::LoopbackForeign => "loopback peer is not the agent's own",
        Reason::UnixNotInScope => "unix socket not in scope",
        Reason::SocketType => "socket type has no use in the scope",
        Reason::LeaseExpired => "the lease of this address has ended",
        Reason::Translated => "address translation led out of scope",
        Reason::Containment => "containment",
        Reason::Fault => "it could not be told, so it was denied",
    }
}

/// Names of IANA's protocol number registry, in lower case; others are their number.
pub(super) fn protocol_name(number: u8) -> String {
    match number {
        0 => "ip",
        1 => "icmp",
        2 => "igmp",
        6 => "tcp",
        17 => "udp",
        33 => "dccp",
        41 => "ipv6",
        47 => "gre",
        50 => "esp",
        51 => "ah",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        255 => "raw",
        other => return other.to_string(),
    }
    .to_owned()
}

/// Names of `SOCK_*`.
pub(super) const fn socket_type_name(number: u8) -> &'static str {
    match number {
        1 => "stream",
        2 => "datagram",
        3 => "raw",
        4 => "rdm",
        5 => "seqpacket",
        6 => "dccp",
        10 => "packet",
        _ => "unknown",
    }
}
