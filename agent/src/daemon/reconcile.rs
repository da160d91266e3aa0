//! Whether the kernel has what the registry says: compared every `reconcile.every` and mended at
//! once, or when somebody asks.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use tracing::{error, warn};

use super::{
    core::Core,
    differences::{Cure, Found},
    keeping,
    time::wall_millis,
};
use crate::{
    audit::{Actor, Decision, Difference, Drifted, Mending},
    control::{
        Caller,
        protocol::{Drift, DriftSummary, Reconciled},
    },
    kernel::{self, DriftKind},
    policy::{self, UnixMillis},
};

/// How often the comparison that runs by itself compiles the registry afresh.
const COMPILE_EVERY: Duration = Duration::from_secs(60);

/// What was found so far.
#[derive(Clone, Debug, Default)]
pub struct DriftBook {
    /// What stands, by what tells it from other drift: since when.
    open: BTreeMap<(&'static str, String), Standing>,
    /// The same of what is no drift.
    notices: BTreeMap<(&'static str, String), UnixMillis>,
    /// When the registry was last compiled afresh to compare with.
    compiled: Option<Instant>,
    summary: DriftSummary,
    /// When the last comparison ended, and how long it took.
    last: Option<(Instant, Duration)>,
}

/// A difference that stands.
#[derive(Clone, Copy, Debug)]
struct Standing {
    since: UnixMillis,
    /// Whether the log has it, as found and as not mended.
    told: bool,
    told_failed: bool,
}

impl DriftBook {
    /// Whether nine times as long as the last comparison took has passed since.
    fn is_due(&self) -> bool {
        self.last
            .is_none_or(|(ended, took)| ended.elapsed() >= took * 9)
    }

    /// In short.
    pub fn summary(&self) -> DriftSummary {
        self.summary
    }
}

impl Core {
    /// What comparing came to.
    pub(super) fn drift_summary(&self) -> DriftSummary {
        self.drift.summary()
    }

    /// How long the last comparison keeps the next one away, where the registry is large.
    pub(super) fn drift_pause(&self) -> Duration {
        self.drift.last.map_or(Duration::ZERO, |(_, took)| took * 9)
    }

    /// The first comparison, before anybody is told that the host enforces. The registry was
    /// compiled just now.
    pub(super) fn compare_first(&mut self) {
        self.drift.compiled = Some(Instant::now());
        self.mend();
    }

    /// The comparison that runs by itself: whatever differs is mended. Of a registry so large that
    /// it would take more than a tenth of the daemon's time, it runs less often. The registry is
    /// compiled afresh once a minute only: its files are watched, and looked at by every comparison.
    pub(super) fn mend(&mut self) {
        self.survey();
        self.hold_again();
        if self.drift.is_due() {
            let compiled = self.drift.compiled;
            let fresh = compiled.is_none_or(|at| at.elapsed() >= COMPILE_EVERY);
            self.reconcile(true, fresh, Actor::Daemon);
        }
    }

    /// The one that somebody asked for.
    pub(super) fn reconcile_on_request(&mut self, caller: &Caller, repair: bool) -> Reconciled {
        if repair {
            self.survey();
            self.hold_again();
        }
        self.reconcile(repair, true, keeping::actor(caller))
    }

    fn reconcile(&mut self, repair: bool, fresh: bool, by: Actor) -> Reconciled {
        let began = Instant::now();
        let now = wall_millis();
        let found = self.enforcer.inspect();
        let beside = self.differences(fresh);
        if fresh {
            self.drift.compiled = Some(began);
        }
        let mut seen = BTreeMap::new();
        let keys = found
            .iter()
            .map(|drift| (drift.kind.name(), drift.what.clone()));
        let others = beside
            .iter()
            .map(|(found, _)| (found.kind, found.what.clone()));
        // What only a fresh compilation finds stands until the next one.
        let kept: Vec<_> = self
            .drift
            .open
            .keys()
            .filter(|(_, what)| !fresh && what.starts_with("entry of "))
            .cloned()
            .collect();
        for key in keys.chain(others).chain(kept) {
            let standing = self.drift.open.get(&key).copied().unwrap_or(Standing {
                since: now,
                told: false,
                told_failed: false,
            });
            if !standing.told {
                self.drift.summary.found += 1;
                self.drift.summary.last_ms = Some(now);
                self.meter.drifted(key.0);
            }
            seen.insert(key, standing);
        }
        self.drift.open = seen;

        let outcomes: Vec<Mending> = if repair && !found.is_empty() {
            warn!(
                message = "Registry and kernel disagree; mending.",
                differences = found.len()
            );
            let mending = Instant::now();
            let repaired = self.enforcer.repair(&found);
            self.meter.repaired(mending);
            let left: BTreeSet<(&str, String)> = self
                .enforcer
                .inspect()
                .into_iter()
                .map(|drift| (drift.kind.name(), drift.what))
                .collect();
            self.recorder.learn(
                &self.enforcer,
                self.force.revision,
                super::core::all(&self.force),
            );
            // What was open in between may have let something through.
            self.close_unreachable(None);
            repaired
                .into_iter()
                .map(|repair| match repair.failed {
                    Some(why) => Mending::Failed(why),
                    None if left.contains(&(repair.drift.kind.name(), repair.drift.what)) => {
                        Mending::Failed("it differs again".to_owned())
                    }
                    None => Mending::Mended,
                })
                .collect()
        } else {
            vec![Mending::NotTried; found.len()]
        };

        let mut drift = Vec::new();
        for (each, mending) in found.into_iter().zip(outcomes) {
            drift.push(self.tell(of_kernel(each), mending, by));
        }
        let mut cured: Vec<(Cure, Option<Result<(), String>>)> = Vec::new();
        for (each, cure) in beside {
            let outcome = match cured.iter().find(|(known, _)| *known == cure) {
                Some((_, outcome)) => outcome.clone(),
                None if repair => {
                    let outcome = self.cure(&cure, by != Actor::Daemon);
                    cured.push((cure, outcome.clone()));
                    outcome
                }
                None => None,
            };
            let mending = match outcome {
                None => Mending::NotTried,
                Some(Ok(())) => Mending::Mended,
                Some(Err(why)) => Mending::Failed(why),
            };
            drift.push(self.tell(each, mending, by));
        }
        self.beats.compared = Some(began);
        self.drift.summary.checked_ms = Some(now);
        self.drift.last = Some((Instant::now(), began.elapsed()));
        self.drift.summary.open = self.drift.open.len() as u64;
        match self.drift.open.keys().next() {
            Some((kind, what)) => {
                let others = self.drift.open.len() - 1;
                self.problems.insert(
                    "drift",
                    format!("registry and kernel disagree: {kind}: {what}, and {others} more"),
                );
            }
            None => drop(self.problems.remove("drift")),
        }
        Reconciled {
            checked_ms: now,
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            entries: self.enforcer.compared(),
            drift,
            notices: self.notices(),
            information: self.information(),
        }
    }

    /// Writes a difference down, once for each turn that it takes.
    fn tell(&mut self, drift: Found, mending: Mending, by: Actor) -> Drift {
        let key = (drift.kind, drift.what.clone());
        let mut standing = self.drift.open.get(&key).copied().unwrap_or(Standing {
            since: wall_millis(),
            told: false,
            told_failed: false,
        });
        let (repaired, error) = match &mending {
            Mending::NotTried => (None, None),
            Mending::Mended => (Some(true), None),
            Mending::Failed(why) => (Some(false), Some(why.clone())),
        };
        let root = drift.root.clone();
        let news = match &mending {
            Mending::NotTried => !standing.told,
            Mending::Mended => true,
            Mending::Failed(_) => !standing.told_failed,
        };
        standing.told = true;
        standing.told_failed |= matches!(mending, Mending::Failed(_));
        if mending == Mending::Mended {
            self.drift.open.remove(&key);
        } else {
            self.drift.open.insert(key, standing);
        }
        if news {
            let hash = drift
                .agent
                .as_ref()
                .and_then(|id| self.force.agents.get(id))
                .map(|agent| agent.tables.hash.clone());
            let drifted = Drifted {
                difference: Difference {
                    kind: drift.kind.to_owned(),
                    what: drift.what.clone(),
                    agent: drift.agent.clone().map(named),
                    root: root.clone(),
                    found: drift.found.clone(),
                    wanted: drift.wanted.clone(),
                    mending,
                },
                since: standing.since,
                hash,
                by,
                revision: self.force.revision,
            };
            warn!(message = "Drift.", what = drifted.difference.sentence());
            self.decide(Decision::Drifted(Box::new(drifted)));
        }
        Drift {
            kind: drift.kind.to_owned(),
            what: drift.what,
            agent: drift.agent.map(named),
            root,
            found: drift.found,
            wanted: drift.wanted,
            since_ms: standing.since,
            remedy: Some(drift.remedy),
            repaired,
            error,
        }
    }

    /// Programs that somebody had put under the links of the fence, as this daemon found it. They
    /// have been replaced.
    pub(super) fn decide_foreign(&mut self) {
        let found: Vec<_> = self
            .enforcer
            .fences()
            .flat_map(|(root, fence)| {
                let foreign = fence.found_foreign().iter();
                foreign.map(|found| (root.to_owned(), found.hook, found.program))
            })
            .collect();
        for (root, hook, program) in found {
            let drifted = Drifted {
                difference: Difference {
                    kind: DriftKind::ForeignProgram.name().to_owned(),
                    what: format!("link of {hook}"),
                    agent: None,
                    root: Some(root),
                    found: format!("program {program}, which remit did not attach"),
                    wanted: "a program of remit's".to_owned(),
                    mending: Mending::Mended,
                },
                since: wall_millis(),
                hash: None,
                by: Actor::Daemon,
                revision: self.force.revision,
            };
            self.drift.summary.found += 1;
            self.drift.summary.last_ms = Some(wall_millis());
            self.meter.drifted(DriftKind::ForeignProgram.name());
            self.decide(Decision::Drifted(Box::new(drifted)));
        }
    }

    /// Holds that could not be put in force when they were asked for.
    fn hold_again(&mut self) {
        let waiting: Vec<String> = self
            .force
            .agents
            .iter()
            .filter(|(id, agent)| agent.hold.as_ref() != self.holds.get(id))
            .map(|(id, _)| id.clone())
            .collect();
        for id in waiting {
            if let Err(why) = self.put_in_force(&id) {
                error!(
                    message = "A held agent is not held in the kernel.",
                    agent = id,
                    why
                );
                self.problems
                    .insert("holds", format!("`{id}` is not held in the kernel: {why}"));
                return;
            }
        }
        self.problems.remove("holds");
    }

    /// What differs from what one would expect, and is as the registry and the settings want it.
    fn notices(&mut self) -> Vec<Drift> {
        let now = wall_millis();
        let mut all = self.unclaimed();
        all.extend(self.kept_entries());
        let mut standing = BTreeMap::new();
        let notices = all
            .into_iter()
            .map(|found| {
                let key = (found.kind, found.what.clone());
                let since = self.drift.notices.get(&key).copied().unwrap_or(now);
                standing.insert(key, since);
                Drift {
                    kind: found.kind.to_owned(),
                    what: found.what,
                    agent: found.agent,
                    root: found.root,
                    found: found.found,
                    wanted: found.wanted,
                    since_ms: since,
                    remedy: Some(found.remedy),
                    repaired: None,
                    error: None,
                }
            })
            .collect();
        self.drift.notices = standing;
        notices
    }

    /// What is worth knowing and no drift.
    fn information(&self) -> Vec<String> {
        let mut told: Vec<String> = self
            .force
            .agents
            .keys()
            .filter(|id| {
                let index = self.enforcer.index_of(id);
                !self.claims.values().any(|(_, agent)| Some(*agent) == index)
            })
            .map(|id| format!("agent `{id}` has no cgroup"))
            .collect();
        for (root, fence) in self.enforcer.fences() {
            for guard in fence.guards() {
                if !guard.others.is_empty() {
                    let ids: Vec<_> = guard.others.iter().map(ToString::to_string).collect();
                    told.push(format!(
                        "other programs run on {} of `{root}`: {}",
                        guard.hook,
                        ids.join(", ")
                    ));
                }
            }
        }
        told
    }
}

/// A difference in the kernel's tables, as all others are.
fn of_kernel(drift: kernel::Drift) -> Found {
    Found {
        kind: drift.kind.name(),
        root: drift.root(),
        remedy: drift.remedy().to_owned(),
        what: drift.what,
        agent: drift.agent,
        found: drift.found,
        wanted: drift.wanted,
    }
}

/// What an agent is called outside the kernel's tables.
fn named(id: String) -> String {
    if id == policy::UNREGISTERED_ID {
        "unregistered".to_owned()
    } else {
        id
    }
}
