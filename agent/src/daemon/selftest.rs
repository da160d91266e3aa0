//! The loaded programs' own verdict against memory's, on the tables just written: what is declared
//! ready has been asked.

use agent_ebpf::{
    abi::{Addr, Answer, Hook, Question},
    decide::{Attempt, Decision, Peer, decide},
};

use crate::{
    kernel::{Enforcer, OpenError, boot_nanos},
    policy::{AgentTables, Clock, MemoryRules, Placed, Prefix, TimedRule},
};

/// Questions about one agent, at most. Each takes the kernel some 5 µs.
const MOST: usize = 48;
/// Questions about one agent whose change is known, at most.
const OF_A_CHANGE: usize = 24;
/// Questions about one agent where all are asked about, at least: one place, and one that nothing
/// is said about.
const LEAST: usize = 8;
/// Questions about all agents together, as far as [`LEAST`] lets.
const ALL: usize = 8_192;
/// Protocols that are asked about with the ports of a rule: TCP and UDP.
const WITH_PORTS: [u8; 2] = [6, 17];
/// Protocols that are asked about once a place: ICMP and one without a class of its own.
const WITHOUT: [u8; 2] = [1, 132];
/// Questions about a place with one rule for one port.
const OF_A_PLACE: usize = 2 * WITH_PORTS.len() + WITHOUT.len();
/// A port that few rules name.
const OTHER_PORT: u16 = 1;

/// What is to be asked about an agent.
#[derive(Clone, Copy, Debug)]
pub struct Extent<'a> {
    /// Questions, at most; those of one place are asked together.
    pub most: usize,
    /// What was in force before: what differs from it is asked about first.
    pub before: Option<&'a AgentTables>,
}

// === impl Extent ===

impl Extent<'_> {
    /// Everywhere, as one of so many agents.
    pub fn one_of(agents: usize) -> Self {
        Self {
            most: (ALL / agents.max(1)).clamp(LEAST, MOST),
            before: None,
        }
    }

    /// The same, and first of all where it differs from what was in force before, if anything was.
    pub fn after(self, before: Option<&AgentTables>) -> Extent<'_> {
        let most = match before {
            Some(_) => self.most.min(OF_A_CHANGE),
            None => self.most,
        };
        Extent { most, before }
    }
}

/// Asks about an agent. The error says what differed.
pub fn ask(
    enforcer: &mut Enforcer,
    tables: &AgentTables,
    clock: &Clock,
    extent: Extent<'_>,
) -> Result<usize, String> {
    let Some(agent) = enforcer.index_of(&tables.id) else {
        return Err(format!("agent `{}` has no index in the kernel", tables.id));
    };
    let memory = MemoryRules::new(tables, clock, Peer::Foreign);
    let mut asked = 0;
    for question in questions(tables, agent, extent) {
        // There the kernel knows more than the registry.
        if enforcer.leased_at(agent, question.addr).is_some() {
            continue;
        }
        let said = enforcer
            .judge(question)
            .map_err(|error: OpenError| error.to_string())?;
        let expected = decide(&memory, memory.row(), &attempt(&question));
        if flat(expected) != (said.verdict, said.reason) || !same_entry(expected, &said) {
            return Err(format!(
                "agent `{}` to {} port {} protocol {}: the kernel says {}/{}, memory {expected:?}",
                tables.id,
                std::net::IpAddr::from(question.addr),
                question.port,
                question.protocol,
                said.verdict,
                said.reason,
            ));
        }
        asked += 1;
    }
    Ok(asked)
}

fn questions(tables: &AgentTables, agent: u32, extent: Extent<'_>) -> Vec<Question> {
    // One moment for all, or a deadline could pass between the two answers.
    let now = boot_nanos();
    let mut questions = Vec::new();
    for placed in places(&tables.scope.reach, extent) {
        let mut ports: Vec<u16> = placed
            .rules
            .iter()
            .take(2)
            .flat_map(|rule| [rule.low, rule.high])
            .chain([OTHER_PORT])
            .collect();
        ports.sort_unstable();
        ports.dedup();
        let with = ports
            .iter()
            .flat_map(|port| WITH_PORTS.map(|protocol| (*port, protocol)));
        let without = WITHOUT.map(|protocol| (OTHER_PORT, protocol));
        let of_place = with.chain(without).map(|(port, protocol)| Question {
            now,
            addr: placed.prefix.addr,
            agent,
            port,
            protocol,
            hook: Hook::Egress as u8,
            peer: 2,
            ..Question::zeroed()
        });
        questions.extend(of_place);
        if questions.len() >= extent.most {
            break;
        }
    }
    questions.truncate(extent.most);
    questions
}

