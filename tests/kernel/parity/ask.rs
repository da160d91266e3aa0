//! The same questions put to the kernel's verdict and to memory's, and where they differ.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use agent_ebpf::{
    abi::{
        Addr, Answer, Cause, Class, Effect, Hook, NEVER, NO_ENTRY, Question, RULES_PER_SET, Reason,
    },
    decide::{Attempt, Decision, Peer, decide},
};
use anyhow::{Context as _, Result, bail};
use remit::{
    kernel::{Enforcer, boot_nanos},
    policy::{AgentTables, Clock, MemoryRules, Placed, Prefix, TimedRule},
};

use super::policies::{ADDRESSES, Registry};
use crate::support::dice::Dice;

const HOOKS: &[Hook] = &[
    Hook::Connect4,
    Hook::Connect6,
    Hook::Egress,
    Hook::Egress,
    Hook::SockCreate,
];
const PROTOCOLS: &[u8] = &[6, 6, 6, 17, 17, 1, 58, 132, 136, 33, 50, 0, 255];
/// No flag, SYN, SYN and ACK, ACK, RST, FIN and ACK.
const FLAGS: &[u8] = &[0, 0x02, 0x12, 0x10, 0x04, 0x11];

/// What was asked so far, and what came of it.
pub struct Tally {
    /// Questions that kernel and memory were both asked.
    pub compared: usize,
    /// Answers by verdict and reason.
    pub answers: BTreeMap<(u8, u8), usize>,
    /// Questions about addresses whose rules fill more than one block.
    pub chained: usize,
    until: Instant,
}

// === impl Tally ===

impl Tally {
    /// Nothing asked yet; what takes longer than `budget` is cut short.
    pub fn new(budget: Duration) -> Self {
        Self {
            compared: 0,
            answers: BTreeMap::new(),
            chained: 0,
            until: Instant::now() + budget,
        }
    }

    /// Whether the time is up.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Asks `count` questions about each agent of `registry`, until the time is up; the first
    /// difference is an error.
    pub fn compare(
        &mut self,
        enforcer: &mut Enforcer,
        registry: &Registry,
        dice: &mut Dice,
        count: usize,
    ) -> Result<()> {
        for tables in &registry.agents {
            if self.is_over() {
                break;
            }
            let agent = index(enforcer, &tables.id)?;
            let memory = memories(tables, &registry.clock);
            for _ in 0..count {
                let question = question(dice, tables, agent, &registry.clock);
                let (said, wanted) = self.ask(enforcer, &memory, question)?;
                if said != wanted {
                    bail!(difference(tables, &question, &said, &wanted));
                }
            }
        }
        Ok(())
    }

    /// Both answers, put in the same form.
    pub fn ask(
        &mut self,
        enforcer: &mut Enforcer,
        memory: &[MemoryRules; 3],
        question: Question,
    ) -> Result<(Answer, Answer)> {
        let rules = &memory[usize::from(question.peer.min(2))];
        let wanted = answer(decide(rules, rules.row(), &attempt(&question)?));
        let said = enforcer.judge(question)?;
        self.compared += 1;
        *self.answers.entry((said.verdict, said.reason)).or_default() += 1;
        let at = question.addr.effective();
        if rules.rules_at(&at).len() > RULES_PER_SET {
            self.chained += 1;
        }
        // The word that pointed to the row is the kernel's own affair.
        Ok((Answer { row: 0, ..said }, wanted))
    }

    /// Agents that are out of force: the kernel must have no row of them.
    pub fn compare_gone(&mut self, enforcer: &mut Enforcer, ids: &[String]) -> Result<()> {
        let wanted = answer(Decision::Fault(Cause::NoRow));
        for id in ids {
            let question = Question {
                addr: Addr::v4([198, 51, 100, 10]),
                agent: index(enforcer, id)?,
                port: 443,
                protocol: 6,
                hook: Hook::Egress as u8,
                ..Question::zeroed()
            };
            let said = enforcer.judge(question)?;
            self.compared += 1;
            if (Answer { row: 0, ..said }) != wanted {
                bail!("agent {id} is out of force, and the kernel says {said:?}");
            }
        }
        Ok(())
    }

