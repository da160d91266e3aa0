//! What the maps say now against what this process put there.

use std::collections::{BTreeMap, HashMap};

use agent_ebpf::abi::{Effect, NEVER, ROW_INDEX_BITS, Rule, RuleSet};

use super::{Installed, Place, Tables, adopt::id_of, name_bytes};
use crate::kernel::{
    drift::{Drift, DriftKind, Target},
    image::describe_row,
};

/// A place in the maps, for the repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// An agent's word.
    Word(u32),
    /// An agent's row.
    Row(u32),
    /// An agent's name.
    Name(u32),
    /// A key of the scope maps.
    Key(SpotKey),
    /// The chain of rule sets with this head.
    Chain(u32),
    /// A cgroup's claim.
    Claim(u64),
    /// The attribution epoch.
    Epoch,
    /// A map that cannot be read.
    Unreadable,
}

/// A key of the scope maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpotKey(pub(super) Place);

/// Collects differences.
struct Report<'a> {
    tables: &'a Tables,
    drifts: Vec<Drift>,
}

impl Tables {
    /// How many entries [`Self::inspect`] compares: of each agent its word, row and name, each
    /// address, and each attribution.
    pub fn compared(&self) -> usize {
        let places: usize = self
            .in_force
            .values()
            .map(|installed| 3 + installed.places().count())
            .sum();
        places + self.attributed.len()
    }

    /// Reads every policy map anew and compares it with what this process believes is in force.
    pub fn inspect(&self) -> Vec<Drift> {
        let mut report = Report {
            tables: self,
            drifts: Vec::new(),
        };
        report.words();
        report.rows();
        report.names();
        report.keys();
        report.chains();
        report.claims();
        report.drifts
    }

    /// The agents in force that use each chain.
    pub(super) fn users_of_chains(&self) -> HashMap<u32, Vec<u32>> {
        let mut users: HashMap<u32, Vec<u32>> = HashMap::new();
        for (agent, installed) in &self.in_force {
            for (_, set) in installed.places() {
                let of = users.entry(set).or_default();
                if of.last() != Some(agent) {
                    of.push(*agent);
                }
            }
        }
        users
    }
}

