//! What metrics are made of: read off from the kernel and the daemon's state when somebody asks.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{self, Reason};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::error;

use super::{DaemonError, core::Core, settings::Settings, time::wall_millis};
use crate::{
    audit::metrics::{CONTENT_TYPE, Decisions, Lookups, MapUse, Snapshot, Spread, Times, encode},
    control::{
        Call,
        protocol::{Code, Exposition, Refusal},
        scrape,
    },
    dns::{
        server::Server,
        tally::{BOUNDS, Spent},
    },
    policy,
};

/// A registration that has ended by its own date, whatever its entry says of its state.
const EXPIRED: &str = "expired";

/// What is counted here and nowhere else.
#[derive(Debug, Default)]
pub struct Meter {
    apply: Option<Times>,
    repair: Option<Times>,
    drift: BTreeMap<&'static str, u64>,
    /// Events that were not written in another form.
    pub(super) unexported: u64,
}

// === impl Meter ===

impl Meter {
    /// A registry was put in force, or it was tried.
    pub fn applied(&mut self, began: Instant) {
        book(&mut self.apply, began.elapsed());
    }

    /// What differed was put right, or it was tried.
    pub fn repaired(&mut self, began: Instant) {
        book(&mut self.repair, began.elapsed());
    }

    /// A difference was found that was not known yet.
    pub fn drifted(&mut self, kind: &'static str) {
        *self.drift.entry(kind).or_default() += 1;
    }
}

fn book(times: &mut Option<Times>, took: Duration) {
    let times = times.get_or_insert_default();
    times.count += 1;
    times.sum += took.as_secs_f64();
    times.last = took.as_secs_f64();
}

/// Serves metrics where the settings want them, on the runtime that this is called on.
pub fn listen(
    settings: &Settings,
    calls: mpsc::Sender<Call>,
) -> Result<Option<JoinHandle<()>>, DaemonError> {
    let Some(address) = settings.metrics.listen else {
        return Ok(None);
    };
    let failed = |source| DaemonError::Metrics { address, source };
    let listener = scrape::bind(address).map_err(failed)?;
    Ok(Some(tokio::spawn(async move {
        if let Err(error) = scrape::serve(listener, calls).await {
            error!(message = "Metrics are not served any more.", %address, %error);
        }
    })))
}

impl Core {
    /// Metrics, as of now.
    pub(super) fn metrics(&mut self) -> Result<Exposition, Refusal> {
        let text = encode(self.snapshot());
        let text = text.map_err(|error| {
            Refusal::new(
                Code::Internal,
                format!("metrics cannot be written: {error}"),
            )
        })?;
        Ok(Exposition {
            content_type: CONTENT_TYPE,
            text,
        })
    }

    fn snapshot(&mut self) -> Snapshot {
        let now = wall_millis();
        let lost = self.recorder.lost();
        let lost = [
            ("kernel", lost.kernel),
            ("rate", lost.rate),
            ("disk", lost.disk),
            ("export", self.meter.unexported),
            ("access", self.enforcer.accesses().beyond().packets),
        ];
        let enforced = self
            .enforcer
            .fences()
            .filter(|(_, fence)| {
                let guards = fence.guards();
                let live = |guard: &crate::kernel::Guard| guard.link.is_some() && guard.listed;
                fence.stands() && !guards.is_empty() && guards.iter().all(live)
            })
            .count();
        let mut agents = BTreeMap::new();
        let mut expiries = Vec::new();
        for (id, agent) in &self.force.agents {
            let tables = &agent.tables;
            let ended = tables.state == abi::State::Active
                && tables.expires.is_some_and(|expires| expires <= now);
            let state = if ended { EXPIRED } else { tables.state.name() };
            *agents.entry(state.to_owned()).or_default() += 1;
            expiries.extend(tables.expires.map(|expires| (id.clone(), expires)));
        }
        let usage = self.enforcer.usage().into_iter().map(|usage| MapUse {
            map: usage.map.to_owned(),
            entries: usage.entries,
            capacity: usage.capacity,
        });
        let server = self.names.server();
        let (lookups, lookup_times) = server.map_or_else(Default::default, lookups);
        let dropped = server.map(|server| {
            let unanswered = server.unanswered();
            [
                ("busy", unanswered.busy),
                ("malformed", unanswered.malformed),
                ("nobodys", unanswered.nobodys),
            ]
        });
        let dropped = dropped.into_iter().flatten();
        Snapshot {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            decisions: self.decisions(),
            events_lost: owned(lost),
            expected_roots: self.settings.enforcement.roots.len() as u64,
            enforced_roots: enforced as u64,
            drift: owned(self.meter.drift.iter().map(|(kind, count)| (*kind, *count))),
            agents,
            expiries,
            revision: self.force.revision,
            maps: usage.collect(),
            lookups,
            lookups_dropped: owned(dropped),
            lookup_times,
            leases: self.live_leases(),
            probes: self.probing.by_verdict(),
            last_probes: self.probing.last_of_each(),
            apply: self.meter.apply,
            repair: self.meter.repair,
            trail: self
                .audit
                .position()
                .map(|last| (last.record, self.audit.signed())),
            problems: self.problems.len() as u64,
        }
    }

    /// The kernel's counters. Agents that were never refused anything have their `allowed` alone.
    fn decisions(&self) -> Vec<Decisions> {
        let mut decisions = Vec::new();
        for (id, index) in self.enforcer.indices() {
            let Some(counters) = self.enforcer.counters(index) else {
                continue;
            };
            let agent = if id == policy::UNREGISTERED_ID {
                "unregistered".to_owned()
            } else {
                id
            };
            let mut put = |verdict, reason: &str, count| {
                decisions.push(Decisions {
                    agent: agent.clone(),
                    verdict,
                    reason: reason.to_owned(),
                    count,
                });
            };
            put("allowed", "", counters.allowed);
            for (verdict, counts) in [
                ("denied", &counters.denied),
                ("monitored", &counters.monitored),
            ] {
                for reason in Reason::ALL {
                    let count = counts.get(usize::from(*reason as u8)).copied();
                    if let Some(count) = count.filter(|count| *count > 0) {
                        put(verdict, reason.name(), count);
                    }
                }
            }
        }
        decisions
    }
}

/// What came of lookups, and how long they took.
fn lookups(server: &Server) -> (Vec<Lookups>, Vec<(&'static str, Spread)>) {
    let tally = server.tally();
    let lookups = tally.each().map(|(agent, came, count)| {
        let (outcome, reason) = came.words();
        Lookups {
            agent: agent.to_owned(),
            outcome,
            reason,
            count,
        }
    });
    let times = [
        ("guard", spread(&tally.guard)),
        ("upstream", spread(&tally.upstream)),
    ];
    (lookups.collect(), times.into())
}

fn spread(spent: &Spent) -> Spread {
    let bounds = BOUNDS.iter().map(|micros| *micros as f64 / 1e6);
    let bounds = bounds.chain([f64::INFINITY]);
    Spread {
        counts: bounds.zip(spent.counts).collect(),
        sum: spent.sum.as_secs_f64(),
    }
}

fn owned<'n>(counts: impl IntoIterator<Item = (&'n str, u64)>) -> BTreeMap<String, u64> {
    counts
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}
