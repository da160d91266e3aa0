//! What a verdict looked at on its way: the prefixes of the scope that cover the address, and the
//! rules of the one that counts. Pure.

use std::net::IpAddr;

use agent_ebpf::abi::{Addr, Class};
use serde::Serialize;

use super::{
    explain::Question,
    tables::{AgentTables, Placed},
};

/// A prefix that covers the address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Looked {
    /// Such as `10.0.0.0/8`.
    pub prefix: String,
    /// Whether its rules were asked: those of the longest prefix alone are.
    pub asked: bool,
    /// Whether it covers an IPv4 address inside the one that was asked about; such a prefix can
    /// only deny.
    pub embedded: bool,
    /// Its rules; of a prefix that was not asked none.
    pub rules: Vec<LookedRule>,
}

/// A rule that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LookedRule {
    /// The entry that it comes from.
    pub entry: String,
    /// File and line of that entry; a line of 0 is built in.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// `allow`, `deny` or `floor`.
    pub effect: &'static str,
    /// Ports and protocol, such as `443 tcp`.
    pub ports: String,
    /// Whether port and protocol are those that were asked about.
    pub matches: bool,
}

/// Everything that the verdict on `question` looked at.
pub fn looked_at(tables: &AgentTables, question: &Question) -> Vec<Looked> {
    let key = Addr::from(question.addr).effective();
    let inner = key.embedded_v4();
    let mut all = Vec::new();
    for (addr, embedded) in inner
        .map(|inner| (inner, true))
        .into_iter()
        .chain([(key, false)])
    {
        let mut covering: Vec<&Placed> = tables
            .scope
            .reach
            .iter()
            .filter(|placed| placed.prefix.contains(&addr))
            .collect();
        covering.sort_by_key(|placed| std::cmp::Reverse(placed.prefix.len));
        for (at, placed) in covering.into_iter().enumerate() {
            let asked = at == 0;
            let rules = if asked {
                rules(tables, placed, question)
            } else {
                Vec::new()
            };
            all.push(Looked {
                prefix: shown(placed),
                asked,
                embedded,
                rules,
            });
        }
    }
    all
}

fn rules(tables: &AgentTables, placed: &Placed, question: &Question) -> Vec<LookedRule> {
    let class = Class::of(question.protocol);
    placed
        .rules
        .iter()
        .map(|rule| {
            let entry = usize::try_from(rule.entry)
                .ok()
                .and_then(|at| tables.entries.get(at));
            let protocol = match rule.class {
                None => "any",
                Some(Class::Tcp) => "tcp",
                Some(Class::Udp) => "udp",
                Some(Class::Icmp) => "icmp",
                Some(Class::Other) => "other",
            };
            let ports = match (rule.low, rule.high) {
                (0, u16::MAX) => protocol.to_owned(),
                (low, high) if low == high => format!("{low} {protocol}"),
                (low, high) => format!("{low}-{high} {protocol}"),
            };
            LookedRule {
                entry: entry.map_or_else(|| "?".to_owned(), |entry| entry.name.clone()),
                file: entry.map_or_else(String::new, |entry| entry.file.clone()),
                line: entry.map_or(0, |entry| entry.line),
                effect: rule.effect.name(),
                ports,
                matches: rule.class.is_none_or(|only| only == class)
                    && (rule.low..=rule.high).contains(&question.port),
            }
        })
        .collect()
}

fn shown(placed: &Placed) -> String {
    let prefix = placed.prefix;
    let addr = IpAddr::from(prefix.addr);
    let len = if addr.is_ipv4() {
        prefix.len.saturating_sub(96)
    } else {
        prefix.len
    };
    format!("{addr}/{len}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    #[test]
    fn the_longest_prefix_is_asked_and_what_is_inside_an_address_too() {
        let text = "schema = 1\n[agent]\nid = \"a\"\nowner = \"alice@example.com\"\n[lifecycle]\n\
                    state = \"active\"\napproved_by = \"dave@example.com\"\n\
                    expires = 2999-01-01T00:00:00Z\n[selector]\ncgroup = [\"/agents.slice/a\"]\n\
                    [[scope.allow]]\nto = \"10.0.0.0/8\"\nports = [443]\n\
                    [[scope.allow]]\nto = \"10.1.0.0/16\"\nports = [\"80-90\"]\n";
        let source = Source {
            path: "a.toml".into(),
            text: text.to_owned(),
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], 0);
        let tables = compilation.agent("a").unwrap();
        let ask =
            |addr: &str, port| looked_at(tables, &Question::to(addr.parse().unwrap(), port, 6));
        let seen = ask("10.1.2.3", 80);
        assert_eq!(seen.len(), 2, "{seen:?}");
        assert_eq!(
            (seen[0].prefix.as_str(), seen[0].asked),
            ("10.1.0.0/16", true)
        );
        assert_eq!(
            (seen[1].prefix.as_str(), seen[1].asked),
            ("10.0.0.0/8", false)
        );
        assert!(
            seen[0]
                .rules
                .iter()
                .any(|rule| rule.matches && rule.entry == "scope.allow[1]")
        );
        assert!(
            ask("10.1.2.3", 22)[0]
                .rules
                .iter()
                .all(|rule| !rule.matches)
        );
        let floor = ask("64:ff9b::a9fe:a9fe", 80);
        assert!(floor[0].embedded && floor[0].asked, "{floor:?}");
        assert!(ask("192.0.2.1", 80).is_empty());
    }
}
