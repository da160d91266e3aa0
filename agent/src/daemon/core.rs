//! The daemon's state and what it does to it: start, reload, attribution, settling, stop.

use std::{collections::BTreeMap, sync::Arc};

use agent_ebpf::abi::ABI_VERSION;
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::{
    DaemonError, Options, SETTLE_EVERY,
    access::AccessBook,
    differences::Seen,
    endings::Endings,
    evidence,
    force::{Force, Stance},
    ground::{Ground, Otherwise},
    laps::Laps,
    lock::RootLock,
    lookups::Lookups,
    metering::Meter,
    names::{self, Names},
    observer::Observing,
    posture::Beats,
    probe::Probing,
    reconcile::DriftBook,
    recorder::{Recorder, Sink},
    settings::{CgroupMount, Settings},
    time::{Offset, wall_millis},
};
use crate::{
    audit::{
        Allowance, Decided, Decision, Key, Limits, Log, LogName, Succession, Tables, Trail,
        written_since,
    },
    cgroup::{CgroupPath, Hierarchy, Selectors},
    dns::server::Request,
    kernel::{self, Capacity, EMBEDDED, Enforcer, Image, Tuning, boot_nanos},
    policy::{self, UnixMillis},
    state::{Damage, Holds, Store},
};

/// Everything.
pub struct Core {
    pub(super) settings: Settings,
    pub(super) hierarchy: Hierarchy,
    pub(super) roots: Vec<CgroupPath>,
    pub(super) enforcer: Enforcer,
    pub(super) force: Force,
    pub(super) recorder: Recorder,
    pub(super) claims: BTreeMap<CgroupPath, (u64, u32)>,
    pub(super) started_ms: UnixMillis,
    pub(super) problems: BTreeMap<&'static str, String>,
    pub(super) offset: Offset,
    pub(super) selectors: Arc<Selectors>,
    pub(super) locks: Vec<RootLock>,
    pub(super) store: Store,
    pub(super) holds: Holds,
    pub(super) endings: Endings,
    /// Seconds since the clocks were written down.
    pub(super) clock_age: u32,
    /// Whether connections are to be looked through once more.
    pub(super) close_again: bool,
    /// Whether the programs' own log is printed.
    pub(super) kernel_log: bool,
    pub(super) drift: DriftBook,
    pub(super) names: Names,
    pub(super) lookups: Lookups,
    pub(super) beats: Beats,
    pub(super) seen: Seen,
    pub(super) probing: Probing,
    pub(super) meter: Meter,
    pub(super) access: AccessBook,
    /// Who reaches model APIs; none where the settings do not ask for it.
    pub(super) observing: Option<Observing>,
    damage: Vec<Damage>,
    pub(super) audit: Trail,
    adopted: bool,
    laps: Laps,
    /// What the compiler remembers of the registry in force.
    pub(super) memory: policy::Memory,
}

/// The v2 mount that the settings name or that mountinfo has.
pub fn hierarchy(settings: &Settings) -> Result<Hierarchy, DaemonError> {
    let at = match &settings.paths.cgroup {
        CgroupMount::Auto => None,
        CgroupMount::At(path) => Some(path.as_path()),
    };
    Ok(Hierarchy::find(at)?)
}

/// How many maps entries to make room for.
pub(super) fn capacity(settings: &Settings, images: &[Image]) -> Capacity {
    let sized = Capacity::for_images(images);
    let limits = &settings.limits;
    let agents = limits.agents.unwrap_or(sized.agents);
    Capacity {
        agents,
        rows: limits
            .agents
            .map_or(sized.rows, |agents| agents.saturating_mul(4)),
        claims: limits
            .agents
            .map_or(sized.claims, |agents| agents.saturating_mul(4)),
        addresses: limits.addresses.unwrap_or(sized.addresses),
        prefixes: limits.prefixes.unwrap_or(sized.prefixes),
        rule_sets: limits
            .rule_sets
            .unwrap_or(if images.iter().any(Image::uses_names) {
                // Leases of different names share no rules.
                sized.rule_sets.max(names::RULE_SETS)
            } else {
                sized.rule_sets
            }),
    }
}

