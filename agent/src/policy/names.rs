//! Which names an agent may resolve, and what it may then do with the addresses. Pure.
//!
//! What a name meets, first match wins:
//!
//! | # | the agent, the name                                   | comes of it |
//! |---|-------------------------------------------------------|-------------|
//! | 1 | is suspended, a draft, expired, …                     | refused with that reason |
//! | 2 | granted, with ports left once 3 and 4 are taken away  | resolved: leases of these ports |
//! | 3 | is on the floor                                       | refused, `floor` |
//! | 4 | is denied                                             | refused, `denied` |
//! | 5 | is granted, and the grant has expired                 | refused, `expired` |
//! | 6 | anything else                                         | refused, `name_not_in_scope` |
//!
//! In monitor mode 4 and 6 are reported, and the name is resolved without leases: its addresses are
//! then judged as any others are.
//!
//! A denial of a name takes away the lookup and its leases. It does not close an address that
//! another entry opens.

use agent_ebpf::abi::{Class, Effect, Mode, NEVER, Reason, State};
use serde::{Deserialize, Serialize};

use super::{
    clock::Clock,
    name::{Depth, HostPattern},
    net::{PortSpec, Ports},
    tables::{AgentTables, Prefix, UnixMillis},
};

/// What an entry says of a name or of the names of a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct NameRule {
    /// Which names.
    pub pattern: HostPattern,
    /// Allow, or one of the two denials.
    pub effect: Effect,
    /// Ports of the addresses that it leads to.
    pub ports: Ports,
    /// Where addresses in private, shared, link-local or loopback ranges have to lie.
    pub within: Vec<Prefix>,
    /// End of an allow; none is without end.
    pub expires: Option<UnixMillis>,
    /// Index into [`AgentTables::entries`].
    pub entry: u32,
}

/// What a grant lets an agent do with the addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// The ports, without those that denials of the name take away.
    pub ports: Ports,
    /// See [`NameRule::within`].
    pub within: Vec<Prefix>,
    /// Boot time in nanoseconds from which it is over.
    pub deadline: u64,
    /// Index into [`AgentTables::entries`].
    pub entry: u32,
    /// The pattern, if it is one of many names.
    pub wildcard: Option<HostPattern>,
}

/// What comes of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It may be resolved, and its addresses leased.
    Granted(Vec<Allowance>),
    /// Monitor mode lets it be resolved, and reports it.
    Monitored {
        /// What enforcement would say.
        reason: Reason,
        /// The entry that decided.
        entry: Option<u32>,
    },
    /// It may not be resolved.
    Refused {
        /// Why.
        reason: Reason,
        /// The entry that decided.
        entry: Option<u32>,
    },
}

// === impl NameRule ===

impl NameRule {
    /// What rules are sorted by.
    fn key(&self) -> (&str, Depth, u32) {
        (self.pattern.base(), self.pattern.depth(), self.entry)
    }
}

/// Puts rules in the order that [`resolve`] relies on.
pub(super) fn sort(rules: &mut [NameRule]) {
    rules.sort_by(|left, right| left.key().cmp(&right.key()));
}

/// Whether rules are in the order that [`resolve`] relies on, and name entries that exist.
pub(super) fn is_sound(rules: &[NameRule], entries: usize) -> bool {
    rules.is_sorted_by(|left, right| left.key() < right.key())
        && rules.iter().all(|rule| (rule.entry as usize) < entries)
}

