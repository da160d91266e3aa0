//! One agent of the registry in force: its entry, and what is laid over it.

use std::sync::Arc;

use agent_ebpf::abi::State;

use crate::{
    daemon::settings::OnBadRegistry,
    policy::AgentTables,
    state::{Approval, Hold},
};

/// One agent in force.
#[derive(Clone, Debug)]
pub struct InForce {
    /// What holds for it: the entry, with the state that a hold or the settings give it.
    pub tables: Arc<AgentTables>,
    /// Its entry, as its file says or said last.
    pub entry: Arc<AgentTables>,
    /// Revision in which it last changed.
    pub revision: u64,
    /// Why this is not what its file says.
    pub kept: Option<String>,
    /// What it is suspended or revoked by, besides its file.
    pub hold: Option<Hold>,
    /// The last good entry is lost; [`Self::entry`] is a draft that claims the same cgroups.
    pub torn: bool,
    /// Its file cannot be used, and the settings say to deny it then.
    pub(super) denied: bool,
}

/// What holds for an agent whose file cannot be used, for the reason `why`.
pub(super) fn keep(known: &InForce, why: &str, on_bad: OnBadRegistry, revision: u64) -> InForce {
    let (denied, so) = match (known.torn, on_bad) {
        (true, _) => (true, "and its last good entry is lost, so it is denied"),
        (false, OnBadRegistry::Keep) => (false, "so the last good entry holds"),
        (false, OnBadRegistry::Deny) => (true, "so it is denied"),
    };
    InForce {
        kept: Some(format!("its file cannot be used, {so}: {why}")),
        torn: known.torn,
        denied,
        ..InForce::new(Arc::clone(&known.entry), revision)
    }
}

/// How much a state takes away; of two that apply the stricter counts.
const fn strictness(state: State) -> u8 {
    match state {
        State::Active => 0,
        State::Draft | State::Unregistered => 1,
        State::Suspended => 2,
        State::Revoked => 3,
    }
}

impl InForce {
    /// An entry as its file says it.
    pub(super) fn new(entry: Arc<AgentTables>, revision: u64) -> Self {
        Self {
            tables: Arc::clone(&entry),
            entry,
            revision,
            kept: None,
            hold: None,
            torn: false,
            denied: false,
        }
    }

    /// This agent with that hold and no other.
    pub(super) fn held(mut self, hold: Option<Hold>) -> Self {
        // A draft reaches nothing, which is what the settings ask for where a file is bad.
        let denied = self.denied.then_some(State::Draft);
        let held = hold.as_ref().map(|hold| hold.state.state());
        let state = [denied, held]
            .into_iter()
            .flatten()
            .fold(self.entry.state, |one, other| {
                if strictness(other) > strictness(one) {
                    other
                } else {
                    one
                }
            });
        self.tables = if state == self.entry.state {
            Arc::clone(&self.entry)
        } else {
            Arc::new(AgentTables {
                state,
                ..(*self.entry).clone()
            })
        };
        self.hold = hold;
        self
    }

    /// With the revision of `known`, if this is the same.
    pub(super) fn since(mut self, known: Option<&Self>) -> Self {
        if let Some(known) = known
            && known.tables == self.tables
            && known.hold == self.hold
            && (known.kept.is_none() || self.kept.is_some())
        {
            self.revision = known.revision;
        }
        self
    }

    /// What tells later whether the entry was approved again; none if the entry is lost.
    pub fn approval(&self) -> Option<Approval> {
        (!self.torn).then(|| Approval::of(&self.entry))
    }
}
