//! The kernel's own answer to a question.

use agent_ebpf::abi::{self, Addr, NEVER, NO_ENTRY, Reason};

use super::{
    answers::written,
    core::{Core, boot_now},
};
use crate::{
    control::protocol::{Answer, Code, Explain, Question, Refusal, Source},
    policy,
};

impl Core {
    pub(super) fn explain(&mut self, question: Question) -> Result<Explain, Refusal> {
        let id = question.agent.clone();
        let agent = self
            .force
            .agents
            .get(&id)
            .ok_or_else(|| Refusal::no_such_agent(&id))?;
        let (tables, revision) = (agent.tables.clone(), self.force.revision);
        let index = self
            .enforcer
            .index_of(&id)
            .ok_or_else(|| Refusal::new(Code::Internal, format!("`{id}` has no index")))?;
        let asked = policy::Question::to(question.addr, question.port, question.protocol);
        let said = self
            .enforcer
            .judge(abi::Question {
                now: boot_now(),
                addr: Addr::from(question.addr),
                agent: index,
                port: question.port,
                protocol: question.protocol,
                hook: asked.hook as u8,
                tcp_flags: if asked.opening { 2 } else { 0 },
                peer: 2,
                ..abi::Question::zeroed()
            })
            .map_err(|error| Refusal::new(Code::Internal, error.to_string()))?;
        let question_addr = question.addr;
        let verdict = match said.verdict {
            1 => Answer::Allowed,
            2 => Answer::Monitored,
            3 => Answer::Denied,
            _ => Answer::Fault,
        };
        let decided = (said.entry != NO_ENTRY)
            .then(|| {
                usize::try_from(said.entry)
                    .ok()
                    .and_then(|at| tables.entries.get(at))
            })
            .flatten();
        Ok(Explain {
            question,
            verdict,
            reason: Reason::from_byte(said.reason).map(|reason| reason.name().to_owned()),
            entry: decided.map(written),
            until_ms: (verdict == Answer::Allowed && said.deadline != NEVER && said.deadline != 0)
                .then(|| self.offset.wall(said.deadline)),
            source: Source::Kernel,
            hash: tables.hash.clone(),
            revision,
            lease: self.lease_at(index, question_addr, said.entry),
            cgroups: self
                .claims
                .iter()
                .filter(|(_, (_, agent))| *agent == index)
                .map(|(path, _)| path.to_string())
                .collect(),
            note: (said.cause != 0).then(|| {
                abi::Cause::from_byte(said.cause).map_or_else(
                    || "unknown cause".to_owned(),
                    |cause| cause.name().to_owned(),
                )
            }),
        })
    }
}
