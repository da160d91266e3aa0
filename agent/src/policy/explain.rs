//! Allowed or denied, by which entry, why, and what would change it: the kernel's verdict over
//! tables in memory, in words.

use std::net::IpAddr;

use agent_ebpf::{
    abi::{Addr, Class, Hook, LOOPBACK_ENTRY, Loopback, Reason},
    decide::{Attempt, Decision, Peer, decide},
};
use serde::Serialize;

use super::{
    clock::Clock,
    memory::MemoryRules,
    tables::{AgentTables, Entry},
};

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Destination.
    pub addr: IpAddr,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Which hook would be asked.
    pub hook: Hook,
    /// Local port, for what is served; 0 when not known.
    pub local_port: u16,
    /// Whether it opens a TCP connection.
    pub opening: bool,
    /// Whose socket a loopback attempt would reach.
    pub peer: Peer,
}

/// What comes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Let through.
    Allowed,
    /// Let through by monitor mode, and reported.
    Monitored,
    /// Refused.
    Denied,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What comes of it.
    pub outcome: Outcome,
    /// The verdict's code for a refusal (`out_of_scope`, …).
    pub reason: Option<&'static str>,
    /// The entry that decided; none where none did.
    pub entry: Option<Entry>,
    /// One sentence: why.
    pub because: String,
    /// One sentence: what would make it otherwise.
    pub would_change: String,
}

/// TCP's SYN flag alone (RFC 9293, section 3.1).
const SYN: u8 = 0x02;

// === impl Question ===

impl Question {
    /// A connect (TCP) or the first packet (anything else) to `addr`.
    pub const fn to(addr: IpAddr, port: u16, protocol: u8) -> Self {
        let hook = match (protocol, addr) {
            (6, IpAddr::V4(_)) => Hook::Connect4,
            (6, IpAddr::V6(_)) => Hook::Connect6,
            _ => Hook::Egress,
        };
        Self {
            addr,
            port,
            protocol,
            hook,
            local_port: 0,
            opening: protocol == 6,
            peer: Peer::Foreign,
        }
    }

    /// As the verdict takes it, at the moment of `clock`.
    pub fn attempt(&self, clock: &Clock) -> Attempt {
        Attempt {
            addr: Addr::from(self.addr).effective(),
            port: self.port,
            local_port: self.local_port,
            protocol: self.protocol,
            hook: self.hook,
            // Only TCP has any: another protocol with SYN set would be taken for an opening.
            tcp_flags: if self.opening && self.protocol == 6 {
                SYN
            } else {
                0
            },
            now: clock.boot_now_ns,
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// The word for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Monitored => "allowed and reported",
            Self::Denied => "denied",
        }
    }
}

/// Asks the verdict about `tables` at the moment of `clock`.
pub fn explain(tables: &AgentTables, question: &Question, clock: &Clock) -> Explanation {
    let rules = MemoryRules::new(tables, clock, question.peer);
    let decision = decide(&rules, rules.row(), &question.attempt(clock));
    words(tables, question, decision)
}

/// A decision about `question` in words, wherever it was made.
pub fn words(tables: &AgentTables, question: &Question, decision: Decision) -> Explanation {
    let entry_at = |at: u32| tables.entries.get(at as usize).cloned();
    let (outcome, reason, at) = match decision {
        Decision::Allow { entry, .. } => (Outcome::Allowed, None, entry),
        Decision::Monitor { reason, entry } => (Outcome::Monitored, Some(reason), entry),
        Decision::Deny { reason, entry } => (Outcome::Denied, Some(reason), entry),
        Decision::Fault(cause) => {
            return Explanation {
                outcome: Outcome::Denied,
                reason: Some(Reason::Fault.name()),
                entry: None,
                because: format!("the tables do not fit together ({})", cause.name()),
                would_change: "this is a defect of remit: please report it".into(),
            };
        }
    };
    let entry = entry_at(at);
    let (because, would_change) = match reason {
        None => allowed(tables, at, entry.as_ref()),
        Some(reason) => refused(tables, question, reason, entry.as_ref()),
    };
    Explanation {
        outcome,
        reason: reason.map(Reason::name),
        entry,
        because,
        would_change,
    }
}

