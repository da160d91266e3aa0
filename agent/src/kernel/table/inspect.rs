//! What the maps say now against what this process put there.

use std::collections::{BTreeMap, HashMap};

use agent_ebpf::abi::{
    AgentName, AgentRow, Effect, INHERITED, Leaf, NEVER, NO_ENTRY, ROW_INDEX_BITS, Rule, RuleSet,
};

use super::{ApplyError, Installed, Place, Tables, adopt::id_of, name_bytes};
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

    /// Of one agent its word and row, and the epoch of attribution: read anew, in words; empty when
    /// all is as it was put there. Its rules are left out, which may be many.
    pub fn inspect_row(&self, agent: u32) -> Vec<String> {
        let mut wrong = Vec::new();
        let Some(installed) = self.in_force.get(&agent) else {
            return vec!["the agent is not in force".to_owned()];
        };
        match self.agents.get(agent).map(Option::unwrap_or_default) {
            Ok(word) if word == installed.word => {}
            Ok(word) => wrong.push(format!(
                "its word is {}, and must be {}",
                describe_word(word),
                describe_word(installed.word)
            )),
            Err(error) => wrong.push(format!("its word cannot be read: {error}")),
        }
        match installed.row.map(|row| self.rows.get(row)) {
            Some(Ok(Some(row))) if row == installed.content => {}
            Some(Ok(Some(row))) => wrong.push(format!(
                "its row is {}, and must be {}",
                describe_row(&row),
                describe_row(&installed.content)
            )),
            Some(Err(error)) => wrong.push(format!("its row cannot be read: {error}")),
            Some(Ok(None)) | None => wrong.push("it has no row".to_owned()),
        }
        match self.epoch.get(0).map(Option::unwrap_or_default) {
            Ok(epoch) if epoch == self.epoch_now => {}
            Ok(epoch) => wrong.push(format!(
                "the epoch of attribution is {epoch}, and must be {}",
                self.epoch_now
            )),
            Err(error) => wrong.push(format!("the epoch cannot be read: {error}")),
        }
        wrong
    }

    /// The agents in force that use each chain.
    pub(super) fn users_of_chains(&self) -> HashMap<u32, Vec<u32>> {
        let mut users: HashMap<u32, Vec<u32>> = HashMap::new();
        for (agent, installed) in &self.in_force {
            for (_, leaf) in installed.places() {
                let of = users.entry(leaf.set).or_default();
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

    fn unreadable(&mut self, map: &str, error: &std::io::Error) {
        self.add(
            DriftKind::Missing,
            map.to_owned(),
            None,
            (format!("cannot be read: {error}"), "to be read".to_owned()),
            Spot::Unreadable,
        );
    }

    fn words(&mut self) {
        let found = match self.tables.agents.all() {
            Ok(found) => found,
            Err(error) => return self.unreadable("agents", &error),
        };
        for (agent, found) in found {
            let installed = self.tables.in_force.get(&agent);
            let wanted = installed.map_or(0, |installed| installed.word);
            if found != wanted {
                self.add(
                    kind(found == 0, wanted == 0),
                    format!("agents [{agent}]"),
                    Some(agent),
                    (describe_word(found), describe_word(wanted)),
                    Spot::Word(agent),
                );
            }
        }
    }

    fn rows(&mut self) {
        let in_force = self.tables.in_force.iter();
        let wanted: Vec<(u32, u32, AgentRow)> = in_force
            .filter_map(|(agent, installed)| Some((*agent, installed.row?, installed.content)))
            .collect();
        let rows: Vec<u32> = wanted.iter().map(|(_, row, _)| *row).collect();
        let found = match self.tables.rows.get_all(&rows) {
            Ok(found) => found,
            Err(error) => return self.unreadable("rows", &error),
        };
        for ((agent, row, wanted), found) in wanted.into_iter().zip(found) {
            // An array has every element.
            let found = found.unwrap_or(AgentRow::zeroed());
            if found != wanted {
                self.add(
                    DriftKind::Changed,
                    format!("rows [{row}]"),
                    Some(agent),
                    (describe_row(&found), describe_row(&wanted)),
                    Spot::Row(agent),
                );
            }
        }
    }

    fn names(&mut self) {
        let found: Vec<(u32, AgentName)> = match self.tables.names.all() {
            Ok(found) => found,
            Err(error) => return self.unreadable("names", &error),
        };
        for (agent, found) in found {
            let id = self.tables.ids.get(&agent).map_or("", String::as_str);
            if found == name_bytes(id) {
                continue;
            }
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
    }

    fn keys(&mut self) {
        let found = match self.tables.read_places() {
            Ok(found) => found,
            Err(ApplyError::Read { map, source }) => return self.unreadable(map, &source),
            Err(error) => {
                let error = std::io::Error::other(error);
                return self.unreadable("exacts or prefixes", &error);
            }
        };
        let mut wanted: HashMap<Place, (Leaf, Option<u32>)> = HashMap::new();
        let mut policies: HashMap<u64, u32> = HashMap::new();
        let retired = self.tables.retired.iter().map(|(_, old)| (None, old));
        let in_force = self.tables.in_force.iter();
        let in_force = in_force.map(|(agent, installed)| (Some(*agent), installed));
        let all: Vec<(Option<u32>, &Installed)> = retired.chain(in_force).collect();
        for (agent, installed) in all {
            policies.extend(agent.map(|agent| (installed.content.policy, agent)));
            for (place, leaf) in installed.places() {
                wanted.insert(place, (leaf, agent));
            }
        }
        for (place, leaf) in found {
            let (kind, agent, wanted) = match wanted.remove(&place) {
                // What is on its way out is nobody's any more.
                Some((_, None)) => continue,
                Some((wanted, _)) if wanted == leaf => continue,
                Some((wanted, agent)) => (DriftKind::Changed, agent, describe_leaf(wanted)),
                None => {
                    let agent = policies.get(&place.policy()).copied();
                    (DriftKind::Extra, agent, "no such key".to_owned())
                }
            };
            let what = format!("{} {place}", place.map());
            let found = describe_leaf(leaf);
            self.add(
                kind,
                what,
                agent,
                (found, wanted),
                Spot::Key(SpotKey(place)),
            );
        }
        let missing: BTreeMap<String, (Place, Leaf, u32)> = wanted
            .into_iter()
            .filter_map(|(place, (leaf, agent))| {
                Some((format!("{} {place}", place.map()), (place, leaf, agent?)))
            })
            .collect();
        for (what, (place, leaf, agent)) in missing {
            let said = ("no such key".to_owned(), describe_leaf(leaf));
            let spot = Spot::Key(SpotKey(place));
            self.add(DriftKind::Missing, what, Some(agent), said, spot);
        }
    }

    fn chains(&mut self) {
        let sets = &self.tables.sets;
        let Some(last) = sets.last_block() else {
            return;
        };
        let mut wrong: BTreeMap<(u32, u32), (RuleSet, RuleSet)> = BTreeMap::new();
        let read = self.tables.rulesets.each_in(0, last, |index, found| {
            if let Some((head, wanted)) = sets.wanted(index)
                && found != wanted
            {
                wrong.insert((head, index), (found, wanted));
            }
        });
        if let Err(error) = read {
            return self.unreadable("rulesets", &error);
        }
        if wrong.is_empty() {
            return;
        }
        let users = self.tables.users_of_chains();
        for ((head, index), (found, wanted)) in wrong {
            // What is on its way out is nobody's any more.
            let Some(agents) = users.get(&head) else {
                continue;
            };
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
    }

    fn claims(&mut self) {
        let mut found: HashMap<u64, u32> = match self.tables.claims.all() {
            Ok(found) => found.into_iter().collect(),
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
        match self.tables.epoch.get(0) {
            Ok(found) if found == Some(self.tables.epoch_now) => {}
            Ok(found) => self.add(
                DriftKind::Changed,
                "epoch [0]".to_owned(),
                None,
                (
                    found.unwrap_or(0).to_string(),
                    self.tables.epoch_now.to_string(),
                ),
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

/// What a key points to, for people.
fn describe_leaf(leaf: Leaf) -> String {
    match leaf.entry {
        NO_ENTRY => format!("rule set [{}]", leaf.set),
        entry => format!("rule set [{}] for entry {entry}", leaf.set),
    }
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
    let entry = match rule.entry {
        INHERITED => "of the address".to_owned(),
        entry => entry.to_string(),
    };
    format!(
        "{effect} {}-{} class {} entry {entry}{end}",
        rule.low, rule.high, rule.class
    )
}