pub(super) fn allowance(settings: &Settings) -> Allowance {
    Allowance {
        lines: settings.log.per_agent_rate,
        bytes: settings.log.per_agent_daily,
    }
}

impl Core {
    /// All of the start but the sockets. See the module `daemon` for the order.
    pub fn start(
        settings: &Settings,
        options: &Options,
    ) -> Result<(Self, mpsc::Receiver<Request>), DaemonError> {
        let Ground {
            hierarchy,
            roots,
            locks,
            store,
            loaded,
            offset,
            force,
            names: guard,
            lookups,
            enforcer,
            adopted,
            began,
            mut laps,
            memory,
        } = Ground::lay(settings, options, Otherwise::Fail)?;
        let mut meter = Meter::default();
        meter.applied(began);

        let limits = Limits {
            max_size: settings.log.max_size,
            max_total: settings.log.max_total,
            retention: settings.log.retention,
        };
        let log = Log::open(&settings.paths.log, LogName::Violations, limits)?;
        let violations = log.path().to_owned();
        let mut recorder = Recorder::new(
            Sink::Log(Box::new(log)),
            allowance(settings),
            hierarchy.clone(),
            offset,
        );
        let mut audit = Trail::open(
            &evidence::places(settings),
            limits,
            recorder.host(),
            wall_millis(),
        )?;
        evidence::arrange(settings, limits, &mut recorder, &mut audit)?;
        recorder.learn(&enforcer, force.revision, all(&force));
        if adopted {
            resume(&mut recorder, &enforcer, &violations);
        }
        laps.done("logs");

        let selectors = Arc::new(selectors(&force, &enforcer)?);
        let mut core = Self {
            settings: settings.clone(),
            hierarchy,
            roots,
            enforcer,
            force,
            recorder,
            claims: BTreeMap::new(),
            started_ms: wall_millis(),
            problems: BTreeMap::new(),
            offset,
            selectors,
            audit,
            adopted,
            locks,
            store,
            holds: loaded.holds,
            endings: Endings::default(),
            clock_age: 0,
            close_again: false,
            kernel_log: options.kernel_log > 0,
            drift: DriftBook::default(),
            names: guard,
            lookups: Lookups::default(),
            beats: Beats::default(),
            seen: Seen::default(),
            probing: Probing::default(),
            meter,
            access: AccessBook::open(settings, limits)?,
            observing: None,
            damage: loaded.damage,
            laps,
            memory,
        };
        for error in loaded.unwritten {
            core.kept("state-holds", "state", Err(error));
        }
        core.resume_access();
        core.expect_endings();
        core.attribute()?;
        core.laps.done("cgroups");
        for root in core.roots.clone() {
            let directory = core.hierarchy.directory(&root);
            core.enforcer.fence(&root.to_string(), &directory)?;
        }
        if let Err(error) = core.enforcer.settle_in() {
            warn!(message = "The maps of before could not be removed yet.", %error);
        }
        core.check_leases(loaded.registry.as_ref());
        core.laps.done("fence");
        core.self_test(None, None).map_err(DaemonError::SelfTest)?;
        core.laps.done("self-test");
        Ok((core, lookups))
    }

    /// The hierarchy.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// The roots.
    pub fn roots(&self) -> &[CgroupPath] {
        &self.roots
    }

    /// The roots as `/proc/PID/cgroup` writes them.
    pub fn roots_in_proc(&self) -> Vec<String> {
        self.roots
            .iter()
            .map(|root| String::from_utf8_lossy(&self.hierarchy.proc_path(root)).into_owned())
            .collect()
    }

    /// The selectors in force.
    pub fn selectors(&self) -> Arc<Selectors> {
        Arc::clone(&self.selectors)
    }

    /// The revision in force.
    pub fn revision(&self) -> u64 {
        self.force.revision
    }

