//! Where the registry and this host disagree beside the kernel's tables: files that are approved and
//! not in force, entries in force that are approved no more, cgroups that nobody claims, processes
//! that have left their agent's cgroup, a ring that cannot be read.
//!
//! A process outside is found in two ways, and no others are claimed: it was seen inside the agent's
//! cgroup by an earlier comparison (the same process: pid and start time), or its parent is inside
//! now. A process that leaves between two comparisons and whose parent is gone is not found.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    time::Duration,
};

use agent_ebpf::abi::State;

use super::{
    core::{Core, stance},
    force, registry,
    time::wall_millis,
};
use crate::{
    cgroup::{CgroupPath, Claimant},
    policy,
};

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// `approved_not_enforced`, ….
    pub kind: &'static str,
    /// What differs.
    pub what: String,
    /// The agent that it is about.
    pub agent: Option<String>,
    /// The root that it is about.
    pub root: Option<String>,
    /// What is.
    pub found: String,
    /// What must be.
    pub wanted: String,
    /// What a repair does, or somebody has to.
    pub remedy: String,
}

/// What a repair does about a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cure {
    /// Nothing: somebody has to decide.
    None,
    /// The registry is compiled and swapped in.
    Reload,
    /// The cgroups are surveyed anew.
    Survey,
    /// The ring's reader is put where it belongs.
    Ring,
    /// This agent's endpoint of the DNS guard is opened anew.
    Endpoint(u32),
    /// The process goes back to this cgroup, if somebody asked for the repair.
    Return(u32, CgroupPath),
}

/// Processes as they were last seen inside agents' cgroups.
#[derive(Clone, Debug, Default)]
pub struct Seen(HashMap<(u32, u64), CgroupPath>);

/// So many of a kind are told one by one.
const MOST: usize = 100;

impl Core {
    /// Everything that differs, with its cure. `fresh` compiles the registry anew, which takes a
    /// while where it is large.
    pub(super) fn differences(&mut self, fresh: bool) -> Vec<(Found, Cure)> {
        let mut all = Vec::new();
        self.ring_difference(&mut all);
        self.guard_differences(&mut all);
        self.claim_differences(&mut all);
        self.outside(&mut all);
        if fresh {
            self.registry_differences(&mut all);
        }
        all
    }

    fn ring_difference(&self, all: &mut Vec<(Found, Cure)>) {
        let found = match self.enforcer.ring_state() {
            Ok(state) if state.waiting().is_some() => return,
            Ok(state) => format!("read to {} of {}", state.consumed, state.produced),
            Err(error) => format!("cannot be read: {error}"),
        };
        let difference = Found {
            kind: "changed",
            what: "ring events".to_owned(),
            agent: None,
            root: None,
            found,
            wanted: "a reader behind the writer, by no more than the ring is long".to_owned(),
            remedy: "puts the reader where the writer is; what was lost is counted".to_owned(),
        };
        all.push((difference, Cure::Ring));
    }

    /// The cgroups on disk against what is attributed.
    fn claim_differences(&self, all: &mut Vec<(Found, Cure)>) {
        let mut wanted: BTreeMap<CgroupPath, (u64, u32)> = BTreeMap::new();
        for root in &self.roots {
            let Ok(survey) = self.hierarchy.claims(root, &self.selectors) else {
                continue;
            };
            let claims = survey.claims.into_iter();
            wanted.extend(claims.map(|claim| (claim.path, (claim.id, claim.agent))));
        }
        let ids = self.ids();
        let mut push = |kind, path: &CgroupPath, agent: u32, found: String, must: String| {
            let difference = Found {
                kind,
                what: format!("claim of {path}"),
                agent: ids.get(&agent).cloned(),
                root: None,
                found,
                wanted: must,
                remedy: "surveys the cgroups and attributes them anew".to_owned(),
            };
            all.push((difference, Cure::Survey));
        };
        for (path, (id, agent)) in &wanted {
            // One that was born just now is attributed by the event that is on its way.
            if self.claims.get(path) != Some(&(*id, *agent)) && !self.is_young(path) {
                let found = match self.claims.get(path) {
                    Some((known, _)) => format!("cgroup {known}"),
                    None => "not attributed".to_owned(),
                };
                push("missing", path, *agent, found, format!("cgroup {id}"));
            }
        }
        for (path, (id, agent)) in &self.claims {
            // Nothing runs in one that is gone.
            if !wanted.contains_key(path) && self.hierarchy.exists(path) {
                let none = "a cgroup that no selector of it names".to_owned();
                push("extra", path, *agent, format!("cgroup {id}"), none);
            }
        }
    }

