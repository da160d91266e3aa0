//! Refusals in words: for the agent, which gets them as an Extended DNS Error, and for the log. Pure.

use agent_ebpf::abi::Reason;
use hickory_proto::op::ResponseCode;

use super::{
    super::{
        budget::Exhausted,
        message::{Asked, ErrorCode, Reply},
        name::shown,
    },
    Action, Report, Why,
};
use crate::policy::AgentTables;

pub(super) fn refuse(
    agent: &AgentTables,
    asked: &Asked,
    why: Why,
    reason: Reason,
    entry: Option<u32>,
) -> Action {
    let (reply, report) = refusal(agent, asked, why, reason, entry);
    Action::Reply(reply, Some(report))
}

pub(super) fn refused(
    agent: &AgentTables,
    asked: &Asked,
    why: Why,
    reason: Reason,
    entry: Option<u32>,
    text: String,
) -> Action {
    let reply = Reply::to(asked, ResponseCode::Refused).because(ErrorCode::Prohibited, &text);
    let report = Report {
        text,
        ..report(agent, asked, why, reason, entry)
    };
    Action::Reply(reply, Some(report))
}

pub(super) fn refusal(
    agent: &AgentTables,
    asked: &Asked,
    why: Why,
    reason: Reason,
    entry: Option<u32>,
) -> (Reply, Report) {
    let report = report(agent, asked, why, reason, entry);
    let code = match reason {
        Reason::Denied | Reason::Floor => ErrorCode::Blocked,
        _ => ErrorCode::Prohibited,
    };
    let rcode = match why {
        Why::Search => ResponseCode::NXDomain,
        _ => ResponseCode::Refused,
    };
    let reply = Reply::to(asked, rcode).because(code, &report.text);
    (reply, report)
}

pub(super) fn report(
    agent: &AgentTables,
    asked: &Asked,
    why: Why,
    reason: Reason,
    entry: Option<u32>,
) -> Report {
    let name = shown(&asked.name).to_ascii_lowercase();
    let (id, owner) = (&agent.id, &agent.owner);
    let kind = asked.kind.to_string();
    let because = match (why, reason) {
        (Why::Kind, _) => format!("agent {id} may not ask for {kind} records, here of {name}"),
        (_, Reason::NameNotInScope | Reason::Denied | Reason::Floor) => {
            format!("agent {id} may not resolve {name}")
        }
        (_, Reason::Unregistered) => {
            format!("no agent claims this process, so it may not resolve {name}")
        }
        (_, reason) => format!("agent {id} may not resolve {name} ({})", reason.name()),
    };
    let text = if owner.is_empty() {
        because
    } else {
        format!("{because}; ask {owner}")
    };
    Report {
        agent: id.clone(),
        name,
        kind,
        why,
        reason,
        entry,
        monitored: false,
        text,
    }
}

pub(super) fn exceeded(agent: &AgentTables, host: &str, exhausted: Exhausted) -> String {
    let (id, owner) = (&agent.id, &agent.owner);
    match exhausted {
        Exhausted::Names(names) => format!(
            "agent {id} asked for {names} names of one wildcard within an hour, as many as it may, \
             and not for {host}; ask {owner}"
        ),
        Exhausted::Octets(octets) => format!(
            "agent {id} asked for names of one wildcard with {octets} octets within an hour, as many \
             as it may, and not for {host}; ask {owner}"
        ),
    }
}
