//! Documents into the model, with every mistake of a file and not the first. What concerns several
//! files at once is in `link`.

use agent_ebpf::abi::{Loopback, Mode, State};

use super::{
    document::{AgentDocument, FloorDocument, SetDocument},
    entries::{denials, grants, serve_entry},
    finding::{Finding, did_you_mean, quoted},
    model::{Agent, Grant, Lifecycle, Scope, Set},
    name::Id,
    reader::{At, Notes},
    selector::Selector,
    source::Span,
    tables::UnixMillis,
};

/// The only schema there is.
const SCHEMA: i64 = 1;
const START: Span = 0..0;

/// What an agent's file says, as far as it can be told.
#[derive(Debug)]
pub struct CheckedAgent {
    /// The agent, unless something it cannot be without is missing or wrong.
    pub agent: Option<Agent>,
    /// Its claims that are valid.
    pub claims: Vec<At<Selector>>,
    /// Its scope, without the entries that are wrong.
    pub scope: Scope,
}

/// Checks an agent's file called `stem`.
pub fn agent(
    document: &AgentDocument,
    stem: &str,
    now: UnixMillis,
    notes: &mut Notes<'_>,
) -> CheckedAgent {
    schema(document.schema.as_ref(), notes);
    let id = id(document, stem, notes);
    let owner = owner(document, notes);
    let lifecycle = lifecycle(document, now, notes);
    let claims = claims(document, notes);
    let scope = scope(document, now, notes);
    let named = person(document.sponsor.as_ref(), "agent.sponsor", notes);
    let backups = document.backup_owners.iter().flat_map(|list| &list.value);
    let backups: Vec<_> = backups
        .filter_map(|each| person(Some(each), "agent.backup_owners", notes))
        .collect();
    let agent = id.zip(owner).map(|(id, owner)| Agent {
        name: document
            .name
            .as_ref()
            .map_or_else(|| id.to_string(), |name| name.value.clone()),
        id,
        purpose: text(document.purpose.as_ref()),
        owner,
        sponsor: named,
        backup_owners: backups,
        labels: document.labels.clone(),
        capabilities: texts(document.capabilities.as_ref()),
        tools: texts(document.tools.as_ref()),
        models: texts(document.models.as_ref()),
        risk: text(document.risk.as_ref()),
        identities: texts(document.identities.as_ref()),
        lifecycle,
        selectors: claims.iter().map(|claim| claim.value.clone()).collect(),
    });
    CheckedAgent {
        agent,
        claims,
        scope,
    }
}

/// Checks a set's file called `stem`.
pub fn set(
    document: &SetDocument,
    stem: &str,
    now: UnixMillis,
    notes: &mut Notes<'_>,
) -> (Option<Set>, Vec<Grant>) {
    schema(document.schema.as_ref(), notes);
    let name = match &document.name {
        Some(written) => {
            let parsed = notes.parsed(&written.span, written.value.parse::<Id>(), |e| e.help());
            if parsed.is_some() && written.value != stem {
                let (name, stem) = (quoted(&written.value), quoted(stem));
                let message = format!("the set is called {name}, but its file {stem}");
                notes.error(
                    &written.span,
                    message,
                    "a set's file is NAME.toml: rename one of them",
                );
            }
            parsed.filter(|_| written.value == stem)
        }
        None => {
            let span = document.set_span.clone().unwrap_or(START);
            let help = format!("write `name = \"{stem}\"` under [set]");
            notes.missing("set.name", &span, "a set needs `set.name`", help);
            None
        }
    };
    let allow = grants(&document.allow, "allow", now, notes);
    if document.allow.is_empty() {
        let span = document.set_span.clone().unwrap_or(START);
        let help = "add [[allow]] entries with `to` and `ports`";
        notes.missing("allow", &span, "the set has no entries", help);
    }
    let set = name.map(|name| Set {
        name,
        description: text(document.description.as_ref()),
        source: text(document.source.as_ref()),
        reviewed: document.reviewed.as_ref().map(|at| at.value),
        entries: allow.len(),
    });
    (set, allow)
}

/// Checks the floor's file.
pub fn floor(document: &FloorDocument, notes: &mut Notes<'_>) -> Vec<Grant> {
    schema(document.schema.as_ref(), notes);
    denials(&document.deny, "deny", notes)
}

fn schema(schema: Option<&At<i64>>, notes: &mut Notes<'_>) {
    let help = format!("write `schema = {SCHEMA}` at the top");
    match schema {
        Some(At { value: SCHEMA, .. }) => {}
        Some(other) => {
            let message = format!("schema {} is not known to this build", other.value);
            notes.error(&other.span, message, help);
        }
        None => notes.missing("schema", &START, "`schema` is missing", help),
    }
}

/// What logs and status call the processes that no agent claims.
const RESERVED: &str = "unregistered";