impl Report<'_> {
    fn add(
        &mut self,
        kind: DriftKind,
        what: String,
        agent: Option<u32>,
        (found, wanted): (String, String),
        spot: Spot,
    ) {
        let agent = agent.map(|agent| match self.tables.ids.get(&agent) {
            Some(id) => id.clone(),
            None => format!("agent {agent}"),
        });
        self.drifts.push(Drift {
            kind,
            what,
            agent,
            found,
            wanted,
            target: Target::Table(spot),
        });
    }

    fn unreadable(&mut self, map: &str, error: &aya::maps::MapError) {
        self.add(
            DriftKind::Missing,
            map.to_owned(),
            None,
            (format!("cannot be read: {error}"), "to be read".to_owned()),
            Spot::Unreadable,
        );
    }

    fn words(&mut self) {
        for agent in 0..self.tables.agents.len() {
            let wanted = self
                .tables
                .in_force
                .get(&agent)
                .map_or(0, |installed| installed.word);
            match self.tables.agents.get(&agent, 0) {
                Ok(found) if found == wanted => {}
                Ok(found) => self.add(
                    kind(found == 0, wanted == 0),
                    format!("agents [{agent}]"),
                    Some(agent),
                    (describe_word(found), describe_word(wanted)),
                    Spot::Word(agent),
                ),
                Err(error) => return self.unreadable("agents", &error),
            }
        }
    }

    fn rows(&mut self) {
        for (agent, installed) in &self.tables.in_force {
            let Some(row) = installed.row else { continue };
            match self.tables.rows.get(&row, 0) {
                Ok(found) if found == installed.content => {}
                Ok(found) => self.add(
                    DriftKind::Changed,
                    format!("rows [{row}]"),
                    Some(*agent),
                    (describe_row(&found), describe_row(&installed.content)),
                    Spot::Row(*agent),
                ),
                Err(error) => return self.unreadable("rows", &error),
            }
        }
    }

    fn names(&mut self) {
        for agent in 0..self.tables.names.len() {
            let id = self.tables.ids.get(&agent).map_or("", String::as_str);
            match self.tables.names.get(&agent, 0) {
                Ok(found) if found == name_bytes(id) => {}
                Ok(found) => {
                    let empty = found.bytes.iter().all(|byte| *byte == 0);
                    let found = id_of(&found).unwrap_or_else(|| {
                        String::from_utf8_lossy(&found.bytes)
                            .escape_debug()
                            .to_string()
                    });
                    self.add(
                        kind(empty, id.is_empty()),
                        format!("names [{agent}]"),
                        Some(agent),
                        (format!("\"{found}\""), format!("\"{id}\"")),
                        Spot::Name(agent),
                    );
                }
                Err(error) => return self.unreadable("names", &error),
            }
        }
    }

    fn keys(&mut self) {
        let found = match self.tables.read_places() {
            Ok(found) => found,
            Err(error) => return self.unreadable("exacts or prefixes", &error),
        };
        let mut wanted: HashMap<Place, (u32, Option<u32>)> = HashMap::new();
        let mut policies: HashMap<u64, u32> = HashMap::new();
        let retired = self.tables.retired.iter().map(|(_, old)| (None, old));
        let in_force = self.tables.in_force.iter();
        let in_force = in_force.map(|(agent, installed)| (Some(*agent), installed));
        let all: Vec<(Option<u32>, &Installed)> = retired.chain(in_force).collect();
        for (agent, installed) in all {
            policies.extend(agent.map(|agent| (installed.content.policy, agent)));
            for (place, set) in installed.places() {
                wanted.insert(place, (set, agent));
            }
        }
        for (place, set) in found {
            let (kind, agent, wanted) = match wanted.remove(&place) {
                // What is on its way out is nobody's any more.
                Some((_, None)) => continue,
                Some((wanted, _)) if wanted == set => continue,
                Some((wanted, agent)) => {
                    (DriftKind::Changed, agent, format!("rule set [{wanted}]"))
                }
                None => {
                    let agent = policies.get(&place.policy()).copied();
                    (DriftKind::Extra, agent, "no such key".to_owned())
                }
            };
            let what = format!("{} {place}", place.map());
            let found = format!("rule set [{set}]");
            self.add(
                kind,
                what,
                agent,
                (found, wanted),
                Spot::Key(SpotKey(place)),
            );
        }
        let missing: BTreeMap<String, (Place, u32, u32)> = wanted
            .into_iter()
            .filter_map(|(place, (set, agent))| {
                Some((format!("{} {place}", place.map()), (place, set, agent?)))
            })
            .collect();
        for (what, (place, set, agent)) in missing {
            let said = ("no such key".to_owned(), format!("rule set [{set}]"));
            let spot = Spot::Key(SpotKey(place));
            self.add(DriftKind::Missing, what, Some(agent), said, spot);
        }
    }

    fn chains(&mut self) {
        let users = self.tables.users_of_chains();
        let mut all: Vec<(u32, Vec<(u32, RuleSet)>)> = self.tables.sets.wanted().collect();
        all.sort_unstable_by_key(|(head, _)| *head);
        for (head, blocks) in all {
            let Some(agents) = users.get(&head) else {
                continue;
            };
            for (index, wanted) in blocks {
                match self.tables.rulesets.get(&index, 0) {
                    Ok(found) if found == wanted => {}
                    Ok(found) => {
                        let (what, agent) = match agents.as_slice() {
                            [one] => (format!("rulesets [{index}]"), Some(*one)),
                            many => (format!("rulesets [{index}] of {} agents", many.len()), None),
                        };
                        self.add(
                            DriftKind::Changed,
                            what,
                            agent,
                            (describe_set(&found), describe_set(&wanted)),
                            Spot::Chain(head),
                        );
                    }
                    Err(error) => return self.unreadable("rulesets", &error),
                }
            }
        }
    }

    fn claims(&mut self) {
        let found: Result<HashMap<u64, u32>, _> = self.tables.claims.iter().collect();
        let mut found = match found {
            Ok(found) => found,
            Err(error) => return self.unreadable("claims", &error),
        };
        let whose = |agent: Option<u32>| match agent {
            None => "nobody's".to_owned(),
            Some(agent) => match self.tables.ids.get(&agent) {
                Some(id) => format!("agent {agent} ({id})"),
                None => format!("agent {agent}"),
            },
        };
        let mut wrong = Vec::new();
        for (cgroup, wanted) in &self.tables.attributed {
            let found = found.remove(cgroup);
            if found != Some(*wanted) {
                wrong.push((*cgroup, found, Some(*wanted)));
            }
        }
        wrong.extend(
            found
                .iter()
                .map(|(cgroup, agent)| (*cgroup, Some(*agent), None)),
        );
        wrong.sort_unstable();
        for (cgroup, found, wanted) in wrong {
            self.add(
                kind(found.is_none(), wanted.is_none()),
                format!("claims cgroup {cgroup}"),
                wanted.or(found),
                (whose(found), whose(wanted)),
                Spot::Claim(cgroup),
            );
        }
        match self.tables.epoch.get(&0, 0) {
            Ok(found) if found == self.tables.epoch_now => {}
            Ok(found) => self.add(
                DriftKind::Changed,
                "epoch [0]".to_owned(),
                None,
                (found.to_string(), self.tables.epoch_now.to_string()),
                Spot::Epoch,
            ),
            Err(error) => self.unreadable("epoch", &error),
        }
    }
}

fn kind(is_missing: bool, is_extra: bool) -> DriftKind {
    match (is_missing, is_extra) {
        (true, _) => DriftKind::Missing,
        (false, true) => DriftKind::Extra,
        (false, false) => DriftKind::Changed,
    }
}

fn describe_word(word: u64) -> String {
    if word == 0 {
        return "none".to_owned();
    }
    let row = word & ((1 << ROW_INDEX_BITS) - 1);
    format!("row {row}, generation {}", word >> ROW_INDEX_BITS)
}

/// A block for people. Every byte may be anything.
fn describe_set(set: &RuleSet) -> String {
    let is_used = |rule: &&Rule| **rule != Rule::UNUSED;
    let mut rules: Vec<String> = set
        .rules
        .iter()
        .filter(is_used)
        .map(describe_rule)
        .collect();
    if rules.is_empty() {
        rules.push("no rules".to_owned());
    }
    if set.next != 0 {
        rules.push(format!("then [{}]", set.next - 1));
    }
    rules.join("; ")
}

fn describe_rule(rule: &Rule) -> String {
    let effect = match Effect::from_byte(rule.effect) {
        Some(effect) => effect.name().to_owned(),
        None => format!("effect {}", rule.effect),
    };
    let end = if rule.deadline == NEVER {
        String::new()
    } else {
        format!(" until boot + {} s", rule.deadline / 1_000_000_000)
    };
    format!(
        "{effect} {}-{} class {} entry {}{end}",
        rule.low, rule.high, rule.class, rule.entry
    )
}
