//! Ends TCP connections that have no grant any more. Egress refuses their packets from the moment of
//! the change, but all it can do is drop them: the program would wait for an answer until it gives
//! up. Ended by the kernel it gets `ECONNABORTED` at once.
//!
//! Each connection of the agents in question is put to the kernel's own verdict, as its next packet
//! would be, and ends if that is no. It is asked about the address that the socket has: one that is
//! translated on output is refused there and keeps waiting. So does one in a network namespace where
//! none of the agent's processes is any more. The verdict does not depend on any of this: where no
//! connection can be ended, its packets are refused all the same.
//!
//! The kernel sends a reset as it ends a connection, which egress refuses and counts like any packet.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
};

use agent_ebpf::abi::{Addr, Hook, Question, UNREGISTERED};
use tracing::{info, warn};

use super::core::Core;
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    kernel::Enforcer,
    sockets::{Connection, Ended, Error, Namespace, Namespaces, State},
};

const IPPROTO_TCP: u8 = 6;
/// TCP flags (RFC 9293, section 3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Verdicts in an answer of the kernel's: see `abi::Answer`.
const ALLOWED: u8 = 1;
const MONITORED: u8 = 2;

/// What was looked at, and what came of it.
#[derive(Debug, Default)]
pub struct Closed {
    /// Connections that were put to the verdict.
    pub looked_at: usize,
    /// Those that ended.
    pub closed: usize,
    /// Those that should have, and network namespaces that could not be asked.
    pub failed: usize,
    /// Why the first of these failed.
    pub why: Option<String>,
    /// What this kernel cannot do.
    pub unsupported: Option<String>,
}

/// Whose cgroup is whose, by the cgroup's id.
struct Attribution<'a> {
    hierarchy: &'a Hierarchy,
    roots: &'a [CgroupPath],
    claims: &'a BTreeMap<CgroupPath, (u64, u32)>,
    known: HashMap<u64, Option<u32>>,
    /// Why the first cgroup that could not be found was not.
    lost: Option<String>,
}

/// One namespace's sockets, found by their ends.
struct Ends<'a> {
    connections: HashMap<(Addr, u16, Addr, u16), &'a Connection>,
    listeners: HashMap<u16, Vec<&'a Connection>>,
}

impl Core {
    /// Ends what the agents with these indices (or all) have open without a grant. To be called
    /// after a change. Whatever goes wrong is told and stops nothing.
    pub(super) fn close_unreachable(&mut self, agents: Option<&[u32]>) -> Closed {
        // What was let through a moment before the change may not be listed yet.
        self.close_again = true;
        let closed = close_unreachable(
            &mut self.enforcer,
            &self.hierarchy,
            &self.roots,
            &self.claims,
            agents,
        );
        if closed.closed > 0 {
            info!(
                message = "Connections without a grant were ended.",
                closed = closed.closed,
                looked_at = closed.looked_at
            );
        }
        let problem = match (&closed.unsupported, &closed.why) {
            (Some(what), _) => Some(format!(
                "TCP connections that lose their grant hang instead of ending: {what}"
            )),
            (None, Some(why)) => Some(format!(
                "{} TCP connections or namespaces with connections that may have lost their grant \
                 were not ended, so they hang: {why}",
                closed.failed
            )),
            (None, None) => None,
        };
        match problem {
            Some(problem) if self.problems.get(PROBLEM) != Some(&problem) => {
                warn!(
                    message = "Connections without a grant were not ended.",
                    problem
                );
                self.problems.insert(PROBLEM, problem);
            }
            Some(_) => {}
            None => drop(self.problems.remove(PROBLEM)),
        }
        closed
    }
}

const PROBLEM: &str = "closing";

/// Ends every TCP connection made below `roots` by one of `agents` (all, without any named; the
/// pseudo-agent is [`UNREGISTERED`]) that the kernel's verdict refuses now.
pub fn close_unreachable(
    enforcer: &mut Enforcer,
    hierarchy: &Hierarchy,
    roots: &[CgroupPath],
    claims: &BTreeMap<CgroupPath, (u64, u32)>,
    agents: Option<&[u32]>,
) -> Closed {
    let mut closed = Closed::default();
    let mut attribution = Attribution {
        hierarchy,
        roots,
        claims,
        known: HashMap::new(),
        lost: None,
    };
    let pids = attribution.processes(agents);
    for namespace in Namespaces::of(pids) {
        let listed = namespace.and_then(|mut namespace| {
            let connections = namespace.connections()?;
            Ok((namespace, connections))
        });
        match listed {
            Ok((mut namespace, connections)) => {
                let doomed = doomed(
                    enforcer,
                    &mut attribution,
                    &connections,
                    agents,
                    &mut closed,
                );
                end(&mut namespace, &doomed, &mut closed);
            }
            Err(error) => closed.failed(error),
        }
        if closed.unsupported.is_some() {
            break;
        }
    }
    if let Some(why) = attribution.lost {
        closed.failed_for(why);
    }
    closed
}