/// What comes of `agent` asking for `name` (lower case, A-labels, no trailing dot) at the moment
/// of `clock`.
pub fn resolve(agent: &AgentTables, name: &str, clock: &Clock) -> Resolution {
    if let Some(reason) = standing(agent, clock) {
        return Resolution::Refused {
            reason,
            entry: None,
        };
    }
    let monitored = agent.mode == Mode::Monitor;
    let lift = |reason, entry| match monitored {
        true => Resolution::Monitored { reason, entry },
        false => Resolution::Refused { reason, entry },
    };
    let rules: Vec<&NameRule> = covering(&agent.names, name).collect();
    let ends = clock.deadline(agent.expires);
    let mut allowances = Vec::new();
    let mut expired = None;
    let mut taken = None;
    for rule in rules.iter().filter(|rule| rule.effect == Effect::Allow) {
        let deadline = clock.deadline(rule.expires).min(ends);
        if clock.boot_now_ns >= deadline {
            expired = expired.or(Some(rule.entry));
            continue;
        }
        let mut ports = rule.ports.clone();
        for denial in rules.iter().filter(|denial| denial.effect != Effect::Allow) {
            ports = ports.without(&denial.ports);
            if ports.is_empty() {
                taken = worse(taken, denial);
                break;
            }
        }
        if !ports.is_empty() {
            allowances.push(Allowance {
                ports,
                within: rule.within.clone(),
                deadline,
                entry: rule.entry,
                wildcard: (rule.pattern.depth() != Depth::Exact).then(|| rule.pattern.clone()),
            });
        }
    }
    if !allowances.is_empty() {
        return Resolution::Granted(allowances);
    }
    for denial in rules.iter().filter(|rule| rule.effect != Effect::Allow) {
        if denial.ports == Ports::all() {
            taken = worse(taken, denial);
        }
    }
    match (taken, expired) {
        (Some((Effect::Floor, entry)), _) => Resolution::Refused {
            reason: Reason::Floor,
            entry: Some(entry),
        },
        (Some((_, entry)), _) => lift(Reason::Denied, Some(entry)),
        (None, Some(entry)) => Resolution::Refused {
            reason: Reason::Expired,
            entry: Some(entry),
        },
        (None, None) => lift(Reason::NameNotInScope, None),
    }
}

/// The floor before a denial, the first of each.
fn worse(taken: Option<(Effect, u32)>, denial: &NameRule) -> Option<(Effect, u32)> {
    match taken {
        Some((Effect::Floor, _)) => taken,
        Some(_) if denial.effect != Effect::Floor => taken,
        _ => Some((denial.effect, denial.entry)),
    }
}

/// Why the agent reaches nothing at all, if so: the order is that of the kernel's verdict.
fn standing(agent: &AgentTables, clock: &Clock) -> Option<Reason> {
    match agent.state {
        State::Active => {}
        State::Unregistered => return Some(Reason::Unregistered),
        State::Draft => return Some(Reason::Draft),
        State::Suspended => return Some(Reason::Suspended),
        State::Revoked => return Some(Reason::Revoked),
    }
    if clock.boot_now_ns < clock.not_before(agent.not_before) {
        return Some(Reason::NotYetValid);
    }
    let deadline = clock.deadline(agent.expires);
    (deadline != NEVER && clock.boot_now_ns >= deadline).then_some(Reason::Expired)
}

/// The rules that cover `name`. Only those of the name itself and of what it is below are looked
/// at, so ten thousand names cost no more than ten.
fn covering<'r>(rules: &'r [NameRule], name: &'r str) -> impl Iterator<Item = &'r NameRule> {
    let dots = name.match_indices('.').map(|(at, _)| at + 1);
    let bases = std::iter::once(0)
        .chain(dots)
        .filter_map(move |from| name.get(from..));
    bases.flat_map(move |base| {
        let first = rules.partition_point(|rule| rule.pattern.base() < base);
        let rest = rules.get(first..).unwrap_or_default();
        rest.iter()
            .take_while(move |rule| rule.pattern.base() == base)
            .filter(move |rule| rule.pattern.matches(name))
    })
}

/// The entry of the denial that takes the last of `grant`, for every name that it covers.
pub(super) fn stopped_by(grant: &NameRule, denials: &[&NameRule]) -> Option<u32> {
    let mut ports = grant.ports.clone();
    for denial in denials {
        if denial.pattern.covers(&grant.pattern) {
            ports = ports.without(&denial.ports);
            if ports.is_empty() {
                return Some(denial.entry);
            }
        }
    }
    None
}

// === stored form ===

/// As a rule is written to disk: each part as the registry writes it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    name: String,
    effect: String,
    ports: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    within: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<UnixMillis>,
    entry: u32,
}

