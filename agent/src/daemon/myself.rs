//! What a process inside the fence is told of itself.

use agent_ebpf::abi::State;

use super::{
    answers::{UNREGISTERED, held, written},
    core::Core,
};
use crate::{
    cgroup::CgroupPath,
    control::{
        Caller,
        protocol::{HoldInfo, Myself},
    },
};

impl Core {
    pub(super) fn myself(&mut self, caller: &Caller) -> Myself {
        let cgroup = caller.cgroup.clone();
        let guard = cgroup
            .as_deref()
            .and_then(|cgroup| self.guarded(cgroup).ok());
        let place = cgroup
            .as_deref()
            .and_then(|cgroup| CgroupPath::new(cgroup).ok());
        let index = place.and_then(|place| {
            self.claims
                .iter()
                .find(|(claimed, _)| place.is_within(claimed))
                .map(|(_, (_, agent))| *agent)
        });
        let found = index.and_then(|index| {
            self.force
                .agents
                .iter()
                .find(|(id, _)| self.enforcer.index_of(id) == Some(index))
                .map(|(id, agent)| (id.clone(), agent.clone()))
        });
        let revision = self.force.revision;
        let Some((id, agent)) = found else {
            return Myself {
                agent: None,
                name: None,
                owner: None,
                approval_ref: None,
                state: UNREGISTERED.to_owned(),
                hold: None,
                mode: self.force.unregistered.mode.name().to_owned(),
                expires_ms: None,
                cgroup,
                guard,
                revision,
                hash: None,
                scope: Vec::new(),
                denials: self.recorder.denials(UNREGISTERED),
                advice: "No registered agent claims this cgroup, so nothing can be reached. Do \
                         not retry; ask whoever runs this host to register the agent."
                    .to_owned(),
            };
        };
        let hold = held(&agent);
        let tables = agent.tables;
        let approval = tables
            .approval_ref
            .as_ref()
            .map_or_else(String::new, |reference| {
                format!(" (approval reference {reference})")
            });
        Myself {
            advice: advice(tables.state, hold.as_ref(), &tables.owner, &approval),
            agent: Some(id.clone()),
            name: Some(tables.name.clone()),
            owner: Some(tables.owner.clone()),
            approval_ref: tables.approval_ref.clone(),
            state: tables.state.name().to_owned(),
            hold,
            mode: tables.mode.name().to_owned(),
            expires_ms: tables.expires,
            cgroup,
            guard,
            revision,
            hash: Some(tables.hash.clone()),
            scope: tables.entries.iter().map(written).collect(),
            denials: self.recorder.denials(&id),
        }
    }
}

/// What a process inside the fence is to do, by its agent's state.
fn advice(state: State, hold: Option<&HoldInfo>, owner: &str, approval: &str) -> String {
    if let Some(hold) = hold {
        return format!(
            "This agent was {} by {}, so nothing can be reached: {}. Do not retry, do not look for \
             another way; ask {owner}{approval}.",
            hold.state,
            hold.by,
            hold.reason.trim_end_matches('.')
        );
    }
    match state {
        State::Active => format!(
            "Only the destinations under `scope` can be reached. A refusal is permanent until the \
             scope changes: do not retry, do not look for another way; ask {owner}{approval} and \
             name the destination, the port and the purpose."
        ),
        State::Draft | State::Suspended | State::Revoked | State::Unregistered => format!(
            "This agent's registration is {}, so nothing can be reached. Do not retry, do not look \
             for another way; ask {owner}{approval}.",
            state.name()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_says_who_holds_the_agent_and_whom_to_ask() {
        let hold = HoldInfo {
            state: "suspended".to_owned(),
            reason: "leaked key.".to_owned(),
            by: "uid 0 (pid 7)".to_owned(),
            since_ms: 0,
            frozen: false,
        };
        let said = |state, hold| advice(state, hold, "alice@example.com", " (CHG-1)");
        assert_eq!(
            said(State::Suspended, Some(&hold)),
            "This agent was suspended by uid 0 (pid 7), so nothing can be reached: leaked key. Do \
             not retry, do not look for another way; ask alice@example.com (CHG-1)."
        );
        let draft = said(State::Draft, None);
        assert!(
            draft.starts_with("This agent's registration is draft, so nothing can be reached.")
        );
        assert!(said(State::Active, None).contains("ask alice@example.com (CHG-1) and name"));
    }
}