fn id(document: &AgentDocument, stem: &str, notes: &mut Notes<'_>) -> Option<Id> {
    let Some(written) = &document.id else {
        let span = document.agent_span.clone().unwrap_or(START);
        let help = format!("write `id = \"{stem}\"` under [agent]");
        notes.missing("agent.id", &span, "`agent.id` is missing", help);
        return None;
    };
    let parsed = notes.parsed(&written.span, written.value.parse::<Id>(), |error| {
        error.help()
    })?;
    if written.value != stem {
        let message = format!(
            "the agent is called {}, but its file {}",
            quoted(&written.value),
            quoted(stem)
        );
        notes.error(
            &written.span,
            message,
            "an agent's file is ID.toml: rename one of them",
        );
        return None;
    }
    if written.value == RESERVED {
        notes.error(
            &written.span,
            format!("the id {} is taken", quoted(RESERVED)),
            "in logs and status it stands for the processes that no agent claims: choose another",
        );
        return None;
    }
    Some(parsed)
}

fn owner(document: &AgentDocument, notes: &mut Notes<'_>) -> Option<String> {
    if document.owner.is_none() {
        let span = document.agent_span.clone().unwrap_or(START);
        let help = "name the accountable person, or a group: `owner = \"alice@example.com\"`";
        notes.missing("agent.owner", &span, "`agent.owner` is missing", help);
    }
    person(document.owner.as_ref(), "agent.owner", notes)
}

/// A person or `group:NAME`: one word, so that it can be looked up.
fn person(written: Option<&At<String>>, key: &str, notes: &mut Notes<'_>) -> Option<String> {
    let written = written?;
    let name = written
        .value
        .strip_prefix("group:")
        .unwrap_or(&written.value);
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let message = format!("{} in `{key}` is nobody", quoted(&written.value));
        let help = "write a person such as \"alice@example.com\", or \"group:NAME\"";
        notes.error(&written.span, message, help);
        return None;
    }
    Some(written.value.clone())
}

fn lifecycle(document: &AgentDocument, now: UnixMillis, notes: &mut Notes<'_>) -> Lifecycle {
    let header = document.lifecycle_span.clone().unwrap_or(START);
    let state = state(document, &header, notes);
    let expires = document.expires.as_ref();
    let approved_by = person(
        document.approved_by.as_ref(),
        "lifecycle.approved_by",
        notes,
    );
    if state == State::Active {
        let at = document
            .state
            .as_ref()
            .map_or(header, |state| state.span.clone());
        if document.approved_by.is_none() {
            let message = "an active agent needs `lifecycle.approved_by`";
            let help = "name who approved it, other than the owner; until then `state = \"draft\"`";
            notes.missing("lifecycle.approved_by", &at, message, help);
        }
        if expires.is_none() {
            let message = "an active agent needs `lifecycle.expires`";
            let help = "write when the approval ends, such as `expires = 2027-12-31T00:00:00Z`";
            notes.missing("lifecycle.expires", &at, message, help);
        }
    }
    if let (Some(approver), Some(owner)) = (&document.approved_by, &document.owner)
        && same_person(&approver.value, &owner.value)
    {
        let message = format!("{} owns the agent and approved it", quoted(&approver.value));
        notes.error(
            &approver.span,
            message,
            "somebody other than the owner has to approve",
        );
    }
    if let Some(expires) = expires.filter(|expires| expires.value <= now) {
        let message = "the agent has expired: everything it tries is denied";
        notes.warning(
            &expires.span,
            message,
            "renew `lifecycle.expires`, or revoke the agent",
        );
    }
    if let (Some(from), Some(expires)) = (&document.not_before, expires)
        && from.value >= expires.value
    {
        let message = "`lifecycle.not_before` is not before `lifecycle.expires`";
        notes.error(
            &from.span,
            message,
            "the agent would never be valid: correct one of them",
        );
    }
    let review_every = document.review_every.as_ref().and_then(|written| {
        let every = span_millis(&written.value);
        if every.is_none() {
            let message = format!("{} is not a span of time", quoted(&written.value));
            notes.error(
                &written.span,
                message,
                "write days such as \"90d\", or \"12w\"",
            );
        }
        every
    });
    let approved_hash = document.approved_hash.as_ref().and_then(|written| {
        let digits = written.value.strip_prefix("sha256:").unwrap_or_default();
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if digits.len() == 64 && digits.bytes().all(hex) {
            return Some((written.value.clone(), written.span.clone()));
        }
        let message = format!("{} is not a hash", quoted(&written.value));
        notes.error(
            &written.span,
            message,
            "write `sha256:` and 64 hex digits, as approval sets it",
        );
        None
    });
    Lifecycle {
        state,
        approved_by,
        approval_ref: text(document.approval_ref.as_ref()),
        approved_hash,
        not_before: document.not_before.as_ref().map(|at| at.value),
        expires: expires.map(|at| at.value),
        review_every,
        last_review: document.last_review.as_ref().map(|at| at.value),
    }
}

fn state(document: &AgentDocument, header: &Span, notes: &mut Notes<'_>) -> State {
    let known = [
        State::Draft,
        State::Active,
        State::Suspended,
        State::Revoked,
    ];
    match &document.state {
        Some(written) => word(written, "state", &known, State::name, notes).unwrap_or(State::Draft),
        None => {
            if !notes.is_mistyped("lifecycle.state") {
                let message = "without `lifecycle.state` the agent is a draft and reaches nothing";
                let help = "write `state = \"draft\"`; once approved, \"active\"";
                let finding = Finding::warning(notes.file, header, message).help(help);
                notes.findings.push(finding.consequence());
            }
            State::Draft
        }
    }
}

