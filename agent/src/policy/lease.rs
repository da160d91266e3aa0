//! What of a name's addresses may be leased, and the rules of an address with leases in force. Pure.
//!
//! A lease is (agent, address, ports, until): the kernel keeps it as the rules of an exact address,
//! where the longest prefix alone is asked. So what the scope says of the address is worked in: a
//! denial there stays, a grant there that lasts longer stays.

use std::{collections::BTreeSet, net::IpAddr};

use agent_ebpf::abi::{Addr, Class, Effect, RULE_LEASED, Reason, Rule};

use super::{
    assemble::RULES,
    clock::Clock,
    names::Allowance,
    net::{PortSpec, Ports, network_mask},
    tables::{AgentTables, Placed, Prefix, TimedRule},
};

/// Why nothing of an allowance may be leased at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unleasable {
    /// `floor`, `denied`, or `out_of_scope` for a range that `within` does not name.
    pub reason: Reason,
    /// The entry that takes it away; none where it is the range.
    pub entry: Option<u32>,
}

/// Ports of one address until a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeasedPorts {
    /// Which.
    pub ports: Ports,
    /// Boot time in nanoseconds from which they are closed.
    pub deadline: u64,
    /// Boot time in nanoseconds until which a TCP connection that is open then may go on.
    pub open_until: u64,
    /// Index into [`AgentTables::entries`].
    pub entry: u32,
}

/// One rule of an exact address with leases in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasedRule {
    /// Protocol class; none means all of them.
    pub class: Option<Class>,
    /// First port.
    pub low: u16,
    /// Last port, inclusive.
    pub high: u16,
    /// What it does.
    pub effect: Effect,
    /// Index into [`AgentTables::entries`].
    pub entry: u32,
    /// Boot time in nanoseconds from which an allow is over; [`agent_ebpf::abi::NEVER`] without end.
    pub deadline: u64,
    /// Whether a lease says so; past its deadline the reason is `lease_expired`.
    pub leased: bool,
    /// Of a lease: see [`LeasedPorts::open_until`].
    pub open_until: u64,
}

impl LeasedRule {
    /// As the kernel takes it.
    pub fn rule(&self) -> Rule {
        let tail = self.open_until.saturating_sub(self.deadline) / 1_000_000_000;
        Rule {
            deadline: self.deadline,
            entry: self.entry,
            low: self.low,
            high: self.high,
            class: self.class.map_or(0, |class| class as u8),
            effect: self.effect as u8,
            flags: if self.leased { RULE_LEASED } else { 0 },
            tail: match self.leased {
                true => u32::try_from(tail).unwrap_or(u32::MAX),
                false => 0,
            },
            ..Rule::zeroed()
        }
    }
}

/// An address with more rules than the kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{addr} would need {count} port rules, more than {RULES}")]
pub struct TooManyRules {
    /// The address.
    pub addr: IpAddr,
    /// How many it would need.
    pub count: usize,
}

/// The ranges whose addresses a name leads to only inside the grant's `within`: private, shared,
/// link-local, loopback, and the unspecified ones that the kernel turns into loopback.
const INSIDE: [(&str, u8); 11] = [
    ("10.0.0.0", 8),
    ("172.16.0.0", 12),
    ("192.168.0.0", 16),
    ("100.64.0.0", 10),
    ("169.254.0.0", 16),
    ("127.0.0.0", 8),
    ("0.0.0.0", 8),
    ("fc00::", 7),
    ("fec0::", 10),
    ("fe80::", 10),
    ("::", 127),
];

/// Whether an address lies in a private, shared, link-local or loopback range, itself or what is
/// embedded in it.
pub fn is_inside(addr: IpAddr) -> bool {
    let addr = Addr::from(addr).effective();
    let lies = |addr: &Addr| {
        INSIDE.iter().any(|(text, len)| {
            // Constants of this file: a test reads each of them.
            text.parse::<IpAddr>()
                .is_ok_and(|ip| Prefix::new(ip, *len).contains(addr))
        })
    };
    lies(&addr) || addr.embedded_v4().is_some_and(|inner| lies(&inner))
}

