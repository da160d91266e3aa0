//! The pipeline: sources → documents → model → tables. Every file is taken as far as it goes, so
//! that one run shows all there is to mend.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    assemble::{self, RULES, Surroundings, hashes, state, unregistered, used_sets},
    dead::{dead_grants, overfull},
    document::{self, AgentDocument, FloorDocument, SetDocument},
    expand::{Flat, Shelf, Shelves},
    finding::Finding,
    link::{self, Neighbour},
    lower::{Lowered, lower},
    memo::{Known, Memory},
    model::{Agent, Grant, Scope, Set},
    name::Id,
    source::{Source, SourceFile, SourceKind, Span},
    tables::{AgentTables, UnixMillis},
    validate::{self, CheckedAgent},
};

/// What came of a registry.
#[derive(Clone, Debug)]
pub struct Compilation {
    /// The agents without errors, by id.
    pub agents: Vec<Arc<AgentTables>>,
    /// The checked entries of [`Self::agents`], in the same order: what the tables have no use for.
    pub registry: Vec<Agent>,
    /// For each of [`Self::agents`], in the same order, the hash that its approval covers: the
    /// entry and the sets it uses, without the floor, which is the host's.
    pub approvals: Vec<String>,
    /// The sets in use or not, without those that an earlier one of the same name hides.
    pub sets: Vec<Set>,
    /// The pseudo-agent: the floor and nothing else. Its mode is the caller's to set.
    pub unregistered: AgentTables,
    /// All findings, by file and place.
    pub findings: Vec<Finding>,
}

/// A set's file under way.
struct Drawer<'a> {
    file: &'a SourceFile<'a>,
    /// By its file's name, unless that is no name.
    name: Option<Id>,
    set: Option<Set>,
    allow: Vec<Grant>,
    findings: Vec<Finding>,
}

/// An agent's file under way.
struct Desk<'a> {
    file: &'a SourceFile<'a>,
    checked: CheckedAgent,
    id_span: Option<Span>,
    findings: Vec<Finding>,
    /// What came of the same file before; then only what concerns other files is looked at.
    known: Option<Arc<Known>>,
}

// === impl Compilation ===

impl Compilation {
    /// Whether any file has an error.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(Finding::is_error)
    }

    /// The tables of an agent.
    pub fn agent(&self, id: &str) -> Option<&AgentTables> {
        let found = self.agents.iter().find(|agent| agent.id == id);
        found.map(|agent| &**agent)
    }
}

/// Whether names lead anywhere on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// The DNS guard turns them into leases.
    Guarded,
    /// There is no guard, for this reason (`dns.enabled = false`). A grant of a name is an error
    /// then, since nothing would ever resolve it; a denial of one only has nothing to do.
    Unguarded(&'static str),
}

/// [`compile_on`] a host with the DNS guard.
pub fn compile(sources: &[Source], now: UnixMillis) -> Compilation {
    compile_on(sources, now, Names::Guarded)
}

/// Compiles a registry at the wall-clock time `now`. An agent is in the result only if its own
/// file and the sets that it uses have no error; a bad file takes no other agent away. A floor
/// with errors is an error, and the agents are compiled with what of it is readable.
pub fn compile_on(sources: &[Source], now: UnixMillis, names: Names) -> Compilation {
    Memory::default().compile(sources, now, names)
}