/// Which of a namespace's connections have no grant.
fn doomed<'a>(
    enforcer: &mut Enforcer,
    attribution: &mut Attribution<'_>,
    connections: &'a [Connection],
    agents: Option<&[u32]>,
    closed: &mut Closed,
) -> Vec<&'a Connection> {
    let ends = Ends::of(connections);
    let mut doomed = Vec::new();
    for connection in connections {
        if connection.state == State::Listen {
            continue;
        }
        let Some(agent) = attribution.of(connection) else {
            continue;
        };
        if agents.is_some_and(|agents| !agents.contains(&agent)) {
            continue;
        }
        closed.looked_at += 1;
        let question = Question {
            addr: Addr::from(connection.remote.ip()).effective(),
            agent,
            port: connection.remote.port(),
            local_port: connection.local.port(),
            protocol: IPPROTO_TCP,
            hook: Hook::Egress as u8,
            tcp_flags: match connection.state {
                State::SynSent => SYN,
                State::SynReceived => SYN | ACK,
                State::Connected | State::Listen => ACK,
            },
            peer: ends.peer(connection, agent, attribution),
            ..Question::zeroed()
        };
        match enforcer.judge(question) {
            Ok(answer) if matches!(answer.verdict, ALLOWED | MONITORED) => {}
            Ok(_) => doomed.push(connection),
            // It cannot be told, and what cannot be told is denied. But egress judges the packets
            // anyway, and an end that nobody decided could not be explained.
            Err(error) => closed.failed_for(format!("the kernel's verdict cannot be had: {error}")),
        }
    }
    doomed
}

fn end(namespace: &mut Namespace, doomed: &[&Connection], closed: &mut Closed) {
    for connection in doomed {
        match namespace.destroy(connection) {
            Ok(Ended::Now) => closed.closed += 1,
            Ok(Ended::Before) => {}
            Err(error) => {
                closed.failed(error);
                if closed.unsupported.is_some() {
                    return;
                }
            }
        }
    }
}

// === impl Closed ===

impl Closed {
    fn failed(&mut self, error: Error) {
        match error {
            Error::Unsupported(_) => self.unsupported = Some(error.to_string()),
            Error::Failed { .. } => self.failed_for(format!("{:#}", anyhow::Error::from(error))),
        }
    }

    fn failed_for(&mut self, why: String) {
        self.failed += 1;
        self.why.get_or_insert(why);
    }
}

// === impl Attribution ===

impl Attribution<'_> {
    /// The processes of these agents; what came or went meanwhile may be missing.
    fn processes(&self, agents: Option<&[u32]>) -> Vec<u32> {
        let everywhere = agents.is_none_or(|agents| agents.contains(&UNREGISTERED));
        let claimed = self.claims.iter().filter_map(|(path, (_, agent))| {
            agents
                .is_some_and(|agents| agents.contains(agent))
                .then_some(path)
        });
        let places: Vec<&CgroupPath> = if everywhere {
            self.roots.iter().collect()
        } else {
            claimed.collect()
        };
        places
            .into_iter()
            .flat_map(|place| self.hierarchy.processes(place, true).unwrap_or_default())
            .collect()
    }

    /// The agent of the cgroup in which a socket was made, as the programs find it: the outermost
    /// claim. None outside the roots, and where the cgroup is gone: the programs know it still, but
    /// nothing else does.
    fn of(&mut self, connection: &Connection) -> Option<u32> {
        let id = connection.cgroup?;
        if let Some(known) = self.known.get(&id) {
            return *known;
        }
        let path = self.hierarchy.path_of(id).unwrap_or_else(|error| {
            let why = || format!("{:#}", anyhow::Error::from(error));
            self.lost.get_or_insert_with(why);
            None
        });
        let agent = path.and_then(|path| agent_at(&path, self.roots, self.claims));
        self.known.insert(id, agent);
        agent
    }
}

