//! What was observed of traffic to model APIs, over the control socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::UnixMillis;

/// Traffic to model APIs of processes outside every root, as the kernel noted it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Whether the settings ask for it.
    pub wanted: bool,
    /// Whether programs of the observer run now.
    pub observed: bool,
    /// What of it is not as it should be, in words; none when all is.
    pub why: Option<String>,
    /// Names of APIs.
    pub names: u64,
    /// Addresses that these lead to, and that are watched.
    pub addresses: u64,
    /// Wall-clock time at boot time zero, which `first_ns` and `last_ns` count from.
    pub boot_ms: UnixMillis,
    /// The notes: some thousand at most.
    pub notes: Vec<Reached>,
}

/// A process that reached an address of a model API: it connected, or sent without connecting.
/// Whether anybody answered is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Process id. The process may have ended, and the id be another's by now.
    pub pid: u32,
    /// User id at the first time.
    pub uid: u32,
    /// Name of the task at the first time: what the process calls itself.
    pub comm: String,
    /// Id of its cgroup.
    pub cgroup_id: u64,
    /// That cgroup below the v2 mount; none where it was gone before anybody looked.
    pub cgroup: Option<String>,
    /// Destination.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// IP protocol: 6 or 17.
    pub protocol: u8,
    /// The names that lead to the address. Others may lead there too.
    pub names: Vec<String>,
    /// Connections, and datagrams that were sent without one.
    pub count: u64,
    /// Boot time of the first, in nanoseconds.
    pub first_ns: u64,
    /// Boot time of the last, in nanoseconds.
    pub last_ns: u64,
}