/// The same, with what `memory` has of the last time.
pub(super) fn compile_with(
    memory: &mut Memory,
    sources: &[Source],
    now: UnixMillis,
    names: Names,
) -> Compilation {
    let files: Vec<SourceFile<'_>> = sources.iter().map(SourceFile::new).collect();
    let of = |kind: SourceKind| files.iter().filter(move |file| file.source.kind == kind);

    let mut floor_findings = Vec::new();
    let mut floors: Vec<(&SourceFile<'_>, Vec<Grant>)> = Vec::new();
    for file in of(SourceKind::Floor) {
        let (document, mut notes) = document::parse(file, FloorDocument::read);
        floors.push((file, validate::floor(&document, &mut notes)));
        floor_findings.push(notes.findings);
    }
    let mut drawers: Vec<Drawer<'_>> = of(SourceKind::Set)
        .map(|file| read_set(file, now))
        .collect();
    let mut desks: Vec<Desk<'_>> = of(SourceKind::Agent)
        .map(|file| match memory.known(file.source, now) {
            Some(known) => recall_agent(file, known),
            None => read_agent(file, now),
        })
        .collect();

    if !memory.has_clean_sets() {
        check_sets(&mut drawers, &floors);
    }
    let clean = drawers.iter().all(|drawer| drawer.findings.is_empty());
    memory.sets_are_clean(clean);
    let mut surroundings = Surroundings {
        shelves: shelves(&drawers),
        floors: floors
            .iter()
            .map(|(file, grants)| (*file, grants.as_slice()))
            .collect(),
    };
    spread_breakage(&mut surroundings.shelves);
    for ((file, grants), findings) in floors.iter().zip(&mut floor_findings) {
        findings.extend(link::missing_sets(file, grants, &surroundings.shelves));
    }
    let lowered: Vec<Option<(Flat, Lowered, Lowered)>> = desks
        .iter_mut()
        .map(|desk| {
            if desk.known.is_some() {
                return None;
            }
            if let Names::Unguarded(why) = names {
                let allow = &desk.checked.scope.allow;
                let unguarded = link::names(desk.file, allow, &surroundings.shelves, why);
                desk.findings.extend(unguarded);
            }
            Some(lower_agent(desk, &surroundings))
        })
        .collect();
    check_neighbours(&mut desks);

    let mut compilation = Compilation {
        agents: Vec::new(),
        registry: Vec::new(),
        approvals: Vec::new(),
        sets: Vec::new(),
        unregistered: unregistered(&surroundings),
        findings: Vec::new(),
    };
    let mut users: BTreeMap<Id, Vec<String>> = BTreeMap::new();
    let mut done = Vec::new();
    for (desk, lowered) in desks.into_iter().zip(lowered) {
        let stem = desk.file.source.stem();
        let mut findings = desk.findings;
        document::without_consequences(&mut findings);
        let used = match &desk.known {
            Some(known) => known.used.clone(),
            None => used_sets(&desk.checked.scope, &surroundings.shelves),
        };
        let whole = used.iter().all(|name| {
            users.entry(name.clone()).or_default().push(stem.clone());
            surroundings
                .shelves
                .get(name)
                .is_some_and(|shelf| !shelf.broken)
        });
        let sound = whole && !findings.iter().any(Finding::is_error);
        if let Some(known) = desk.known.filter(|_| sound) {
            done.push(Arc::clone(&known));
            memory.keep(desk.file.source, known);
        } else if let Some((agent, (flat, reach, serve))) =
            desk.checked.agent.filter(|_| sound).zip(lowered)
        {
            let scope = &desk.checked.scope;
            let (approval, hash) = hashes(&agent, scope, &surroundings);
            let state = state(&agent, &approval, desk.file, &mut findings);
            let until = soonest(&agent, &flat, now);
            let tables = AgentTables {
                state,
                hash,
                ..assemble::tables(&agent, scope, desk.file, flat, reach, serve)
            };
            let known = Arc::new(Known {
                agent,
                tables: Arc::new(tables),
                approval,
                used,
                claims: desk.checked.claims,
                id_span: desk.id_span,
                until,
            });
            done.push(Arc::clone(&known));
            // A finding is told each time, so what has one is looked at each time.
            if findings.is_empty() {
                memory.keep(desk.file.source, known);
            }
        }
        compilation.keep(findings, &[stem]);
    }
    done.sort_by(|left, right| left.agent.id.cmp(&right.agent.id));
    for known in done {
        compilation.registry.push(known.agent.clone());
        compilation.agents.push(Arc::clone(&known.tables));
        compilation.approvals.push(known.approval.clone());
    }
    let mut taken = BTreeSet::new();
    for drawer in drawers {
        let first = drawer.name.filter(|name| taken.insert(name.clone()));
        compilation
            .sets
            .extend(drawer.set.filter(|_| first.is_some()));
        let users = first
            .and_then(|name| users.remove(&name))
            .unwrap_or_default();
        compilation.keep(drawer.findings, &users);
    }
    for mut findings in floor_findings {
        document::without_consequences(&mut findings);
        compilation.keep(findings, &[]);
    }
    compilation.findings.sort_by(|left, right| {
        let key = |each: &Finding| (each.span.start, each.severity, each.span.end);
        left.file
            .cmp(&right.file)
            .then_with(|| key(left).cmp(&key(right)))
    });
    compilation
}

impl Compilation {
    fn keep(&mut self, findings: Vec<Finding>, agents: &[String]) {
        let about = findings.into_iter().map(|finding| Finding {
            agents: agents.to_vec(),
            ..finding
        });
        self.findings.extend(about);
    }
}

fn read_set<'a>(file: &'a SourceFile<'a>, now: UnixMillis) -> Drawer<'a> {
    let (document, mut notes) = document::parse(file, SetDocument::read);
    let stem = file.source.stem();
    let (set, allow) = validate::set(&document, &stem, now, &mut notes);
    Drawer {
        file,
        name: stem.parse().ok(),
        set,
        allow,
        findings: notes.findings,
    }
}

fn read_agent<'a>(file: &'a SourceFile<'a>, now: UnixMillis) -> Desk<'a> {
    let (document, mut notes) = document::parse(file, AgentDocument::read);
    let checked = validate::agent(&document, &file.source.stem(), now, &mut notes);
    let id_span = document.id.map(|id| id.span);
    Desk {
        file,
        checked,
        id_span,
        findings: notes.findings,
        known: None,
    }
}

/// A file that is as it was.
fn recall_agent<'a>(file: &'a SourceFile<'a>, known: Arc<Known>) -> Desk<'a> {
    Desk {
        file,
        checked: CheckedAgent {
            agent: Some(known.agent.clone()),
            claims: known.claims.clone(),
            scope: Scope::default(),
        },
        id_span: known.id_span.clone(),
        findings: Vec::new(),
        known: Some(known),
    }
}

/// When the first of an agent's times is that makes a difference to what is found, after `now`.
fn soonest(agent: &Agent, flat: &Flat, now: UnixMillis) -> Option<UnixMillis> {
    let grants = flat.expires.iter().copied().flatten();
    grants
        .chain(agent.lifecycle.expires)
        .filter(|expires| *expires > now)
        .min()
}

/// The first of each name.
fn shelves<'a>(drawers: &'a [Drawer<'a>]) -> Shelves<'a> {
    let mut shelves = Shelves::new();
    for drawer in drawers {
        if let Some(name) = &drawer.name {
            let broken = drawer.findings.iter().any(Finding::is_error);
            let shelf = Shelf {
                file: drawer.file,
                allow: &drawer.allow,
                broken,
            };
            shelves.entry(name.clone()).or_insert(shelf);
        }
    }
    shelves
}

/// A set is broken too if one that it includes is.
fn spread_breakage(shelves: &mut Shelves<'_>) {
    let broken =
        |name: &Id, shelves: &Shelves<'_>| shelves.get(name).is_none_or(|shelf| shelf.broken);
    let affected: Vec<Id> = shelves
        .iter()
        .filter(|(_, shelf)| {
            link::included(shelf.allow, shelves)
                .iter()
                .any(|inner| broken(inner, shelves))
        })
        .map(|(name, _)| name.clone())
        .collect();
    for name in affected {
        if let Some(shelf) = shelves.get_mut(&name) {
            shelf.broken = true;
        }
    }
}

/// What is wrong with sets besides their own text.
fn check_sets(drawers: &mut [Drawer<'_>], floors: &[(&SourceFile<'_>, Vec<Grant>)]) {
    let found: Vec<Vec<Finding>> = {
        let shelves = shelves(drawers);
        let floors: Vec<_> = floors
            .iter()
            .map(|(file, grants)| (*file, grants.as_slice()))
            .collect();
        let check = |drawer: &Drawer<'_>| {
            let mut findings = link::missing_sets(drawer.file, &drawer.allow, &shelves);
            if let Some(name) = &drawer.name {
                findings.extend(link::circles(drawer.file, name, &drawer.allow, &shelves));
            }
            let scope = Scope {
                allow: drawer.allow.clone(),
                ..Scope::default()
            };
            let flat = Flat::new(drawer.file, "", &scope, &shelves, &floors);
            let lowered = lower(&flat.reach, &flat.expires, RULES);
            findings.extend(dead_grants(drawer.file, "", &scope, &flat, &lowered));
            findings
        };
        drawers.iter().map(check).collect()
    };
    for (drawer, found) in drawers.iter_mut().zip(found) {
        drawer.findings.extend(found);
        document::without_consequences(&mut drawer.findings);
    }
}

