//! What a compilation leaves to the next one. Of a registry mostly one file changes at a time; an
//! agent whose file, sets and floor are to the byte what they were, and about which there was
//! nothing to say, comes out as it did.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use sha2::{Digest as _, Sha256};

use super::{
    compile::{Compilation, Names, compile_with},
    model::Agent,
    name::Id,
    reader::At,
    selector::Selector,
    source::{Source, SourceKind, Span},
    tables::{AgentTables, UnixMillis},
};

/// What came of an agent's file.
pub(super) struct Known {
    pub agent: Agent,
    pub tables: Arc<AgentTables>,
    pub approval: String,
    /// The sets that it uses.
    pub used: BTreeSet<Id>,
    pub claims: Vec<At<Selector>>,
    pub id_span: Option<Span>,
    /// When something in it ends, which is worth a finding.
    pub until: Option<UnixMillis>,
}

type Hash = [u8; 32];

/// What is known from the last time. Without it, every file is looked at.
#[derive(Default)]
pub struct Memory {
    /// Of the sets, the floor, and whether names lead anywhere.
    base: Option<Hash>,
    /// Whether nothing was wrong with the sets then.
    clean_sets: bool,
    agents: BTreeMap<PathBuf, (Hash, Arc<Known>)>,
    /// What the compilation under way will leave.
    next: BTreeMap<PathBuf, (Hash, Arc<Known>)>,
    /// Hashes of the compilation under way.
    hashes: BTreeMap<PathBuf, Hash>,
}

// === impl Memory ===

impl Memory {
    /// Does what [`super::compile_on`] does, and comes to the same.
    pub fn compile(&mut self, sources: &[Source], now: UnixMillis, names: Names) -> Compilation {
        let base = hash_of_base(sources, names);
        if self.base != Some(base) {
            *self = Self::default();
            self.base = Some(base);
        }
        let agents = sources.iter().filter(|each| each.kind == SourceKind::Agent);
        self.hashes = agents
            .map(|source| {
                let hash = Sha256::digest(source.text.as_bytes()).into();
                (source.path.clone(), hash)
            })
            .collect();
        let compilation = compile_with(self, sources, now, names);
        self.agents = std::mem::take(&mut self.next);
        self.hashes.clear();
        compilation
    }

    /// What came of this file, if it comes to the same now.
    pub(super) fn known(&self, source: &Source, now: UnixMillis) -> Option<Arc<Known>> {
        let (hash, known) = self.agents.get(&source.path)?;
        let same = self.hashes.get(&source.path) == Some(hash);
        let holds = known.until.is_none_or(|until| now < until);
        (same && holds).then(|| Arc::clone(known))
    }

    /// Keeps what came of this file. There must have been nothing to say about it.
    pub(super) fn keep(&mut self, source: &Source, known: Arc<Known>) {
        if let Some(hash) = self.hashes.get(&source.path) {
            self.next.insert(source.path.clone(), (*hash, known));
        }
    }

    /// Whether the sets are the same as last time, and nothing was wrong with them.
    pub(super) fn has_clean_sets(&self) -> bool {
        self.clean_sets
    }

    pub(super) fn sets_are_clean(&mut self, clean: bool) {
        self.clean_sets = clean;
    }
}

