//! What the helper inside the fence is told, and what it answers: a line of JSON each.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use agent_ebpf::abi::Hook;
use serde::{Deserialize, Serialize};

/// Which addresses the socket is of, and which it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// An IPv4 address in the form `::ffff:a.b.c.d`, on an IPv6 socket.
    Mapped,
}

/// How something is attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// TCP, by connect.
    Tcp,
    /// UDP, by connect and send.
    UdpConnected,
    /// UDP, by sendto.
    Udp,
    /// A raw socket is made.
    Raw,
    /// TCP to a listener of the helper's own.
    OwnTcp,
    /// UDP to a socket of the helper's own.
    OwnUdp,
}

/// What the helper is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Attempt something.
    Try(Order),
    /// Run a pinned program on a packet.
    Run {
        /// Where it is pinned.
        program: PathBuf,
        /// With an Ethernet header in front.
        packet: Vec<u8>,
    },
    /// Ask a resolver over UDP.
    Lookup {
        /// Which.
        via: SocketAddr,
        /// What.
        message: Vec<u8>,
    },
}

/// One attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Which addresses.
    pub family: Family,
    /// How.
    pub way: Way,
    /// Where to; a listener of the helper's own chooses its port itself.
    pub to: SocketAddr,
    /// What is sent where it can be: nobody else knows it.
    pub nonce: String,
}

/// What came of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// The call that ended it.
    pub step: String,
    /// Its error number; 0: all went well.
    pub errno: i32,
    /// Port that was tried, where the helper chose it.
    pub port: u16,
    /// Whether the helper's own listener got what was sent, or the program let the packet pass.
    pub heard: bool,
    /// Id of the program that was run.
    #[serde(default)]
    pub program: u32,
    /// The response code of a lookup that was answered.
    #[serde(default)]
    pub code: Option<u8>,
}

// === impl Order ===

impl Order {
    /// What it is, for people.
    pub fn name(&self) -> String {
        format!("{} {}", self.family.name(), self.way.name())
    }
}

// === impl Family ===

impl Family {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Mapped => "mapped IPv4",
        }
    }

    /// An address as a socket of this family takes it.
    pub fn written(self, to: SocketAddr) -> SocketAddr {
        match (self, to.ip()) {
            (Self::Mapped, IpAddr::V4(ip)) => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), to.port())
            }
            _ => to,
        }
    }
}

// === impl Way ===

impl Way {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP connect",
            Self::UdpConnected => "UDP connect",
            Self::Udp => "UDP send",
            Self::Raw => "raw socket",
            Self::OwnTcp => "TCP to itself",
            Self::OwnUdp => "UDP to itself",
        }
    }

    /// IP protocol number; of a raw socket another for each family, so that one refusal is not
    /// folded into the other.
    pub const fn protocol(self, family: Family) -> u8 {
        match (self, family) {
            (Self::Tcp | Self::OwnTcp, _) => 6,
            (Self::UdpConnected | Self::Udp | Self::OwnUdp, _) => 17,
            (Self::Raw, Family::V4) => 255,
            (Self::Raw, Family::V6 | Family::Mapped) => 17,
        }
    }

    /// The hook that judges it first.
    pub const fn hook(self, family: Family) -> Hook {
        match (self, family) {
            (Self::Raw, _) => Hook::SockCreate,
            (Self::Udp | Self::OwnUdp, _) => Hook::Egress,
            (_, Family::V4) => Hook::Connect4,
            (_, Family::V6 | Family::Mapped) => Hook::Connect6,
        }
    }
}
