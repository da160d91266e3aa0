//! Suspensions and revocations. Each is kept twice: in the state directory, and beside the
//! registry's file as `ID.hold`. Reading takes both and the stricter counts, so the loss of either
//! frees nobody; a copy that cannot be read holds the agent as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use agent_ebpf::abi::State;
use serde::{Deserialize, Serialize};

use super::file::{self, Damage, Kind, StateError};
use crate::policy::{AgentTables, Id};

const KIND: Kind = Kind {
    word: "hold",
    max: 64 << 10,
};
/// Ends the name of a copy in the state directory.
const KEPT: &str = ".json";
/// Ends the name of a copy beside the registry.
const MARKER: &str = ".hold";

/// What an agent is held as; the later is the stricter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldState {
    /// Until somebody resumes it.
    Suspended,
    /// Until its file has changed and was approved again.
    Revoked,
}

/// Who held an agent; nothing known is Remit itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct By {
    /// Effective user id.
    pub uid: Option<u32>,
    /// Process id.
    pub pid: Option<i32>,
    /// The cgroup it was in, as `/proc/PID/cgroup` writes it.
    pub cgroup: Option<String>,
}

/// What of an entry tells whether it was approved again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approval {
    /// Hash of the entry.
    pub hash: String,
    /// `lifecycle.approved_by`.
    pub approved_by: Option<String>,
    /// `lifecycle.approval_ref`.
    pub approval_ref: Option<String>,
    /// `lifecycle.approved_hash`.
    pub approved_hash: Option<String>,
}

/// A suspension or revocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// Which.
    pub state: HoldState,
    /// Why, as whoever did it said.
    pub reason: String,
    /// Who.
    pub by: By,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: i64,
    /// Whether its processes were frozen as well.
    pub frozen: bool,
    /// The entry that was in force then. None if it was not known: then no later entry can be told
    /// to be another, and only [`Hold::settled`] or people can end a revocation.
    pub approval: Option<Approval>,
}

/// All holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holds {
    /// By the agent's id. Agents that are not registered may be among them.
    pub by_id: BTreeMap<String, Hold>,
    /// Set if neither place could be read: nobody is known to be free, so this holds all others.
    pub blind: Option<Hold>,
}

/// How durable a hold is.
#[derive(Debug)]
#[must_use]
pub enum Copies {
    /// Both copies are on disk.
    Both,
    /// One is, and this is what hindered the other.
    One(StateError),
}

/// A file's content.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    id: String,
    hold: Hold,
}

/// What came of reading all holds.
#[derive(Debug, Default)]
pub struct HoldsRead {
    /// The holds.
    pub holds: Holds,
    /// What could not be read.
    pub damage: Vec<Damage>,
    /// Missing or damaged copies that could not be written anew.
    pub unwritten: Vec<StateError>,
}

/// The two places.
#[derive(Clone, Debug)]
pub(super) struct Places {
    kept: PathBuf,
    markers: PathBuf,
}

/// The copies of one agent's hold.
#[derive(Debug, Default)]
struct Found {
    whole: Vec<Hold>,
    damaged: Vec<Damage>,
}

// === impl HoldState ===

impl HoldState {
    /// The lifecycle state that it means.
    pub const fn state(self) -> State {
        match self {
            Self::Suspended => State::Suspended,
            Self::Revoked => State::Revoked,
        }
    }

    /// `suspended` or `revoked`.
    pub const fn name(self) -> &'static str {
        self.state().name()
    }
}

// === impl Approval ===

impl Approval {
    /// That of an entry.
    pub fn of(tables: &AgentTables) -> Self {
        Self {
            hash: tables.hash.clone(),
            approved_by: tables.approved_by.clone(),
            approval_ref: tables.approval_ref.clone(),
            approved_hash: tables.approved_hash.clone(),
        }
    }

    fn given(&self) -> [&Option<String>; 3] {
        [&self.approved_by, &self.approval_ref, &self.approved_hash]
    }
}

// === impl Hold ===

impl Hold {
    /// Whether this entry ends the hold: only a revocation ends by a file, and only by one that
    /// says something else than then, is active, and carries another approval.
    pub fn lifted_by(&self, tables: &AgentTables) -> bool {
        let Some(then) = &self.approval else {
            return false;
        };
        let now = Approval::of(tables);
        self.state == HoldState::Revoked
            && tables.state == State::Active
            && now.hash != then.hash
            && now.given() != then.given()
    }

    /// This revocation with the approval of `tables` as the one that has to change, if none was
    /// known when the agent was revoked.
    pub fn settled(&self, tables: &AgentTables) -> Option<Self> {
        let unsettled = self.state == HoldState::Revoked && self.approval.is_none();
        unsettled.then(|| Self {
            approval: Some(Approval::of(tables)),
            ..self.clone()
        })
    }

    /// What holds an agent whose own hold cannot be read.
    fn unreadable(state: HoldState, why: &str, now_ms: i64) -> Self {
        Self {
            state,
            reason: format!("its state cannot be read, so it is held: {why}"),
            by: By::default(),
            since_ms: now_ms,
            frozen: false,
            approval: None,
        }
    }

    fn rank(&self) -> (HoldState, i64) {
        (self.state, self.since_ms)
    }
}

// === impl Holds ===