/// Of all but the agents.
fn hash_of_base(sources: &[Source], names: Names) -> Hash {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    match names {
        Names::Guarded => part(b"guarded"),
        Names::Unguarded(why) => part(why.as_bytes()),
    }
    for source in sources {
        match source.kind {
            SourceKind::Agent => continue,
            SourceKind::Set => part(b"set"),
            SourceKind::Floor => part(b"floor"),
        }
        part(source.path.as_os_str().as_encoded_bytes());
        part(source.text.as_bytes());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::compile_on;

    const NOW: UnixMillis = 1_790_812_800_000;
    /// 2027-12-31.
    const END: UnixMillis = 1_830_211_200_000;

    fn source(path: &str, kind: SourceKind, text: &str) -> Source {
        Source {
            path: path.into(),
            text: text.into(),
            kind,
        }
    }

    fn agent(id: &str, more: &str) -> Source {
        let text = format!(
            "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\n\
             cgroup = [\"/r/{id}\"]\n[[scope.allow]]\nto = \"@s\"\nports = [443]\n{more}"
        );
        source(&format!("{id}.toml"), SourceKind::Agent, &text)
    }

    fn set(to: &str) -> Source {
        let text =
            format!("schema = 1\n[set]\nname = \"s\"\n[[allow]]\nto = \"{to}\"\nports = [443]\n");
        source("sets/s.toml", SourceKind::Set, &text)
    }

    /// Compiles on and on, and holds each result against one without a memory. Returns how many
    /// agents were taken from it in the last.
    fn recalled(steps: &[(&[Source], UnixMillis)]) -> usize {
        let mut memory = Memory::default();
        let mut before: Vec<Arc<AgentTables>> = Vec::new();
        let mut recalled = 0;
        for (sources, now) in steps {
            let again = memory.compile(sources, *now, Names::Guarded);
            let anew = compile_on(sources, *now, Names::Guarded);
            assert_eq!(again.agents, anew.agents);
            let said = |all: &Compilation| format!("{:?} {:?}", all.registry, all.sets);
            assert_eq!(said(&again), said(&anew));
            assert_eq!(again.approvals, anew.approvals);
            assert_eq!(again.unregistered, anew.unregistered);
            assert_eq!(again.findings, anew.findings);
            let old = |each: &&Arc<AgentTables>| before.iter().any(|old| Arc::ptr_eq(old, each));
            recalled = again.agents.iter().filter(old).count();
            before = again.agents;
        }
        recalled
    }

    #[test]
    fn only_what_changed_is_compiled() {
        let same = [agent("a", ""), agent("b", ""), set("10.0.0.1")];
        let deny = "[[scope.deny]]\nto = \"10.0.0.0/8\"\nports = [80]\n";
        let one = [agent("a", ""), agent("b", deny), set("10.0.0.1")];
        assert_eq!(recalled(&[(&same, NOW), (&same, NOW + 1)]), 2);
        assert_eq!(recalled(&[(&same, NOW), (&one, NOW), (&same, NOW)]), 1);
        assert_eq!(
            recalled(&[(&same, NOW), (&same[1..], NOW)]),
            1,
            "a file less"
        );
    }

    #[test]
    fn a_set_or_a_floor_that_changed_changes_all() {
        let one = [agent("a", ""), set("10.0.0.1")];
        let two = [agent("a", ""), set("10.0.0.2")];
        let floor = source(
            "floor.toml",
            SourceKind::Floor,
            "schema = 1\n[[deny]]\nto = \"10.0.0.0/24\"\n",
        );
        assert_eq!(recalled(&[(&one, NOW), (&two, NOW)]), 0);
        let three = [agent("a", ""), set("10.0.0.2"), floor];
        assert_eq!(recalled(&[(&two, NOW), (&three, NOW)]), 0);
        let broken = [agent("a", ""), set("10.0.0.1/8")];
        assert_eq!(
            recalled(&[(&one, NOW), (&broken, NOW), (&broken, NOW), (&one, NOW)]),
            0
        );
    }

    #[test]
    fn what_ends_in_between_is_looked_at_again() {
        let all = [agent("a", ""), set("10.0.0.1")];
        assert_eq!(recalled(&[(&all, NOW), (&all, END - 1)]), 1);
        assert_eq!(recalled(&[(&all, NOW), (&all, END)]), 0);
        // Also after the clock went back.
        assert_eq!(recalled(&[(&all, END), (&all, NOW), (&all, NOW - 1)]), 1);
        let grant = "[[scope.allow]]\nto = \"192.0.2.1\"\nports = [1]\n\
                     expires = 2026-12-31T00:00:00Z\n";
        let sooner = [agent("a", grant), set("10.0.0.1")];
        let year = 365 * 86_400_000;
        assert_eq!(recalled(&[(&sooner, NOW), (&sooner, END - year)]), 0);
    }

    #[test]
    fn what_there_is_to_say_is_said_each_time() {
        let two = [agent("a", ""), agent("b", "x = 1\n"), set("10.0.0.1")];
        assert_eq!(recalled(&[(&two, NOW), (&two, NOW)]), 1);
        // Two that claim the same, though each file alone is as it was.
        let same = agent("a", "").text.replace("\"a\"", "\"c\"");
        let rival = source("c.toml", SourceKind::Agent, &same);
        let alone = [agent("a", ""), set("10.0.0.1")];
        let both = [agent("a", ""), rival, set("10.0.0.1")];
        assert_eq!(
            recalled(&[(&alone, NOW), (&both, NOW), (&both, NOW), (&alone, NOW)]),
            0
        );
    }
}