/// The ports that `allowance` may lease at `addr`, without those that the floor or a denial of the
/// address takes away.
///
/// # Errors
/// Why none is left.
pub fn leasable(
    agent: &AgentTables,
    addr: IpAddr,
    allowance: &Allowance,
) -> Result<Ports, Unleasable> {
    let key = Addr::from(addr).effective();
    let inner = key.embedded_v4();
    let mut ports = allowance.ports.clone();
    // What is denied is told before what is merely not granted.
    for place in [inner.as_ref(), Some(&key)].into_iter().flatten() {
        for rule in rules_at(agent, place) {
            let reason = match rule.effect {
                Effect::Allow => continue,
                Effect::Deny => Reason::Denied,
                Effect::Floor => Reason::Floor,
            };
            ports = ports.without(&ports_of(rule));
            if ports.is_empty() {
                let entry = Some(rule.entry);
                return Err(Unleasable { reason, entry });
            }
        }
    }
    let within = |place: &Addr| allowance.within.iter().any(|prefix| prefix.contains(place));
    if is_inside(addr) && !within(&key) && !inner.as_ref().is_some_and(within) {
        return Err(Unleasable {
            reason: Reason::OutOfScope,
            entry: None,
        });
    }
    Ok(ports)
}

/// Whether the scope lets the agent reach any port of `addr`, leases apart.
pub fn reaches(agent: &AgentTables, addr: IpAddr, clock: &Clock) -> bool {
    let key = Addr::from(addr).effective();
    rules_at(agent, &key).iter().any(|rule| {
        rule.effect == Effect::Allow && clock.boot_now_ns < clock.deadline(rule.expires)
    })
}

/// All rules of the exact address `addr` with `leases` in force, sorted by class and port. Of
/// several leases, or a lease and a grant, the one that lasts longest counts for each port.
///
/// # Errors
/// When they are more than fit; then none may be written.
pub fn leased_rules(
    agent: &AgentTables,
    addr: IpAddr,
    leases: &[LeasedPorts],
    clock: &Clock,
) -> Result<Vec<LeasedRule>, TooManyRules> {
    let standing = rules_at(agent, &Addr::from(addr).effective());
    let each: Vec<Vec<LeasedRule>> = Class::ALL
        .iter()
        .map(|class| merged(*class, standing, leases, clock))
        .collect();
    let same = each.windows(2).all(|pair| {
        let bare = |rules: &[LeasedRule]| -> Vec<LeasedRule> {
            rules
                .iter()
                .map(|rule| LeasedRule {
                    class: None,
                    ..*rule
                })
                .collect()
        };
        matches!(pair, [left, right] if bare(left) == bare(right))
    });
    let rules: Vec<LeasedRule> = match each.first() {
        Some(first) if same => {
            let all = first.iter().map(|rule| LeasedRule {
                class: None,
                ..*rule
            });
            all.collect()
        }
        _ => each.into_iter().flatten().collect(),
    };
    if rules.len() > RULES {
        return Err(TooManyRules {
            addr,
            count: rules.len(),
        });
    }
    Ok(rules)
}

/// The rules of one class: the scope's, with leases where it says nothing or less.
fn merged(
    class: Class,
    standing: &[TimedRule],
    leases: &[LeasedPorts],
    clock: &Clock,
) -> Vec<LeasedRule> {
    let ours = |rule: &&TimedRule| rule.class.is_none_or(|only| only == class);
    let standing: Vec<LeasedRule> = standing
        .iter()
        .filter(ours)
        .map(|rule| LeasedRule {
            class: Some(class),
            low: rule.low,
            high: rule.high,
            effect: rule.effect,
            entry: rule.entry,
            deadline: clock.deadline(rule.expires),
            leased: false,
            open_until: 0,
        })
        .collect();
    let leased: Vec<LeasedRule> = leases
        .iter()
        .flat_map(|lease| {
            lease
                .ports
                .of(class)
                .iter()
                .map(move |&(low, high)| LeasedRule {
                    class: Some(class),
                    low,
                    high,
                    effect: Effect::Allow,
                    entry: lease.entry,
                    deadline: lease.deadline,
                    leased: true,
                    open_until: lease.open_until,
                })
        })
        .collect();
    // Ports at which something begins; between two of them everything is alike.
    let mut cuts: BTreeSet<u32> = BTreeSet::new();
    for rule in standing.iter().chain(&leased) {
        cuts.insert(u32::from(rule.low));
        cuts.insert(u32::from(rule.high) + 1);
    }
    let cuts: Vec<u32> = cuts.into_iter().collect();
    let mut rules: Vec<LeasedRule> = Vec::new();
    for pair in cuts.windows(2) {
        let [from, to] = pair else { continue };
        let (Ok(low), Ok(high)) = (u16::try_from(*from), u16::try_from(to.saturating_sub(1)))
        else {
            continue;
        };
        let covers = |rule: &&LeasedRule| rule.low <= low && high <= rule.high;
        let said = standing.iter().find(covers);
        let lease = leased.iter().filter(covers).max_by_key(|lease| {
            (
                lease.deadline,
                lease.open_until,
                std::cmp::Reverse(lease.entry),
            )
        });
        let chosen = match (said, lease) {
            (Some(said), _) if said.effect != Effect::Allow => said,
            (Some(said), Some(lease)) if said.deadline >= lease.deadline => said,
            (_, Some(lease)) => lease,
            (Some(said), None) => said,
            (None, None) => continue,
        };
        let next = LeasedRule {
            low,
            high,
            ..*chosen
        };
        match rules.last_mut() {
            Some(last)
                if u32::from(last.high) + 1 == *from
                    && LeasedRule { low, high, ..*last } == next =>
            {
                last.high = high;
            }
            _ => rules.push(next),
        }
    }
    rules
}

