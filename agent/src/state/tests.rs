use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    sync::Arc,
};

use agent_ebpf::abi::State;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::policy::{Source, SourceKind, compile};

const NOW: i64 = 1_790_812_800_000;

/// A state directory and a registry's folder.
struct Host {
    folder: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            folder: TempDir::new().unwrap(),
        };
        fs::create_dir(host.registry()).unwrap();
        host
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn registry(&self) -> PathBuf {
        self.folder.path().join("agents.d")
    }

    fn entry(&self, id: &str) -> PathBuf {
        self.state().join(format!("registry/{id}.json"))
    }

    fn kept(&self, id: &str) -> PathBuf {
        self.state().join(format!("holds/{id}.json"))
    }

    fn marker(&self, id: &str) -> PathBuf {
        self.registry().join(format!("{id}.hold"))
    }

    fn store(&self) -> Store {
        Store::open(&self.state(), &self.registry())
    }

    fn load(&self) -> Loaded {
        self.store().load(NOW)
    }
}

fn entry(id: &str, allow: &str) -> Arc<AgentTables> {
    let text = format!(
        "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
         approved_by = \"p\"\napproval_ref = \"CHG-1\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\n\
         cgroup = [\"/r/{id}\"]\n[[scope.allow]]\nto = \"{allow}\"\nports = [443]\n"
    );
    let source = Source {
        path: format!("agents.d/{id}.toml").into(),
        text,
        kind: SourceKind::Agent,
    };
    let compilation = compile(&[source], NOW);
    assert!(!compilation.has_errors(), "{:?}", compilation.findings);
    Arc::clone(&compilation.agents[0])
}

fn pseudo() -> Arc<AgentTables> {
    Arc::new(compile(&[], NOW).unregistered)
}

fn save(store: &mut Store, revision: u64, agents: &[Arc<AgentTables>]) -> Saved {
    let records = agents.iter().map(|tables| Record {
        tables,
        torn: false,
    });
    store.save_registry(revision, &pseudo(), records).unwrap()
}

fn hold(state: HoldState, reason: &str, since_ms: i64) -> Hold {
    Hold {
        state,
        reason: reason.to_owned(),
        by: By {
            uid: Some(0),
            pid: Some(4711),
            cgroup: Some("/system.slice/sshd.service".to_owned()),
        },
        since_ms,
        frozen: false,
        approval: Some(Approval::of(&entry("a", "10.0.0.1"))),
    }
}

fn suspended(reason: &str) -> Hold {
    hold(HoldState::Suspended, reason, NOW)
}

fn revoked(reason: &str) -> Hold {
    hold(HoldState::Revoked, reason, NOW)
}

fn both(copies: Result<Copies, StateError>) {
    assert!(matches!(copies, Ok(Copies::Both)), "{copies:?}");
}

fn names(folder: &Path) -> Vec<String> {
    file::names(folder).unwrap()
}

// === the registry ===

