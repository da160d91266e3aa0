//! What lowering shows to be wrong with a scope: grants that do nothing, addresses that need more
//! rules than fit.

use std::net::IpAddr;

use super::{
    assemble::RULES,
    expand::Flat,
    finding::{Finding, quoted},
    lower::Lowered,
    model::Scope,
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
    for opened in flat.opened.iter().filter(|opened| opened.whole) {
        let Some(grant) = scope.allow.get(opened.position) else {
            continue;
        };
        let range = opened.first as usize..opened.end as usize;
        let live = lowered.live.get(range.clone()).unwrap_or_default();
        if live.contains(&true) {
            continue;
        }
        let name = format!("`{prefix}allow[{}]`", grant.index);
        let blockers = lowered.blocked_by.get(range).unwrap_or_default();
        let blocker = blockers
            .iter()
            .flatten()
            .next()
            .and_then(|at| flat.entries.get(*at as usize));
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
        let help = if blocker.name.starts_with("floor.") {
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
