//! The registry in force: what the files say now, and where they cannot be used, what they said
//! last. Pure but for its inputs; the kernel module makes it true.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use agent_ebpf::abi::{Mode, State};

use super::{
    registry::{Registry, Unread},
    settings::{OnBadRegistry, Unregistered},
};
use crate::{
    kernel::Image,
    policy::{self, AgentTables, Clock, Compilation, Finding, Placed, Prefix, SourceKind},
};

/// One agent in force.
#[derive(Clone, Debug)]
pub struct InForce {
    /// Its entry.
    pub tables: Arc<AgentTables>,
    /// Revision in which it last changed.
    pub revision: u64,
    /// Why this is not what its file says.
    pub kept: Option<String>,
}

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
}

/// Why a registry may not come into force at all.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The floor cannot be told, and a state without it would lack denials.
    #[error("the floor cannot be used: {0}")]
    Floor(String),
}

/// Puts together what shall be in force from what was read and compiled, and from what is in force
/// now. An agent whose file is bad keeps its last good entry, or is denied, as the settings say.
pub fn merge(
    registry: &Registry,
    compiled: Compilation,
    before: Option<&Force>,
    on_bad: OnBadRegistry,
    unregistered: Unregistered,
) -> Result<Force, Unusable> {
    if let Some(unread) = registry
        .unread
        .iter()
        .find(|unread| unread.kind == SourceKind::Floor)
    {
        return Err(Unusable::Floor(unread.to_string()));
    }
    let floors: Vec<&PathBuf> = registry
        .sources
        .iter()
        .filter(|source| source.kind == SourceKind::Floor)
        .map(|source| &source.path)
        .collect();
    let broken = compiled
        .findings
        .iter()
        .find(|finding| finding.is_error() && floors.contains(&&finding.file));
    if let Some(finding) = broken {
        return Err(Unusable::Floor(finding.to_string()));
    }

    let revision = before.map_or(1, |before| before.revision + 1);
    let mut agents = BTreeMap::new();
    for tables in compiled.agents {
        let known = before.and_then(|before| before.agents.get(&tables.id));
        let since = match known {
            Some(known) if *known.tables == tables && known.kept.is_none() => known.revision,
            Some(_) | None => revision,
        };
        let id = tables.id.clone();
        agents.insert(
            id,
            InForce {
                tables: Arc::new(tables),
                revision: since,
                kept: None,
            },
        );
    }
    let mut bad = Vec::new();
    for (id, why) in unusable(registry, &compiled.findings, before) {
        if agents.contains_key(&id) {
            continue;
        }
        if let Some(known) = before.and_then(|before| before.agents.get(&id)) {
            agents.insert(id.clone(), keep(known, why, on_bad, revision));
        }
        bad.push(id);
    }

    let mut pseudo = compiled.unregistered;
    pseudo.mode = match unregistered {
        Unregistered::Deny => Mode::Enforce,
        Unregistered::Monitor => Mode::Monitor,
    };
    let mut findings: Vec<String> = compiled.findings.iter().map(ToString::to_string).collect();
    findings.extend(
        registry
            .unread
            .iter()
            .map(|unread| format!("error: {unread}")),
    );
    let errors = compiled
        .findings
        .iter()
        .filter(|finding| finding.is_error())
        .count();
    Ok(Force {
        revision,
        agents,
        unregistered: Arc::new(pseudo),
        errors: errors + registry.unread.len(),
        warnings: compiled.findings.len() - errors,
        findings,
        files: registry.sources.len(),
        bad,
    })
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

fn keep(known: &InForce, why: String, on_bad: OnBadRegistry, revision: u64) -> InForce {
    match on_bad {
        OnBadRegistry::Keep => InForce {
            kept: Some(format!(
                "its file cannot be used, so the last good entry holds: {why}"
            )),
            ..known.clone()
        },
        OnBadRegistry::Deny => {
            let mut tables = (*known.tables).clone();
            // A draft reaches nothing, which is what the settings ask for here.
            tables.state = State::Draft;
            InForce {
                tables: Arc::new(tables),
                revision,
                kept: Some(format!("its file cannot be used, so it is denied: {why}")),
            }
        }
    }
}

impl Force {
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
    }
}