    /// Writes the start down.
    pub fn started(&mut self) {
        let roots = self.roots.iter().map(ToString::to_string).collect();
        let (revision, adopted) = (self.force.revision, self.adopted);
        self.decide(Decision::Started {
            pid: std::process::id(),
            roots,
            revision,
            adopted,
        });
        self.decide_succession();
        self.decide_loaded(0);
        let damage = std::mem::take(&mut self.damage);
        self.damaged(&damage);
        self.watch_lead(true);
        self.laps.done("trail and sockets");
        self.keep();
        self.laps.done("keep");
        // What was in force before may have granted more.
        self.close_unreachable(None);
        self.follow_names();
        self.laps.done("connections");
        debug!(message = "Started.", took = %self.laps);
    }

    /// Writes the end down. The fence stays.
    pub fn stop(&mut self, reason: &str) {
        self.drain();
        self.recorder.settle_now(&mut self.enforcer);
        self.lookups.settle(&mut self.recorder);
        self.settle_access();
        self.write_access();
        self.keep_clock();
        let revision = self.force.revision;
        self.decide(Decision::Stopped {
            pid: std::process::id(),
            reason: reason.to_owned(),
            revision,
        });
        if let Err(error) = self.audit.close(wall_millis()) {
            error!(message = "The audit trail could not be signed.", %error);
        }
        info!(
            message = "Stopped; what is in force stays in force.",
            reason
        );
    }

    pub(super) fn decide(&mut self, what: Decision) {
        let decided = Decided {
            time: wall_millis(),
            what,
        };
        let host = self.recorder.host().clone();
        if let Err(error) = self
            .audit
            .append(decided.time, |sequence| decided.to_ocsf(&host, sequence))
        {
            error!(message = "The audit log could not be written.", %error);
            self.problems.insert(
                "audit",
                format!("the audit log could not be written: {error}"),
            );
        } else {
            self.problems.remove("audit");
        }
        self.export();
    }

    /// Writes down how this daemon came to the fence that it found.
    fn decide_succession(&mut self) {
        let tables = match self.enforcer.succession() {
            kernel::Succession::Fresh => return,
            kernel::Succession::Adopted => Tables::Adopted,
            kernel::Succession::Replaced { from, .. } if from.as_slice() == [ABI_VERSION] => {
                Tables::Grown
            }
            kernel::Succession::Replaced { from, why, lost } => {
                info!(message = "The maps of before were replaced.", why);
                if !lost.is_empty() {
                    warn!(
                        message = "Not all could be taken along.",
                        lost = lost.join(", ")
                    );
                }
                let names: Vec<_> = from.iter().map(|version| format!("v{version}")).collect();
                Tables::Migrated {
                    from: names.join(", "),
                    to: format!("v{ABI_VERSION}"),
                }
            }
        };
        let differences = self.enforcer.take_differences();
        for difference in &differences {
            info!(
                message = "The kernel had another state of an agent than the registry has now.",
                agent = difference.agent,
                what = difference.what.join("; ")
            );
        }
        self.decide(Decision::Succession(Succession {
            pid: std::process::id(),
            tables,
            links: self.enforcer.links(),
            rewritten: differences.into_iter().map(|each| each.agent).collect(),
            revision: self.force.revision,
        }));
        self.decide_foreign();
    }

    pub(super) fn decide_loaded(&mut self, closed: u64) {
        let revision = self.force.revision;
        if self.force.bad.is_empty() && self.force.errors == 0 {
            let agents = self.force.agents.len();
            let warnings = self.force.findings.clone();
            self.decide(Decision::Loaded {
                revision,
                agents,
                warnings,
                closed,
            });
        } else {
            let agents = self.force.bad.clone();
            let errors = self.force.findings.clone();
            self.decide(Decision::Refused {
                revision,
                agents,
                errors,
                closed,
            });
        }
    }

    /// Has aya-log print what the programs say.
    pub fn log_kernel(&mut self) {
        match kernel::log(self.enforcer.ebpf()) {
            Ok(()) => {}
            Err(error) => warn!(message = "The programs' own log cannot be read.", %error),
        }
    }

    /// Becomes readable when there are records.
    pub fn ring(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.enforcer.ring()
    }

    /// Takes in records.
    pub fn drain(&mut self) {
        self.recorder.drain(&mut self.enforcer);
        self.drain_access();
        let unguarded = self.recorder.take_unguarded();
        self.unguarded(&unguarded);
    }

