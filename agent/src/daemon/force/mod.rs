//! The registry in force: what the files say now, and where they cannot be used, what they said
//! last; holds laid over. Pure but for its inputs; the kernel module makes it true.

mod agent;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use agent_ebpf::abi::Mode;

use self::agent::keep;
use super::{
    registry::{Registry, Unread},
    settings::{OnBadRegistry, Unregistered},
};
use crate::{
    kernel::Image,
    policy::{self, AgentTables, Clock, Compilation, Finding, Placed, Prefix, SourceKind},
    state::{Hold, Holds, LastGood, Record},
};

pub use self::agent::InForce;

/// All of them, and the pseudo-agent.
#[derive(Clone, Debug)]
pub struct Force {
    /// Number of this state.
    pub revision: u64,
    /// By id.
    pub agents: BTreeMap<String, InForce>,
    /// The rules for processes that no agent claims.
    pub unregistered: Arc<AgentTables>,
    /// Findings, rendered.
    pub findings: Vec<String>,
    /// Files read.
    pub files: usize,
    /// Findings that are errors.
    pub errors: usize,
    /// Findings that are not.
    pub warnings: usize,
    /// Agents whose file cannot be used.
    pub bad: Vec<String>,
    /// Revocations that ended, since the entry changed and was approved again. The caller releases
    /// them in the store once this is in force.
    pub lifted: Vec<String>,
    /// Holds that now know which approval has to change. The caller writes them down.
    pub settled: Vec<(String, Hold)>,
    /// Files and folders of agents of which it is not known which cgroups they claim. While there
    /// are any, `unregistered = "monitor"` lets nothing through.
    pub untold: BTreeSet<String>,
    /// The whole registry is the last good one, and why.
    pub fell_back: Option<String>,
    /// Whether agents may have been in force before of which nothing is known here.
    complete: bool,
}

/// How the settings want what is doubtful to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stance {
    /// `enforcement.on_bad_registry`.
    pub on_bad: OnBadRegistry,
    /// `enforcement.unregistered`.
    pub unregistered: Unregistered,
}

/// Why a registry may not come into force at all.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The floor cannot be told, and a state without it would lack denials.
    #[error("the floor cannot be used: {0}")]
    Floor(String),
}

/// What shall be in force at the start: as [`merge`], upon the registry that was in force last.
/// With a floor that cannot be used that registry holds as a whole.
///
/// # Errors
/// Where the floor cannot be used and there is no earlier one.
pub fn start(
    registry: &Registry,
    compiled: Compilation,
    last: Option<&LastGood>,
    holds: &Holds,
    stance: Stance,
) -> Result<Force, Unusable> {
    let before = last.map(remembered);
    match (usable_floor(registry, &compiled), before) {
        (Err(unusable), Some(before)) if last.is_some_and(|last| last.unregistered.is_some()) => {
            let told = Told::new(registry, &compiled);
            Ok(fall_back(
                registry, &compiled, before, holds, stance, &unusable, told,
            ))
        }
        (_, before) => merge(registry, compiled, before.as_ref(), holds, stance),
    }
}

/// Puts together what shall be in force from what was read and compiled, and from what is in force
/// now. An agent whose file is bad keeps its last good entry, or is denied, as the settings say.
///
/// # Errors
/// Where the floor cannot be used.
pub fn merge(
    registry: &Registry,
    compiled: Compilation,
    before: Option<&Force>,
    holds: &Holds,
    stance: Stance,
) -> Result<Force, Unusable> {
    usable_floor(registry, &compiled)?;
    let mut told = Told::new(registry, &compiled);
    let bad = unusable(registry, &compiled.findings, before);
    let revision = before.map_or(1, |before| before.revision + 1);
    let mut agents = BTreeMap::new();
    let mut lifted = Vec::new();
    let mut settled = Vec::new();
    for tables in compiled.agents {
        let known = before.and_then(|before| before.agents.get(&tables.id));
        let id = tables.id.clone();
        let entry = match known {
            Some(known) if known.entry == tables => Arc::clone(&known.entry),
            Some(_) | None => tables,
        };
        let mut hold = holds.get(&id).cloned();
        if hold.as_ref().is_some_and(|hold| hold.lifted_by(&entry)) {
            hold = None;
            lifted.push(id.clone());
        }
        if let Some(known) = holds.by_id.get(&id).and_then(|hold| hold.settled(&entry)) {
            hold = Some(known.clone());
            settled.push((id.clone(), known));
        }
        let next = InForce::new(entry, revision).held(hold);
        agents.insert(id, next.since(known));
    }
    let mut unusable = Vec::new();
    let mut unclaimed: Vec<String> = unread_folders(registry);
    for (id, why) in bad {
        if agents.contains_key(&id) {
            continue;
        }
        if let Some(known) = before.and_then(|before| before.agents.get(&id)) {
            let next = keep(known, &why, stance.on_bad, revision);
            let next = next.held(holds.get(&id).cloned());
            agents.insert(id.clone(), next.since(Some(known)));
        } else {
            unclaimed.push(id.clone());
        }
        unusable.push(id);
    }
    let untold = untold(unclaimed, before);
    let unregistered = pseudo(
        compiled.unregistered,
        stance.unregistered,
        &untold,
        &mut told,
    );
    Ok(Force {
        revision,
        agents,
        unregistered: Arc::new(unregistered),
        findings: told.findings,
        files: registry.sources.len(),
        errors: told.errors,
        warnings: told.warnings,
        bad: unusable,
        lifted,
        settled,
        untold,
        fell_back: None,
        complete: true,
    })
}

