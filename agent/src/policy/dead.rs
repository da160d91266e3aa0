//! What lowering shows to be wrong with a scope: grants that do nothing, addresses that need more
//! rules than fit.

use std::{collections::HashMap, net::IpAddr};

use agent_ebpf::abi::Effect;

use super::{
    assemble::RULES,
    expand::{Flat, Role},
    finding::{Finding, quoted},
    lower::Lowered,
    model::{Grant, Scope, Target},
    names::{self, NameRule},
    net::Ports,
    reader::Notes,
    source::SourceFile,
    tables::Prefix,
};

/// Entries that a message names at most.
const NAMED: usize = 8;

/// Grants of which nothing takes effect.
pub(super) fn dead_grants(
    file: &SourceFile<'_>,
    prefix: &str,
    scope: &Scope,
    flat: &Flat,
    lowered: &Lowered,
) -> Vec<Finding> {
    let mut notes = Notes::new(file);
    let names = stopped_names(flat);
    for opened in flat.opened.iter().filter(|opened| opened.whole) {
        let Some(grant) = scope.allow.get(opened.position) else {
            continue;
        };
        within_floor(grant, flat, &mut notes);
        let range = opened.first as usize..opened.end as usize;
        let live = lowered.live.get(range.clone()).unwrap_or_default();
        let mut entries = opened.first..opened.end;
        if live.contains(&true) || entries.any(|entry| names.get(&entry) == Some(&None)) {
            continue;
        }
        let name = format!("`{prefix}allow[{}]`", grant.index);
        let blockers = lowered.blocked_by.get(range).unwrap_or_default();
        let entries = opened.first..opened.end;
        let blocker = blockers
            .iter()
            .flatten()
            .copied()
            .chain(entries.filter_map(|entry| names.get(&entry).copied().flatten()))
            .next()
            .and_then(|at| flat.entries.get(at as usize));
        let Some(blocker) = blocker else {
            let message = format!("{name} can never take effect: it shares no port with the set");
            notes.error(
                &grant.span,
                message,
                "a set grants its own ports at most: see its file",
            );
            continue;
        };
        let message = format!(
            "{name} can never take effect: it lies inside `{}` ({})",
            blocker.name, blocker.text
        );
        let place = if blocker.file.is_empty() {
            String::new()
        } else {
            format!(" ({}:{})", blocker.file, blocker.line)
        };
        let named = matches!(grant.to, Target::Name(_));
        let help = if blocker.name.starts_with("floor.") && named {
            "no grant of a name overrides the floor: remove the entry".to_owned()
        } else if blocker.name.starts_with("floor.") {
            "the floor gives way to a grant of an exact address only: name the address, or remove \
             the entry"
                .to_owned()
        } else {
            format!(
                "denials beat grants: remove the entry, or narrow `{}`{place}",
                blocker.name
            )
        };
        notes.error(&grant.span, message, help);
    }
    notes.findings
}

/// Every grant of a name by its entry, with the entry of the denial that takes all of it.
fn stopped_names(flat: &Flat) -> HashMap<u32, Option<u32>> {
    let (grants, denials): (Vec<&NameRule>, Vec<&NameRule>) = flat
        .names
        .iter()
        .partition(|rule| rule.effect == Effect::Allow);
    grants
        .into_iter()
        .map(|grant| (grant.entry, names::stopped_by(grant, &denials)))
        .collect()
}

/// Limits of a name's addresses where no name ever leads.
fn within_floor(grant: &Grant, flat: &Flat, notes: &mut Notes<'_>) {
    for limit in &grant.within {
        let wanted = limit.value.prefix();
        let floor = flat.reach.iter().find(|item| {
            item.role == Role::Floor
                && item.ports == Ports::all()
                && item.prefix.len <= wanted.len
                && item.prefix.contains(&wanted.addr)
        });
        let Some(entry) = floor.and_then(|item| flat.entries.get(item.entry as usize)) else {
            continue;
        };
        let message = format!(
            "{} lies inside `{}` ({}), where no name leads",
            quoted(&limit.value.to_string()),
            entry.name,
            entry.text
        );
        let help = "remove it; only an entry that names the address itself reaches there";
        notes.error(&limit.span, message, help);
    }
}

/// The first prefix with more rules than the kernel's tables take.
pub(super) fn overfull(file: &SourceFile<'_>, flat: &Flat, lowered: &Lowered) -> Option<Finding> {
    let (prefix, count, entries) = lowered.overfull.first()?;
    let names = entries
        .iter()
        .filter_map(|at| flat.entries.get(*at as usize));
    let names: Vec<String> = names.map(|entry| format!("`{}`", entry.name)).collect();
    let more = names.len().saturating_sub(NAMED);
    let shown = names
        .iter()
        .take(NAMED)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let tail = if more == 0 {
        String::new()
    } else {
        format!(" and {more} more")
    };
    let spans = entries
        .iter()
        .filter_map(|at| flat.spans.get(*at as usize).cloned().flatten());
    let span = spans.min_by_key(|span| span.start).unwrap_or(0..0);
    let message = format!(
        "{} needs {count} port rules, more than {RULES}, from {shown}{tail}",
        quoted(&show(prefix))
    );
    let help = "join neighbouring ports into ranges, or grant \"any/tcp\" there";
    Some(Finding::error(file, &span, message).help(help))
}

/// A prefix as people write it.
fn show(prefix: &Prefix) -> String {
    let mapped = prefix.addr.is_v4() && prefix.len >= 96;
    let len = if mapped { prefix.len - 96 } else { prefix.len };
    format!("{}/{len}", IpAddr::from(prefix.addr))
}
