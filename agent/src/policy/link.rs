//! What concerns several files at once: ids, claims on cgroups, and sets.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    expand::Shelves,
    finding::{Finding, did_you_mean, quoted},
    model::{Grant, Target},
    name::Id,
    reader::At,
    selector::Selector,
    source::{SourceFile, Span},
};

/// An agent's file, as far as other files' agents are concerned.
#[derive(Debug)]
pub struct Neighbour<'a> {
    /// The file.
    pub file: &'a SourceFile<'a>,
    /// Its id and where it stands; none when it is wrong.
    pub id: Option<(Id, Span)>,
    /// Its claims.
    pub claims: &'a [At<Selector>],
    /// Whether nothing else is wrong with it. A file that is refused anyway takes nothing away
    /// from others.
    pub sound: bool,
}

/// A finding, and the index of the neighbour whose file it is about.
pub type Indexed = (usize, Finding);

/// Ids that two files have.
pub fn duplicate_ids(neighbours: &[Neighbour<'_>]) -> Vec<Indexed> {
    let mut by_id: BTreeMap<&Id, Vec<usize>> = BTreeMap::new();
    for (index, neighbour) in neighbours.iter().enumerate() {
        if let Some((id, _)) = &neighbour.id {
            by_id.entry(id).or_default().push(index);
        }
    }
    let mut findings = Vec::new();
    for (id, indices) in by_id.iter().filter(|(_, indices)| indices.len() > 1) {
        for &index in indices {
            let other = indices.iter().find(|other| **other != index);
            let other = other.and_then(|other| neighbours.get(*other));
            let Some((neighbour, other)) = neighbours.get(index).zip(other) else {
                continue;
            };
            let Some((_, span)) = &neighbour.id else {
                continue;
            };
            let message = format!(
                "two files say that they are the agent {}",
                quoted(id.as_str())
            );
            let help = format!("the other is {}: keep one of them", name(other.file));
            findings.push((
                index,
                Finding::error(neighbour.file, span, message).help(help),
            ));
        }
    }
    findings
}

/// Cgroups that two agents claim, or one inside the other's.
pub fn conflicting_claims(neighbours: &[Neighbour<'_>]) -> Vec<Indexed> {
    let claims: Vec<(usize, &At<Selector>)> = neighbours
        .iter()
        .enumerate()
        .flat_map(|(index, neighbour)| neighbour.claims.iter().map(move |claim| (index, claim)))
        .collect();
    // For each claim the first other that it meets.
    let mut met: BTreeMap<usize, usize> = BTreeMap::new();
    let mut meet = |left: usize, right: usize| {
        met.entry(left).or_insert(right);
        met.entry(right).or_insert(left);
    };
    // Plain paths meet along their ancestors only; globs are compared with everything.
    let mut plain: HashMap<&str, Vec<usize>> = HashMap::new();
    for (at, (_, claim)) in claims.iter().enumerate() {
        if !claim.value.is_pattern() {
            plain.entry(claim.value.as_str()).or_default().push(at);
        }
    }
    let foreign = |left: usize, right: usize| {
        let owner = |at: usize| claims.get(at).map(|(index, _)| *index);
        owner(left) != owner(right)
    };
    for (at, (_, claim)) in claims.iter().enumerate() {
        if claim.value.is_pattern() {
            for (other, (_, theirs)) in claims.iter().enumerate() {
                let later = other > at || !theirs.value.is_pattern();
                if later && foreign(at, other) && claim.value.overlaps(&theirs.value) {
                    meet(at, other);
                }
            }
            continue;
        }
        let path = claim.value.as_str();
        let ends = path
            .match_indices('/')
            .map(|(end, _)| end)
            .chain([path.len()]);
        for ancestor in ends.filter_map(|end| path.get(..end)) {
            for &other in plain.get(ancestor).into_iter().flatten() {
                if foreign(at, other) {
                    meet(at, other);
                }
            }
        }
    }
    let mut findings = Vec::new();
    for (at, other) in met {
        let pair = claims.get(at).zip(claims.get(other));
        let Some(((index, claim), (other, theirs))) = pair else {
            continue;
        };
        let Some((ours, other)) = neighbours.get(*index).zip(neighbours.get(*other)) else {
            continue;
        };
        if ours.sound && !other.sound {
            continue;
        }
        let whose = other
            .id
            .as_ref()
            .map_or_else(|| other.file.source.stem(), |(id, _)| id.to_string());
        let (line, _) = other.file.position(theirs.span.start);
        let (claim_text, theirs_text) = (claim.value.as_str(), theirs.value.as_str());
        let message = if claim_text == theirs_text {
            format!(
                "{} is claimed by the agent {} as well",
                quoted(claim_text),
                quoted(&whose)
            )
        } else {
            let (claim, theirs) = (quoted(claim_text), quoted(theirs_text));
            format!(
                "{claim} overlaps {theirs}, which the agent {} claims",
                quoted(&whose)
            )
        };
        let help = format!(
            "the other claim is {}:{line}: a cgroup and what is below it are one agent's",
            name(other.file)
        );
        findings.push((
            *index,
            Finding::error(ours.file, &claim.span, message).help(help),
        ));
    }
    findings
}

/// Sets that `grants` of `file` name and that do not exist.
pub fn missing_sets(
    file: &SourceFile<'_>,
    grants: &[Grant],
    shelves: &Shelves<'_>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for grant in grants {
        let Target::Set(wanted) = &grant.to else {
            continue;
        };
        if shelves.contains_key(wanted) {
            continue;
        }
        let known = shelves.keys().map(Id::as_str);
        let help = did_you_mean(wanted.as_str(), known).map_or_else(
            || format!("write the file {wanted}.toml in one of the sets' folders"),
            |nearest| format!("did you mean \"@{nearest}\"?"),
        );
        let message = format!("there is no set {}", quoted(wanted.as_str()));
        findings.push(Finding::error(file, &grant.span, message).help(help));
    }
    findings
}

/// For each grant of a name, or of a set with one, an error: nothing resolves it, for `why`.
pub fn names(
    file: &SourceFile<'_>,
    grants: &[Grant],
    shelves: &Shelves<'_>,
    why: &str,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is_name = |grant: &Grant| matches!(grant.to, Target::Name(_));
    for grant in grants {
        let message = match &grant.to {
            Target::Net(_) => continue,
            Target::Name(host) => {
                format!("{} is a name, and {why}", quoted(&host.to_string()))
            }
            Target::Set(set) => {
                let sets = included(std::slice::from_ref(grant), shelves);
                let mut members = sets.iter().filter_map(|set| shelves.get(set));
                let name = members.find_map(|shelf| shelf.allow.iter().find(|each| is_name(each)));
                let Some(name) = name else { continue };
                let (set, name) = (format!("@{set}"), name.to.to_string());
                format!(
                    "{} grants the name {}, and {why}",
                    quoted(&set),
                    quoted(&name)
                )
            }
        };
        let help = "only the DNS guard turns names into addresses: enable it, or name addresses";
        findings.push(Finding::error(file, &grant.span, message).help(help));
    }
    findings
}

/// For each set in `grants` that leads back to `set`, an error.
pub fn circles(
    file: &SourceFile<'_>,
    set: &Id,
    grants: &[Grant],
    shelves: &Shelves<'_>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for grant in grants {
        if let Target::Set(inner) = &grant.to
            && (inner == set || included(std::slice::from_ref(grant), shelves).contains(set))
        {
            let message = format!("the set {} includes itself", quoted(set.as_str()));
            let help = "a set may include others, but not in a circle: remove this entry";
            findings.push(Finding::error(file, &grant.span, message).help(help));
        }
    }
    findings
}

/// The sets that `grants` name, and those that these include, and so on.
pub fn included(grants: &[Grant], shelves: &Shelves<'_>) -> BTreeSet<Id> {
    let mut found = BTreeSet::new();
    let mut open: Vec<&Grant> = grants.iter().collect();
    while let Some(grant) = open.pop() {
        if let Target::Set(name) = &grant.to
            && found.insert(name.clone())
        {
            open.extend(shelves.get(name).map_or(&[][..], |shelf| shelf.allow));
        }
    }
    found
}

fn name(file: &SourceFile<'_>) -> String {
    file.source.path.display().to_string()
}
