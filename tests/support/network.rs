//! The network of a case: a namespace with `lo` alone, and many addresses on it. Outside
//! 127.0.0.0/8 and ::1 these are not loopback to Remit, so they serve as destinations in and out
//! of scope where a real listener really receives.

use std::{fs, net::IpAddr};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::netlink::{LO, add_address, link_up};

/// In scope, by the standard grant.
pub const IN_V4: &str = "198.51.100.10";
/// In scope, too.
pub const IN_V6: &str = "2001:db8:1::10";
/// Out of scope.
pub const OUT_V4: &str = "203.0.113.10";
/// Out of scope, too.
pub const OUT_V6: &str = "2001:db8:2::10";

/// A whole IPv4 prefix is local; of IPv6 only the address.
const ADDRESSES: &[(&str, u8)] = &[
    ("198.51.100.1", 24),
    ("203.0.113.1", 24),
    ("169.254.1.1", 16),
    ("10.0.0.1", 8),
    ("192.0.2.1", 24),
    (IN_V6, 128),
    ("2001:db8:1::11", 128),
    ("2001:db8:1::99", 128),
    (OUT_V6, 128),
    ("2001:db8:2::11", 128),
    ("fd00:10::1", 128),
    ("fd00:20::1", 128),
    ("fd00:ec2::254", 128),
    ("64:ff9b::a9fe:a9fe", 128),
    ("64:ff9b::c633:640a", 128),
];

/// Enters the namespaces of the case.
pub fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("cannot enter new network and mount namespaces")?;
    // Mounts made here must not reach the host, and end with the last process in here.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make mounts private")?;
    link_up(LO).context("cannot bring lo up")?;
    for (ip, prefix) in ADDRESSES {
        let ip: IpAddr = ip.parse()?;
        add_address(LO, ip, *prefix).with_context(|| format!("cannot add {ip} to lo"))?;
    }
    for (name, value) in [
        ("ping_group_range", "0 2147483647"),
        // Client and server, data in the first SYN without a cookie, on every listener.
        ("tcp_fastopen", "1543"),
        ("conf/all/accept_source_route", "1"),
        ("conf/lo/accept_source_route", "1"),
    ] {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}