/// What is wrong between agents.
fn check_neighbours(desks: &mut [Desk<'_>]) {
    let found: Vec<link::Indexed> = {
        let neighbours: Vec<Neighbour<'_>> = desks
            .iter()
            .map(|desk| Neighbour {
                file: desk.file,
                id: desk
                    .checked
                    .agent
                    .as_ref()
                    .map(|agent| agent.id.clone())
                    .zip(desk.id_span.clone()),
                claims: &desk.checked.claims,
                sound: !desk.findings.iter().any(Finding::is_error),
            })
            .collect();
        let mut found = link::duplicate_ids(&neighbours);
        found.extend(link::conflicting_claims(&neighbours));
        found
    };
    for (index, finding) in found {
        if let Some(desk) = desks.get_mut(index) {
            desk.findings.push(finding);
        }
    }
}

/// Lowers an agent's scope, also of a file with errors: what can be said about it is said.
fn lower_agent(desk: &mut Desk<'_>, around: &Surroundings<'_>) -> (Flat, Lowered, Lowered) {
    let scope = &desk.checked.scope;
    for grants in [&scope.allow, &scope.deny] {
        desk.findings
            .extend(link::missing_sets(desk.file, grants, &around.shelves));
    }
    let flat = Flat::new(desk.file, "scope.", scope, &around.shelves, &around.floors);
    let reach = lower(&flat.reach, &flat.expires, RULES);
    let serve = lower(&flat.serve, &flat.expires, RULES);
    desk.findings
        .extend(dead_grants(desk.file, "scope.", scope, &flat, &reach));
    for lowered in [&reach, &serve] {
        desk.findings.extend(overfull(desk.file, &flat, lowered));
    }
    (flat, reach, serve)
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::State;

    use super::*;

    const NOW: UnixMillis = 1_790_812_800_000;

    fn source(path: &str, kind: SourceKind, text: impl Into<String>) -> Source {
        Source {
            path: path.into(),
            text: text.into(),
            kind,
        }
    }

    fn agent(id: &str, lifecycle: &str, scope: &str) -> Source {
        let text = format!(
            "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
             approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n{lifecycle}\n[selector]\n\
             cgroup = [\"/r/{id}\"]\n{scope}"
        );
        source(&format!("{id}.toml"), SourceKind::Agent, text)
    }

    fn set(folder: &str, name: &str, to: &str) -> Source {
        let text = format!(
            "schema = 1\n[set]\nname = \"{name}\"\n[[allow]]\nto = \"{to}\"\nports = [443]\n"
        );
        source(&format!("{folder}/{name}.toml"), SourceKind::Set, text)
    }

    const USE: &str = "[[scope.allow]]\nto = \"@s\"\nports = [443]\n";

    fn ids(compilation: &Compilation) -> Vec<&str> {
        compilation
            .agents
            .iter()
            .map(|agent| agent.id.as_str())
            .collect()
    }

    #[test]
    fn a_bad_set_takes_away_only_those_that_use_it() {
        let sources = [
            agent("uses", "", USE),
            agent("not", "", ""),
            set("sets", "s", "10.0.0.1/8"),
        ];
        let compilation = compile(&sources, NOW);
        assert_eq!(ids(&compilation), ["not"]);
        assert_eq!(compilation.findings.len(), 1);
        assert_eq!(compilation.findings[0].agents, ["uses"]);
    }

    #[test]
    fn a_set_is_bad_if_one_that_it_includes_is() {
        let sources = [
            agent("uses", "", USE),
            set("sets", "s", "@inner"),
            set("sets", "inner", "no name"),
        ];
        assert!(ids(&compile(&sources, NOW)).is_empty());
    }

    #[test]
    fn the_first_set_of_a_name_counts_even_if_it_is_bad() {
        let good = [
            agent("a", "", USE),
            set("etc", "s", "10.0.0.1"),
            set("usr", "s", "10.0.0.1/8"),
        ];
        let compilation = compile(&good, NOW);
        assert_eq!(ids(&compilation), ["a"]);
        assert_eq!(
            compilation.agents[0].entries[0].text,
            "10.0.0.1 443/tcp via scope.allow[0]"
        );
        let [agent, first, second] = good;
        assert!(ids(&compile(&[agent, second, first], NOW)).is_empty());
    }

    #[test]
    fn a_bad_floor_leaves_the_agents_and_what_of_it_is_readable() {
        let floor = "schema = 1\n[[deny]]\nto = \"no name\"\n[[deny]]\nto = \"10.9.9.9\"\n";
        let sources = [
            agent("a", "", ""),
            source("floor.toml", SourceKind::Floor, floor),
        ];
        let compilation = compile(&sources, NOW);
        assert!(compilation.has_errors());
        let names = |tables: &AgentTables| {
            tables
                .entries
                .iter()
                .map(|entry| entry.name.clone())
                .collect::<Vec<_>>()
        };
        assert!(names(&compilation.agents[0]).contains(&"floor.deny[1]".into()));
        assert!(names(&compilation.unregistered).contains(&"floor.builtin[0]".into()));
    }

    #[test]
    fn an_approved_entry_is_active_until_it_or_a_set_changes() {
        let plain = [agent("a", "", USE), set("sets", "s", "10.0.0.0/8")];
        let approval = compile(&plain, NOW).approvals[0].clone();
        let approved = format!("approved_hash = \"{approval}\"");
        let state = |sources: &[Source]| compile(sources, NOW).agents[0].state;
        let entry = agent("a", &approved, USE);
        assert_eq!(
            state(&[entry.clone(), set("sets", "s", "10.0.0.0/8")]),
            State::Active
        );
        assert_eq!(
            state(&[entry.clone(), set("sets", "s", "0.0.0.0/0")]),
            State::Draft
        );
        let wider = format!("{USE}[[scope.allow]]\nto = \"192.0.2.1\"\nports = [1]\n");
        let changed = agent("a", &approved, &wider);
        assert_eq!(
            state(&[changed, set("sets", "s", "10.0.0.0/8")]),
            State::Draft
        );
        let floor = source(
            "floor.toml",
            SourceKind::Floor,
            "schema = 1\n[[deny]]\nto = \"10.9.9.9\"\n",
        );
        assert_eq!(
            state(&[entry, set("sets", "s", "10.0.0.0/8"), floor]),
            State::Active
        );
    }

    #[test]
    fn the_hash_is_of_what_is_said_and_not_of_how() {
        let hash = |sources: &[Source]| compile(sources, NOW).agents[0].hash.clone();
        let plain = agent("a", "", USE);
        let set_file = set("sets", "s", "10.0.0.0/8");
        let mut commented = plain.clone();
        commented.text = format!(
            "# a comment\n\n{}",
            commented.text.replace("[443]", "[ \"443/tcp\" ]")
        );
        let before = hash(&[plain.clone(), set_file.clone()]);
        assert_eq!(before, hash(&[commented, set_file.clone()]));
        assert_ne!(
            before,
            hash(&[plain.clone(), set("sets", "s", "10.0.0.0/9")])
        );
        let floor = source(
            "floor.toml",
            SourceKind::Floor,
            "schema = 1\n[[deny]]\nto = \"10.9.9.9\"\n",
        );
        assert_ne!(before, hash(&[plain, set_file, floor]));
    }

    #[test]
    fn a_claim_conflict_spares_an_agent_if_the_other_file_is_bad_anyway() {
        let mut bad = agent("b", "", "");
        bad.text = bad
            .text
            .replace("/r/b", "/r/a/below")
            .replace("owner", "ovner");
        let compilation = compile(&[agent("a", "", ""), bad], NOW);
        assert_eq!(ids(&compilation), ["a"]);
        let claims = |each: &&Finding| each.message.contains("claims");
        assert_eq!(compilation.findings.iter().filter(claims).count(), 1);
    }

    #[test]
    fn what_an_entry_includes_sets_the_sockets_it_has_a_use_for() {
        use agent_ebpf::abi::{SOCKETS_ANY, SOCKETS_ICMP};
        let sockets = |ports: &str| {
            let scope = format!("[[scope.allow]]\nto = \"10.0.0.1\"\nports = [{ports}]\n");
            compile(&[agent("a", "", &scope)], NOW).agents[0].sockets
        };
        assert_eq!(sockets("443"), 0);
        assert_eq!(sockets("443, \"icmp\""), SOCKETS_ICMP);
        assert_eq!(sockets("\"any\""), SOCKETS_ICMP | SOCKETS_ANY);
    }

    #[test]
    fn without_the_guard_a_grant_of_a_name_is_an_error_and_a_denial_is_not() {
        let grant = "[[scope.allow]]\nto = \"api.example\"\nports = [443]\n";
        let deny = "[[scope.deny]]\nto = \"api.example\"\n";
        let sources = [
            agent("grants", "", grant),
            agent("uses", "", USE),
            agent("denies", "", deny),
            set("sets", "s", "@inner"),
            set("sets", "inner", "www.example"),
        ];
        assert_eq!(ids(&compile(&sources, NOW)), ["denies", "grants", "uses"]);
        let compilation = compile_on(&sources, NOW, Names::Unguarded("there is no guard"));
        assert_eq!(ids(&compilation), ["denies"]);
        let messages: Vec<&str> = compilation
            .findings
            .iter()
            .map(|finding| finding.message.as_str())
            .collect();
        assert_eq!(
            messages,
            [
                "`api.example` is a name, and there is no guard",
                "`@s` grants the name `www.example`, and there is no guard",
            ]
        );
    }

    #[test]
    fn the_hash_covers_names_and_where_they_may_lead() {
        let hash = |scope: &str| {
            let compilation = compile(&[agent("a", "", scope)], NOW);
            compilation.agents[0].hash.clone()
        };
        let grant = |to: &str, within: &str| {
            format!("[[scope.allow]]\nto = \"{to}\"\nports = [443]\nwithin = [{within}]\n")
        };
        let hashes = [
            hash(&grant("a.example", "")),
            hash(&grant("*.a.example", "")),
            hash(&grant("**.a.example", "")),
            hash(&grant("a.example", "\"10.0.0.0/8\"")),
            hash(&grant("a.example", "\"10.0.0.0/9\"")),
        ];
        let distinct: BTreeSet<&String> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
        assert_eq!(hash(&grant("A.Example.", "")), hashes[0]);
    }
}
