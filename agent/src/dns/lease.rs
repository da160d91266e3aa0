//! Which addresses which names of an agent lead to, until when. Pure; bounded.
//!
//! What a lease opens is not kept: it is asked of the scope in force each time an address is
//! written, so that a change of the scope needs nothing but asking again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use crate::policy::{self, AgentTables, Clock, LeasedPorts, Resolution};

/// One agent's leases.
#[derive(Debug, Default)]
pub struct Leases {
    /// For each name its addresses, with the boot time in nanoseconds at which each ends.
    names: HashMap<Arc<str>, BTreeMap<IpAddr, u64>>,
    /// For each address the names that lead to it.
    addresses: HashMap<IpAddr, BTreeSet<Arc<str>>>,
    /// Pairs of name and address.
    count: usize,
    /// Nothing ends before this boot time, so that a flood at the bound costs no look at each.
    first_end: u64,
}

/// How many leases there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Addresses of one name.
    pub per_name: usize,
    /// Pairs of name and address of one agent.
    pub per_agent: usize,
}

/// What is full, and when there is room again (boot time in nanoseconds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The name has as many addresses as it may have.
    Name(u64),
    /// The agent has as many leases as it may have.
    Agent(u64),
}

/// A lease in words, for `status` and `explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The name.
    pub name: Arc<str>,
    /// Its address.
    pub addr: IpAddr,
    /// Boot time in nanoseconds at which it ends.
    pub deadline: u64,
}

// === impl Leases ===