fn agent_at(
    path: &CgroupPath,
    roots: &[CgroupPath],
    claims: &BTreeMap<CgroupPath, (u64, u32)>,
) -> Option<u32> {
    roots.iter().find(|root| path.is_within(root))?;
    let claim = path
        .below(&CgroupPath::root())
        .into_iter()
        .find_map(|step| claims.get(&step));
    Some(claim.map_or(UNREGISTERED, |(_, agent)| *agent))
}

// === impl Ends ===

impl<'a> Ends<'a> {
    fn of(connections: &'a [Connection]) -> Self {
        let mut ends = Self {
            connections: HashMap::new(),
            listeners: HashMap::new(),
        };
        for connection in connections {
            let (local, remote) = (connection.local, connection.remote);
            if connection.state == State::Listen {
                let listeners = ends.listeners.entry(local.port()).or_default();
                listeners.push(connection);
            } else {
                ends.connections.insert(
                    (ip(local), local.port(), ip(remote), remote.port()),
                    connection,
                );
            }
        }
        ends
    }

    /// Whose socket the next packet of a loopback connection would reach, as egress looks it up
    /// and as a question encodes it: 0 nobody's, 1 the agent's own, 2 another one's.
    fn peer(&self, connection: &Connection, agent: u32, attribution: &mut Attribution<'_>) -> u8 {
        const NOBODY: u8 = 0;
        const OWN: u8 = 1;
        const FOREIGN: u8 = 2;
        let (local, remote) = (connection.local, connection.remote);
        if !ip(remote).is_loopback() {
            return FOREIGN;
        }
        let other = (ip(remote), remote.port(), ip(local), local.port());
        let reached: Vec<&Connection> = match self.connections.get(&other) {
            // What is left of a closed connection is nobody's any more.
            Some(end) if end.cgroup.is_none() && end.state != State::SynReceived => return NOBODY,
            Some(end) if end.cgroup.is_some() => vec![end],
            // A request is its listener's.
            Some(_) | None => self.listeners_at(remote),
        };
        if reached.is_empty() {
            return NOBODY;
        }
        let own = |end: &&Connection| attribution.of(end) == Some(agent);
        if reached.iter().all(own) {
            OWN
        } else {
            FOREIGN
        }
    }

    /// The listeners that a packet to `to` may reach: those on the address itself, else those on
    /// all addresses. Several share a port by `SO_REUSEPORT`.
    fn listeners_at(&self, to: SocketAddr) -> Vec<&'a Connection> {
        let all = self
            .listeners
            .get(&to.port())
            .map_or(&[][..], Vec::as_slice);
        let exact: Vec<_> = all
            .iter()
            .copied()
            .filter(|listener| ip(listener.local) == ip(to))
            .collect();
        if !exact.is_empty() {
            return exact;
        }
        let v4 = ip(to).is_v4();
        all.iter()
            .copied()
            .filter(|listener| match listener.local.ip() {
                IpAddr::V4(any) => v4 && any.is_unspecified(),
                IpAddr::V6(any) => any.is_unspecified() && !(v4 && listener.v6_only),
            })
            .collect()
    }
}

/// The address, v4-mapped and plain IPv4 as one.
fn ip(at: SocketAddr) -> Addr {
    Addr::from(at.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_its_outermost_claimants_or_nobodys_and_only_below_a_root() {
        let path = |text: &str| text.parse::<CgroupPath>().unwrap();
        let roots = [path("/agents.slice")];
        let claims = BTreeMap::from([
            (path("/agents.slice/a.service"), (11, 1)),
            (path("/agents.slice/a.service/in/b"), (12, 2)),
            (path("/elsewhere"), (13, 3)),
        ]);
        let at = |text: &str| agent_at(&path(text), &roots, &claims);
        assert_eq!(at("/agents.slice/a.service"), Some(1));
        assert_eq!(at("/agents.slice/a.service/in/b/deep"), Some(1));
        assert_eq!(at("/agents.slice/a.service.d"), Some(UNREGISTERED));
        assert_eq!(at("/agents.slice"), Some(UNREGISTERED));
        assert_eq!(at("/elsewhere"), None);
        assert_eq!(at("/"), None);
    }
}