impl From<NameRule> for Stored {
    fn from(rule: NameRule) -> Self {
        let ports = rule.ports.to_string();
        Self {
            name: rule.pattern.to_string(),
            effect: rule.effect.name().to_owned(),
            ports: ports.split(", ").map(str::to_owned).collect(),
            within: rule.within.iter().map(Prefix::to_string).collect(),
            expires: rule.expires,
            entry: rule.entry,
        }
    }
}

impl TryFrom<Stored> for NameRule {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, Self::Error> {
        let wrong = |what: &dyn std::fmt::Display| what.to_string();
        let effect = Effect::ALL
            .iter()
            .copied()
            .find(|effect| effect.name() == stored.effect)
            .ok_or_else(|| format!("`{}` is no effect", stored.effect))?;
        let mut within = Vec::with_capacity(stored.within.len());
        for text in &stored.within {
            let prefix: Result<Prefix, super::PrefixError> = text.parse();
            within.push(prefix.map_err(|error| wrong(&error))?);
        }
        let mut ports = Vec::with_capacity(stored.ports.len());
        for text in &stored.ports {
            ports.push(match text.as_str() {
                // No file of people can say this alone; a sum of entries can.
                "other" => PortSpec::whole(Class::Other),
                text => text
                    .parse::<PortSpec>()
                    .map_err(|error: super::PortError| wrong(&error))?,
            });
        }
        Ok(Self {
            pattern: stored
                .name
                .parse()
                .map_err(|error: super::name::HostError| wrong(&error))?,
            effect,
            ports: ports.into_iter().collect(),
            within,
            expires: stored.expires,
            entry: stored.entry,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    /// 2026-10-01T00:00:00Z
    const NOW: UnixMillis = 1_790_812_800_000;
    const CLOCK: Clock = Clock::at(1 << 40, NOW);

    fn compiled(state: &str, scope: &str, more: &[(&str, SourceKind, &str)]) -> AgentTables {
        let text = format!(
            "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"{state}\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = [\"/r/a\"]\n\
             [scope]\n{scope}"
        );
        let mut sources = vec![Source {
            path: "a.toml".into(),
            text,
            kind: SourceKind::Agent,
        }];
        sources.extend(more.iter().map(|(path, kind, text)| Source {
            path: path.into(),
            text: format!("schema = 1\n{text}"),
            kind: *kind,
        }));
        let compilation = compile(&sources, NOW);
        let shown: Vec<String> = compilation
            .findings
            .iter()
            .filter(|finding| finding.is_error())
            .map(ToString::to_string)
            .collect();
        assert!(shown.is_empty(), "{}", shown.join("\n"));
        compilation.agent("a").unwrap().clone()
    }

    fn allow(to: &str, ports: &str) -> String {
        format!("[[scope.allow]]\nto = \"{to}\"\nports = [{ports}]\n")
    }

    fn deny(to: &str) -> String {
        format!("[[scope.deny]]\nto = \"{to}\"\n")
    }

    /// Ports and entry of each allowance, or the reason in parentheses.
    fn told(agent: &AgentTables, name: &str) -> String {
        let entry = |at: u32| agent.entries[at as usize].name.clone();
        match resolve(agent, name, &CLOCK) {
            Resolution::Granted(allowances) => allowances
                .iter()
                .map(|each| format!("{} {}", entry(each.entry), each.ports))
                .collect::<Vec<_>>()
                .join("; "),
            Resolution::Monitored { reason, .. } => format!("[{}]", reason.name()),
            Resolution::Refused { reason, entry: at } => {
                let by = at.map_or_else(String::new, |at| format!(" {}", entry(at)));
                format!("({}{by})", reason.name())
            }
        }
    }

    #[test]
    fn a_name_is_resolved_by_each_grant_that_covers_it() {
        let scope = allow("api.example.com", "443")
            + &allow("*.example.com", "80")
            + &allow("**.example.org", "\"53/udp\"");
        let agent = compiled("active", &scope, &[]);
        for (name, expected) in [
            (
                "api.example.com",
                "scope.allow[0] 443/tcp; scope.allow[1] 80/tcp",
            ),
            ("www.example.com", "scope.allow[1] 80/tcp"),
            ("a.b.example.org", "scope.allow[2] 53/udp"),
            ("example.com", "(name_not_in_scope)"),
            ("a.b.example.com", "(name_not_in_scope)"),
            ("notexample.com", "(name_not_in_scope)"),
            ("evilexample.org", "(name_not_in_scope)"),
            ("com", "(name_not_in_scope)"),
            ("", "(name_not_in_scope)"),
        ] {
            assert_eq!(told(&agent, name), expected, "{name}");
        }
    }

    #[test]
    fn denials_beat_grants_port_by_port() {
        let scope = allow("**.example.com", "443, 80")
            + &deny("*.internal.example.com")
            + "[[scope.deny]]\nto = \"old.example.com\"\nports = [80]\n"
            + &deny("elsewhere.example");
        let agent = compiled("active", &scope, &[]);
        for (name, expected) in [
            ("a.example.com", "scope.allow[0] 80/tcp, 443/tcp"),
            ("a.internal.example.com", "(denied scope.deny[0])"),
            ("a.b.internal.example.com", "scope.allow[0] 80/tcp, 443/tcp"),
            ("internal.example.com", "scope.allow[0] 80/tcp, 443/tcp"),
            ("old.example.com", "scope.allow[0] 443/tcp"),
            ("elsewhere.example", "(denied scope.deny[2])"),
        ] {
            assert_eq!(told(&agent, name), expected, "{name}");
        }
    }

    #[test]
    fn no_grant_of_a_name_overrides_the_floor() {
        let floor = "[[deny]]\nto = \"**.evil.example\"\n";
        let scope = allow("**.example", "443") + &deny("a.evil.example");
        let agent = compiled("active", &scope, &[("f.toml", SourceKind::Floor, floor)]);
        assert_eq!(told(&agent, "a.evil.example"), "(floor floor.deny[0])");
        assert_eq!(told(&agent, "evil.example"), "scope.allow[0] 443/tcp");
    }

    #[test]
    fn a_set_grants_its_names_within_what_both_allow() {
        let set = "[set]\nname = \"s\"\n[[allow]]\nto = \"api.example\"\nports = [443, 80]\n\
                   within = [\"10.0.0.0/8\"]\nexpires = 2027-01-01T00:00:00Z\n\
                   [[allow]]\nto = \"192.0.2.1\"\nports = [443]\n";
        let scope = allow("@s", "443, 22") + "[[scope.deny]]\nto = \"@s\"\nports = [22]\n";
        let agent = compiled("active", &scope, &[("s.toml", SourceKind::Set, set)]);
        assert_eq!(told(&agent, "api.example"), "set:s.allow[0] 443/tcp");
        let rule = agent.names.iter().find(|rule| rule.effect == Effect::Allow);
        let rule = rule.unwrap();
        assert_eq!(rule.within, [Prefix::new([10, 0, 0, 0].into(), 8)]);
        assert_eq!(rule.expires, Some(1_798_761_600_000));
        let entry = &agent.entries[rule.entry as usize];
        assert_eq!(entry.text, "api.example 443/tcp via scope.allow[0]");
        let denied = compiled(
            "active",
            &(allow("**.example", "443") + &deny("@s")),
            &[("s.toml", SourceKind::Set, set)],
        );
        assert_eq!(told(&denied, "api.example"), "(denied scope.deny[0])");
    }

    #[test]
    fn who_reaches_nothing_resolves_nothing() {
        let scope = allow("api.example", "443");
        for (state, reason) in [
            ("draft", "(draft)"),
            ("suspended", "(suspended)"),
            ("revoked", "(revoked)"),
        ] {
            let agent = compiled(state, &scope, &[]);
            assert_eq!(told(&agent, "api.example"), reason);
        }
        let mut agent = compiled("active", &scope, &[]);
        agent.expires = Some(NOW);
        assert_eq!(told(&agent, "api.example"), "(expired)");
        agent.expires = Some(NOW + 1);
        agent.not_before = Some(NOW + 1);
        assert_eq!(told(&agent, "api.example"), "(not_yet_valid)");
        let pseudo = compile(&[], NOW).unregistered;
        assert_eq!(told(&pseudo, "api.example"), "(unregistered)");
    }

    #[test]
    fn an_expired_grant_says_so_and_the_lease_ends_with_grant_or_agent() {
        let scope = allow("api.example", "443") + "expires = 2026-10-01T00:00:01Z\n";
        let mut agent = compiled("active", &scope, &[]);
        let Resolution::Granted(allowances) = resolve(&agent, "api.example", &CLOCK) else {
            panic!("refused");
        };
        assert_eq!(allowances[0].deadline, (1 << 40) + 1_000_000_000);
        let later = Clock::at((1 << 40) + 1_000_000_000, NOW + 1_000);
        let refused = resolve(&agent, "api.example", &later);
        assert!(matches!(
            refused,
            Resolution::Refused {
                reason: Reason::Expired,
                entry: Some(_)
            }
        ));
        agent.expires = Some(NOW + 10);
        let Resolution::Granted(allowances) = resolve(&agent, "api.example", &CLOCK) else {
            panic!("refused");
        };
        assert_eq!(allowances[0].deadline, (1 << 40) + 10_000_000);
    }

    #[test]
    fn monitor_mode_lifts_scope_and_denials_alone() {
        let floor = "[[deny]]\nto = \"f.example\"\n";
        let scope =
            "mode = \"monitor\"\n".to_owned() + &allow("api.example", "443") + &deny("d.example");
        let agent = compiled("active", &scope, &[("f.toml", SourceKind::Floor, floor)]);
        assert_eq!(told(&agent, "api.example"), "scope.allow[0] 443/tcp");
        assert_eq!(told(&agent, "d.example"), "[denied]");
        assert_eq!(told(&agent, "x.example"), "[name_not_in_scope]");
        assert_eq!(told(&agent, "f.example"), "(floor floor.deny[0])");
    }

    #[test]
    fn ten_thousand_names_are_told_apart() {
        let mut scope = String::new();
        for number in 0..10_000 {
            scope += &allow(&format!("n{number}.example.com"), "443");
        }
        let agent = compiled("active", &scope, &[]);
        assert_eq!(agent.names.len(), 10_000);
        for number in [0, 1, 999, 9_999] {
            let name = format!("n{number}.example.com");
            let expected = format!("scope.allow[{number}] 443/tcp");
            assert_eq!(told(&agent, &name), expected);
        }
        assert_eq!(told(&agent, "n10000.example.com"), "(name_not_in_scope)");
    }

    #[test]
    fn rules_come_back_from_disk_as_they_were() {
        let scope = allow("*.example.com", "443, \"53/udp\", \"icmp\"")
            + "within = [\"10.0.0.0/8\", \"fd00::/8\"]\nexpires = 2027-01-01T00:00:00Z\n"
            + &allow("b.example", "\"any\"")
            + &deny("c.example");
        let agent = compiled("active", &scope, &[]);
        assert_eq!(agent.names.len(), 3);
        let text = serde_json::to_string(&agent.names).unwrap();
        let back: Vec<NameRule> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, agent.names);
        for (from, to) in [
            ("*.example.com", "*.com"),
            ("\"allow\"", "\"alow\""),
            ("/8", "/99"),
        ] {
            let spoilt = text.replacen(from, to, 1);
            assert!(
                serde_json::from_str::<Vec<NameRule>>(&spoilt).is_err(),
                "{to}"
            );
        }
    }

    #[test]
    fn icmp_and_other_protocols_of_names_open_their_socket_types() {
        use agent_ebpf::abi::{SOCKETS_ANY, SOCKETS_ICMP};
        let sockets = |ports| compiled("active", &allow("a.example", ports), &[]).sockets;
        assert_eq!(sockets("443"), 0);
        assert_eq!(sockets("\"icmp\""), SOCKETS_ICMP);
        assert_eq!(sockets("\"any\""), SOCKETS_ICMP | SOCKETS_ANY);
    }
}