fn allowed(tables: &AgentTables, at: u32, entry: Option<&Entry>) -> (String, String) {
    if let Some(entry) = entry {
        let because = format!("{} grants {}", entry.name, entry.text);
        return (because, format!("removing {} would deny it", place(entry)));
    }
    if at == LOOPBACK_ENTRY && tables.loopback == Loopback::Own {
        return (
            "it is loopback, and the peer is the agent's own".into(),
            "`loopback = \"none\"` would deny it".into(),
        );
    }
    (
        "`loopback = \"any\"` opens all of loopback".into(),
        "`loopback = \"own\"` would narrow it".into(),
    )
}

fn refused(
    tables: &AgentTables,
    question: &Question,
    reason: Reason,
    entry: Option<&Entry>,
) -> (String, String) {
    let name = entry.map_or("an entry", |entry| entry.name.as_str());
    let text = entry.map_or("", |entry| entry.text.as_str());
    let at = entry.map_or_else(|| "the entry".into(), place);
    let grant = grant(question);
    let file = tables.file.display();
    match reason {
        Reason::OutOfScope => (
            "no entry of the scope covers it".into(),
            format!("a grant in {file} would allow it: {grant}"),
        ),
        Reason::Denied => (
            format!("{name} denies {text}, and denials beat grants"),
            format!("narrowing {at} would lift the denial; a grant is needed as well"),
        ),
        Reason::Floor => (
            format!("{name} denies {text} on this host"),
            format!("only a grant of the exact address in {file} would allow it: {grant}"),
        ),
        Reason::Expired if entry.is_some() => (
            format!("{name} granted {text} and has expired"),
            format!("a later `expires` at {at} would allow it"),
        ),
        Reason::LoopbackForeign if tables.loopback == Loopback::None => (
            "`loopback = \"none\"` closes loopback".into(),
            format!("a grant in {file} would allow it: {grant}"),
        ),
        Reason::LoopbackForeign => (
            "the loopback peer is not the agent's own".into(),
            format!("a grant in {file} would allow it: {grant}"),
        ),
        reason => lifecycle(tables, reason),
    }
}

/// A refusal that has nothing to do with the destination.
pub(super) fn lifecycle(tables: &AgentTables, reason: Reason) -> (String, String) {
    let file = tables.file.display();
    match reason {
        Reason::Expired => (
            "the agent has expired".into(),
            format!("a later `lifecycle.expires` in {file} would let it reach its scope"),
        ),
        Reason::NotYetValid => (
            "the agent is not valid yet".into(),
            format!("`lifecycle.not_before` in {file} has to pass"),
        ),
        Reason::Suspended => (
            "the agent is suspended".into(),
            format!("`remit resume {}` would let it reach its scope", tables.id),
        ),
        Reason::Revoked => (
            "the agent is revoked".into(),
            format!("{file} has to change and be approved again"),
        ),
        Reason::Draft => (
            "the agent is a draft, or its entry is not what was approved".into(),
            format!("approving {file} would let it reach its scope"),
        ),
        Reason::Unregistered => (
            "no agent claims the process's cgroup".into(),
            "an agent whose `selector.cgroup` names it, and whose scope covers this, would".into(),
        ),
        Reason::OutOfScope
        | Reason::Denied
        | Reason::Floor
        | Reason::LoopbackForeign
        | Reason::NameNotInScope
        | Reason::UnixNotInScope
        | Reason::SocketType
        | Reason::LeaseExpired
        | Reason::Translated
        | Reason::Containment
        | Reason::Fault => (
            format!("the kernel refused it as {}", reason.name()),
            format!("see `{}` in docs/events.md", reason.name()),
        ),
    }
}