    fn is_young(&self, path: &CgroupPath) -> bool {
        let made = fs::metadata(self.hierarchy.directory(path)).and_then(|meta| meta.modified());
        let age = made.ok().and_then(|made| made.elapsed().ok());
        age.is_none_or(|age| age < Duration::from_secs(2))
    }

    /// Cgroups below a root that hold processes and that nobody claims: what runs there is denied,
    /// or in monitor mode reported.
    pub(super) fn unclaimed(&self) -> Vec<Found> {
        let mut all = Vec::new();
        for root in &self.roots {
            let Ok(below) = self.hierarchy.subtree(root) else {
                continue;
            };
            for path in below {
                let (claimant, _) = self.selectors.owner(root, &path);
                if !matches!(claimant, Claimant::Nobody) {
                    continue;
                }
                let count = self
                    .hierarchy
                    .processes(&path, false)
                    .map_or(0, |found| found.len());
                if count == 0 {
                    continue;
                }
                all.push(Found {
                    kind: "unclaimed_cgroup",
                    what: format!("cgroup {path}"),
                    agent: None,
                    root: Some(root.to_string()),
                    found: format!("{count} processes that are nobody's"),
                    wanted: "an agent that claims it".to_owned(),
                    remedy: format!(
                        "nothing: register an agent with `selector.cgroup = [\"{path}\"]`, or stop \
                         what runs there"
                    ),
                });
                if all.len() >= MOST {
                    return all;
                }
            }
        }
        all
    }

    /// The agents' ids by their numbers in the kernel.
    fn ids(&self) -> HashMap<u32, String> {
        let indices = self.enforcer.indices().into_iter();
        indices.map(|(id, index)| (index, id)).collect()
    }

    /// Processes outside that belong inside.
    fn outside(&mut self, all: &mut Vec<(Found, Cure)>) {
        let ids = self.ids();
        let mut inside: HashMap<u32, CgroupPath> = HashMap::new();
        for path in self.claims.keys() {
            let there = self.hierarchy.processes(path, true).unwrap_or_default();
            inside.extend(there.into_iter().map(|pid| (pid, path.clone())));
        }
        let mut told: HashSet<u32> = HashSet::new();
        let mut push = |pid: u32, claimed: &CgroupPath, how: &str, cure| {
            let Ok(now) = self.hierarchy.cgroup_of(pid) else {
                return;
            };
            // Born, or come back, since the list was made.
            if now.is_within(claimed) {
                return;
            }
            let back = claimed.clone();
            let agent = self.claims.get(claimed).map(|(_, agent)| *agent);
            let difference = Found {
                kind: "process_outside",
                what: format!("process {pid} ({})", comm(pid)),
                agent: agent.and_then(|agent| ids.get(&agent).cloned()),
                root: None,
                found: format!("in {now}: {how}"),
                wanted: format!("in {claimed}"),
                remedy: match cure {
                    true => format!("`remit reconcile --repair` puts it back into {claimed}"),
                    false => format!(
                        "nothing: kill it, or put it back: `echo {pid} > …{claimed}/cgroup.procs`"
                    ),
                },
            };
            let cure = if cure {
                Cure::Return(pid, back)
            } else {
                Cure::None
            };
            all.push((difference, cure));
        };
        // Those that were inside.
        let mut seen = Seen::default();
        for ((pid, start), claimed) in &self.seen.0 {
            if inside.contains_key(pid) || started(*pid) != Some(*start) {
                continue;
            }
            // Its agent's cgroup is gone with it in it: that cannot be, so it was moved before.
            seen.0.insert((*pid, *start), claimed.clone());
            if told.insert(*pid) {
                push(*pid, claimed, "it was inside before", true);
            }
        }
        // Those whose parents are.
        for (pid, parent, start) in processes() {
            if let Some(path) = inside.get(&pid) {
                seen.0.insert((pid, start), path.clone());
            } else if let Some(path) = inside.get(&parent)
                && told.insert(pid)
            {
                push(pid, path, "its parent is inside", false);
            }
        }
        self.seen = seen;
    }

