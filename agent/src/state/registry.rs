//! The last good registry on disk: a file for each agent, so that one torn file costs one agent
//! only, one for the pseudo-agent, and an index that says which there are.
//!
//! Order of a save: files that changed, then the index, then files that the index no longer lists
//! are removed. Each file carries the revision at which it was written. So after a crash in between
//! a file may be newer than the index says, and is good; one that is older is not what was saved.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::file::{self, Damage, Kind, StateError};
use crate::policy::{AgentTables, Id, UNREGISTERED_ID};

/// A million prefixes of an agent are about half of it.
const ENTRY: Kind = Kind {
    word: "entry",
    max: 512 << 20,
};
const INDEX: Kind = Kind {
    word: "index",
    max: 64 << 20,
};

// No id starts with `_`.
const INDEX_NAME: &str = "_index.json";
const PSEUDO_NAME: &str = "_unregistered.json";
const ENDING: &str = ".json";

/// One agent as it was last saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its entry, or, if that is lost, a draft that reaches nothing and claims the same cgroups.
    pub tables: Arc<AgentTables>,
    /// Revision at which it was saved.
    pub since: u64,
    /// Why its entry is lost.
    pub torn: Option<String>,
}

/// The registry that was in force last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastGood {
    /// Its revision.
    pub revision: u64,
    /// Its agents, by id.
    pub agents: BTreeMap<String, Stored>,
    /// The pseudo-agent; none if it is lost.
    pub unregistered: Option<Arc<AgentTables>>,
    /// Whether these are all. If the index is lost, agents may be missing.
    pub complete: bool,
}

/// An agent to be saved.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Its entry as the registry says it, holds not laid over.
    pub tables: &'a Arc<AgentTables>,
    /// Whether these tables only stand for an entry that is lost: it stays lost.
    pub torn: bool,
}

/// What a save did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Entries written.
    pub written: usize,
    /// Files removed.
    pub removed: usize,
}

/// An entry's file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<T> {
    since: u64,
    tables: T,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    revision: u64,
    pseudo: Option<Digest>,
    agents: BTreeMap<String, Listed>,
}

/// Which version of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Digest {
    since: u64,
    sha256: String,
}

/// What the index knows of an agent: enough to know its processes by, should its file be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    /// None if the entry is lost already.
    saved: Option<Digest>,
    name: String,
    owner: String,
    file: PathBuf,
    selectors: Vec<String>,
}

/// A file that is on disk as it is here.
#[derive(Clone, Debug)]
struct OnDisk {
    tables: Arc<AgentTables>,
    digest: Digest,
}

/// Entries that a save writes.
struct Changes {
    batch: file::Batch,
    entries: Vec<(String, OnDisk)>,
}

impl Changes {
    fn new(folder: &Path) -> Result<Self, StateError> {
        Ok(Self {
            batch: file::Batch::new(folder)?,
            entries: Vec::new(),
        })
    }
}

/// The folder, and what is known to be in it.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
    on_disk: BTreeMap<String, OnDisk>,
    index: Option<Index>,
}

// === impl Folder ===

impl Folder {
    pub(super) fn new(state: &Path) -> Self {
        Self {
            path: state.join("registry"),
            on_disk: BTreeMap::new(),
            index: None,
        }
    }

    fn file(&self, id: &str) -> Result<PathBuf, StateError> {
        if id == UNREGISTERED_ID {
            Ok(self.path.join(PSEUDO_NAME))
        } else if id.parse::<Id>().is_ok() {
            Ok(self.path.join(format!("{id}{ENDING}")))
        } else {
            Err(StateError::Id(id.to_owned()))
        }
    }

    // === saving ===