#[test]
fn nothing_saved_is_nothing_found() {
    let host = Host::new();
    let loaded = host.load();
    assert!(loaded.registry.is_none() && loaded.clock.is_none());
    assert_eq!(loaded.holds, Holds::default());
    assert!(loaded.damage.is_empty(), "{:?}", loaded.damage);
    assert!(loaded.unwritten.is_empty(), "{:?}", loaded.unwritten);
    let mode = fs::metadata(host.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_registry_comes_back_as_it_was() {
    let host = Host::new();
    let agents = [entry("a", "10.0.0.1"), entry("b.json", "10.0.0.2")];
    save(&mut host.store(), 7, &agents);
    let last = host.load().registry.unwrap();
    assert_eq!((last.revision, last.complete), (7, true));
    assert_eq!(last.unregistered, Some(pseudo()));
    for tables in &agents {
        let stored = &last.agents[&tables.id];
        assert_eq!((&stored.tables, stored.since), (tables, 7));
        assert_eq!(stored.torn, None);
    }
    assert_eq!(
        names(&host.state().join("registry")),
        ["_index.json", "_unregistered.json", "a.json", "b.json.json"]
    );
}

#[test]
fn only_what_changed_is_written_and_what_left_is_removed() {
    let host = Host::new();
    let mut store = host.store();
    let (a, b) = (entry("a", "10.0.0.1"), entry("b", "10.0.0.2"));
    assert_eq!(save(&mut store, 1, &[a.clone(), b.clone()]).written, 3);
    assert_eq!(save(&mut store, 2, &[a.clone(), b]), Saved::default());
    let changed = entry("b", "10.0.0.3");
    let saved = save(&mut store, 3, &[a.clone(), changed.clone()]);
    assert_eq!((saved.written, saved.removed), (1, 0));
    let saved = save(&mut store, 4, &[changed]);
    assert_eq!((saved.written, saved.removed), (0, 1));
    let last = host.load().registry.unwrap();
    assert_eq!(last.revision, 4);
    assert_eq!(last.agents.keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(last.agents["b"].since, 3);

    // A store that has loaded knows what is there.
    let mut store = host.store();
    let _ = store.load(NOW);
    assert_eq!(save(&mut store, 5, &[a]).written, 1);
}

#[test]
fn a_lost_folder_is_written_anew() {
    let host = Host::new();
    let mut store = host.store();
    let a = entry("a", "10.0.0.1");
    save(&mut store, 1, std::slice::from_ref(&a));
    fs::remove_dir_all(host.state()).unwrap();
    assert_eq!(save(&mut store, 1, std::slice::from_ref(&a)).written, 2);
    let loaded = host.load();
    assert_eq!(loaded.registry.unwrap().agents["a"].tables, a);
}

#[test]
fn a_torn_entry_costs_one_agent_and_keeps_its_cgroups() {
    let host = Host::new();
    let agents = [entry("a", "10.0.0.1"), entry("b", "10.0.0.2")];
    save(&mut host.store(), 1, &agents);
    let whole = fs::read(host.entry("a")).unwrap();
    fs::write(host.entry("a"), &whole[..whole.len() / 2]).unwrap();

    // What is lost stays lost, also when it is saved, and though the file is gone.
    for round in 0..3 {
        let mut store = host.store();
        let loaded = store.load(NOW + round);
        let last = loaded.registry.unwrap();
        let torn = &last.agents["a"];
        assert!(torn.torn.is_some(), "round {round}");
        assert_eq!(torn.tables.state, State::Draft);
        assert_eq!(torn.tables.selectors, ["/r/a"]);
        assert!(torn.tables.scope.reach.is_empty());
        assert_eq!(last.agents["b"].tables, agents[1]);
        assert_eq!(last.agents["b"].torn, None);
        let about: Vec<_> = loaded.damage.iter().map(|each| &each.agent).collect();
        match round {
            0 => {
                assert_eq!(about, [&Some("a".to_owned())]);
                let aside = loaded.damage[0].aside.as_ref().unwrap();
                assert_eq!(fs::read(aside).unwrap(), whole[..whole.len() / 2]);
            }
            1 => {
                assert!(loaded.damage[0].why.starts_with("is missing"));
                let records = last.agents.values().map(|stored| Record {
                    tables: &stored.tables,
                    torn: stored.torn.is_some(),
                });
                let saved = store.save_registry(2, &pseudo(), records).unwrap();
                assert_eq!(saved.written, 0);
            }
            _ => assert!(about.is_empty()),
        }
    }
    let mut store = host.store();
    let _ = store.load(NOW);
    save(&mut store, 3, &agents);
    assert_eq!(host.load().registry.unwrap().agents["a"].torn, None);
}

#[test]
fn an_entry_that_is_not_the_saved_one_is_lost() {
    let host = Host::new();
    let mut store = host.store();
    let wide = entry("a", "10.0.0.0/8");
    save(&mut store, 1, &[wide.clone(), entry("b", "10.0.0.1")]);
    let old = fs::read(host.entry("a")).unwrap();
    save(
        &mut store,
        2,
        &[entry("a", "10.0.0.1"), entry("b", "10.0.0.1")],
    );

    let why = |bytes: &[u8]| {
        fs::write(host.entry("a"), bytes).unwrap();
        let loaded = host.load();
        let stored = &loaded.registry.unwrap().agents["a"];
        assert_eq!(stored.tables.state, State::Draft);
        stored.torn.clone().unwrap()
    };
    assert!(why(&old).contains("older than the 2"));
    // One that somebody made: its own checksum is right.
    let forged = Host::new();
    save(&mut forged.store(), 2, &[wide]);
    let forged = fs::read(forged.entry("a")).unwrap();
    assert!(why(&forged).contains("not the one that was saved"));
    let other = fs::read(host.entry("b")).unwrap();
    assert!(why(&other).contains("about another agent, `b`"));
}

#[test]
fn a_crash_before_the_index_keeps_the_newer_entry() {
    let host = Host::new();
    let mut store = host.store();
    save(&mut store, 1, &[entry("a", "10.0.0.1")]);
    let index = fs::read(host.entry("_index")).unwrap();
    let newer = entry("a", "10.0.0.2");
    save(&mut store, 2, &[newer.clone(), entry("new", "10.0.0.3")]);
    fs::write(host.entry("_index"), index).unwrap();
    let loaded = host.load();
    let last = loaded.registry.unwrap();
    assert_eq!((last.revision, &last.agents["a"].tables), (2, &newer));
    // The index does not know this one: it does not count, and is told.
    assert!(!last.agents.contains_key("new"));
    assert!(loaded.damage[0].why.contains("not in the index"));
}

#[test]
fn without_an_index_what_is_whole_counts_and_more_may_be_missing() {
    let host = Host::new();
    let a = entry("a", "10.0.0.1");
    save(&mut host.store(), 3, &[a.clone(), entry("b", "10.0.0.2")]);
    fs::write(host.entry("_index"), "remit-state").unwrap();
    fs::write(host.entry("b"), "").unwrap();
    for round in 0..2 {
        let loaded = host.store().load(NOW + round);
        let last = loaded.registry.unwrap();
        assert!(!last.complete);
        assert_eq!(last.revision, 3);
        assert_eq!(last.agents.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(last.unregistered, Some(pseudo()));
        assert!(loaded.damage[0].path.ends_with("_index.json"));
    }
}

#[test]
fn a_lost_floor_is_told_and_not_replaced_by_a_guess() {
    let host = Host::new();
    save(&mut host.store(), 1, &[entry("a", "10.0.0.1")]);
    fs::remove_file(host.entry("_unregistered")).unwrap();
    let loaded = host.load();
    assert_eq!(loaded.registry.unwrap().unregistered, None);
    assert!(loaded.damage[0].why.contains("the floor in it is lost"));
}

#[test]
fn a_folder_that_others_write_in_gives_nothing() {
    let host = Host::new();
    save(&mut host.store(), 1, &[entry("a", "10.0.0.1")]);
    both(host.store().hold("a", &suspended("x")));
    fs::set_permissions(host.state(), fs::Permissions::from_mode(0o777)).unwrap();
    let loaded = host.load();
    assert!(loaded.registry.is_none());
    assert!(loaded.damage[0].why.contains("everybody may write there"));
    // It may still take away.
    assert!(loaded.holds.get("a").is_some());
}

#[test]
fn odd_ids_become_no_file_names() {
    let host = Host::new();
    let long = "a".repeat(64);
    for id in ["", "../a", "a/b", ".a", "A", "a b", "_index", "a\0", &long] {
        assert!(
            matches!(
                host.store().hold(id, &suspended("x")),
                Err(StateError::Id(_))
            ),
            "{id}"
        );
        assert!(matches!(host.store().release(id), Err(StateError::Id(_))));
        let odd = Arc::new(AgentTables {
            id: id.to_owned(),
            ..(*entry("a", "10.0.0.1")).clone()
        });
        let record = Record {
            tables: &odd,
            torn: false,
        };
        let saved = host.store().save_registry(1, &pseudo(), [record]);
        assert!(matches!(saved, Err(StateError::Id(_))), "{id}");
    }
    let longest = "a".repeat(63);
    both(host.store().hold(&longest, &suspended("x")));
    save(&mut host.store(), 1, &[entry(&longest, "10.0.0.1")]);
    let loaded = host.load();
    assert!(loaded.holds.get(&longest).is_some() && loaded.damage.is_empty());
}

#[test]
fn where_nothing_can_be_written_it_is_said() {
    let host = Host::new();
    fs::write(host.state(), "in the way").unwrap();
    let loaded = host.load();
    assert_eq!(loaded.unwritten.len(), 1);
    let a = entry("a", "10.0.0.1");
    let record = Record {
        tables: &a,
        torn: false,
    };
    let mut store = host.store();
    assert!(store.save_registry(1, &pseudo(), [record]).is_err());
    let mark = ClockMark {
        boot_id: "b".to_owned(),
        origin_ms: 1,
        latest_ms: 1,
        high_water_ms: 2,
    };
    assert!(store.save_clock(&mark).is_err());
    // The marker can.
    let copies = store.hold("a", &suspended("x"));
    assert!(matches!(copies, Ok(Copies::One(_))), "{copies:?}");
    fs::remove_file(host.marker("a")).unwrap();
    fs::remove_dir(host.registry()).unwrap();
    assert!(store.hold("a", &suspended("x")).is_err());
}

// === holds ===

#[test]
fn a_hold_stands_until_it_is_released() {
    let host = Host::new();
    let held = revoked("leaked its key");
    both(host.store().hold("a", &held));
    let loaded = host.load();
    assert_eq!(loaded.holds.get("a"), Some(&held));
    assert_eq!(loaded.holds.get("b"), None);
    assert!(loaded.damage.is_empty() && loaded.unwritten.is_empty());
    host.store().release("a").unwrap();
    assert_eq!(host.load().holds, Holds::default());
    host.store().release("a").unwrap();
    assert_eq!(names(&host.registry()), Vec::<String>::new());
}

#[test]
fn the_loss_of_either_copy_frees_nobody_and_is_mended() {
    for lose in [Host::kept, Host::marker] {
        let host = Host::new();
        let held = suspended("a reason");
        both(host.store().hold("a", &held));
        fs::remove_file(lose(&host, "a")).unwrap();
        assert_eq!(host.load().holds.get("a"), Some(&held));
        assert!(lose(&host, "a").exists());
    }
    let host = Host::new();
    both(host.store().hold("a", &revoked("x")));
    fs::remove_dir_all(host.state()).unwrap();
    assert_eq!(host.load().holds.get("a"), Some(&revoked("x")));
    assert!(host.kept("a").exists());
}

#[test]
fn the_stricter_copy_counts_and_of_equal_ones_the_later() {
    let later = hold(HoldState::Suspended, "later", NOW + 1);
    for (kept, marker, counts) in [
        (suspended("x"), revoked("y"), revoked("y")),
        (revoked("x"), later.clone(), revoked("x")),
        (later.clone(), suspended("x"), later.clone()),
    ] {
        let (one, other) = (Host::new(), Host::new());
        both(one.store().hold("a", &kept));
        both(other.store().hold("a", &marker));
        fs::copy(other.marker("a"), one.marker("a")).unwrap();
        assert_eq!(one.load().holds.get("a"), Some(&counts));
        // Both say so now.
        assert_eq!(
            fs::read(one.kept("a")).unwrap(),
            fs::read(one.marker("a")).unwrap()
        );
    }
}

#[test]
fn a_hold_that_cannot_be_read_holds() {
    for spoil in [Host::kept, Host::marker] {
        let host = Host::new();
        both(host.store().hold("a", &revoked("x")));
        fs::write(spoil(&host, "a"), "torn").unwrap();
        let loaded = host.load();
        assert_eq!(loaded.holds.get("a"), Some(&revoked("x")));
        assert_eq!(loaded.damage[0].agent.as_deref(), Some("a"));
        let aside = loaded.damage[0].aside.as_ref().unwrap();
        assert_eq!(fs::read(aside).unwrap(), b"torn");
        assert!(host.load().damage.is_empty());
    }
    let host = Host::new();
    both(host.store().hold("a", &revoked("x")));
    for copy in [host.kept("a"), host.marker("a")] {
        fs::write(copy, "torn").unwrap();
    }
    let loaded = host.load();
    let held = loaded.holds.get("a").unwrap().clone();
    assert_eq!(held.state, HoldState::Revoked);
    assert!(held.reason.contains("cannot be read"), "{}", held.reason);
    assert_eq!(loaded.damage.len(), 2);
    // It stays so, as a hold like others, though what was damaged is out of the way.
    let again = host.load();
    assert_eq!(again.holds.get("a"), Some(&held));
    assert!(again.damage.is_empty());
}

#[test]
fn what_stands_in_a_holds_place_holds() {
    let host = Host::new();
    symlink("/dev/null", host.marker("linked")).unwrap();
    fs::create_dir(host.marker("folder")).unwrap();
    fs::write(host.marker("empty"), "").unwrap();
    fs::write(host.marker("long"), vec![b'x'; 70_000]).unwrap();
    let other = Host::new();
    both(other.store().hold("b", &suspended("x")));
    fs::copy(other.marker("b"), host.marker("copied")).unwrap();
    for name in ["A.hold", ".hidden.hold", "a.hold.bak"] {
        fs::write(host.registry().join(name), "").unwrap();
    }
    let loaded = host.load();
    let held: Vec<_> = loaded.holds.by_id.keys().map(String::as_str).collect();
    assert_eq!(held, ["copied", "empty", "folder", "linked", "long"]);
    assert!(
        loaded
            .damage
            .iter()
            .any(|each| each.why.contains("no agent's id"))
    );
    // A folder can't be replaced by a file; its agent stays held all the same.
    assert_eq!(loaded.unwritten.len(), 1);
    assert_eq!(host.load().holds.by_id.len(), 5);
}

#[test]
fn an_unfinished_write_is_swept() {
    let host = Host::new();
    both(host.store().hold("a", &suspended("x")));
    let leftovers = [
        host.registry().join(".a.hold.tmp"),
        host.state().join("holds/.a.json.tmp"),
    ];
    for path in &leftovers {
        fs::write(path, "half").unwrap();
    }
    fs::write(host.registry().join(".mine.tmp"), "not ours").unwrap();
    assert_eq!(host.load().holds.get("a"), Some(&suspended("x")));
    assert!(leftovers.iter().all(|path| !path.exists()));
    assert!(host.registry().join(".mine.tmp").exists());
}

#[test]
fn where_neither_place_can_be_read_everybody_is_held() {
    let host = Host::new();
    fs::create_dir(host.state()).unwrap();
    fs::write(host.state().join("holds"), "no folder").unwrap();
    assert_eq!(host.load().holds.get("anybody"), None);
    fs::remove_dir(host.registry()).unwrap();
    fs::write(host.registry(), "no folder").unwrap();
    let loaded = host.load();
    let held = loaded.holds.get("anybody").unwrap();
    assert_eq!(held.state, HoldState::Suspended);
    assert_eq!(loaded.damage.len(), 3);
}

#[test]
fn a_revocation_ends_by_another_approval_of_another_entry() {
    let then = entry("a", "10.0.0.1");
    let held = Hold {
        approval: Some(Approval::of(&then)),
        ..revoked("x")
    };
    let changed = |change: fn(&mut AgentTables)| {
        let mut tables = (*then).clone();
        change(&mut tables);
        tables
    };
    let lifted = |change| held.lifted_by(&changed(change));
    assert!(!lifted(|_| {}));
    assert!(!lifted(|now| now.hash = "sha256:1".into()));
    assert!(!lifted(|now| now.approval_ref = Some("CHG-2".into())));
    type Change = fn(&mut AgentTables);
    let approvals: [Change; 3] = [
        |now| now.approval_ref = Some("CHG-2".into()),
        |now| now.approved_by = Some("q".into()),
        |now| now.approved_hash = Some("sha256:2".into()),
    ];
    for approve in approvals {
        let mut now = (*then).clone();
        approve(&mut now);
        now.hash = "sha256:1".into();
        assert!(held.lifted_by(&now));
        for state in [State::Draft, State::Suspended, State::Revoked] {
            now.state = state;
            assert!(!held.lifted_by(&now), "{state:?}");
        }
        now.state = State::Active;
        // A suspension ends by no file, and nothing ends what was never known.
        let suspended = Hold {
            state: HoldState::Suspended,
            ..held.clone()
        };
        assert!(!suspended.lifted_by(&now));
        let unknown = Hold {
            approval: None,
            ..held.clone()
        };
        assert!(!unknown.lifted_by(&now));
        let settled = unknown.settled(&then).unwrap();
        assert!(settled.lifted_by(&now) && !settled.lifted_by(&then));
        assert_eq!(held.settled(&then), None);
    }
}

#[test]
fn the_hold_format_on_disk() {
    let host = Host::new();
    let held = Hold {
        approval: Some(Approval {
            hash: "sha256:0".to_owned(),
            approved_by: Some("p".to_owned()),
            approval_ref: None,
            approved_hash: None,
        }),
        ..revoked("leaked")
    };
    both(host.store().hold("a", &held));
    let text = fs::read_to_string(host.marker("a")).unwrap();
    let (head, body) = text.split_once('\n').unwrap();
    assert!(head.starts_with("remit-state 1 hold sha256:"), "{head}");
    assert_eq!(
        body,
        "{\"id\":\"a\",\"hold\":{\"state\":\"revoked\",\"reason\":\"leaked\",\"by\":{\"uid\":0,\
         \"pid\":4711,\"cgroup\":\"/system.slice/sshd.service\"},\"since_ms\":1790812800000,\
         \"frozen\":false,\"approval\":{\"hash\":\"sha256:0\",\"approved_by\":\"p\",\
         \"approval_ref\":null,\"approved_hash\":null}}}\n"
    );
}

#[test]
fn the_entry_format_on_disk() {
    let host = Host::new();
    save(&mut host.store(), 7, &[entry("a", "10.0.0.0/8")]);
    let body = |name: &str| {
        let text = fs::read_to_string(host.entry(name)).unwrap();
        let (head, body) = text.split_once('\n').unwrap();
        (head[..19].to_owned(), body.to_owned())
    };
    let (head, text) = body("a");
    assert_eq!(head, "remit-state 1 entry");
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["since"], 7);
    let tables = &value["tables"];
    for (key, word) in [
        ("id", "a"),
        ("approved_by", "p"),
        ("approval_ref", "CHG-1"),
        ("file", "agents.d/a.toml"),
        ("state", "active"),
        ("mode", "enforce"),
        ("loopback", "own"),
    ] {
        assert_eq!(tables[key], word, "{key}");
    }
    let reach = tables["scope"]["reach"].as_array().unwrap();
    let granted = reach
        .iter()
        .find(|at| at["prefix"] == "10.0.0.0/8")
        .unwrap();
    assert_eq!(
        granted["rules"].to_string(),
        "[{\"class\":\"tcp\",\"low\":443,\"high\":443,\"effect\":\"allow\",\"entry\":0}]"
    );
    let (head, text) = body("_index");
    assert_eq!(head, "remit-state 1 index");
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["revision"], 7);
    assert_eq!(value["agents"]["a"]["selectors"][0], "/r/a");
}

#[test]
fn a_hold_cut_or_flipped_anywhere_holds_and_is_never_another() {
    let host = Host::new();
    both(host.store().hold("a", &revoked("x")));
    let whole = fs::read(host.marker("a")).unwrap();
    // Every byte and bit is tried in `file`; here it is about what follows, and each takes syncs.
    let spoilt = (0..whole.len()).step_by(23).flat_map(|at| {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        [whole[..at].to_vec(), flipped]
    });
    for bytes in spoilt {
        let host = Host::new();
        fs::write(host.marker("a"), &bytes).unwrap();
        let loaded = host.load();
        assert_eq!(loaded.damage.len(), 1);
        let held = loaded.holds.get("a").unwrap();
        assert_eq!(held.state, HoldState::Revoked);
        assert!(held.reason.contains("cannot be read"));
    }
}

// === the clocks ===

#[test]
fn the_clocks_come_back_or_are_told_to_be_lost() {
    let host = Host::new();
    let mark = ClockMark {
        boot_id: boot_id().unwrap(),
        origin_ms: NOW - 1000,
        latest_ms: NOW - 500,
        high_water_ms: NOW,
    };
    host.store().save_clock(&mark).unwrap();
    assert_eq!(host.load().clock, Some(mark.clone()));
    // Each copy is enough, and the later time counts.
    let copies = [
        host.state().join("clock.json"),
        host.registry().join(".clock"),
    ];
    let spoil = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        fs::write(path, text.replace(&NOW.to_string(), "0")).unwrap();
    };
    spoil(&copies[0]);
    let loaded = host.load();
    assert_eq!(loaded.clock, Some(mark.clone()));
    assert!(loaded.damage[0].why.contains("checksum differs"));
    assert!(loaded.damage[0].aside.as_ref().unwrap().exists());
    let later = ClockMark {
        high_water_ms: NOW + 1,
        ..mark
    };
    host.store().save_clock(&later).unwrap();
    fs::remove_dir_all(host.state()).unwrap();
    assert_eq!(host.load().clock, Some(later));
    spoil(&copies[1]);
    fs::write(&copies[1], "torn").unwrap();
    let loaded = host.load();
    assert_eq!(loaded.clock, None);
    assert!(
        loaded.damage[0].why.contains("no earlier time"),
        "{loaded:?}"
    );
}

// === any values ===

fn any_hold() -> impl Strategy<Value = Hold> {
    let approval = proptest::option::of((
        any::<String>(),
        proptest::option::of(any::<String>()),
        proptest::option::of(any::<String>()),
    ));
    let by = (any::<Option<u32>>(), any::<Option<i32>>());
    (
        any::<bool>(),
        any::<String>(),
        by,
        any::<i64>(),
        any::<bool>(),
        approval,
    )
        .prop_map(
            |(revoked, reason, (uid, pid), since_ms, frozen, approval)| Hold {
                state: if revoked {
                    HoldState::Revoked
                } else {
                    HoldState::Suspended
                },
                reason,
                by: By {
                    uid,
                    pid,
                    cgroup: None,
                },
                since_ms,
                frozen,
                approval: approval.map(|(hash, approved_by, approval_ref)| Approval {
                    hash,
                    approved_by,
                    approval_ref,
                    approved_hash: None,
                }),
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_hold_comes_back(id in "[a-z0-9][a-z0-9.-]{0,62}", hold in any_hold()) {
        let host = Host::new();
        both(host.store().hold(&id, &hold));
        let loaded = host.load();
        prop_assert_eq!(loaded.holds.get(&id), Some(&hold));
        prop_assert!(loaded.damage.is_empty());
    }

    #[test]
    fn every_registry_comes_back(hosts in proptest::collection::btree_map("[a-z][a-z0-9.-]{0,8}", 0_u32.., 0..6)) {
        let host = Host::new();
        let agents: Vec<_> = hosts
            .iter()
            .map(|(id, bits)| entry(id, &format!("11.{}.{}.{}", bits >> 16 & 255, bits >> 8 & 255, bits & 255)))
            .collect();
        save(&mut host.store(), 1, &agents);
        let last = host.load().registry.unwrap();
        let back: Vec<_> = last.agents.into_values().map(|stored| stored.tables).collect();
        prop_assert_eq!(back, agents);
    }
}

#[test]
fn ids_that_look_like_other_names_do_not_meet() {
    let host = Host::new();
    let ids = ["a", "a.json", "a.hold", "a.json.damaged-1", "index"];
    let agents: Vec<_> = ids.iter().map(|id| entry(id, "10.0.0.1")).collect();
    save(&mut host.store(), 1, &agents);
    for id in ids {
        both(host.store().hold(id, &suspended(id)));
    }
    let loaded = host.load();
    let found: BTreeSet<_> = loaded.registry.unwrap().agents.into_keys().collect();
    assert_eq!(found, ids.iter().map(|id| (*id).to_owned()).collect());
    for id in ids {
        assert_eq!(loaded.holds.get(id), Some(&suspended(id)));
    }
    assert!(loaded.damage.is_empty(), "{:?}", loaded.damage);
}