    /// Whether each kind of answer was among them; the error names those that were not.
    pub fn require_all_kinds(&self) -> Result<()> {
        let kinds = [
            (1, 0),
            (2, Reason::OutOfScope as u8),
            (2, Reason::Denied as u8),
            (3, Reason::OutOfScope as u8),
            (3, Reason::Denied as u8),
            (3, Reason::Floor as u8),
            (3, Reason::Expired as u8),
            (3, Reason::NotYetValid as u8),
            (3, Reason::Suspended as u8),
            (3, Reason::Revoked as u8),
            (3, Reason::Draft as u8),
            (3, Reason::LoopbackForeign as u8),
        ];
        let missing: Vec<(u8, u8)> = kinds
            .into_iter()
            .filter(|kind| !self.answers.contains_key(kind))
            .collect();
        if !missing.is_empty() || self.chained == 0 {
            bail!(
                "too narrow: no answers (verdict, reason) {missing:?}; {} about chains",
                self.chained
            );
        }
        Ok(())
    }
}

/// The index of an agent in the kernel.
pub fn index(enforcer: &Enforcer, id: &str) -> Result<u32> {
    enforcer
        .index_of(id)
        .with_context(|| format!("agent {id} has no index in the kernel"))
}

/// Memory's tables for each owner that a loopback peer may have, in the order of the question's
/// `peer`.
pub fn memories(tables: &AgentTables, clock: &Clock) -> [MemoryRules; 3] {
    [Peer::Nobody, Peer::Own, Peer::Foreign].map(|peer| MemoryRules::new(tables, clock, peer))
}

/// A question that must find the rule at `prefix` for the agent at `agent`.
pub fn direct(agent: u32, prefix: Prefix, port: u16, protocol: u8) -> Question {
    Question {
        now: boot_nanos(),
        addr: prefix.addr,
        agent,
        port,
        protocol,
        hook: Hook::Connect6 as u8,
        peer: 2,
        ..Question::zeroed()
    }
}

fn attempt(question: &Question) -> Result<Attempt> {
    Ok(Attempt {
        addr: question.addr.effective(),
        port: question.port,
        local_port: question.local_port,
        protocol: question.protocol,
        hook: Hook::from_byte(question.hook).context("no such hook")?,
        tcp_flags: question.tcp_flags,
        now: question.now,
    })
}

/// A decision as the judge puts it.
fn answer(decision: Decision) -> Answer {
    let said = Answer {
        entry: NO_ENTRY,
        ..Answer::zeroed()
    };
    match decision {
        Decision::Allow {
            entry,
            until,
            cacheable,
        } => Answer {
            verdict: 1,
            entry,
            deadline: until,
            cacheable: u8::from(cacheable),
            ..said
        },
        Decision::Monitor { reason, entry } => Answer {
            verdict: 2,
            entry,
            reason: reason as u8,
            ..said
        },
        Decision::Deny { reason, entry } => Answer {
            verdict: 3,
            entry,
            reason: reason as u8,
            ..said
        },
        Decision::Fault(cause) => Answer {
            verdict: 4,
            reason: Reason::Fault as u8,
            cause: cause as u8,
            ..said
        },
    }
}

fn difference(tables: &AgentTables, question: &Question, said: &Answer, wanted: &Answer) -> String {
    format!(
        "agent {} to {}: the kernel says {said:?}, memory {wanted:?}; asked {question:?}, state \
         {:?}, mode {:?}, loopback {:?}, entries {:?}",
        tables.id,
        IpAddr::from(question.addr),
        tables.state,
        tables.mode,
        tables.loopback,
        tables
            .entries
            .iter()
            .map(|entry| (&entry.name, &entry.text))
            .collect::<Vec<_>>(),
    )
}