    /// Writes what differs from what is on disk.
    pub(super) fn save<'a>(
        &mut self,
        revision: u64,
        pseudo: &Arc<AgentTables>,
        agents: impl IntoIterator<Item = Record<'a>>,
    ) -> Result<Saved, StateError> {
        file::make_folder(&self.path)?;
        let names = file::names(&self.path).map_err(StateError::io("list", &self.path))?;
        let present: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut changes = Changes::new(&self.path)?;
        let mut index = Index {
            revision,
            pseudo: Some(self.put(revision, pseudo, &present, &mut changes)?),
            agents: BTreeMap::new(),
        };
        for record in agents {
            let tables = record.tables;
            let digest = if record.torn {
                None
            } else {
                Some(self.put(revision, tables, &present, &mut changes)?)
            };
            index.agents.insert(
                tables.id.clone(),
                Listed {
                    saved: digest,
                    name: tables.name.clone(),
                    owner: tables.owner.clone(),
                    file: PathBuf::from(tables.file.to_string_lossy().into_owned()),
                    selectors: tables.selectors.clone(),
                },
            );
        }
        let mut saved = Saved {
            written: changes.entries.len(),
            removed: 0,
        };
        // The index must not be there before what it lists.
        changes.batch.commit()?;
        self.on_disk.extend(changes.entries);
        let path = self.path.join(INDEX_NAME);
        if self.index.as_ref() != Some(&index) || !present.contains(INDEX_NAME) {
            file::replace(&path, &file::encode(&path, INDEX, &index)?)?;
        }
        self.on_disk
            .retain(|id, _| id == UNREGISTERED_ID || index.agents.contains_key(id));
        for name in &names {
            let listed = id_of(name).is_none_or(|id| {
                id == UNREGISTERED_ID
                    || index
                        .agents
                        .get(id)
                        .is_some_and(|each| each.saved.is_some())
            });
            if !listed || file::unfinished(name).is_some() {
                file::remove(&self.path.join(name))?;
                saved.removed += 1;
            }
        }
        self.index = Some(index);
        Ok(saved)
    }

    fn put(
        &mut self,
        revision: u64,
        tables: &Arc<AgentTables>,
        present: &BTreeSet<&str>,
        changes: &mut Changes,
    ) -> Result<Digest, StateError> {
        let path = self.file(&tables.id)?;
        let there = path
            .file_name()
            .is_some_and(|name| present.contains(&*name.to_string_lossy()));
        if let Some(known) = self.on_disk.get_mut(&tables.id)
            && there
            && (Arc::ptr_eq(&known.tables, tables) || known.tables == *tables)
        {
            // One copy in memory is enough.
            known.tables = Arc::clone(tables);
            return Ok(known.digest.clone());
        }
        let content = Entry {
            since: revision,
            tables: &**tables,
        };
        let encoded = file::encode(&path, ENTRY, &content)?;
        changes.batch.stage(&path, &encoded)?;
        let digest = Digest {
            since: revision,
            sha256: encoded.digest,
        };
        let on_disk = OnDisk {
            tables: Arc::clone(tables),
            digest: digest.clone(),
        };
        changes.entries.push((tables.id.clone(), on_disk));
        Ok(digest)
    }

    // === loading ===

    /// Reads all there is; none if nothing was ever saved.
    pub(super) fn load(&mut self, now_ms: i64, damage: &mut Vec<Damage>) -> Option<LastGood> {
        self.on_disk.clear();
        self.index = None;
        let names = match file::names(&self.path) {
            Ok(names) => names,
            Err(error) => {
                let why = format!("cannot be read: {error}; no last good registry is known");
                damage.push(Damage::new(&self.path, why));
                return None;
            }
        };
        let mut told = Vec::new();
        let last = match file::read::<Index>(&self.path.join(INDEX_NAME), INDEX) {
            Ok(Some(index)) => {
                let last = self.load_listed(&index.value, &names, &mut told);
                self.index = Some(index.value);
                Some(last)
            }
            Ok(None) => {
                let any = names.iter().any(|name| id_of(name).is_some());
                any.then(|| {
                    let index = Damage::new(&self.path.join(INDEX_NAME), "is missing");
                    self.load_unlisted(index, &names, &mut told)
                })
            }
            Err(index) => Some(self.load_unlisted(index, &names, &mut told)),
        };
        for damage in told.iter_mut().filter(|damage| damage.path.is_file()) {
            file::move_aside(damage, now_ms);
        }
        damage.append(&mut told);
        last
    }

    /// What the index lists; other files are left alone, and told.
    fn load_listed(&mut self, index: &Index, names: &[String], told: &mut Vec<Damage>) -> LastGood {
        let mut last = LastGood {
            revision: index.revision,
            agents: BTreeMap::new(),
            unregistered: None,
            complete: true,
        };
        if let Some(listed) = &index.pseudo {
            match self.load_entry(UNREGISTERED_ID, Some(listed)) {
                Ok((tables, since)) => {
                    last.revision = last.revision.max(since);
                    last.unregistered = Some(tables);
                }
                Err(damage) => told.push(damage.so("the floor in it is lost")),
            }
        }
        for (id, listed) in &index.agents {
            let stored = match &listed.saved {
                None => Stored {
                    tables: Arc::new(stand_in(id, listed)),
                    since: index.revision,
                    torn: Some("was lost before".to_owned()),
                },
                Some(digest) => match self.load_entry(id, Some(digest)) {
                    Ok((tables, since)) => Stored {
                        tables,
                        since,
                        torn: None,
                    },
                    Err(damage) => {
                        let torn = Some(damage.to_string());
                        told.push(damage.of(id).so("while its registry file cannot be used \
                                                    either, the agent is denied"));
                        Stored {
                            tables: Arc::new(stand_in(id, listed)),
                            since: digest.since,
                            torn,
                        }
                    }
                },
            };
            last.revision = last.revision.max(stored.since);
            last.agents.insert(id.clone(), stored);
        }
        for name in names {
            let unlisted = id_of(name)
                .is_some_and(|id| id != UNREGISTERED_ID && !index.agents.contains_key(id));
            if unlisted {
                let why = "is not in the index, so it counts for nothing";
                told.push(Damage::new(&self.path.join(name), why));
            }
        }
        last
    }

    /// Whatever is whole, where no index says what should be there.
    fn load_unlisted(
        &mut self,
        index: Damage,
        names: &[String],
        told: &mut Vec<Damage>,
    ) -> LastGood {
        told.push(index.so("agents may be missing from the last good registry"));
        let mut last = LastGood {
            revision: 0,
            agents: BTreeMap::new(),
            unregistered: None,
            complete: false,
        };
        for id in names.iter().filter_map(|name| id_of(name)) {
            match self.load_entry(id, None) {
                Ok((tables, since)) => {
                    last.revision = last.revision.max(since);
                    if id == UNREGISTERED_ID {
                        last.unregistered = Some(tables);
                        continue;
                    }
                    let stored = Stored {
                        tables,
                        since,
                        torn: None,
                    };
                    last.agents.insert(id.to_owned(), stored);
                }
                Err(damage) => told.push(damage.of(id)),
            }
        }
        last
    }

    fn load_entry(
        &mut self,
        id: &str,
        listed: Option<&Digest>,
    ) -> Result<(Arc<AgentTables>, u64), Damage> {
        let path = self
            .file(id)
            .map_err(|error| Damage::new(&self.path, error.to_string()))?;
        let read = file::read::<Entry<AgentTables>>(&path, ENTRY)?;
        let read = read.ok_or_else(|| Damage::new(&path, "is missing"))?;
        let Entry { since, tables } = read.value;
        if tables.id != id {
            let why = format!("is about another agent, `{}`", tables.id.escape_default());
            return Err(Damage::new(&path, why));
        }
        tables.check().map_err(|why| Damage::new(&path, why))?;
        if let Some(listed) = listed {
            if since < listed.since {
                let why = format!(
                    "is of revision {since}, older than the {} that was saved",
                    listed.since
                );
                return Err(Damage::new(&path, why));
            }
            if since == listed.since && read.digest != listed.sha256 {
                return Err(Damage::new(&path, "is not the one that was saved"));
            }
        }
        let tables = Arc::new(tables);
        let on_disk = OnDisk {
            tables: Arc::clone(&tables),
            digest: Digest {
                since,
                sha256: read.digest,
            },
        };
        self.on_disk.insert(id.to_owned(), on_disk);
        Ok((tables, since))
    }
}

/// The id of a file in the folder; none if it is no entry's.
fn id_of(name: &str) -> Option<&str> {
    if name == PSEUDO_NAME {
        return Some(UNREGISTERED_ID);
    }
    let stem = name.strip_suffix(ENDING)?;
    stem.parse::<Id>().is_ok().then_some(stem)
}

/// A draft in place of an entry that is lost. It claims the cgroups that the entry claimed, so
/// that its processes are not taken for unregistered ones.
fn stand_in(id: &str, listed: &Listed) -> AgentTables {
    AgentTables {
        id: id.to_owned(),
        name: listed.name.clone(),
        owner: listed.owner.clone(),
        file: listed.file.clone(),
        selectors: listed.selectors.clone(),
        ..AgentTables::nobody()
    }
}
