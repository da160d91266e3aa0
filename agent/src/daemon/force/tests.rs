use std::path::PathBuf;

use agent_ebpf::abi::State;

use super::*;
use crate::{
    policy::{Source, compile},
    state::{Approval, By, HoldState, Stored},
};

const NOW: i64 = 1_790_812_800_000;

const KEEP: Stance = Stance {
    on_bad: OnBadRegistry::Keep,
    unregistered: Unregistered::Deny,
};
const DENY: Stance = Stance {
    on_bad: OnBadRegistry::Deny,
    unregistered: Unregistered::Deny,
};
const MONITOR: Stance = Stance {
    on_bad: OnBadRegistry::Keep,
    unregistered: Unregistered::Monitor,
};

/// Files of a registry.
#[derive(Clone, Default)]
struct Files(Registry);

impl Files {
    fn with(mut self, path: &str, kind: SourceKind, text: &str) -> Self {
        self.0.sources.push(Source {
            path: path.into(),
            text: text.to_owned(),
            kind,
        });
        self
    }

    fn agent(self, id: &str, lifecycle: &str, allow: &str) -> Self {
        let text = format!(
            "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"o\"\n[lifecycle]\nexpires = \
             2027-12-31T00:00:00Z\napproved_by = \"p\"\n{lifecycle}\n[selector]\ncgroup = \
             [\"/r/{id}\"]\n[[scope.allow]]\nto = \"{allow}\"\nports = [443]\n"
        );
        self.with(&format!("agents.d/{id}.toml"), SourceKind::Agent, &text)
    }

    fn active(self, id: &str, allow: &str) -> Self {
        self.agent(id, "state = \"active\"\napproval_ref = \"CHG-1\"", allow)
    }

    fn bad(self, id: &str) -> Self {
        self.with(
            &format!("agents.d/{id}.toml"),
            SourceKind::Agent,
            "schema = ",
        )
    }

    fn floor(self, text: &str) -> Self {
        self.with("floor.toml", SourceKind::Floor, text)
    }

    fn unread(mut self, path: &str, kind: SourceKind, folder: bool) -> Self {
        self.0.unread.push(Unread {
            path: path.into(),
            kind,
            folder,
            why: "Input/output error".to_owned(),
        });
        self
    }

    fn start(&self, last: Option<&LastGood>, holds: &Holds, stance: Stance) -> Force {
        self.try_start(last, holds, stance).unwrap()
    }

    fn try_start(
        &self,
        last: Option<&LastGood>,
        holds: &Holds,
        stance: Stance,
    ) -> Result<Force, Unusable> {
        start(&self.0, compile(&self.0.sources, NOW), last, holds, stance)
    }

    fn reload(&self, before: &Force, holds: &Holds, stance: Stance) -> Force {
        let compiled = compile(&self.0.sources, NOW);
        merge(&self.0, compiled, Some(before), holds, stance).unwrap()
    }

    /// What a store would have of these files, at revision 7.
    fn saved(&self) -> LastGood {
        let force = self.start(None, &Holds::default(), KEEP);
        let stored = force.records().map(|record| {
            let stored = Stored {
                tables: Arc::clone(record.tables),
                since: 5,
                torn: None,
            };
            (record.tables.id.clone(), stored)
        });
        LastGood {
            revision: 7,
            agents: stored.collect(),
            unregistered: Some(Arc::clone(&force.unregistered)),
            complete: true,
        }
    }
}

fn files() -> Files {
    Files::default()
}

fn none() -> Holds {
    Holds::default()
}

fn held(id: &str, state: HoldState, approval: Option<Approval>) -> Holds {
    let hold = Hold {
        state,
        reason: "r".to_owned(),
        by: By::default(),
        since_ms: NOW,
        frozen: false,
        approval,
    };
    Holds {
        by_id: BTreeMap::from([(id.to_owned(), hold)]),
        blind: None,
    }
}