fn question(dice: &mut Dice, tables: &AgentTables, agent: u32, clock: &Clock) -> Question {
    let (addr, rules) = address(dice, tables);
    let aimed = (!rules.is_empty()).then(|| &rules[dice.below(rules.len())]);
    let port = |dice: &mut Dice| match dice.below(8) {
        0 => dice.roll() as u16,
        1 => dice.pick(&[0, 1, 443, 65_535]),
        _ => aimed.map_or(dice.below(6) as u16, |rule| {
            let edge = dice.pick(&[rule.low, rule.high]);
            edge.wrapping_add(dice.pick(&[0, 0, 0, 1, u16::MAX]))
        }),
    };
    let protocol = match aimed.and_then(|rule| rule.class) {
        _ if dice.once_in(16) => dice.roll() as u8,
        Some(class) if !dice.once_in(3) => of_class(class),
        _ => dice.pick(PROTOCOLS),
    };
    Question {
        now: moment(dice, tables, clock),
        addr,
        agent,
        port: port(dice),
        local_port: port(dice),
        protocol,
        hook: dice.pick(HOOKS) as u8,
        tcp_flags: dice.pick(FLAGS),
        peer: dice.below(3) as u8,
        ..Question::zeroed()
    }
}

/// A protocol of a class.
pub fn of_class(class: Class) -> u8 {
    match class {
        Class::Tcp => 6,
        Class::Udp => 17,
        Class::Icmp => 1,
        Class::Other => 132,
    }
}

/// An address at an edge of one of the agent's prefixes, or inside, or one of the universe, or
/// anywhere; as it is, or inside a form that a translator unwraps. With it the rules to aim at.
fn address<'a>(dice: &mut Dice, tables: &'a AgentTables) -> (Addr, &'a [TimedRule]) {
    // Every other time where something is granted: the built-in denials would outnumber it.
    let granted = dice.once_in(2);
    let placed: Vec<&Placed> = tables
        .scope
        .reach
        .iter()
        .chain(&tables.scope.serve)
        .filter(|placed| {
            let mut rules = placed.rules.iter();
            !granted || rules.any(|rule| rule.effect == Effect::Allow)
        })
        .collect();
    let mut rules: &[TimedRule] = &[];
    let bits = if placed.is_empty() || dice.once_in(4) {
        if dice.once_in(8) {
            dice.wide()
        } else {
            // Constants that parse, as each run of the suite shows.
            let ip: Option<IpAddr> = dice.pick(ADDRESSES).parse().ok();
            ip.map_or(0, |ip| u128::from_be_bytes(Addr::from(ip).octets()))
        }
    } else {
        let chosen = dice.pick(&placed);
        rules = &chosen.rules;
        let first = chosen.prefix.bits();
        let hosts = u128::MAX
            .checked_shr(u32::from(chosen.prefix.len))
            .unwrap_or(0);
        match dice.below(6) {
            0 => first | hosts,
            1 => first.wrapping_sub(1),
            2 => (first | hosts).wrapping_add(1),
            3 => first | dice.wide() & hosts,
            _ => first,
        }
    };
    let bits = if dice.once_in(5) {
        embed(dice, bits as u32)
    } else {
        bits
    };
    (Addr::from_octets(bits.to_be_bytes()), rules)
}

/// The IPv4 address inside NAT64 (both prefixes), 6to4, IPv4-compatible, mapped, or a form that
/// only looks like one.
fn embed(dice: &mut Dice, v4: u32) -> u128 {
    let v4 = u128::from(v4);
    let noise = dice.wide();
    match dice.below(6) {
        0 => 0x0064_ff9b << 96 | v4,
        1 => 0x0064_ff9b_0001 << 80 | (noise & 0xffff_ffff_ffff) << 32 | v4,
        2 => 0x2002 << 112 | v4 << 80 | noise & ((1 << 80) - 1),
        3 => v4,
        4 => 0xffff << 32 | v4,
        _ => 0x0064_ff9b_0002 << 80 | v4,
    }
}

/// Now, or a nanosecond around a moment at which something begins or ends.
fn moment(dice: &mut Dice, tables: &AgentTables, clock: &Clock) -> u64 {
    let mut moments = vec![
        clock.deadline(tables.expires),
        clock.not_before(tables.not_before),
    ];
    moments.extend(
        tables
            .scope
            .reach
            .iter()
            .flat_map(|placed| &placed.rules)
            .filter(|rule| rule.effect == Effect::Allow && rule.expires.is_some())
            .map(|rule| clock.deadline(rule.expires)),
    );
    let at = dice.pick(&moments);
    if at == 0 || at == NEVER || !dice.once_in(5) {
        return clock.boot_now_ns;
    }
    // Zero would mean the kernel's own now.
    match dice.below(3) {
        0 => at.saturating_sub(1).max(1),
        1 => at,
        _ => at + 1,
    }
}