fn ports_of(rule: &TimedRule) -> Ports {
    [PortSpec::interval(rule.class, rule.low, rule.high)]
        .into_iter()
        .collect()
}

/// What the scope says of an address: the rules of its longest prefix.
fn rules_at<'a>(agent: &'a AgentTables, addr: &Addr) -> &'a [TimedRule] {
    let placed: &[Placed] = &agent.scope.reach;
    let bits = u128::from_be_bytes(addr.octets());
    (0..=128_u8)
        .rev()
        .find_map(|len| {
            let wanted = (bits & network_mask(len), len);
            let at =
                placed.binary_search_by_key(&wanted, |each| (each.prefix.bits(), each.prefix.len));
            at.ok().and_then(|at| placed.get(at))
        })
        .map_or(&[], |placed| &placed.rules)
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::NEVER;

    use super::*;
    use crate::policy::{Resolution, Source, SourceKind, compile, resolve};

    const NOW: i64 = 1_790_812_800_000;
    const BOOT: u64 = 1 << 40;
    const CLOCK: Clock = Clock::at(BOOT, NOW);

    fn agent(scope: &str) -> AgentTables {
        let text = format!(
            "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = [\"/r/a\"]\n\
             [scope]\n{scope}"
        );
        let source = Source {
            path: "a.toml".into(),
            text,
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], NOW);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        (*compilation.agents[0]).clone()
    }

    fn ports(text: &[&str]) -> Ports {
        text.iter()
            .map(|each| each.parse::<PortSpec>().unwrap())
            .collect()
    }

    const NAME: &str = "[[scope.allow]]\nto = \"api.example\"\nports = [443, 80]\n";

    /// What of the grant of `api.example` may be leased at `addr`.
    fn told(scope: &str, addr: &str) -> String {
        let agent = agent(scope);
        let Resolution::Granted(allowances) = resolve(&agent, "api.example", &CLOCK) else {
            panic!("refused");
        };
        match leasable(&agent, addr.parse().unwrap(), &allowances[0]) {
            Ok(ports) => ports.to_string(),
            Err(Unleasable { reason, .. }) => reason.name().into(),
        }
    }

    #[test]
    fn the_inside_ranges_are_readable() {
        for (text, len) in INSIDE {
            let ip: IpAddr = text.parse().unwrap();
            let prefix = Prefix::new(ip, len);
            assert_eq!(prefix.bits() & !network_mask(prefix.len), 0, "{text}");
            assert!(is_inside(ip), "{text}");
        }
    }

    #[test]
    fn inside_addresses_lease_only_within() {
        let within = format!("{NAME}within = [\"10.0.0.0/8\", \"127.0.0.0/8\"]\n");
        for (addr, without, with) in [
            ("203.0.113.7", "80/tcp, 443/tcp", "80/tcp, 443/tcp"),
            ("2001:db8::7", "80/tcp, 443/tcp", "80/tcp, 443/tcp"),
            ("10.1.2.3", "out_of_scope", "80/tcp, 443/tcp"),
            ("::ffff:10.1.2.3", "out_of_scope", "80/tcp, 443/tcp"),
            ("64:ff9b::10.1.2.3", "out_of_scope", "80/tcp, 443/tcp"),
            ("127.0.0.1", "out_of_scope", "80/tcp, 443/tcp"),
            ("0.0.0.0", "out_of_scope", "80/tcp, 443/tcp"),
            ("192.168.1.1", "out_of_scope", "out_of_scope"),
            ("172.31.255.255", "out_of_scope", "out_of_scope"),
            ("100.64.0.1", "out_of_scope", "out_of_scope"),
            ("fd00::1", "out_of_scope", "out_of_scope"),
            ("::1", "out_of_scope", "out_of_scope"),
            ("::", "out_of_scope", "out_of_scope"),
            ("2002:c0a8:101::1", "out_of_scope", "out_of_scope"),
            ("169.254.169.254", "floor", "floor"),
            ("64:ff9b::169.254.169.254", "floor", "floor"),
            ("fd00:ec2::254", "floor", "floor"),
            ("fe80::1", "floor", "floor"),
            ("224.0.0.251", "floor", "floor"),
            ("255.255.255.255", "floor", "floor"),
        ] {
            assert_eq!(told(NAME, addr), without, "{addr}");
            assert_eq!(told(&within, addr), with, "{addr} within");
        }
    }

    #[test]
    fn denials_of_the_address_are_taken_away_port_by_port() {
        let scope = format!(
            "{NAME}[[scope.deny]]\nto = \"203.0.113.0/24\"\nports = [80]\n\
             [[scope.deny]]\nto = \"198.51.100.0/24\"\n"
        );
        assert_eq!(told(&scope, "203.0.113.7"), "443/tcp");
        assert_eq!(told(&scope, "64:ff9b::203.0.113.7"), "443/tcp");
        assert_eq!(told(&scope, "198.51.100.7"), "denied");
    }

    fn shown(rules: &[LeasedRule]) -> Vec<String> {
        rules
            .iter()
            .map(|rule| {
                let class = rule.class.map_or("any", Class::name);
                let end = match rule.deadline {
                    NEVER => "never".into(),
                    deadline => deadline.saturating_sub(BOOT).to_string(),
                };
                let leased = if rule.leased { " leased" } else { "" };
                format!(
                    "{class} {}-{} {} {} {end}{leased}",
                    rule.low,
                    rule.high,
                    rule.effect.name(),
                    rule.entry
                )
            })
            .collect()
    }

    #[test]
    fn what_the_scope_says_of_the_address_is_kept() {
        let scope = "[[scope.allow]]\nto = \"203.0.113.0/24\"\nports = [\"80-90\"]\n\
                     [[scope.allow]]\nto = \"203.0.113.0/24\"\nports = [443]\n\
                     expires = 2026-10-01T00:00:01Z\n\
                     [[scope.deny]]\nto = \"203.0.113.0/28\"\nports = [85]\n";
        let agent = agent(scope);
        let lease = |text: &[&str], after, entry| LeasedPorts {
            ports: ports(text),
            deadline: BOOT + after,
            open_until: BOOT + after,
            entry,
        };
        let leases = [
            lease(&["84-92", "443"], 5_000_000_000, 7),
            lease(&["92-93"], 9_000_000_000, 8),
        ];
        let rules = leased_rules(&agent, "203.0.113.7".parse().unwrap(), &leases, &CLOCK).unwrap();
        assert_eq!(
            shown(&rules),
            [
                "tcp 80-84 allow 0 never",
                "tcp 85-85 deny 2 never",
                "tcp 86-90 allow 0 never",
                "tcp 91-91 allow 7 5000000000 leased",
                "tcp 92-93 allow 8 9000000000 leased",
                "tcp 443-443 allow 7 5000000000 leased",
            ]
        );
    }

    #[test]
    fn a_lease_of_everything_is_one_rule() {
        let lease = LeasedPorts {
            ports: Ports::all(),
            deadline: BOOT + 1,
            open_until: BOOT + 1,
            entry: 0,
        };
        let rules = leased_rules(&agent(""), "203.0.113.7".parse().unwrap(), &[lease], &CLOCK);
        assert_eq!(shown(&rules.unwrap()), ["any 0-65535 allow 0 1 leased"]);
    }

    #[test]
    fn more_rules_than_fit_are_refused_as_a_whole() {
        let lease = |port: u16| LeasedPorts {
            ports: ports(&[&format!("{}", port * 2)]),
            deadline: BOOT + 1,
            open_until: BOOT + 1,
            entry: 0,
        };
        let leases: Vec<LeasedPorts> = (1..=65).map(lease).collect();
        let addr = "203.0.113.7".parse().unwrap();
        let told = leased_rules(&agent(""), addr, &leases, &CLOCK);
        assert_eq!(told, Err(TooManyRules { addr, count: 65 }));
    }

    #[test]
    fn an_address_is_reached_by_what_is_granted_and_not_expired() {
        let agent = agent(
            "[[scope.allow]]\nto = \"203.0.113.0/24\"\nports = [443]\n\
             expires = 2026-10-01T00:00:01Z\n[[scope.deny]]\nto = \"203.0.113.9\"\n",
        );
        let reach = |addr: &str, clock: &Clock| reaches(&agent, addr.parse().unwrap(), clock);
        assert!(reach("203.0.113.7", &CLOCK));
        assert!(!reach("203.0.113.9", &CLOCK));
        assert!(!reach("198.51.100.1", &CLOCK));
        let later = Clock::at(BOOT + 1_000_000_000, NOW + 1_000);
        assert!(!reach("203.0.113.7", &later));
    }
}
