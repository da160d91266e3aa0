//! An unattached program that puts a question to [`decide`] on the live maps, and counts nothing:
//! the daemon's self-test before it is ready, and `remit explain`. It runs by test-run only.

use agent_ebpf::{
    abi::{
        ABI_VERSION, Answer, Cause, FINGERPRINT, Hook, LAYOUT_QUESTION, NO_ENTRY, Question, Reason,
    },
    decide::{Attempt, Decision, Peer, decide},
    verifier::hide_addr,
};
use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};

use super::{
    cache::boot_now,
    maps::{ANSWER, QUESTION, Tables, row, word},
    peer::Told,
};

/// Answers `question` in `answer`.
#[cgroup_skb]
pub fn remit_judge(_: SkBuffContext) -> i32 {
    let (Some(question), Some(answer)) = (QUESTION.get(0), ANSWER.get_ptr_mut(0)) else {
        return 0;
    };
    let said = if question.agent == LAYOUT_QUESTION {
        Answer {
            row: FINGERPRINT,
            entry: ABI_VERSION,
            verdict: 1,
            ..Answer::zeroed()
        }
    } else {
        ask(question)
    };
    // SAFETY: a checked map value; nothing else writes it while a question is open.
    unsafe { answer.write(said) };
    1
}

#[inline(always)]
fn ask(question: &Question) -> Answer {
    let word = word(question.agent);
    let mut answer = Answer {
        row: word,
        entry: NO_ENTRY,
        ..Answer::zeroed()
    };
    let peer = match question.peer {
        0 => Peer::Nobody,
        1 => Peer::Own,
        _ => Peer::Foreign,
    };
    let decision = match (row(word), Hook::from_byte(question.hook)) {
        (Some(row), Some(hook)) => {
            let attempt = Attempt {
                addr: hide_addr(question.addr.effective()),
                port: question.port,
                local_port: question.local_port,
                protocol: question.protocol,
                hook,
                tcp_flags: question.tcp_flags,
                now: if question.now == 0 {
                    boot_now()
                } else {
                    question.now
                },
            };
            decide(&Tables { peer: Told(peer) }, row, &attempt)
        }
        (None, _) | (_, None) => Decision::Fault(Cause::NoRow),
    };
    match decision {
        Decision::Allow {
            entry,
            until,
            cacheable,
        } => {
            answer.verdict = 1;
            answer.entry = entry;
            answer.deadline = until;
            answer.cacheable = cacheable as u8;
        }
        Decision::Monitor { reason, entry } => {
            answer.verdict = 2;
            answer.entry = entry;
            answer.reason = reason as u8;
        }
        Decision::Deny { reason, entry } => {
            answer.verdict = 3;
            answer.entry = entry;
            answer.reason = reason as u8;
        }
        Decision::Fault(cause) => {
            answer.verdict = 4;
            answer.reason = Reason::Fault as u8;
            answer.cause = cause as u8;
        }
    }
    answer
}
