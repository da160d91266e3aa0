//! Addresses of this host, where what is sent stays.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{ears::Ear, order::Family};

/// The loopback address of a family.
pub const fn localhost(family: Family) -> IpAddr {
    match family {
        Family::V4 | Family::Mapped => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

/// Whether this host has it.
pub fn has_loopback(family: Family) -> bool {
    Ear::open(localhost(family), 17).is_ok()
}

/// Addresses of this host: those on its links first, for they are refused by the scope and not by
/// the rule for loopback.
pub fn candidates(family: Family) -> Vec<IpAddr> {
    const MOST: usize = 32;
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let mut found: Vec<IpAddr> = all
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|at| IpAddr::V4(at.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|at| IpAddr::V6(at.ip())))
        })
        .filter(|ip| match ip {
            IpAddr::V4(ip) => family != Family::V6 && !ip.is_loopback(),
            // Link-local addresses would need their link named.
            IpAddr::V6(ip) => {
                family == Family::V6 && !ip.is_loopback() && !ip.is_unicast_link_local()
            }
        })
        .take(MOST)
        .collect();
    found.push(localhost(family));
    found
}