impl Holds {
    /// What holds an agent.
    pub fn get(&self, id: &str) -> Option<&Hold> {
        self.by_id.get(id).or(self.blind.as_ref())
    }
}

// === impl Places ===

impl Places {
    pub(super) fn new(state: &Path, registry: &Path) -> Self {
        Self {
            kept: state.join("holds"),
            markers: registry.to_owned(),
        }
    }

    fn files(&self, id: &str) -> Result<[PathBuf; 2], StateError> {
        if id.parse::<Id>().is_err() {
            return Err(StateError::Id(id.to_owned()));
        }
        Ok([
            self.kept.join(format!("{id}{KEPT}")),
            self.markers.join(format!("{id}{MARKER}")),
        ])
    }

    /// Writes both copies.
    pub(super) fn write(&self, id: &str, hold: &Hold) -> Result<Copies, StateError> {
        let [kept, marker] = self.files(id)?;
        let content = Content {
            id: id.to_owned(),
            hold: hold.clone(),
        };
        let encoded = file::encode(&kept, KIND, &content)?;
        let first = file::make_folder(&self.kept).and_then(|()| file::replace(&kept, &encoded));
        let second = file::replace(&marker, &encoded);
        match (first, second) {
            (Ok(()), Ok(())) => Ok(Copies::Both),
            (Ok(()), Err(error)) | (Err(error), Ok(())) => Ok(Copies::One(error)),
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Removes both copies. What remains after an error goes on holding the agent.
    pub(super) fn remove(&self, id: &str) -> Result<(), StateError> {
        for path in self.files(id)? {
            file::remove(&path)?;
        }
        Ok(())
    }

    /// Reads all copies, and writes anew those that are missing or damaged.
    pub(super) fn read(&self, now_ms: i64) -> HoldsRead {
        let mut read = HoldsRead::default();
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        let mut unread = Vec::new();
        for (folder, ending) in [(&self.kept, KEPT), (&self.markers, MARKER)] {
            match file::names(folder) {
                Ok(names) => {
                    for name in names {
                        read_copy(&folder.join(&name), &name, ending, &mut found, &mut read);
                    }
                }
                Err(error) => unread.push(Damage::new(folder, format!("cannot be read: {error}"))),
            }
        }
        if let [first, _] = unread.as_slice() {
            read.holds.blind = Some(Hold::unreadable(
                HoldState::Suspended,
                &first.to_string(),
                now_ms,
            ));
        }
        read.damage.append(&mut unread);
        for (id, found) in found {
            let hold = self.settle(&id, found, now_ms, &mut read);
            read.holds.by_id.insert(id, hold);
        }
        read
    }

    /// What the copies of one hold come to.
    fn settle(&self, id: &str, found: Found, now_ms: i64, read: &mut HoldsRead) -> Hold {
        let copies = found.whole.len();
        let same: BTreeSet<String> = found.whole.iter().map(|hold| format!("{hold:?}")).collect();
        let hold = found
            .whole
            .into_iter()
            .max_by_key(Hold::rank)
            .unwrap_or_else(|| {
                let why = found.damaged.first().map(ToString::to_string);
                // It may have been a revocation, and those are final.
                Hold::unreadable(HoldState::Revoked, &why.unwrap_or_default(), now_ms)
            });
        for mut damage in found.damaged {
            file::link_aside(&mut damage, now_ms);
            let held = format!("the agent is held as {}", hold.state.name());
            read.damage.push(damage.of(id).so(&held));
        }
        if copies < 2 || same.len() > 1 {
            match self.write(id, &hold) {
                Ok(Copies::Both) => {}
                Ok(Copies::One(error)) | Err(error) => read.unwritten.push(error),
            }
        }
        hold
    }
}

fn read_copy(
    path: &Path,
    name: &str,
    ending: &str,
    found: &mut BTreeMap<String, Found>,
    read: &mut HoldsRead,
) {
    if let Some(unfinished) = file::unfinished(name)
        && id_of(unfinished, ending).is_some_and(|id| id.is_ok())
    {
        // A write that never came to its end; what was before it still stands.
        let _ = fs::remove_file(path);
        return;
    }
    let id = match id_of(name, ending) {
        None => return,
        Some(Ok(id)) => id,
        Some(Err(())) => {
            let why = "its name is no agent's id, so it holds nobody";
            read.damage.push(Damage::new(path, why));
            return;
        }
    };
    let entry = found.entry(id.to_owned()).or_default();
    match file::read::<Content>(path, KIND) {
        Ok(Some(decoded)) if decoded.value.id == id => entry.whole.push(decoded.value.hold),
        Ok(Some(decoded)) => {
            let why = format!(
                "is about another agent, `{}`",
                decoded.value.id.escape_default()
            );
            entry.damaged.push(Damage::new(path, why));
        }
        // Removed a moment ago.
        Ok(None) => entry
            .damaged
            .push(Damage::new(path, "vanished while it was read")),
        Err(damage) => entry.damaged.push(damage),
    }
}

/// The id in a file's name; none if the file is no hold.
fn id_of<'a>(name: &'a str, ending: &str) -> Option<Result<&'a str, ()>> {
    let stem = name.strip_suffix(ending)?;
    if stem.starts_with('.') {
        return None;
    }
    Some(match stem.parse::<Id>() {
        Ok(_) => Ok(stem),
        Err(_) => Err(()),
    })
}
