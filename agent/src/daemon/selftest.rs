//! The loaded programs' own verdict against memory's, on the tables just written: what is declared
//! ready has been asked.

use agent_ebpf::{
    abi::{Addr, Answer, Hook, Question},
    decide::{Attempt, Decision, Peer, decide},
};

use crate::{
    kernel::{Enforcer, OpenError, boot_nanos},
    policy::{AgentTables, Clock, MemoryRules, Placed},
};

/// Places of each agent that are asked about; each with several ports and protocols.
const PLACES: usize = 8;
/// Protocols: TCP, UDP, ICMP and one without a class of its own.
const PROTOCOLS: [u8; 4] = [6, 17, 1, 132];

/// Asks about an agent. The error says what differed.
pub fn ask(enforcer: &mut Enforcer, tables: &AgentTables, clock: &Clock) -> Result<usize, String> {
    let Some(agent) = enforcer.index_of(&tables.id) else {
        return Err(format!("agent `{}` has no index in the kernel", tables.id));
    };
    let memory = MemoryRules::new(tables, clock, Peer::Foreign);
    let mut asked = 0;
    for question in questions(tables, agent) {
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

fn questions(tables: &AgentTables, agent: u32) -> Vec<Question> {
    // One moment for all, or a deadline could pass between the two answers.
    let now = boot_nanos();
    let somewhere = Placed {
        prefix: crate::policy::Prefix {
            addr: Addr::v4([192, 0, 2, 1]),
            len: 128,
        },
        rules: Vec::new(),
    };
    let every = tables.scope.reach.len().div_ceil(PLACES).max(1);
    let places = tables
        .scope
        .reach
        .iter()
        .step_by(every)
        .chain(std::iter::once(&somewhere));
    let mut questions = Vec::new();
    for placed in places {
        let edges = placed
            .rules
            .iter()
            .take(4)
            .flat_map(|rule| [rule.low, rule.high]);
        for port in edges.chain([1]) {
            for protocol in PROTOCOLS {
                questions.push(Question {
                    now,
                    addr: placed.prefix.addr,
                    agent,
                    port,
                    protocol,
                    hook: Hook::Egress as u8,
                    peer: 2,
                    ..Question::zeroed()
                });
            }
        }
    }
    questions
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