/// Addresses differ in case without naming two people.
fn same_person(left: &str, right: &str) -> bool {
    left.trim().to_lowercase() == right.trim().to_lowercase()
}

fn claims(document: &AgentDocument, notes: &mut Notes<'_>) -> Vec<At<Selector>> {
    let written = document.cgroup.as_ref();
    if written.is_none_or(|list| list.value.is_empty()) {
        let header = document.selector_span.clone().unwrap_or(START);
        let span = written.map_or(header, |list| list.span.clone());
        let help = "say which processes it is: `cgroup = [\"/agents.slice/x.service\"]` under \
                    [selector]";
        notes.missing(
            "selector.cgroup",
            &span,
            "`selector.cgroup` names no cgroup",
            help,
        );
    }
    let mut claims = Vec::new();
    for each in written.iter().flat_map(|list| &list.value) {
        let parsed = each.value.parse::<Selector>();
        if let Some(value) = notes.parsed(&each.span, parsed, |error| error.help().into()) {
            claims.push(At {
                value,
                span: each.span.clone(),
            });
        }
    }
    claims
}

fn scope(document: &AgentDocument, now: UnixMillis, notes: &mut Notes<'_>) -> Scope {
    let mode = document.mode.as_ref();
    let mode = mode.and_then(|written| word(written, "mode", Mode::ALL, Mode::name, notes));
    let loopback = document.loopback.as_ref();
    let loopback = loopback
        .and_then(|written| word(written, "loopback", Loopback::ALL, Loopback::name, notes));
    let unix = unix(document.unix.as_ref(), notes);
    let serve = document.serve.iter().enumerate();
    let serve = serve
        .filter_map(|(index, entry)| serve_entry(index, entry, notes))
        .collect();
    Scope {
        mode: mode.unwrap_or(Mode::Enforce),
        loopback: loopback.unwrap_or(Loopback::Own),
        unix,
        serve,
        allow: grants(&document.allow, "scope.allow", now, notes),
        deny: denials(&document.deny, "scope.deny", notes),
    }
}

fn unix(written: Option<&At<Vec<At<String>>>>, notes: &mut Notes<'_>) -> Vec<String> {
    let Some(list) = written.filter(|list| !list.value.is_empty()) else {
        return Vec::new();
    };
    let mut globs = Vec::with_capacity(list.value.len());
    for each in &list.value {
        let valid = each.value.starts_with(['/', '@']) && globset::Glob::new(&each.value).is_ok();
        if valid {
            globs.push(each.value.clone());
        } else {
            let message = format!("{} is not a glob of unix sockets", quoted(&each.value));
            let help =
                "write a path such as \"/run/x/*.sock\", or \"@name\" for an abstract socket";
            notes.error(&each.span, message, help);
        }
    }
    notes.warning(
        &list.span,
        "`scope.unix` has effect only with containment",
        "without a kernel that offers BPF LSM, unix sockets are not judged at all: see `remit doctor`",
    );
    globs
}

/// One of a closed set of words.
fn word<T: Copy>(
    written: &At<String>,
    key: &str,
    known: &[T],
    name: impl Fn(T) -> &'static str,
    notes: &mut Notes<'_>,
) -> Option<T> {
    let found = known
        .iter()
        .copied()
        .find(|each| name(*each) == written.value);
    if found.is_none() {
        let words = known.iter().map(|each| name(*each));
        let all = words.clone().collect::<Vec<_>>().join("\", \"");
        let help = did_you_mean(&written.value, words).map_or_else(
            || format!("write one of \"{all}\""),
            |nearest| format!("did you mean \"{nearest}\"?"),
        );
        let message = format!("{} is no `{key}`", quoted(&written.value));
        notes.error(&written.span, message, help);
    }
    found
}

/// `90d`, in milliseconds.
fn span_millis(text: &str) -> Option<i64> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        'w' => 604_800,
        _ => return None,
    };
    let number = digits.parse::<i64>().ok().filter(|number| *number > 0)?;
    number.checked_mul(seconds * 1_000)
}

fn text(written: Option<&At<String>>) -> Option<String> {
    written.map(|at| at.value.clone())
}

fn texts(written: Option<&At<Vec<At<String>>>>) -> Vec<String> {
    let values = written.iter().flat_map(|list| &list.value);
    values.map(|at| at.value.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time_have_a_unit() {
        assert_eq!(span_millis("90d"), Some(90 * 86_400_000));
        assert_eq!(span_millis("12w"), Some(12 * 7 * 86_400_000));
        for bad in ["", "90", "d", "0d", "-1d", "1y", "9999999999999999w", "1ü"] {
            assert_eq!(span_millis(bad), None, "{bad}");
        }
    }

    #[test]
    fn case_does_not_make_another_person() {
        assert!(same_person("Alice@Example.com", "alice@example.com "));
        assert!(!same_person("alice@example.com", "bob@example.com"));
    }
}
