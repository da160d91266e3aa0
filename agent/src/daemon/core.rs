//! The daemon's state and what it does to it: start, reload, attribution, settling, stop.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tracing::{error, info, warn};

use super::{
    DaemonError, Options,
    force::{self, Force, Unusable},
    recorder::{Recorder, Sink},
    registry, selftest,
    settings::{CgroupMount, Containment, Settings},
    time::{Offset, wall_millis},
};
use crate::{
    audit::{Allowance, Decided, Decision, Key, Limits, Log, LogName, written_since},
    cgroup::{CgroupPath, Change, Claimant, Hierarchy, Selectors},
    kernel::{self, Capacity, EMBEDDED, Enforcer, Tuning, boot_nanos},
    policy::{self, UnixMillis},
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
    offset: Offset,
    selectors: Arc<Selectors>,
    audit: Log,
    adopted: bool,
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
fn capacity(settings: &Settings, images: &[kernel::Image]) -> Capacity {
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
        rule_sets: limits.rule_sets.unwrap_or(sized.rule_sets),
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
    pub fn start(settings: &Settings, options: &Options) -> Result<Self, DaemonError> {
        if settings.enforcement.containment == Containment::Require {
            return Err(DaemonError::Containment);
        }
        let hierarchy = hierarchy(settings)?;
        let offset = Offset::read();
        let files = registry::read(&settings.paths);
        let compiled = policy::compile(&files.sources, wall_millis());
        let enforcement = &settings.enforcement;
        let force = force::merge(
            &files,
            compiled,
            None,
            enforcement.on_bad_registry,
            enforcement.unregistered,
        )?;
        let images = force.images(&offset.clock());

        let tuning = Tuning {
            kernel_log: options.kernel_log,
            events_per_second: settings.log.per_agent_rate,
        };
        let capacity = capacity(settings, &images);
        let mut enforcer =
            Enforcer::open(&options.object, &settings.paths.bpffs, capacity, &tuning)?;
        let adopted = enforcer.born_before_us();
        let mut roots = Vec::new();
        for root in &enforcement.roots {
            let path = CgroupPath::new(root).map_err(|why| DaemonError::Root(root.clone(), why))?;
            hierarchy.create(&path)?;
            roots.push(path);
        }
        enforcer.apply(images)?;

        let limits = Limits {
            max_size: settings.log.max_size,
            max_total: settings.log.max_total,
            retention: settings.log.retention,
        };
        let log = Log::open(&settings.paths.log, LogName::Violations, limits)?;
        let audit = Log::open(&settings.paths.log, LogName::Audit, limits)?;
        let violations = log.path().to_owned();
        let mut recorder = Recorder::new(
            Sink::Log(Box::new(log)),
            allowance(settings),
            hierarchy.clone(),
            offset,
        );
        recorder.learn(&enforcer, force.revision, all(&force));
        if adopted {
            resume(&mut recorder, &enforcer, &violations);
        }

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
        };
        core.attribute()?;
        for root in core.roots.clone() {
            let directory = core.hierarchy.directory(&root);
            core.enforcer.fence(&root.to_string(), &directory)?;
        }
        core.self_test(None).map_err(DaemonError::SelfTest)?;
        Ok(core)
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
        self.decide_loaded();
    }

    /// Writes the end down. The fence stays.
    pub fn stop(&mut self, reason: &str) {
        self.drain();
        self.recorder.settle(&mut self.enforcer);
        let revision = self.force.revision;
        self.decide(Decision::Stopped {
            pid: std::process::id(),
            reason: reason.to_owned(),
            revision,
        });
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
            .append(|sequence| decided.to_ocsf(&host, sequence))
        {
            error!(message = "The audit log could not be written.", %error);
            self.problems.insert(
                "audit",
                format!("the audit log could not be written: {error}"),
            );
        } else {
            self.problems.remove("audit");
        }
    }

    fn decide_loaded(&mut self) {
        let revision = self.force.revision;
        if self.force.bad.is_empty() && self.force.errors == 0 {
            let agents = self.force.agents.len();
            let warnings = self.force.findings.clone();
            self.decide(Decision::Loaded {
                revision,
                agents,
                warnings,
            });
        } else {
            let agents = self.force.bad.clone();
            let errors = self.force.findings.clone();
            self.decide(Decision::Refused {
                revision,
                agents,
                errors,
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
    }

    /// Once a second. Returns whether the tables were written anew.
    pub fn settle(&mut self) -> bool {
        self.recorder.settle(&mut self.enforcer);
        self.enforcer.sweep();
        let Some(stepped) = self.offset.stepped() else {
            return false;
        };
        info!(message = "The wall clock stepped; deadlines are computed anew.");
        self.offset = stepped;
        self.recorder.set_offset(stepped);
        let images = self.force.images(&stepped.clock());
        match self.enforcer.apply(images) {
            Ok(_) => {
                self.problems.remove("clock");
                self.recorder
                    .learn(&self.enforcer, self.force.revision, all(&self.force));
            }
            Err(error) => {
                error!(message = "Deadlines could not be computed anew.", %error);
                self.problems
                    .insert("clock", format!("deadlines are of the old clock: {error}"));
            }
        }
        true
    }

    /// Opens the logs anew.
    pub fn reopen_logs(&mut self) {
        self.recorder.reopen();
        if let Err(error) = self.audit.reopen() {
            warn!(message = "The audit log could not be reopened.", %error);
        }
    }

    /// Compiles the registry and swaps it in. Whatever cannot be used leaves in force what is.
    /// Returns the agents that changed, or why nothing did.
    pub fn reload(&mut self) -> Result<Vec<String>, String> {
        let result = self.try_reload();
        match &result {
            Ok(changed) => {
                info!(
                    message = "Registry in force.",
                    revision = self.force.revision,
                    changed = changed.len(),
                    errors = self.force.errors
                );
                self.problems.remove("reload");
            }
            Err(why) => {
                error!(message = "The reload failed.", why);
                self.problems
                    .insert("reload", format!("the last reload failed: {why}"));
                let revision = self.force.revision;
                self.decide(Decision::Refused {
                    revision,
                    agents: Vec::new(),
                    errors: vec![why.clone()],
                });
            }
        }
        result
    }

    fn try_reload(&mut self) -> Result<Vec<String>, String> {
        let files = registry::read(&self.settings.paths);
        let compiled = policy::compile(&files.sources, wall_millis());
        let enforcement = &self.settings.enforcement;
        let next = force::merge(
            &files,
            compiled,
            Some(&self.force),
            enforcement.on_bad_registry,
            enforcement.unregistered,
        )
        .map_err(|unusable: Unusable| unusable.to_string())?;
        // What was held back a second ago for running programs can go now, and make room.
        self.enforcer.sweep();
        let images = next.images(&self.offset.clock());
        let changed = self
            .enforcer
            .apply(images)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        self.force = next;
        let followed = self.follow(&changed);
        self.close_unreachable(None);
        self.decide_loaded();
        followed.map_err(|why| format!("the new registry is in force, but {why}"))?;
        Ok(changed)
    }

    /// What goes with new tables: whose records they are, which cgroups they claim, and whether the
    /// kernel understands them as memory does.
    fn follow(&mut self, changed: &[String]) -> Result<(), String> {
        self.recorder
            .learn(&self.enforcer, self.force.revision, all(&self.force));
        let selectors =
            selectors(&self.force, &self.enforcer).map_err(|error| error.to_string())?;
        self.selectors = Arc::new(selectors);
        self.attribute()
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        self.self_test(Some(changed))
            .map_err(|why| format!("the self-test fails: {why}"))
    }

    /// Compares the kernel's verdict with memory's, for these agents or for all.
    fn self_test(&mut self, only: Option<&[String]>) -> Result<(), String> {
        let clock = self.offset.clock();
        let tables: Vec<_> = all(&self.force)
            .filter(|tables| only.is_none_or(|only| only.contains(&tables.id)))
            .cloned()
            .collect();
        let mut asked = 0;
        for tables in tables {
            asked += selftest::ask(&mut self.enforcer, &tables, &clock)?;
        }
        tracing::debug!(message = "Kernel and memory agree.", questions = asked);
        Ok(())
    }

    /// Finds out anew which cgroup is whose, and tells the kernel.
    pub fn survey(&mut self) {
        self.refence();
        match self.attribute() {
            Ok(()) => {
                self.problems.remove("attribution");
            }
            Err(error) => {
                warn!(message = "Cgroups could not be attributed.", %error);
                self.problems.insert("attribution", error.to_string());
            }
        }
    }

    fn attribute(&mut self) -> Result<(), DaemonError> {
        let mut claims = BTreeMap::new();
        self.problems.remove("disputes");
        for root in &self.roots {
            let survey = match self.hierarchy.claims(root, &self.selectors) {
                Ok(survey) => survey,
                Err(error) if error.is_missing() => continue,
                Err(error) => return Err(error.into()),
            };
            for claim in survey.claims {
                claims.insert(claim.path, (claim.id, claim.agent));
            }
            if let Some(dispute) = survey.disputes.first() {
                self.problems.insert(
                    "disputes",
                    format!(
                        "cgroup `{}` is claimed by several agents, so by none",
                        dispute.path
                    ),
                );
            }
        }
        self.claims = claims;
        self.push_claims()
    }

    fn push_claims(&mut self) -> Result<(), DaemonError> {
        let wanted: Vec<(u64, u32)> = self.claims.values().copied().collect();
        self.enforcer.attribute_indices(&wanted)?;
        Ok(())
    }

    /// Follows cgroups as they come and go.
    pub fn cgroups_changed(&mut self, changes: &[Change]) {
        let mut again = false;
        for change in changes {
            match change {
                Change::Created {
                    path,
                    id,
                    claimant: Claimant::Agent(agent),
                } => {
                    self.claims.insert(path.clone(), (*id, *agent));
                }
                Change::Created {
                    claimant: Claimant::Several(_),
                    ..
                }
                | Change::RootDeleted(_)
                | Change::RootCreated { .. }
                | Change::Unwatched(_) => again = true,
                Change::Created {
                    claimant: Claimant::Nobody,
                    ..
                } => {}
                Change::Deleted { path, id } => {
                    if self.claims.get(path).is_some_and(|(known, _)| known == id) {
                        self.claims.remove(path);
                    }
                }
            }
        }
        if again {
            self.survey();
        } else if let Err(error) = self.push_claims() {
            warn!(message = "Cgroups could not be attributed.", %error);
            self.problems.insert("attribution", error.to_string());
        }
    }

    /// Raises fences on roots that were removed and made again.
    fn refence(&mut self) {
        for root in self.roots.clone() {
            let name = root.to_string();
            let stands = self
                .enforcer
                .fences()
                .any(|(fenced, fence)| fenced == name && fence.stands());
            if stands {
                continue;
            }
            let directory = self.hierarchy.directory(&root);
            let raised = self
                .hierarchy
                .create(&root)
                .map_err(|error| error.to_string())
                .and_then(|_| {
                    self.enforcer
                        .fence(&name, &directory)
                        .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
                });
            match raised {
                Ok(()) => {
                    warn!(
                        message = "A root was gone; it is fenced again.",
                        root = name
                    );
                    self.problems.remove("roots");
                }
                Err(why) => {
                    error!(message = "A root is not fenced.", root = name, why);
                    self.problems
                        .insert("roots", format!("root `{name}` is not fenced: {why}"));
                }
            }
        }
    }

    /// The offset between the clocks.
    pub(super) fn offset(&self) -> Offset {
        self.offset
    }
}

/// All entries in force, the pseudo-agent's first.
fn all(force: &Force) -> impl Iterator<Item = &Arc<policy::AgentTables>> {
    std::iter::once(&force.unregistered).chain(force.agents.values().map(|agent| &agent.tables))
}

/// The selectors of all agents, by their index in the kernel.
fn selectors(force: &Force, enforcer: &Enforcer) -> Result<Selectors, DaemonError> {
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

/// Removes every pin below the settings' bpffs folder and writes it to the audit log.
pub fn detach_all(settings: &Settings) -> Result<Vec<PathBuf>, DaemonError> {
    let limits = Limits {
        max_size: settings.log.max_size,
        max_total: settings.log.max_total,
        retention: settings.log.retention,
    };
    let mut audit = Log::open(&settings.paths.log, LogName::Audit, limits)?;
    let removed =
        kernel::detach_pinned(&settings.paths.bpffs).map_err(|source| DaemonError::System {
            what: "remove the pins that hold the fence",
            source,
        })?;
    let host = crate::audit::Host::read();
    let decided = Decided {
        time: wall_millis(),
        what: Decision::Stopped {
            pid: std::process::id(),
            reason: "--detach-all: the fence was lifted".to_owned(),
            revision: 0,
        },
    };
    audit.append(|sequence| decided.to_ocsf(&host, sequence))?;
    Ok(removed)
}

/// Opens the embedded object for a fence of its own, as `remit run` without a daemon does.
pub(super) fn open_alone(
    bpffs: &std::path::Path,
    images: &[kernel::Image],
    events_per_second: u32,
) -> Result<Enforcer, DaemonError> {
    let tuning = Tuning {
        kernel_log: 0,
        events_per_second,
    };
    Ok(Enforcer::open(
        EMBEDDED,
        bpffs,
        Capacity::for_images(images),
        &tuning,
    )?)
}

/// Boot time for the self-test and the answers, so that callers need not know the kernel module.
pub(super) fn boot_now() -> u64 {
    boot_nanos()
}
