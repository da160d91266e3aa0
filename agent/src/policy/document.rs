//! The files as they are written: every leaf with its place, nothing judged yet but shape. The
//! one list of keys that the registry knows.

use toml::de::{DeTable, DeValue};

use super::{
    finding::Finding,
    reader::{At, Fields, Notes, integer, string},
    source::{SourceFile, Span},
    tables::UnixMillis,
};

type Text = Option<At<String>>;
type Texts = Option<At<Vec<At<String>>>>;
type Moment = Option<At<UnixMillis>>;

/// `agents.d/ID.toml`.
#[derive(Debug, Default)]
pub struct AgentDocument {
    pub schema: Option<At<i64>>,
    /// Where `[agent]` begins.
    pub agent_span: Option<Span>,
    pub id: Text,
    pub name: Text,
    pub purpose: Text,
    pub owner: Text,
    pub sponsor: Text,
    pub backup_owners: Texts,
    pub labels: Vec<(String, String)>,
    pub capabilities: Texts,
    pub tools: Texts,
    pub models: Texts,
    pub risk: Text,
    pub identities: Texts,
    /// Where `[lifecycle]` begins.
    pub lifecycle_span: Option<Span>,
    pub state: Text,
    pub approved_by: Text,
    pub approval_ref: Text,
    pub approved_hash: Text,
    pub not_before: Moment,
    pub expires: Moment,
    pub review_every: Text,
    pub last_review: Moment,
    /// Where `[selector]` begins.
    pub selector_span: Option<Span>,
    pub cgroup: Texts,
    pub mode: Text,
    pub loopback: Text,
    pub unix: Texts,
    pub serve: Vec<ServeDocument>,
    pub allow: Vec<GrantDocument>,
    pub deny: Vec<GrantDocument>,
}

/// `sets.d/NAME.toml`.
#[derive(Debug, Default)]
pub struct SetDocument {
    pub schema: Option<At<i64>>,
    /// Where `[set]` begins.
    pub set_span: Option<Span>,
    pub name: Text,
    pub description: Text,
    pub source: Text,
    pub reviewed: Moment,
    pub allow: Vec<GrantDocument>,
}

/// `floor.toml`.
#[derive(Debug, Default)]
pub struct FloorDocument {
    pub schema: Option<At<i64>>,
    pub deny: Vec<GrantDocument>,
}

/// `[[scope.allow]]`, `[[scope.deny]]`, `[[allow]]` or `[[deny]]`.
#[derive(Debug)]
pub struct GrantDocument {
    /// Where the entry begins.
    pub span: Span,
    pub to: Text,
    pub ports: Option<At<Vec<At<PortDocument>>>>,
    pub reason: Text,
    pub expires: Moment,
    pub within: Texts,
}

/// `[[scope.serve]]`.
#[derive(Debug)]
pub struct ServeDocument {
    /// Where the entry begins.
    pub span: Span,
    pub ports: Option<At<Vec<At<PortDocument>>>>,
    pub from: Texts,
}

/// An element of `ports`.
#[derive(Clone, Debug)]
pub enum PortDocument {
    Number(i64),
    Text(String),
}

/// Reads one file by `read`, syntax errors included. Where the syntax is broken the rest is still
/// looked at, but what may only follow from the break is left out.
pub fn parse<'a, T>(
    file: &'a SourceFile<'a>,
    read: impl FnOnce(&mut Fields<'_>, &mut Notes<'_>) -> T,
) -> (T, Notes<'a>) {
    let (table, errors) = DeTable::parse_recoverable(&file.source.text);
    let table = table.into_inner();
    let mut notes = Notes::new(file);
    let mut fields = Fields::top(&table);
    let document = read(&mut fields, &mut notes);
    fields.finish(&mut notes);
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let finding = Finding::error(file, &span, error.message().to_owned()).help(
            "the file is not TOML here; what else is wrong near it shows once this is mended",
        );
        notes.findings.push(Finding {
            syntax: true,
            ..finding
        });
    }
    (document, notes)
}

/// Leaves out what may only follow from a syntax error: missing and unknown keys, and whatever
/// stands on a line with one.
pub fn without_consequences(findings: &mut Vec<Finding>) {
    let broken: Vec<u32> = findings
        .iter()
        .filter(|each| each.syntax)
        .map(|each| each.line)
        .collect();
    if !broken.is_empty() {
        findings.retain(|each| each.syntax || !each.consequence && !broken.contains(&each.line));
    }
}

// === impl AgentDocument ===

impl AgentDocument {
    /// Takes every key an agent's file may have.
    pub fn read(top: &mut Fields<'_>, notes: &mut Notes<'_>) -> Self {
        let mut document = Self {
            schema: top.integer(notes, "schema"),
            ..Self::default()
        };
        if let Some(fields) = top.table(notes, "agent") {
            document.read_agent(fields, notes);
        }
        if let Some(fields) = top.table(notes, "lifecycle") {
            document.read_lifecycle(fields, notes);
        }
        if let Some(mut fields) = top.table(notes, "selector") {
            document.selector_span = Some(fields.span.clone());
            document.cgroup = fields.strings(notes, "cgroup");
            fields.finish(notes);
        }
        if let Some(fields) = top.table(notes, "scope") {
            document.read_scope(fields, notes);
        }
        document
    }