/// The entry that would allow what was asked and nothing else.
fn grant(question: &Question) -> String {
    let addr = Addr::from(question.addr).effective();
    let ports = match Class::of(question.protocol) {
        Class::Tcp => question.port.to_string(),
        Class::Udp => format!("\"{}/udp\"", question.port),
        Class::Icmp => "\"icmp\"".into(),
        Class::Other => "\"any\"".into(),
    };
    format!(
        "[[scope.allow]] to = \"{}\" ports = [{ports}]",
        IpAddr::from(addr)
    )
}

pub(super) fn place(entry: &Entry) -> String {
    if entry.file.is_empty() {
        entry.name.clone()
    } else {
        format!("{} ({}:{})", entry.name, entry.file, entry.line)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            compile::{Compilation, compile},
            source::{Source, SourceKind},
        },
        *,
    };

    const CLOCK: Clock = Clock::at(1 << 40, 1_790_812_800_000);

    fn compiled(state: &str, scope: &str) -> Compilation {
        let text = format!(
            "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"{state}\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = [\"/r/a\"]\n\
             [scope]\n{scope}"
        );
        let source = Source {
            path: "a.toml".into(),
            text,
            kind: SourceKind::Agent,
        };
        compile(&[source], CLOCK.wall_now_ms)
    }

    fn answer(state: &str, scope: &str, to: &str) -> Explanation {
        let compilation = compiled(state, scope);
        let agent = compilation.agent("a").unwrap();
        explain(agent, &Question::to(to.parse().unwrap(), 443, 6), &CLOCK)
    }

    const GRANT: &str = "[[scope.allow]]\nto = \"10.0.0.0/8\"\nports = [443]\n";

    #[test]
    fn a_grant_is_named_with_its_place() {
        let answer = answer("active", GRANT, "10.1.2.3");
        assert_eq!(answer.outcome, Outcome::Allowed);
        assert_eq!(answer.because, "scope.allow[0] grants 10.0.0.0/8 443/tcp");
        assert_eq!(
            answer.would_change,
            "removing scope.allow[0] (a.toml:13) would deny it"
        );
    }

    #[test]
    fn what_is_out_of_scope_comes_with_the_grant_it_needs() {
        let answer = answer("active", GRANT, "::ffff:192.0.2.1");
        assert_eq!(
            (answer.outcome, answer.reason),
            (Outcome::Denied, Some("out_of_scope"))
        );
        let grant = "[[scope.allow]] to = \"192.0.2.1\" ports = [443]";
        assert!(
            answer.would_change.ends_with(grant),
            "{}",
            answer.would_change
        );
    }

    #[test]
    fn monitor_mode_lets_through_and_says_so() {
        let scope = format!("mode = \"monitor\"\n{GRANT}");
        let answer = answer("active", &scope, "192.0.2.1");
        assert_eq!(
            (answer.outcome, answer.reason),
            (Outcome::Monitored, Some("out_of_scope"))
        );
    }

    #[test]
    fn lifecycle_comes_before_the_scope() {
        for (state, reason) in [
            ("draft", "draft"),
            ("suspended", "suspended"),
            ("revoked", "revoked"),
        ] {
            let answer = answer(state, GRANT, "10.1.2.3");
            assert_eq!(
                (answer.outcome, answer.reason),
                (Outcome::Denied, Some(reason))
            );
            assert_eq!(answer.entry, None);
        }
    }

    #[test]
    fn the_pseudo_agent_reaches_nothing_and_knows_the_floor() {
        let unregistered = compiled("active", GRANT).unregistered;
        let reason = |to: &str| {
            explain(
                &unregistered,
                &Question::to(to.parse().unwrap(), 443, 6),
                &CLOCK,
            )
            .reason
        };
        assert_eq!(reason("10.1.2.3"), Some("unregistered"));
        assert_eq!(reason("127.0.0.1"), Some("unregistered"));
        assert_eq!(reason("169.254.169.254"), Some("floor"));
        let monitored = AgentTables {
            mode: agent_ebpf::abi::Mode::Monitor,
            ..unregistered
        };
        let question = Question::to("10.1.2.3".parse().unwrap(), 443, 6);
        assert_eq!(
            explain(&monitored, &question, &CLOCK).outcome,
            Outcome::Monitored
        );
    }
}