/// The registry of before as a whole, since a new one would lack denials.
fn fall_back(
    registry: &Registry,
    compiled: &Compilation,
    before: Force,
    holds: &Holds,
    stance: Stance,
    unusable_floor: &Unusable,
    mut told: Told,
) -> Force {
    let revision = before.revision + 1;
    let why = format!("{unusable_floor}; the last good registry holds as a whole");
    let bad: Vec<String> = unusable(registry, &compiled.findings, Some(&before))
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    let mut unclaimed = unread_folders(registry);
    unclaimed.extend(
        bad.iter()
            .filter(|id| !before.agents.contains_key(*id))
            .cloned(),
    );
    let untold = untold(unclaimed, Some(&before));
    let unregistered = pseudo(
        (*before.unregistered).clone(),
        stance.unregistered,
        &untold,
        &mut told,
    );
    let agents = before.agents.iter().map(|(id, known)| {
        let mut next = keep(known, &why, OnBadRegistry::Keep, revision);
        next.kept = Some(if known.torn {
            format!("{why}, but for this agent it is lost, so it is denied")
        } else {
            why.clone()
        });
        next = next.held(holds.get(id).cloned());
        (id.clone(), next.since(Some(known)))
    });
    Force {
        revision,
        agents: agents.collect(),
        unregistered: Arc::new(unregistered),
        findings: told.findings,
        files: registry.sources.len(),
        errors: told.errors,
        warnings: told.warnings,
        bad,
        lifted: Vec::new(),
        settled: Vec::new(),
        untold,
        fell_back: Some(why),
        complete: before.complete,
    }
}

/// The registry of the last time, as if it were in force.
fn remembered(last: &LastGood) -> Force {
    let agents = last.agents.iter().map(|(id, stored)| {
        let agent = InForce {
            torn: stored.torn.is_some(),
            ..InForce::new(Arc::clone(&stored.tables), stored.since)
        };
        (id.clone(), agent)
    });
    Force {
        revision: last.revision,
        agents: agents.collect(),
        unregistered: last
            .unregistered
            .clone()
            .unwrap_or_else(|| Arc::new(AgentTables::nobody())),
        findings: Vec::new(),
        files: 0,
        errors: 0,
        warnings: 0,
        bad: Vec::new(),
        lifted: Vec::new(),
        settled: Vec::new(),
        untold: BTreeSet::new(),
        fell_back: None,
        complete: last.complete,
    }
}

/// Findings, rendered and counted.
struct Told {
    findings: Vec<String>,
    errors: usize,
    warnings: usize,
}

impl Told {
    fn new(registry: &Registry, compiled: &Compilation) -> Self {
        let mut findings: Vec<String> = compiled.findings.iter().map(ToString::to_string).collect();
        let unread = registry.unread.iter();
        findings.extend(unread.map(|unread| format!("error: {unread}")));
        let errors = compiled.findings.iter().filter(|each| each.is_error());
        let errors = errors.count();
        Self {
            findings,
            errors: errors + registry.unread.len(),
            warnings: compiled.findings.len() - errors,
        }
    }
}

fn usable_floor(registry: &Registry, compiled: &Compilation) -> Result<(), Unusable> {
    if let Some(unread) = registry
        .unread
        .iter()
        .find(|unread| unread.kind == SourceKind::Floor)
    {
        return Err(Unusable::Floor(unread.to_string()));
    }
    let floors = registry
        .sources
        .iter()
        .filter(|source| source.kind == SourceKind::Floor);
    let broken = compiled.findings.iter().find(|finding| {
        finding.is_error() && floors.clone().any(|floor| floor.path == finding.file)
    });
    match broken {
        Some(finding) => Err(Unusable::Floor(finding.to_string())),
        None => Ok(()),
    }
}