fn torn(mut last: LastGood, id: &str) -> LastGood {
    let stored = last.agents.get_mut(id).unwrap();
    stored.torn = Some("checksum".to_owned());
    stored.tables = Arc::new(AgentTables {
        id: id.to_owned(),
        selectors: stored.tables.selectors.clone(),
        ..AgentTables::nobody()
    });
    last
}

fn state(force: &Force, id: &str) -> State {
    force.agents[id].tables.state
}

// === the start ===

/// The same registry with these holds laid over instead, one agent after the other.
fn laid_over(force: &Force, holds: &Holds) -> Force {
    let mut next = force.clone();
    for id in force.agents.keys() {
        let agent = force.hold_one(id, holds).unwrap();
        next.put(id, agent);
    }
    next
}

#[test]
fn a_bad_file_at_the_start_keeps_the_last_good_entry() {
    let last = files()
        .active("a", "10.0.0.1")
        .active("b", "10.0.0.2")
        .saved();
    let now = files().bad("a").active("b", "10.0.0.3");
    let force = now.start(Some(&last), &none(), KEEP);
    let a = &force.agents["a"];
    assert_eq!(a.tables, last.agents["a"].tables);
    assert_eq!((a.revision, force.revision), (5, 8));
    let kept = a.kept.as_ref().unwrap();
    assert!(kept.contains("so the last good entry holds: agents.d/a.toml:1:"));
    // The other's change is in.
    assert_eq!(force.agents["b"].revision, 8);
    assert_ne!(force.agents["b"].tables, last.agents["b"].tables);
    assert_eq!(force.bad, ["a"]);

    let denied = now.start(Some(&last), &none(), DENY);
    assert_eq!(state(&denied, "a"), State::Draft);
    assert_eq!(denied.agents["a"].entry, last.agents["a"].tables);
    assert!(
        denied.agents["a"]
            .kept
            .as_ref()
            .unwrap()
            .contains("so it is denied")
    );
    // And saved as it was: the settings may change.
    let record = denied.records().next().unwrap();
    assert_eq!(record.tables, &last.agents["a"].tables);

    let unknown = now.start(None, &none(), KEEP);
    assert!(!unknown.agents.contains_key("a"));
}

#[test]
fn a_start_that_finds_all_as_it_was_changes_nothing() {
    let now = files().active("a", "10.0.0.1").active("b", "10.0.0.2");
    let last = now.saved();
    let force = now.start(Some(&last), &none(), KEEP);
    for (id, agent) in &force.agents {
        assert_eq!(agent.revision, 5);
        // The same in memory, so the store need not compare.
        assert!(Arc::ptr_eq(&agent.entry, &last.agents[id].tables));
        assert!(Arc::ptr_eq(&agent.tables, &agent.entry));
    }
}