    /// The registry compiled afresh against what is in force.
    fn registry_differences(&self, all: &mut Vec<(Found, Cure)>) {
        let files = registry::read(&self.settings.paths);
        let names = registry::names(&self.settings);
        let compiled = policy::compile_on(&files.sources, wall_millis(), names);
        let last = Some(&self.force);
        let next = force::merge(&files, compiled, last, &self.holds, stance(&self.settings));
        let mut push = |kind, agent: &str, found: String, wanted: String| {
            let difference = Found {
                kind,
                what: format!("entry of {agent}"),
                agent: Some(agent.to_owned()),
                root: None,
                found,
                wanted,
                remedy: "compiles the registry and swaps it in, as `remit reload` does".to_owned(),
            };
            all.push((difference, Cure::Reload));
        };
        let next = match next {
            Ok(next) => next,
            Err(unusable) => {
                push(
                    "approved_not_enforced",
                    "every agent",
                    "the registry in force".to_owned(),
                    format!("the files, and {unusable}"),
                );
                return;
            }
        };
        let say = |agent: &force::InForce| {
            let hash = agent.tables.hash.get(..19).unwrap_or(&agent.tables.hash);
            format!("{} {hash}…", agent.tables.state.name())
        };
        for (id, file) in &next.agents {
            let now = self.force.agents.get(id);
            let same = now.is_some_and(|now| {
                (&now.tables.hash, now.tables.state) == (&file.tables.hash, file.tables.state)
            });
            if same {
                continue;
            }
            let found = now.map_or_else(|| "not in force".to_owned(), say);
            let kind = if file.tables.state == State::Active {
                "approved_not_enforced"
            } else if now.is_some_and(|now| now.tables.state == State::Active) {
                "enforced_not_approved"
            } else {
                "changed"
            };
            push(kind, id, found, say(file));
        }
        for (id, now) in &self.force.agents {
            if !next.agents.contains_key(id) {
                let kind = if now.tables.state == State::Active {
                    "enforced_not_approved"
                } else {
                    "extra"
                };
                push(kind, id, say(now), "no file of it".to_owned());
            }
        }
    }

    /// Entries in force that no file says any more, by the settings' own wish.
    pub(super) fn kept_entries(&self) -> Vec<Found> {
        self.force
            .agents
            .iter()
            .filter_map(|(id, agent)| {
                let why = agent.kept.as_ref()?;
                Some(Found {
                    kind: "enforced_not_approved",
                    what: format!("entry of {id}"),
                    agent: Some(id.clone()),
                    root: None,
                    found: "its last good entry, by `on_bad_registry`".to_owned(),
                    wanted: why.lines().next().unwrap_or_default().to_owned(),
                    remedy: "nothing: mend its file".to_owned(),
                })
            })
            .collect()
    }

    /// Does what cures a difference. The error says why it did not.
    pub(super) fn cure(&mut self, cure: &Cure, asked_for: bool) -> Option<Result<(), String>> {
        match cure {
            Cure::None => None,
            Cure::Reload => Some(self.reload().map(drop)),
            Cure::Survey => {
                self.survey();
                Some(match self.problems.get("attribution") {
                    Some(why) => Err(why.clone()),
                    None => Ok(()),
                })
            }
            Cure::Ring => {
                self.drain();
                let mended = self.enforcer.mend_ring().map_err(|error| error.to_string());
                Some(mended.and_then(|()| match self.enforcer.ring_state() {
                    Ok(state) if state.waiting().is_some() => Ok(()),
                    Ok(_) => Err("it makes no sense again".to_owned()),
                    Err(error) => Err(error.to_string()),
                }))
            }
            Cure::Endpoint(agent) => Some(self.reopen_endpoint(*agent)),
            Cure::Return(pid, path) => asked_for.then(|| {
                let procs = self.hierarchy.directory(path).join("cgroup.procs");
                fs::write(&procs, pid.to_string()).map_err(|error| error.to_string())?;
                match self.hierarchy.cgroup_of(*pid) {
                    Ok(now) if now.is_within(path) => Ok(()),
                    Ok(now) => Err(format!("it is in {now}")),
                    Err(error) => Err(error.to_string()),
                }
            }),
        }
    }
}

/// Every process: pid, parent, start time in clock ticks since boot.
fn processes() -> Vec<(u32, u32, u64)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| {
            let (parent, start) = stat(pid)?;
            Some((pid, parent, start))
        })
        .collect()
}

fn started(pid: u32) -> Option<u64> {
    stat(pid).map(|(_, start)| start)
}

/// Parent and start time (proc(5), fields 4 and 22). The name before them may hold anything.
fn stat(pid: u32) -> Option<(u32, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // A zombie runs nothing any more, and its cgroup is no longer its own.
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some((parent, start))
}

/// A process's name; hostile bytes, so whoever prints it makes it harmless.
fn comm(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = std::process::id();
        let (parent, start) = stat(me).unwrap();
        assert!(parent > 0 && start > 0);
        assert!(processes().contains(&(me, parent, start)));
        assert_eq!(started(me), Some(start));
        assert_eq!(stat(u32::MAX), None);
        assert!(!comm(me).is_empty());
    }
}