/// The pseudo-agent as the settings want it. Monitoring lets through what nobody claims; where it
/// is not known what is claimed, that could be an agent's own.
fn pseudo(
    tables: AgentTables,
    wanted: Unregistered,
    untold: &BTreeSet<String>,
    told: &mut Told,
) -> AgentTables {
    let mode = match (wanted, untold.first()) {
        (Unregistered::Deny, _) => Mode::Enforce,
        (Unregistered::Monitor, None) => Mode::Monitor,
        (Unregistered::Monitor, Some(first)) => {
            told.findings.push(format!(
                "warning: unregistered processes are denied although `enforcement.unregistered` \
                 is \"monitor\": `{first}` cannot be used, nothing is known of before, and so \
                 they could be an agent's"
            ));
            told.warnings += 1;
            Mode::Enforce
        }
    };
    AgentTables { mode, ..tables }
}

/// Of what cannot be used and is not in force, what may have been in force before.
fn untold(unclaimed: Vec<String>, before: Option<&Force>) -> BTreeSet<String> {
    let unclaimed = unclaimed.into_iter();
    match before {
        Some(before) if before.complete => unclaimed
            .filter(|each| before.untold.contains(each))
            .collect(),
        Some(_) | None => unclaimed.collect(),
    }
}

fn unread_folders(registry: &Registry) -> Vec<String> {
    let unread = registry.unread.iter();
    unread
        .filter(|unread| unread.folder && unread.kind == SourceKind::Agent)
        .map(|unread| unread.path.display().to_string())
        .collect()
}

/// Agents whose files are there and cannot be used, with the reason.
fn unusable(
    registry: &Registry,
    findings: &[Finding],
    before: Option<&Force>,
) -> Vec<(String, String)> {
    let mut bad: BTreeMap<String, String> = BTreeMap::new();
    for finding in findings.iter().filter(|finding| finding.is_error()) {
        let why = format!(
            "{}:{}:{}: {}",
            finding.file.display(),
            finding.line,
            finding.col,
            finding.message
        );
        for id in &finding.agents {
            bad.entry(id.clone()).or_insert_with(|| why.clone());
        }
    }
    for unread in registry
        .unread
        .iter()
        .filter(|unread| unread.kind == SourceKind::Agent)
    {
        if unread.folder {
            let known = before.into_iter().flat_map(|before| before.agents.keys());
            for id in known {
                bad.entry(id.clone()).or_insert_with(|| unread.to_string());
            }
        } else if let Some(id) = stem(unread) {
            bad.entry(id).or_insert_with(|| unread.to_string());
        }
    }
    bad.into_iter().collect()
}

fn stem(unread: &Unread) -> Option<String> {
    Path::new(&unread.path)
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
}

impl Force {
    /// One agent with what holds for it laid over, as [`Self::put`] takes it. How many others there
    /// are makes no difference: a revocation waits for none of them.
    pub fn hold_one(&self, id: &str, holds: &Holds) -> Option<InForce> {
        let known = self.agents.get(id)?;
        let next = InForce {
            revision: self.revision + 1,
            ..known.clone()
        };
        Some(next.held(holds.get(id).cloned()).since(Some(known)))
    }

    /// Replaces one agent by what [`Self::hold_one`] made of it.
    pub fn put(&mut self, id: &str, agent: InForce) {
        self.revision = self.revision.max(agent.revision);
        self.agents.insert(id.to_owned(), agent);
        self.lifted.clear();
        self.settled.clear();
    }

    /// What of it goes into the store.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        self.agents.values().map(|agent| Record {
            tables: &agent.entry,
            torn: agent.torn,
        })
    }

    /// Everything in the kernel's terms.
    pub fn images(&self, clock: &Clock) -> Vec<Image> {
        std::iter::once(&self.unregistered)
            .chain(self.agents.values().map(|agent| &agent.tables))
            .map(|tables| image(tables, clock))
            .collect()
    }
}

/// One agent in the kernel's terms.
pub fn image(tables: &AgentTables, clock: &Clock) -> Image {
    let place = |placed: &Placed| -> (Prefix, Vec<agent_ebpf::abi::Rule>) {
        (
            placed.prefix,
            placed.rules.iter().map(|rule| clock.rule(rule)).collect(),
        )
    };
    Image {
        id: tables.id.clone(),
        row: policy::row(tables, 0, clock),
        reach: tables.scope.reach.iter().map(place).collect(),
        serve: tables.scope.serve.iter().map(place).collect(),
        leases: Vec::new(),
        fresh: false,
    }
}