#[test]
fn an_agent_whose_file_is_gone_is_gone() {
    let last = files()
        .active("a", "10.0.0.1")
        .active("b", "10.0.0.2")
        .saved();
    let force = files()
        .active("b", "10.0.0.2")
        .start(Some(&last), &none(), KEEP);
    assert_eq!(force.agents.keys().collect::<Vec<_>>(), ["b"]);
    let folder = files().unread("agents.d", SourceKind::Agent, true);
    let force = folder.start(Some(&last), &none(), KEEP);
    assert_eq!(force.agents.keys().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_torn_entry_denies_only_with_a_bad_file() {
    let last = files().active("a", "10.0.0.1").saved();
    let last = torn(last, "a");
    let good = files()
        .active("a", "10.0.0.1")
        .start(Some(&last), &none(), KEEP);
    assert_eq!(state(&good, "a"), State::Active);
    assert!(!good.agents["a"].torn);

    let force = files().bad("a").start(Some(&last), &none(), KEEP);
    let a = &force.agents["a"];
    assert!(a.torn && a.approval().is_none());
    assert_eq!(a.tables.state, State::Draft);
    assert_eq!(a.tables.selectors, ["/r/a"]);
    assert!(
        a.kept
            .as_ref()
            .unwrap()
            .contains("its last good entry is lost")
    );
    assert!(force.records().next().unwrap().torn);
    // Nor does a reload with the file still bad make an entry of it.
    let again = files().bad("a").reload(&force, &none(), KEEP);
    assert!(again.agents["a"].torn);
    assert_eq!(state(&again, "a"), State::Draft);
}

#[test]
fn a_floor_that_cannot_be_used_holds_all_that_was() {
    let last = files()
        .active("a", "10.0.0.1")
        .floor("schema = 1\n[[deny]]\nto = \"10.9.9.9\"\n")
        .saved();
    let now = files().active("a", "10.0.0.2").active("new", "10.0.0.3");
    for now in [
        now.clone().floor("schema = "),
        now.unread("floor.toml", SourceKind::Floor, false),
    ] {
        let force = now.start(Some(&last), &none(), KEEP);
        assert_eq!(force.agents.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(force.agents["a"].tables, last.agents["a"].tables);
        assert_eq!(Some(&force.unregistered), last.unregistered.as_ref());
        assert!(force.errors > 0);
        let why = force.fell_back.as_ref().unwrap();
        assert!(
            why.contains("the last good registry holds as a whole"),
            "{why}"
        );
        assert_eq!(force.agents["a"].kept.as_ref(), Some(why));
        let floored = force.agents["a"].entry.entries.iter();
        assert!(floored.clone().any(|each| each.text.contains("10.9.9.9")));

        // Holds count here too.
        let holds = held("a", HoldState::Suspended, None);
        let suspended = now.start(Some(&last), &holds, KEEP);
        assert_eq!(state(&suspended, "a"), State::Suspended);

        // A torn entry reaches nothing, and without a floor of before there is nothing to hold.
        let denied = now.start(Some(&torn(last.clone(), "a")), &none(), KEEP);
        assert_eq!(state(&denied, "a"), State::Draft);
        let lost = LastGood {
            unregistered: None,
            ..last.clone()
        };
        for last in [None, Some(&lost)] {
            let refused = now.try_start(last, &none(), KEEP);
            assert!(matches!(refused, Err(Unusable::Floor(_))));
        }
        // Mended, the files count again.
        let mended = files()
            .active("a", "10.0.0.2")
            .reload(&force, &none(), KEEP);
        assert_eq!(mended.fell_back, None);
        assert_eq!(mended.agents["a"].kept, None);
        assert_ne!(mended.agents["a"].tables, last.agents["a"].tables);
    }
}

// === what nobody is known to claim ===

#[test]
fn monitoring_of_strangers_ends_where_they_could_be_an_agent() {
    let mode = |force: &Force| force.unregistered.mode;
    let good = files().active("a", "10.0.0.1");
    let bad = good.clone().bad("b");
    assert_eq!(mode(&good.start(None, &none(), MONITOR)), Mode::Monitor);

    // Nothing is known of before: `b` may be running.
    let force = bad.start(None, &none(), MONITOR);
    assert_eq!(mode(&force), Mode::Enforce);
    assert_eq!(force.untold, BTreeSet::from(["b".to_owned()]));
    assert!(
        force
            .findings
            .last()
            .unwrap()
            .contains("`b` cannot be used")
    );
    assert_eq!(mode(&bad.reload(&force, &none(), MONITOR)), Mode::Enforce);
    assert_eq!(mode(&good.reload(&force, &none(), MONITOR)), Mode::Monitor);

    // It is known that `b` was none, or what it claims.
    let last = good.saved();
    assert_eq!(
        mode(&bad.start(Some(&last), &none(), MONITOR)),
        Mode::Monitor
    );
    let first = good.start(None, &none(), MONITOR);
    assert_eq!(mode(&bad.reload(&first, &none(), MONITOR)), Mode::Monitor);
    let both = good.clone().active("b", "10.0.0.2").saved();
    let force = bad.start(Some(&torn(both, "b")), &none(), MONITOR);
    assert_eq!(mode(&force), Mode::Monitor);
    assert_eq!(force.agents["b"].tables.selectors, ["/r/b"]);

    // The index is lost, or the folder cannot be read and nothing is known.
    let partly = LastGood {
        complete: false,
        ..good.saved()
    };
    assert_eq!(
        mode(&bad.start(Some(&partly), &none(), MONITOR)),
        Mode::Enforce
    );
    let folder = files().unread("agents.d", SourceKind::Agent, true);
    assert_eq!(mode(&folder.start(None, &none(), MONITOR)), Mode::Enforce);
    assert_eq!(
        mode(&folder.start(Some(&last), &none(), MONITOR)),
        Mode::Monitor
    );
    assert_eq!(
        mode(&folder.start(Some(&last), &none(), KEEP)),
        Mode::Enforce
    );
}

// === holds ===

#[test]
fn the_stricter_of_file_and_hold_counts() {
    for (written, suspended, revoked) in [
        ("active", State::Suspended, State::Revoked),
        ("draft", State::Suspended, State::Revoked),
        ("suspended", State::Suspended, State::Revoked),
        ("revoked", State::Revoked, State::Revoked),
    ] {
        let files = files().agent("a", &format!("state = \"{written}\""), "10.0.0.1");
        let with = |hold| files.start(None, &held("a", hold, None), KEEP);
        assert_eq!(state(&with(HoldState::Suspended), "a"), suspended);
        assert_eq!(state(&with(HoldState::Revoked), "a"), revoked);
        let free = files.start(None, &none(), KEEP);
        assert_eq!(state(&free, "a").name(), written);
        assert_eq!(free.agents["a"].hold, None);
    }
}

#[test]
fn holds_reach_the_kernel_and_end_where_they_are_lifted() {
    let now = files().active("a", "10.0.0.1").active("b", "10.0.0.2");
    let force = now.start(None, &none(), KEEP);
    let holds = held("a", HoldState::Suspended, None);
    let suspended = laid_over(&force, &holds);
    assert_eq!(suspended.revision, force.revision + 1);
    assert_eq!(suspended.agents["a"].hold.as_ref(), holds.get("a"));
    assert_eq!(suspended.agents["a"].revision, suspended.revision);
    assert_eq!(suspended.agents["b"].revision, force.revision);
    let clock = Clock::at(0, NOW);
    let states = |force: &Force| -> Vec<u8> {
        let images = force.images(&clock);
        images.iter().map(|image| image.row.state).collect()
    };
    use State::{Active, Suspended, Unregistered};
    let before = [Unregistered, Active, Active].map(|state| state as u8);
    assert_eq!(states(&force), before);
    let after = [Unregistered, Suspended, Active].map(|state| state as u8);
    assert_eq!(states(&suspended), after);
    // The entry stays what the file says: that is what is saved.
    assert_eq!(suspended.agents["a"].entry, force.agents["a"].entry);
    assert!(
        suspended
            .records()
            .all(|record| record.tables.state == Active)
    );

    assert_eq!(laid_over(&suspended, &holds).revision, suspended.revision);
    let reloaded = now.reload(&suspended, &holds, KEEP);
    assert_eq!(states(&reloaded), after);
    assert_eq!(reloaded.agents["a"].revision, suspended.revision);
    assert_eq!(states(&laid_over(&suspended, &none())), before);
}

#[test]
fn a_hold_stays_with_a_bad_file_and_waits_for_a_deleted_one() {
    let good = files().active("a", "10.0.0.1");
    let holds = held("a", HoldState::Suspended, None);
    let force = good.start(None, &holds, KEEP);
    let bad = files().bad("a").reload(&force, &holds, KEEP);
    assert_eq!(state(&bad, "a"), State::Suspended);
    let free = laid_over(&bad, &none());
    assert_eq!(state(&free, "a"), State::Active);
    let denied = files().bad("a").reload(&bad, &none(), DENY);
    assert_eq!(state(&denied, "a"), State::Draft);
    assert_eq!(state(&laid_over(&denied, &holds), "a"), State::Suspended);

    let gone = files().reload(&force, &holds, KEEP);
    assert!(gone.agents.is_empty());
    let back = good.reload(&gone, &holds, KEEP);
    assert_eq!(state(&back, "a"), State::Suspended);
}

#[test]
fn a_revocation_is_lifted_by_a_file_that_was_approved_again() {
    let force = files().active("a", "10.0.0.1").start(None, &none(), KEEP);
    let holds = held("a", HoldState::Revoked, force.agents["a"].approval());
    let revoked = laid_over(&force, &holds);
    assert_eq!(state(&revoked, "a"), State::Revoked);
    let edited = files()
        .active("a", "10.0.0.2")
        .reload(&revoked, &holds, KEEP);
    assert_eq!(state(&edited, "a"), State::Revoked);
    assert!(edited.lifted.is_empty());
    let approved = files()
        .agent(
            "a",
            "state = \"active\"\napproval_ref = \"CHG-2\"",
            "10.0.0.2",
        )
        .reload(&edited, &holds, KEEP);
    assert_eq!(state(&approved, "a"), State::Active);
    assert_eq!(approved.lifted, ["a"]);
    // An approved hash that is not the entry's makes a draft, and lifts nothing.
    let wrong = format!(
        "state = \"active\"\napproval_ref = \"CHG-2\"\napproved_hash = \"sha256:{}\"",
        "0".repeat(64)
    );
    let draft = files()
        .agent("a", &wrong, "10.0.0.2")
        .reload(&edited, &holds, KEEP);
    assert_eq!(state(&draft, "a"), State::Revoked);
    // Nor does a suspension end that way.
    let holds = held("a", HoldState::Suspended, force.agents["a"].approval());
    let suspended = files()
        .agent(
            "a",
            "state = \"active\"\napproval_ref = \"CHG-2\"",
            "10.0.0.2",
        )
        .reload(&force, &holds, KEEP);
    assert_eq!(state(&suspended, "a"), State::Suspended);
}

#[test]
fn a_revocation_of_an_unknown_entry_takes_the_first_readable_one_as_its_measure() {
    let holds = held("a", HoldState::Revoked, None);
    let force = files().active("a", "10.0.0.1").start(None, &holds, KEEP);
    assert_eq!(state(&force, "a"), State::Revoked);
    let [(id, settled)] = force.settled.as_slice() else {
        panic!("{:?}", force.settled)
    };
    assert_eq!(
        (id.as_str(), &settled.approval),
        ("a", &force.agents["a"].approval())
    );
    assert_eq!(force.agents["a"].hold.as_ref(), Some(settled));
    let holds = held("a", HoldState::Revoked, settled.approval.clone());
    let approved = files()
        .agent(
            "a",
            "state = \"active\"\napproval_ref = \"CHG-2\"",
            "10.0.0.1",
        )
        .reload(&force, &holds, KEEP);
    assert_eq!(approved.lifted, ["a"]);
}

#[test]
fn where_no_hold_can_be_read_everybody_is_held() {
    let blind = Holds {
        by_id: BTreeMap::new(),
        blind: held("x", HoldState::Suspended, None).by_id.remove("x"),
    };
    let force = files().active("a", "10.0.0.1").start(None, &blind, KEEP);
    assert_eq!(state(&force, "a"), State::Suspended);
    assert!(force.settled.is_empty() && force.lifted.is_empty());
    assert_eq!(
        force.agents["a"].tables.file,
        PathBuf::from("agents.d/a.toml")
    );
}
