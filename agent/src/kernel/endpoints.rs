//! Where the DNS guard listens, as the hooks know it, and whose questions they have seen.
//!
//! The kernel turns an agent's lookups to the endpoint that stands in `endpoints` for the agent and
//! its network namespace, and only while a socket is there that this process has marked as its own.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use agent_ebpf::abi::{Addr, Asked, Asker, Endpoint, EndpointKey, Guardian};
use aya::{
    Ebpf,
    maps::{HashMap as KernelHash, MapData},
};
use zerocopy::IntoBytes as _;

use super::{
    error::{ApplyError, OpenError},
    object, sys, typed,
};

/// The endpoints in force.
pub struct Endpoints {
    map: KernelHash<MapData, EndpointKey, Endpoint>,
    askers: KernelHash<MapData, Asker, Asked>,
    guards: OwnedFd,
    held: BTreeMap<(u32, u64), Endpoint>,
}

fn failed(map: &'static str, key: String, source: io::Error) -> ApplyError {
    ApplyError::Write { map, key, source }
}

impl Endpoints {
    /// Takes the maps out of a loaded object. What an earlier daemon left in them leads to sockets
    /// that are gone, and is removed.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self, OpenError> {
        let unusable = |source: io::Error| OpenError::Pins {
            path: "guards".into(),
            source,
        };
        let guards = ebpf
            .map("guards")
            .and_then(object::data)
            .ok_or(OpenError::MapMissing { name: "guards" })?;
        let guards = guards.fd().as_fd().try_clone_to_owned().map_err(unusable)?;
        let mut map: KernelHash<MapData, EndpointKey, Endpoint> = typed(ebpf, "endpoints")?;
        let stale: Vec<EndpointKey> = map.keys().filter_map(Result::ok).collect();
        for key in stale {
            map.remove(&key).map_err(|source| OpenError::Map {
                name: "endpoints",
                source: Box::new(source.into()),
            })?;
        }
        Ok(Self {
            map,
            askers: typed(ebpf, "askers")?,
            guards,
            held: BTreeMap::new(),
        })
    }

    /// Puts in force what `other` has, whose marks are on the same sockets.
    pub(super) fn take_over(&mut self, other: &Self) -> Result<(), ApplyError> {
        for (&(agent, netns), &endpoint) in &other.held {
            self.put(agent, netns, endpoint)?;
        }
        Ok(())
    }

    /// Marks `sockets` as the guard's for `agent`, and has the agent's lookups in their network
    /// namespace turned to them. Returns the cookie of that namespace.
    ///
    /// # Errors
    /// When they cannot be marked, or what was written is not what is read back.
    pub fn open_endpoint(
        &mut self,
        agent: u32,
        endpoint: Endpoint,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<u64, ApplyError> {
        let marking =
            |source: io::Error| failed("guards", format!("endpoint {}", endpoint.id), source);
        let first = sockets
            .first()
            .ok_or_else(|| marking(io::ErrorKind::InvalidInput.into()))?;
        let netns = sys::netns_cookie(*first).map_err(marking)?;
        let mark = Guardian {
            endpoint: endpoint.id,
            agent,
            pad: 0,
        };
        for socket in sockets {
            // Storage of a socket is found by its descriptor.
            let key = socket.as_raw_fd().cast_unsigned();
            sys::write_element(self.guards.as_fd(), key, mark.as_bytes()).map_err(marking)?;
        }
        self.put(agent, netns, endpoint)?;
        Ok(netns)
    }

    fn put(&mut self, agent: u32, netns: u64, endpoint: Endpoint) -> Result<(), ApplyError> {
        let key = EndpointKey {
            netns,
            agent,
            pad: 0,
        };
        let name = || format!("agent {agent}, namespace {netns}");
        let wrong = |error| failed("endpoints", name(), io::Error::other(error));
        self.map.insert(key, endpoint, 0).map_err(wrong)?;
        if self.map.get(&key, 0).map_err(wrong)? != endpoint {
            return Err(ApplyError::ReadBack {
                map: "endpoints",
                key: name(),
            });
        }
        self.held.insert((agent, netns), endpoint);
        Ok(())
    }

    /// Turns nothing of `agent` in this network namespace any more.
    pub fn close_endpoint(&mut self, agent: u32, netns: u64) {
        let key = EndpointKey {
            netns,
            agent,
            pad: 0,
        };
        self.held.remove(&(agent, netns));
        if let Err(error) = self.map.remove(&key) {
            tracing::debug!(message = "An endpoint was gone already.", %error);
        }
    }

    /// Whose socket the last packet to `endpoint` came from that was sent from this address.
    pub fn asker(&self, endpoint: u64, from: IpAddr, port: u16, protocol: u8) -> Option<Asked> {
        let asker = Asker {
            endpoint,
            addr: Addr::from(from),
            port,
            protocol,
            pad: [0; 5],
        };
        self.askers.get(&asker, 0).ok()
    }
}