/// The places to ask about, the telling ones first: one that nothing is said about, those whose
/// rules are new, those where only the numbers of entries are, then any. Of each kind some from all
/// over, and of those that are gone too.
fn places<'a>(
    reach: &'a [Placed],
    extent: Extent<'a>,
) -> impl Iterator<Item = std::borrow::Cow<'a, Placed>> {
    use std::borrow::Cow;
    let somewhere = Placed {
        prefix: Prefix {
            addr: Addr::v4([192, 0, 2, 1]),
            len: 128,
        },
        rules: Vec::new(),
    };
    let (mut changed, mut renumbered) = (Vec::new(), Vec::new());
    if let Some(before) = extent.before {
        let key = |placed: &Placed| (placed.prefix.bits(), placed.prefix.len);
        let mut old = before.scope.reach.iter().peekable();
        for new in reach {
            while let Some(gone) = old.next_if(|old| key(old) < key(new)) {
                changed.push(gone);
            }
            match old.next_if(|old| key(old) == key(new)) {
                Some(old) if old.rules == new.rules => {}
                Some(old) if is_renumbered(old, new) => renumbered.push(new),
                Some(_) | None => changed.push(new),
            }
        }
        changed.extend(old);
    }
    let places = (extent.most / OF_A_PLACE).max(1);
    let step = |among: usize| among.div_ceil(places).max(1);
    let spread = |of: Vec<&'a Placed>| {
        let step = step(of.len());
        of.into_iter().step_by(step)
    };
    let any = reach.iter().step_by(step(reach.len()));
    std::iter::once(Cow::Owned(somewhere)).chain(
        spread(changed)
            .chain(spread(renumbered))
            .chain(any)
            .map(Cow::Borrowed),
    )
}

/// Whether only the entries are other ones.
fn is_renumbered(old: &Placed, new: &Placed) -> bool {
    old.rules.len() == new.rules.len()
        && old.rules.iter().zip(&new.rules).all(|(old, new)| {
            let entry = new.entry;
            TimedRule {
                entry,
                ..old.clone()
            } == *new
        })
}

fn attempt(question: &Question) -> Attempt {
    Attempt {
        addr: question.addr.effective(),
        port: question.port,
        local_port: question.local_port,
        protocol: question.protocol,
        hook: Hook::Egress,
        tcp_flags: question.tcp_flags,
        now: question.now,
    }
}

/// A decision as the judge puts it.
fn flat(decision: Decision) -> (u8, u8) {
    match decision {
        Decision::Allow { .. } => (1, 0),
        Decision::Monitor { reason, .. } => (2, reason as u8),
        Decision::Deny { reason, .. } => (3, reason as u8),
        Decision::Fault(_) => (4, agent_ebpf::abi::Reason::Fault as u8),
    }
}

fn same_entry(decision: Decision, said: &Answer) -> bool {
    match decision {
        Decision::Allow { entry, .. }
        | Decision::Monitor { entry, .. }
        | Decision::Deny { entry, .. } => entry == said.entry,
        Decision::Fault(cause) => cause as u8 == said.cause,
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Effect;

    use super::*;

    fn placed(last: u8, port: u16, entry: u32) -> Placed {
        Placed {
            prefix: Prefix {
                addr: Addr::v4([10, 0, 0, last]),
                len: 128,
            },
            rules: vec![TimedRule {
                class: None,
                low: port,
                high: port,
                effect: Effect::Allow,
                entry,
                expires: None,
            }],
        }
    }

    fn tables(reach: Vec<Placed>) -> AgentTables {
        AgentTables {
            scope: crate::policy::Scope {
                reach,
                serve: Vec::new(),
            },
            ..AgentTables::nobody()
        }
    }

    /// Last octets of the places, in order.
    fn asked(now: &AgentTables, before: Option<&AgentTables>, most: usize) -> Vec<u8> {
        let extent = Extent { most, before };
        let mut octets: Vec<u8> = questions(now, 1, extent)
            .iter()
            .map(|question| question.addr.octets()[15])
            .collect();
        octets.dedup();
        octets
    }

    #[test]
    fn what_changed_is_asked_about_first() {
        let before = tables(
            (1..=100)
                .map(|last| placed(last, 443, last.into()))
                .collect(),
        );
        let mut now = before.clone();
        now.scope.reach.remove(49);
        now.scope.reach[20] = placed(21, 80, 21);
        for renumbered in &mut now.scope.reach[90..] {
            renumbered.rules[0].entry += 1;
        }
        // The first is the one that nothing is said about.
        assert_eq!(asked(&now, Some(&before), 18)[..3], [1, 21, 50]);
        let more = asked(&now, Some(&before), MOST);
        assert!(more[3..8].iter().all(|octet| *octet > 91), "{more:?}");
    }

    #[test]
    fn questions_are_bounded_and_from_all_over() {
        let now = tables(
            (1..=200)
                .map(|last| placed(last, 443, last.into()))
                .collect(),
        );
        let few = Extent::one_of(5_000);
        assert_eq!(few.most, LEAST);
        assert_eq!(questions(&now, 1, few).len(), LEAST);
        let all = Extent::one_of(1);
        assert_eq!(questions(&now, 1, all).len(), MOST);
        let octets = asked(&now, None, MOST);
        assert!(
            octets.len() > 6 && *octets.iter().max().unwrap() > 20,
            "{octets:?}"
        );
    }
}
