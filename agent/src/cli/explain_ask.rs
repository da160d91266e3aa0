//! What there is to ask about a destination, and the registry's own answer.

use std::net::IpAddr;

use agent_ebpf::{
    abi::{Addr, Class},
    decide::Peer,
};

use super::{
    destination::{Destination, TCP, UDP, What, icmp, written},
    outcome::{Failure, Result},
};
use crate::{
    control::protocol::{self, Answer, Explain, Question, Source},
    policy::{self, AgentTables, Clock, Entry, Outcome as Verdict},
};

/// An IP protocol that has no class of its own: SCTP.
const OTHER: u8 = 132;

/// One thing to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// The destination in words.
    pub(super) label: String,
    pub(super) protocol: u8,
    pub(super) port: u16,
    /// Whether this port is meant, and not one that stands for many.
    pub(super) exact: bool,
}

/// Everything to ask. Without a port, the scope says what there is to ask about.
pub(super) fn ask(destination: &Destination, tables: Option<&AgentTables>) -> Result<Vec<Asked>> {
    let addr = destination.addr;
    let questions = destination.questions();
    if destination.what != What::Everything {
        let asked = questions.into_iter().map(|(protocol, port)| Asked {
            label: written(addr, protocol, port),
            protocol,
            port,
            exact: true,
        });
        return Ok(asked.collect());
    }
    match tables {
        Some(tables) => Ok(everything(addr, tables)),
        None => Err(Failure::no(
            "the registry on disk has no valid entry for this agent to say which ports matter",
        )
        .help(format!(
            "name one: `{addr}:PORT`, with brackets around an IPv6 address"
        ))),
    }
}

/// One question for each rule at the address, and one for what no rule covers.
fn everything(addr: IpAddr, tables: &AgentTables) -> Vec<Asked> {
    let key = Addr::from(addr).effective();
    let placed = tables
        .scope
        .reach
        .iter()
        .filter(|placed| placed.prefix.contains(&key))
        .max_by_key(|placed| placed.prefix.len);
    let rules = placed.map_or(&[][..], |placed| placed.rules.as_slice());
    let mut asked: Vec<Asked> = rules
        .iter()
        .map(|rule| {
            let (protocol, name) = match rule.class {
                Some(Class::Tcp) => (TCP, "tcp"),
                None => (TCP, "any"),
                Some(Class::Udp) => (UDP, "udp"),
                Some(Class::Icmp) => (icmp(addr), "icmp"),
                Some(Class::Other) => (OTHER, "other"),
            };
            let ports = match (rule.low, rule.high) {
                (0, u16::MAX) => String::new(),
                (low, high) if low == high => format!(" {low}"),
                (low, high) => format!(" {low}-{high}"),
            };
            let all = ports.is_empty() && rule.class.is_none();
            let ports = if all {
                " everything".to_owned()
            } else {
                format!("{ports} {name}")
            };
            Asked {
                label: format!("{addr}{}", ports.replace("  ", " ")),
                protocol,
                port: rule.low.max(1),
                exact: rule.low == rule.high,
            }
        })
        .collect();
    let class_of = |protocol| Some(Class::of(protocol));
    let uncovered = [TCP, UDP, OTHER].into_iter().find_map(|protocol| {
        let covers = |port: u16| {
            rules.iter().any(|rule| {
                (rule.class.is_none() || rule.class == class_of(protocol))
                    && (rule.low..=rule.high).contains(&port)
            })
        };
        (1..=u16::MAX)
            .find(|port| !covers(*port))
            .map(|port| (protocol, port))
    });
    if let Some((protocol, port)) = uncovered {
        let label = if rules.is_empty() {
            "everything"
        } else {
            "everything else"
        };
        asked.push(Asked {
            label: format!("{addr} {label}"),
            protocol,
            port,
            exact: false,
        });
    }
    asked
}

/// The registry's answer, why, and what would change it.
pub(super) fn offline(
    tables: &AgentTables,
    question: &Question,
    clock: &Clock,
) -> (Explain, String, String) {
    let mut asked = policy::Question::to(question.addr, question.port, question.protocol);
    let told = policy::explain(tables, &asked, clock);
    // On loopback the answer may hang on who listens there; a foreign listener is the safe answer.
    asked.peer = Peer::Own;
    let own = policy::explain(tables, &asked, clock);
    let note = (own.outcome != told.outcome).then(|| {
        format!(
            "{} when the listener there is the agent's own",
            own.outcome.name()
        )
    });
    let verdict = match told.outcome {
        Verdict::Allowed => Answer::Allowed,
        Verdict::Monitored => Answer::Monitored,
        Verdict::Denied if told.reason == Some("fault") => Answer::Fault,
        Verdict::Denied => Answer::Denied,
    };
    let explain = Explain {
        question: question.clone(),
        verdict,
        reason: told.reason.map(str::to_owned),
        entry: told.entry.as_ref().map(entry),
        until_ms: tables.expires.filter(|_| verdict.passes()),
        source: Source::Registry,
        hash: tables.hash.clone(),
        revision: 0,
        cgroups: Vec::new(),
        note,
        lease: None,
    };
    (explain, told.because, told.would_change)
}

fn entry(entry: &Entry) -> protocol::Entry {
    protocol::Entry {
        name: entry.name.clone(),
        text: entry.text.clone(),
        file: entry.file.clone(),
        line: entry.line,
        reason: entry.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::compiled::clock,
        policy::{Source as File, SourceKind},
    };

    const ENTRY: &str = r#"
schema = 1
[agent]
id = "a"
owner = "alice@example.com"
[lifecycle]
state = "active"
approved_by = "dave@example.com"
expires = 2999-01-01T00:00:00Z
[selector]
cgroup = ["/agents.slice/a"]
[[scope.allow]]
to = "10.0.0.0/8"
ports = [443, "8000-8100", "53/udp"]
[[scope.allow]]
to = "192.0.2.1"
ports = ["any"]
"#;

    fn tables() -> AgentTables {
        let source = File {
            path: "a.toml".into(),
            text: ENTRY.to_owned(),
            kind: SourceKind::Agent,
        };
        let compilation = policy::compile(&[source], 0);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        compilation.agent("a").unwrap().clone()
    }

    fn labels(addr: &str) -> Vec<String> {
        let asked = everything(addr.parse().unwrap(), &tables());
        asked.into_iter().map(|asked| asked.label).collect()
    }

    #[test]
    fn without_a_port_the_scope_says_what_to_ask() {
        assert_eq!(
            labels("10.1.2.3"),
            [
                "10.1.2.3 443 tcp",
                "10.1.2.3 8000-8100 tcp",
                "10.1.2.3 53 udp",
                "10.1.2.3 everything else",
            ]
        );
        assert_eq!(labels("192.0.2.1"), ["192.0.2.1 everything"]);
        assert_eq!(labels("198.51.100.1"), ["198.51.100.1 everything"]);
    }

    #[test]
    fn loopback_says_what_its_answer_hangs_on() {
        let question = Question {
            agent: "a".to_owned(),
            addr: "127.0.0.1".parse().unwrap(),
            port: 80,
            protocol: TCP,
        };
        let (told, _, _) = offline(&tables(), &question, &clock().unwrap());
        assert_eq!(told.verdict, Answer::Denied);
        assert_eq!(told.reason.as_deref(), Some("loopback_foreign"));
        assert_eq!(
            told.note.as_deref(),
            Some("allowed when the listener there is the agent's own")
        );
    }
}