impl Leases {
    /// Leases `addr` to `name` until `deadline`, or longer if it is leased longer.
    ///
    /// # Errors
    /// When there is no room.
    pub fn add(
        &mut self,
        name: &str,
        addr: IpAddr,
        deadline: u64,
        bounds: Bounds,
        now: u64,
    ) -> Result<(), Full> {
        if let Some(held) = self
            .names
            .get_mut(name)
            .and_then(|addresses| addresses.get_mut(&addr))
        {
            *held = (*held).max(deadline);
            return Ok(());
        }
        self.drop_ended_of(name, now);
        let addresses = self.names.get(name);
        if addresses.is_some_and(|addresses| addresses.len() >= bounds.per_name) {
            let first = addresses.and_then(|addresses| addresses.values().min().copied());
            return Err(Full::Name(first.unwrap_or(now)));
        }
        if self.count >= bounds.per_agent {
            self.drop_ended(now);
        }
        if self.count >= bounds.per_agent {
            return Err(Full::Agent(self.first_end));
        }
        let name: Arc<str> = match self.names.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None => name.into(),
        };
        self.addresses
            .entry(addr)
            .or_default()
            .insert(Arc::clone(&name));
        self.names.entry(name).or_default().insert(addr, deadline);
        self.first_end = match self.count {
            0 => deadline,
            _ => self.first_end.min(deadline),
        };
        self.count += 1;
        Ok(())
    }

    /// Drops what has ended.
    pub fn drop_ended(&mut self, now: u64) {
        if now < self.first_end {
            return;
        }
        let ended: Vec<Arc<str>> = self
            .names
            .iter()
            .filter(|(_, addresses)| addresses.values().any(|deadline| *deadline <= now))
            .map(|(name, _)| Arc::clone(name))
            .collect();
        for name in ended {
            self.drop_ended_of(&name, now);
        }
        let ends = self.names.values().flat_map(BTreeMap::values);
        self.first_end = ends.min().copied().unwrap_or(u64::MAX);
    }

    fn drop_ended_of(&mut self, name: &str, now: u64) {
        let Some(addresses) = self.names.get_mut(name) else {
            return;
        };
        let ended: Vec<IpAddr> = addresses
            .iter()
            .filter(|(_, deadline)| **deadline <= now)
            .map(|(addr, _)| *addr)
            .collect();
        for addr in &ended {
            addresses.remove(addr);
        }
        let empty = addresses.is_empty();
        self.count -= ended.len();
        for addr in ended {
            if let Some(names) = self.addresses.get_mut(&addr) {
                names.remove(name);
                if names.is_empty() {
                    self.addresses.remove(&addr);
                }
            }
        }
        if empty {
            self.names.remove(name);
        }
    }

    /// What the leases of `addr` open under `agent`'s scope at the moment of `clock`: the input of
    /// [`policy::leased_rules`]. Empty when none does. An open TCP connection may go on for
    /// `max_lease` nanoseconds more, but never longer than its grant.
    pub fn ports(
        &self,
        agent: &AgentTables,
        addr: IpAddr,
        max_lease: u64,
        clock: &Clock,
    ) -> Vec<LeasedPorts> {
        let mut ports = Vec::new();
        for name in self.addresses.get(&addr).into_iter().flatten() {
            let ends = self
                .names
                .get(name)
                .and_then(|addresses| addresses.get(&addr));
            let Some(ends) = ends.filter(|ends| **ends > clock.boot_now_ns) else {
                continue;
            };
            let Resolution::Granted(allowances) = policy::resolve(agent, name, clock) else {
                continue;
            };
            for allowance in allowances {
                if let Ok(open) = policy::leasable(agent, addr, &allowance) {
                    ports.push(LeasedPorts {
                        ports: open,
                        deadline: allowance.deadline.min(*ends),
                        open_until: allowance.deadline.min(ends.saturating_add(max_lease)),
                        entry: allowance.entry,
                    });
                }
            }
        }
        ports
    }

    /// Names that lead to `addr`, for logs.
    pub fn names_of(&self, addr: IpAddr) -> impl Iterator<Item = &str> {
        let names = self.addresses.get(&addr).into_iter().flatten();
        names.map(|name| &**name)
    }

    /// Every address with a lease, for writing them anew when the scope has changed.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.keys().copied()
    }

    /// Whether `addr` has a lease that has not ended.
    pub fn holds(&self, addr: IpAddr, now: u64) -> bool {
        self.addresses.get(&addr).into_iter().flatten().any(|name| {
            let ends = self.names.get(name).and_then(|held| held.get(&addr));
            ends.is_some_and(|ends| *ends > now)
        })
    }

    /// All leases that have not ended, in no order.
    pub fn shown(&self, now: u64) -> impl Iterator<Item = Shown> {
        self.names.iter().flat_map(move |(name, addresses)| {
            addresses
                .iter()
                .filter(move |(_, deadline)| **deadline > now)
                .map(|(addr, deadline)| Shown {
                    name: Arc::clone(name),
                    addr: *addr,
                    deadline: *deadline,
                })
        })
    }

    /// Pairs of name and address, ended ones that are still kept included.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        per_name: 3,
        per_agent: 5,
    };

    fn addr(last: u8) -> IpAddr {
        [203, 0, 113, last].into()
    }

    #[test]
    fn a_lease_is_only_ever_made_longer() {
        let mut leases = Leases::default();
        leases.add("a", addr(1), 100, BOUNDS, 0).unwrap();
        leases.add("a", addr(1), 50, BOUNDS, 0).unwrap();
        assert!(leases.holds(addr(1), 99));
        assert!(!leases.holds(addr(1), 100));
        leases.add("a", addr(1), 200, BOUNDS, 150).unwrap();
        assert!(leases.holds(addr(1), 199));
        assert_eq!(leases.len(), 1);
    }

    #[test]
    fn a_name_and_an_agent_hold_so_many_and_no_more() {
        let mut leases = Leases::default();
        for last in 1..=3 {
            leases
                .add("a", addr(last), 100 + u64::from(last), BOUNDS, 0)
                .unwrap();
        }
        assert_eq!(
            leases.add("a", addr(4), 500, BOUNDS, 0),
            Err(Full::Name(101))
        );
        leases.add("b", addr(4), 90, BOUNDS, 0).unwrap();
        leases.add("b", addr(5), 300, BOUNDS, 0).unwrap();
        assert_eq!(
            leases.add("c", addr(6), 500, BOUNDS, 0),
            Err(Full::Agent(90))
        );
        // What has ended makes room: of the name, of the agent.
        leases.add("c", addr(6), 500, BOUNDS, 90).unwrap();
        assert_eq!(leases.len(), 5);
        assert!(!leases.holds(addr(4), 0));
        leases.drop_ended(1_000);
        assert!(leases.is_empty());
        assert_eq!(leases.addresses().count(), 0);
    }

    #[test]
    fn an_address_of_two_names_stays_while_one_holds_it() {
        let mut leases = Leases::default();
        leases.add("a", addr(1), 100, BOUNDS, 0).unwrap();
        leases.add("b", addr(1), 200, BOUNDS, 0).unwrap();
        leases.drop_ended(100);
        assert_eq!(leases.names_of(addr(1)).collect::<Vec<_>>(), ["b"]);
        assert!(leases.holds(addr(1), 150));
        assert_eq!(leases.shown(150).count(), 1);
    }
}
