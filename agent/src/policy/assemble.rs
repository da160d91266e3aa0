//! The model and its lowered scope put together: the tables of an agent, with their hash and the
//! state in force.

use std::{collections::BTreeSet, path::PathBuf};

use agent_ebpf::abi::{Loopback, Mode, RULES_PER_SET, SETS_PER_ADDRESS, State};

use super::{
    expand::{Flat, Shelves},
    finding::Finding,
    hash::Canonical,
    link,
    lower::{Lowered, lower},
    model::{Agent, Grant, Scope},
    name::Id,
    source::{Source, SourceFile, SourceKind},
    tables::{self, AgentTables},
};

/// Rules that one address may have.
pub(super) const RULES: usize = RULES_PER_SET * SETS_PER_ADDRESS;

/// The id of the pseudo-agent of processes that no agent claims.
pub const UNREGISTERED_ID: &str = "(unregistered)";

/// What every agent is compiled with.
pub(super) struct Surroundings<'a> {
    pub shelves: Shelves<'a>,
    pub floors: Vec<(&'a SourceFile<'a>, &'a [Grant])>,
}

/// The sets that a scope takes in.
pub(super) fn used_sets(scope: &Scope, shelves: &Shelves<'_>) -> BTreeSet<Id> {
    let mut used = link::included(&scope.allow, shelves);
    used.extend(link::included(&scope.deny, shelves));
    used
}

/// The hash that an approval covers, and the hash of all that is in force.
pub(super) fn hashes(agent: &Agent, scope: &Scope, around: &Surroundings<'_>) -> (String, String) {
    let mut canonical = Canonical::default();
    canonical.agent(agent, scope);
    for name in used_sets(scope, &around.shelves) {
        canonical.set(
            &name,
            around.shelves.get(&name).map_or(&[], |shelf| shelf.allow),
        );
    }
    let approval = canonical.hash();
    for (_, grants) in &around.floors {
        canonical.floor(grants);
    }
    (approval, canonical.hash())
}

/// The state in force: what was not approved as it stands is a draft.
pub(super) fn state(
    agent: &Agent,
    approval: &str,
    file: &SourceFile<'_>,
    findings: &mut Vec<Finding>,
) -> State {
    let state = agent.lifecycle.state;
    match &agent.lifecycle.approved_hash {
        Some((approved, span)) if state == State::Active && approved != approval => {
            let message = "the entry is not what was approved: it counts as a draft";
            let help = format!("approve it again; the hash is now {approval}");
            findings.push(Finding::warning(file, span, message).help(help));
            State::Draft
        }
        _ => state,
    }
}

pub(super) fn tables(
    agent: &Agent,
    scope: &Scope,
    file: &SourceFile<'_>,
    flat: Flat,
    reach: Lowered,
    serve: Lowered,
) -> AgentTables {
    AgentTables {
        id: agent.id.to_string(),
        name: agent.name.clone(),
        owner: agent.owner.clone(),
        approved_by: agent.lifecycle.approved_by.clone(),
        approval_ref: agent.lifecycle.approval_ref.clone(),
        approved_hash: agent
            .lifecycle
            .approved_hash
            .as_ref()
            .map(|(hash, _)| hash.clone()),
        file: file.source.path.clone(),
        hash: String::new(),
        state: agent.lifecycle.state,
        mode: scope.mode,
        loopback: scope.loopback,
        sockets: flat.sockets,
        not_before: agent.lifecycle.not_before,
        expires: agent.lifecycle.expires,
        selectors: agent
            .selectors
            .iter()
            .map(|selector| selector.as_str().into())
            .collect(),
        scope: tables::Scope {
            reach: reach.placed,
            serve: serve.placed,
        },
        names: flat.names,
        entries: flat.entries,
    }
}

pub(super) fn unregistered(around: &Surroundings<'_>) -> AgentTables {
    let source = Source {
        path: PathBuf::new(),
        text: String::new(),
        kind: SourceKind::Agent,
    };
    let file = SourceFile::new(&source);
    let nothing = Scope {
        loopback: Loopback::None,
        ..Scope::default()
    };
    let mut canonical = Canonical::default();
    for (_, grants) in &around.floors {
        canonical.floor(grants);
    }
    let flat = {
        let floors: Vec<_> = around
            .floors
            .iter()
            .map(|(file, grants)| (&**file, *grants))
            .collect();
        Flat::new(&file, "scope.", &nothing, &around.shelves, &floors)
    };
    let reach = lower(&flat.reach, &flat.expires, RULES).placed;
    AgentTables {
        id: UNREGISTERED_ID.into(),
        name: "Processes that no agent claims".into(),
        owner: String::new(),
        approved_by: None,
        approval_ref: None,
        approved_hash: None,
        file: PathBuf::new(),
        hash: canonical.hash(),
        state: State::Unregistered,
        mode: Mode::Enforce,
        loopback: Loopback::None,
        sockets: 0,
        not_before: None,
        expires: None,
        selectors: Vec::new(),
        scope: tables::Scope {
            reach,
            serve: Vec::new(),
        },
        names: flat.names,
        entries: flat.entries,
    }
}