    fn read_agent(&mut self, mut fields: Fields<'_>, notes: &mut Notes<'_>) {
        self.agent_span = Some(fields.span.clone());
        self.id = fields.string(notes, "id");
        self.name = fields.string(notes, "name");
        self.purpose = fields.string(notes, "purpose");
        self.owner = fields.string(notes, "owner");
        self.sponsor = fields.string(notes, "sponsor");
        self.backup_owners = fields.strings(notes, "backup_owners");
        if let Some(labels) = fields.table(notes, "labels") {
            self.labels = labels.all_strings(notes);
        }
        self.capabilities = fields.strings(notes, "capabilities");
        self.tools = fields.strings(notes, "tools");
        self.models = fields.strings(notes, "models");
        self.risk = fields.string(notes, "risk");
        self.identities = fields.strings(notes, "identities");
        fields.finish(notes);
    }

    fn read_lifecycle(&mut self, mut fields: Fields<'_>, notes: &mut Notes<'_>) {
        self.lifecycle_span = Some(fields.span.clone());
        self.state = fields.string(notes, "state");
        self.approved_by = fields.string(notes, "approved_by");
        self.approval_ref = fields.string(notes, "approval_ref");
        self.approved_hash = fields.string(notes, "approved_hash");
        self.not_before = fields.moment(notes, "not_before");
        self.expires = fields.moment(notes, "expires");
        self.review_every = fields.string(notes, "review_every");
        self.last_review = fields.date(notes, "last_review");
        fields.finish(notes);
    }

    fn read_scope(&mut self, mut fields: Fields<'_>, notes: &mut Notes<'_>) {
        self.mode = fields.string(notes, "mode");
        self.loopback = fields.string(notes, "loopback");
        self.unix = fields.strings(notes, "unix");
        for mut serve in fields.tables(notes, "serve") {
            self.serve.push(ServeDocument {
                span: serve.span.clone(),
                ports: ports(&mut serve, notes),
                from: serve.strings(notes, "from"),
            });
            serve.finish(notes);
        }
        self.allow = grants(fields.tables(notes, "allow"), notes);
        self.deny = denials(fields.tables(notes, "deny"), notes);
        fields.finish(notes);
    }
}

// === impl SetDocument ===

impl SetDocument {
    /// Takes every key a set's file may have.
    pub fn read(top: &mut Fields<'_>, notes: &mut Notes<'_>) -> Self {
        let mut document = Self {
            schema: top.integer(notes, "schema"),
            ..Self::default()
        };
        if let Some(mut fields) = top.table(notes, "set") {
            document.set_span = Some(fields.span.clone());
            document.name = fields.string(notes, "name");
            document.description = fields.string(notes, "description");
            document.source = fields.string(notes, "source");
            document.reviewed = fields.date(notes, "reviewed");
            fields.finish(notes);
        }
        document.allow = grants(top.tables(notes, "allow"), notes);
        document
    }
}

// === impl FloorDocument ===

impl FloorDocument {
    /// Takes every key the floor's file may have.
    pub fn read(top: &mut Fields<'_>, notes: &mut Notes<'_>) -> Self {
        Self {
            schema: top.integer(notes, "schema"),
            deny: denials(top.tables(notes, "deny"), notes),
        }
    }
}

fn grants(tables: Vec<Fields<'_>>, notes: &mut Notes<'_>) -> Vec<GrantDocument> {
    let read = |mut fields: Fields<'_>| {
        let grant = GrantDocument {
            span: fields.span.clone(),
            to: fields.string(notes, "to"),
            ports: ports(&mut fields, notes),
            reason: fields.string(notes, "reason"),
            expires: fields.moment(notes, "expires"),
            within: fields.strings(notes, "within"),
        };
        fields.finish(notes);
        grant
    };
    tables.into_iter().map(read).collect()
}

/// A denial has no expiry: it would open something by time alone.
fn denials(tables: Vec<Fields<'_>>, notes: &mut Notes<'_>) -> Vec<GrantDocument> {
    let read = |mut fields: Fields<'_>| {
        let grant = GrantDocument {
            span: fields.span.clone(),
            to: fields.string(notes, "to"),
            ports: ports(&mut fields, notes),
            reason: fields.string(notes, "reason"),
            expires: None,
            within: None,
        };
        fields.finish(notes);
        grant
    };
    tables.into_iter().map(read).collect()
}

fn ports(fields: &mut Fields<'_>, notes: &mut Notes<'_>) -> Option<At<Vec<At<PortDocument>>>> {
    let read = |value: &DeValue<'_>| {
        let number = integer(value).map(PortDocument::Number);
        number.or_else(|| string(value).map(PortDocument::Text))
    };
    fields.list(
        notes,
        "ports",
        "a port such as 443, or a string such as \"53/udp\"",
        read,
    )
}
