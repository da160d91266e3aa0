//! The suite's own footing: without any fence every way out arrives. A refusal elsewhere then
//! means something, and "the attempt failed" is not taken for "it was blocked".

use crate::{
    harness::{Case, Need},
    support::{
        Actor, Family, Way,
        fixture::arrives,
        network::{OUT_V4, OUT_V6},
        wire::Wire,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    let ways = [
        Way::Tcp,
        Way::UdpConnected,
        Way::UdpSendTo,
        Way::UdpSendMany,
        Way::FastOpen,
        Way::FastOpenConnect,
        Way::Ping,
        Way::PingConnected,
        Way::RawIcmp,
        Way::RawHeader,
        Way::UdpLite,
        Way::Mptcp,
        Way::Uring,
    ];
    ways.into_iter()
        .map(|way| {
            let name = format!("control::unfenced_{}_arrives", way.name());
            let case = Case::new(name, move |_| {
                let mut wire = Wire::tap()?;
                let mut actor = Actor::spawn(None)?;
                for family in way.families() {
                    let to = family.pick(OUT_V4, OUT_V6, 443)?;
                    arrives(&mut wire, &mut actor, way, *family, to)?;
                }
                Ok(())
            })
            .without_remit();
            way.need().into_iter().fold(case, Case::needs)
        })
        .collect()
}

impl Way {
    /// The families in which it exists.
    pub fn families(self) -> &'static [Family] {
        match self {
            // IPv6 has ping and raw sockets for its own ICMP alone, and IP_HDRINCL is IPv4.
            Self::Ping | Self::PingConnected | Self::RawIcmp => &[Family::V4, Family::V6],
            Self::RawHeader => &[Family::V4],
            _ => &Family::ALL,
        }
    }

    /// What not every kernel has.
    pub fn need(self) -> Option<Need> {
        match self {
            Self::UdpLite => Some(Need::Socket(
                "UDP-Lite",
                libc::AF_INET,
                libc::SOCK_DGRAM,
                libc::IPPROTO_UDPLITE,
            )),
            Self::Sctp => Some(Need::Socket(
                "SCTP",
                libc::AF_INET,
                libc::SOCK_STREAM,
                libc::IPPROTO_SCTP,
            )),
            Self::Mptcp => Some(Need::Socket(
                "MPTCP",
                libc::AF_INET,
                libc::SOCK_STREAM,
                libc::IPPROTO_MPTCP,
            )),
            Self::Uring => Some(Need::IoUring),
            _ => None,
        }
    }
}
