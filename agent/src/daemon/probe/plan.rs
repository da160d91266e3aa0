//! What is tried, and what must come of it by the registry. Pure: the kernel is what is on trial,
//! so it is not asked.

use std::net::{IpAddr, SocketAddr};

use agent_ebpf::{
    abi::{Addr, AgentRow, Reason, Rule},
    decide::{Attempt, Decision, Peer, decide, socket::may_create},
};

use super::{
    judge::Wanted,
    order::{Family, Way},
};
use crate::policy::{
    AgentTables, Clock, LeasedPorts, MemoryRules, PortSpec, TooManyRules, leased_rules,
};

/// One agent, as the registry has it.
pub struct Registry<'a> {
    tables: &'a AgentTables,
    clock: Clock,
    foreign: MemoryRules,
    own: MemoryRules,
}

// === impl Registry ===

impl<'a> Registry<'a> {
    /// The agent at the moment of `clock`.
    pub fn new(tables: &'a AgentTables, clock: Clock) -> Self {
        Self {
            tables,
            clock,
            foreign: MemoryRules::new(tables, &clock, Peer::Foreign),
            own: MemoryRules::new(tables, &clock, Peer::Own),
        }
    }

    /// What must come of reaching a listener of the daemon's.
    pub fn wanted(&self, to: SocketAddr, family: Family, way: Way) -> Option<Wanted> {
        verdict(&self.foreign, &self.attempt(to, family, way))
    }

    /// What must come of reaching a socket of the agent's own.
    pub fn wanted_of_own(&self, to: SocketAddr, family: Family, way: Way) -> Option<Wanted> {
        verdict(&self.own, &self.attempt(to, family, way))
    }

    /// What must come of making a raw socket; none where the scope has a use for it.
    pub fn wanted_of_raw(&self, family: Family) -> Option<Wanted> {
        const SOCK_RAW: u32 = 3;
        let protocol = Way::Raw.protocol(family);
        let row: &AgentRow = self.foreign.row();
        (!may_create(row, SOCK_RAW, protocol.into())).then_some(Wanted::Refused(Reason::SocketType))
    }

    /// Why the agent reaches nothing at all, if so.
    pub fn lifeless(&self) -> Option<Reason> {
        let to = SocketAddr::from(([192, 0, 2, 1], 9));
        match self.wanted(to, Family::V4, Way::Tcp) {
            Some(Wanted::Refused(reason)) if super::super::posture::lifeless(reason) => {
                Some(reason)
            }
            _ => None,
        }
    }

    /// The rules of an exact address when these ports of it are granted until `deadline` besides.
    ///
    /// # Errors
    /// When they are more than fit.
    pub fn granted(
        &self,
        addr: IpAddr,
        ports: &[PortSpec],
        deadline: u64,
    ) -> Result<Vec<Rule>, TooManyRules> {
        let lease = LeasedPorts {
            ports: ports.iter().copied().collect(),
            deadline,
            open_until: deadline,
            entry: agent_ebpf::abi::NO_ENTRY,
        };
        let rules = leased_rules(self.tables, addr, &[lease], &self.clock)?;
        Ok(rules
            .iter()
            .map(|rule| Rule {
                deadline: rule.deadline,
                entry: rule.entry,
                low: rule.low,
                high: rule.high,
                class: rule.class.map_or(0, |class| class as u8),
                effect: rule.effect as u8,
                ..Rule::zeroed()
            })
            .collect())
    }

    fn attempt(&self, to: SocketAddr, family: Family, way: Way) -> Attempt {
        let hook = way.hook(family);
        Attempt {
            addr: Addr::from(to.ip()).effective(),
            port: to.port(),
            local_port: 0,
            protocol: way.protocol(family),
            hook,
            tcp_flags: 0,
            now: self.clock.boot_now_ns,
        }
    }
}

fn verdict(rules: &MemoryRules, attempt: &Attempt) -> Option<Wanted> {
    match decide(rules, rules.row(), attempt) {
        Decision::Allow { .. } => Some(Wanted::Through),
        Decision::Deny { reason, .. } => Some(Wanted::Refused(reason)),
        Decision::Monitor { reason, .. } => Some(Wanted::Monitored(reason)),
        Decision::Fault(_) => None,
    }
}

/// One port of TCP and one of UDP.
pub fn port(protocol: u8, port: u16) -> Option<PortSpec> {
    let name = if protocol == 6 { "tcp" } else { "udp" };
    format!("{port}/{name}").parse().ok()
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::{Effect, NEVER};

    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    fn tables(more: &str) -> AgentTables {
        let text = format!(
            "schema = 1\n[agent]\nid = \"a\"\nowner = \"alice@example.com\"\n[lifecycle]\n\
             state = \"active\"\napproved_by = \"dave@example.com\"\n\
             expires = 2999-01-01T00:00:00Z\n[selector]\ncgroup = [\"/agents.slice/a\"]\n{more}"
        );
        let source = Source {
            path: "a.toml".into(),
            text,
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], 0);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        compilation.agent("a").unwrap().clone()
    }

    const CLOCK: Clock = Clock::at(1_000_000_000, 1_793_836_800_000);

    #[test]
    fn the_registry_says_what_must_come_of_it() {
        let tables = tables(
            "[[scope.allow]]\nto = \"198.51.100.0/24\"\nports = [443]\n\
             [[scope.deny]]\nto = \"198.51.100.7\"\n",
        );
        let registry = Registry::new(&tables, CLOCK);
        let wanted = |to: &str, way| registry.wanted(to.parse().unwrap(), Family::V4, way);
        let refused = |reason| Some(Wanted::Refused(reason));
        assert_eq!(wanted("198.51.100.1:443", Way::Tcp), Some(Wanted::Through));
        assert_eq!(
            wanted("198.51.100.1:443", Way::Udp),
            refused(Reason::OutOfScope)
        );
        assert_eq!(
            wanted("198.51.100.7:443", Way::Tcp),
            refused(Reason::Denied)
        );
        assert_eq!(
            wanted("127.0.0.1:80", Way::Tcp),
            refused(Reason::LoopbackForeign)
        );
        let own = registry.wanted_of_own("127.0.0.1:80".parse().unwrap(), Family::V4, Way::OwnTcp);
        assert_eq!(own, Some(Wanted::Through));
        assert_eq!(
            registry.wanted_of_raw(Family::V6),
            refused(Reason::SocketType)
        );
        assert_eq!(registry.lifeless(), None);
    }

    #[test]
    fn a_grant_to_the_probe_ends_and_leaves_the_rest_alone() {
        let tables = tables("[[scope.deny]]\nto = \"127.0.0.1\"\nports = [\"1-1023/tcp\"]\n");
        let registry = Registry::new(&tables, CLOCK);
        let addr = "127.0.0.1".parse().unwrap();
        let rules = registry
            .granted(addr, &[port(6, 4_000).unwrap()], 5_000_000_000)
            .unwrap();
        let seen: Vec<_> = rules
            .iter()
            .map(|rule| (rule.low, rule.high, rule.effect, rule.deadline))
            .collect();
        assert!(
            seen.contains(&(4_000, 4_000, Effect::Allow as u8, 5_000_000_000)),
            "{seen:?}"
        );
        assert!(
            seen.contains(&(1, 1_023, Effect::Deny as u8, NEVER)),
            "{seen:?}"
        );
        let allows = seen.iter().filter(|rule| rule.2 == Effect::Allow as u8);
        assert_eq!(allows.count(), 1);
    }
}