    /// Whether records came in within the last second, or are likely to. Then there may be more
    /// without a wake-up: a CPU wakes the daemon at most once a millisecond. The first after a pause
    /// always does.
    pub fn hears(&self) -> bool {
        self.recorder.heard_within(SETTLE_EVERY) || self.access.is_busy()
    }

    /// Once a second. Returns whether the tables were written anew.
    pub fn settle(&mut self) -> bool {
        self.recorder.settle_in_time(&mut self.enforcer);
        self.lookups.settle(&mut self.recorder);
        self.tend_trail();
        self.tend_access();
        self.enforcer.sweep();
        self.tend_names();
        self.tend_observer();
        if self.close_again {
            self.close_unreachable(None);
            self.close_again = false;
        }
        self.end_what_ends();
        self.probe_what_is_due();
        let Some(stepped) = self.offset.stepped() else {
            return false;
        };
        self.clock_stepped(stepped);
        true
    }

    /// Opens the logs anew.
    pub fn reopen_logs(&mut self) {
        self.recorder.reopen();
        if let Err(error) = self.audit.reopen() {
            warn!(message = "The audit log could not be reopened.", %error);
        }
        if let Err(error) = self.access.reopen() {
            warn!(message = "The access log could not be reopened.", %error);
        }
    }
}

pub(super) fn stance(settings: &Settings) -> Stance {
    Stance {
        on_bad: settings.enforcement.on_bad_registry,
        unregistered: settings.enforcement.unregistered,
    }
}

/// All entries in force, the pseudo-agent's first.
pub(super) fn all(force: &Force) -> impl Iterator<Item = &Arc<policy::AgentTables>> {
    std::iter::once(&force.unregistered).chain(force.agents.values().map(|agent| &agent.tables))
}

/// The selectors of all agents, by their index in the kernel.
pub(super) fn selectors(force: &Force, enforcer: &Enforcer) -> Result<Selectors, DaemonError> {
    let pairs = force.agents.values().flat_map(|agent| {
        let index = enforcer.index_of(&agent.tables.id);
        agent
            .tables
            .selectors
            .iter()
            .filter_map(move |glob| index.map(|at| (at, glob.as_str())))
    });
    Ok(Selectors::new(pairs)?)
}

/// Lets the ledger start from what the log says was written since the counters were made.
fn resume(recorder: &mut Recorder, enforcer: &Enforcer, violations: &std::path::Path) {
    let Some(born) = enforcer.born() else { return };
    match written_since(violations, born) {
        Ok(sums) => {
            let written = sums
                .into_iter()
                .filter_map(|((id, verdict, reason), count)| {
                    let id = if id == "unregistered" {
                        policy::UNREGISTERED_ID
                    } else {
                        &id
                    };
                    let agent = enforcer.index_of(id)?;
                    Some((
                        Key {
                            agent,
                            verdict,
                            reason,
                        },
                        count,
                    ))
                });
            let folds: Vec<_> = enforcer
                .folds()
                .into_iter()
                .map(|(cpu, slot, fold)| (cpu << 16 | slot, fold))
                .collect();
            recorder.ledger().resume(written.collect::<Vec<_>>(), folds);
        }
        Err(error) => {
            warn!(message = "The log of before cannot be read; its lines count anew.", %error);
        }
    }
}

/// Opens the embedded object for a fence of its own, as `remit run` without a daemon does.
pub(super) fn open_alone(
    bpffs: &std::path::Path,
    images: &[Image],
    events_per_second: u32,
) -> Result<Enforcer, DaemonError> {
    let tuning = Tuning {
        kernel_log: 0,
        events_per_second,
        // Nobody would read it.
        accounts: false,
    };
    let mut capacity = Capacity::for_images(images);
    if images.iter().any(Image::uses_names) {
        capacity.rule_sets = capacity.rule_sets.max(names::RULE_SETS_ALONE);
    }
    Ok(Enforcer::open(EMBEDDED, bpffs, capacity, &tuning)?)
}

/// Boot time for the self-test and the answers, so that callers need not know the kernel module.
pub(super) fn boot_now() -> u64 {
    boot_nanos()
}
