//! Whether a name may be resolved, by which entry and why: [`super::resolve`] in words.

use agent_ebpf::abi::{Class, Mode, Reason};

use super::{
    clock::Clock,
    explain::{Explanation, Outcome, lifecycle, place},
    names::{self, Allowance, Resolution},
    tables::{AgentTables, Entry},
};

/// Whether `agent` may resolve `name` (lower case, A-labels, no trailing dot) and reach `port` of
/// `class` at its addresses; without a port, anything there. The addresses are leased when the name
/// is resolved, so what may be reached at one of them is told apart, by [`explain()`].
pub fn explain_name(
    tables: &AgentTables,
    name: &str,
    port: Option<(Class, u16)>,
    clock: &Clock,
) -> Explanation {
    let file = tables.file.display();
    let entry_at = |at: u32| tables.entries.get(at as usize).cloned();
    let ports = match port {
        None => "443".into(),
        Some((Class::Tcp, port)) => port.to_string(),
        Some((Class::Udp, port)) => format!("\"{port}/udp\""),
        Some((Class::Icmp, _)) => "\"icmp\"".into(),
        Some((Class::Other, _)) => "\"any\"".into(),
    };
    let wanted = format!(
        "a grant in {file} would allow it: [[scope.allow]] to = \"{name}\" ports = [{ports}]"
    );
    let refusal = |outcome, reason: Reason, entry: Option<Entry>| {
        let because = match (reason, &entry) {
            (Reason::NameNotInScope, _) => "no entry of the scope covers the name".into(),
            (Reason::Denied, Some(entry)) => format!(
                "{} denies {}, and denials beat grants",
                entry.name, entry.text
            ),
            (Reason::Floor, Some(entry)) => {
                format!("{} denies {} on this host", entry.name, entry.text)
            }
            (Reason::Expired, Some(entry)) => {
                format!("{} granted {} and has expired", entry.name, entry.text)
            }
            (reason, _) => lifecycle(tables, reason).0,
        };
        let would_change = match (reason, &entry) {
            (Reason::NameNotInScope, _) => wanted.clone(),
            (Reason::Denied | Reason::Floor, Some(entry)) => {
                format!("only a change of {} would allow it", place(entry))
            }
            (Reason::Expired, Some(entry)) => {
                format!("a later `expires` at {} would allow it", place(entry))
            }
            (reason, _) => lifecycle(tables, reason).1,
        };
        Explanation {
            outcome,
            reason: Some(reason.name()),
            entry,
            because,
            would_change,
        }
    };
    match names::resolve(tables, name, clock) {
        Resolution::Refused { reason, entry } => {
            refusal(Outcome::Denied, reason, entry.and_then(entry_at))
        }
        Resolution::Monitored { reason, entry } => {
            refusal(Outcome::Monitored, reason, entry.and_then(entry_at))
        }
        Resolution::Granted(allowances) => {
            let has = |each: &&Allowance| {
                port.is_none_or(|(class, port)| each.ports.contains(class, port))
            };
            if let Some(allowance) = allowances.iter().find(has) {
                let entry = entry_at(allowance.entry);
                let shown = entry.clone().unwrap_or_else(unknown);
                return Explanation {
                    outcome: Outcome::Allowed,
                    reason: None,
                    because: format!(
                        "{} grants {}: the name may be resolved, and its addresses are leased",
                        shown.name, shown.text
                    ),
                    would_change: format!("removing {} would deny it", place(&shown)),
                    entry,
                };
            }
            let granted = allowances
                .iter()
                .map(|each| each.ports.to_string())
                .collect::<Vec<_>>();
            let outcome = match tables.mode {
                Mode::Monitor => Outcome::Monitored,
                Mode::Enforce => Outcome::Denied,
            };
            Explanation {
                outcome,
                reason: Some(Reason::OutOfScope.name()),
                entry: None,
                because: format!(
                    "the name may be resolved, but its addresses are leased for {} only",
                    granted.join(", ")
                ),
                would_change: wanted.clone(),
            }
        }
    }
}

/// Stands for an entry that the tables do not have.
fn unknown() -> Entry {
    Entry {
        name: "an entry".into(),
        text: "it".into(),
        file: String::new(),
        line: 0,
        reason: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    const CLOCK: Clock = Clock::at(1 << 40, 1_790_812_800_000);
    const SCOPE: &str = "[[scope.allow]]\nto = \"*.example.com\"\nports = [443, \"53/udp\"]\n\
                         [[scope.allow]]\nto = \"old.example.net\"\nports = [443]\n\
                         expires = 2026-01-01T00:00:00Z\n\
                         [[scope.deny]]\nto = \"bad.example.com\"\n";

    fn answer(mode: &str, name: &str, port: Option<(Class, u16)>) -> Explanation {
        let text = format!(
            "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = [\"/r/a\"]\n\
             [scope]\nmode = \"{mode}\"\n{SCOPE}"
        );
        let source = Source {
            path: "a.toml".into(),
            text,
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], CLOCK.wall_now_ms);
        let agent = compilation.agent("a").unwrap();
        explain_name(agent, name, port, &CLOCK)
    }

    #[test]
    fn a_granted_name_is_told_with_its_entry() {
        for port in [None, Some((Class::Tcp, 443)), Some((Class::Udp, 53))] {
            let told = answer("enforce", "api.example.com", port);
            assert_eq!((told.outcome, told.reason), (Outcome::Allowed, None));
            assert_eq!(told.entry.unwrap().name, "scope.allow[0]");
            assert_eq!(
                told.because,
                "scope.allow[0] grants *.example.com 443/tcp, 53/udp: the name may be resolved, and \
                 its addresses are leased"
            );
        }
    }

    #[test]
    fn a_port_that_is_not_granted_is_told_apart_from_the_name() {
        let told = answer("enforce", "api.example.com", Some((Class::Tcp, 80)));
        assert_eq!(
            (told.outcome, told.reason),
            (Outcome::Denied, Some("out_of_scope"))
        );
        assert!(
            told.because.ends_with("leased for 443/tcp, 53/udp only"),
            "{}",
            told.because
        );
        assert!(
            told.would_change
                .ends_with("[[scope.allow]] to = \"api.example.com\" ports = [80]"),
            "{}",
            told.would_change
        );
    }

    #[test]
    fn a_refusal_says_what_would_change_it() {
        for (mode, name, outcome, reason, change) in [
            (
                "enforce",
                "api.example.org",
                Outcome::Denied,
                "name_not_in_scope",
                "to = \"api.example.org\" ports = [443]",
            ),
            (
                "enforce",
                "bad.example.com",
                Outcome::Denied,
                "denied",
                "only a change of scope.deny[0] (a.toml:21) would allow it",
            ),
            (
                "enforce",
                "old.example.net",
                Outcome::Denied,
                "expired",
                "a later `expires` at scope.allow[1] (a.toml:17) would allow it",
            ),
            (
                "monitor",
                "api.example.org",
                Outcome::Monitored,
                "name_not_in_scope",
                "ports = [443]",
            ),
        ] {
            let told = answer(mode, name, Some((Class::Tcp, 443)));
            assert_eq!(
                (told.outcome, told.reason),
                (outcome, Some(reason)),
                "{name}"
            );
            assert!(told.would_change.ends_with(change), "{}", told.would_change);
        }
    }
}
