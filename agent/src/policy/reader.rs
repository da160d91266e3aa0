//! Walks a parsed TOML table and keeps score: wrong types and unknown keys become findings, and
//! reading goes on. serde would stop at the first mistake of a file.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    finding::{Finding, did_you_mean, quoted},
    source::{SourceFile, Span},
    tables::UnixMillis,
};

/// A value, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Span,
}

/// Where findings about one file go.
pub struct Notes<'a> {
    /// The file.
    pub file: &'a SourceFile<'a>,
    /// What was found so far.
    pub findings: Vec<Finding>,
    /// Keys that are there, but not of their type.
    mistyped: Vec<String>,
}

/// The keys of one table, taken one by one.
pub struct Fields<'d> {
    /// `scope.allow[2]`; empty at the top.
    path: String,
    /// Where the table begins.
    pub span: Span,
    table: &'d DeTable<'d>,
    known: Vec<&'static str>,
}

// === impl Notes ===

impl<'a> Notes<'a> {
    /// None so far.
    pub const fn new(file: &'a SourceFile<'a>) -> Self {
        Self {
            file,
            findings: Vec::new(),
            mistyped: Vec::new(),
        }
    }

    /// Adds an error with advice.
    pub fn error(&mut self, span: &Span, message: impl Into<String>, help: impl Into<String>) {
        self.findings
            .push(Finding::error(self.file, span, message).help(help));
    }

    /// Adds a warning with advice.
    pub fn warning(&mut self, span: &Span, message: impl Into<String>, help: impl Into<String>) {
        self.findings
            .push(Finding::warning(self.file, span, message).help(help));
    }

    /// Adds an error about `key`, which is not there, unless it is and only mistyped. A syntax
    /// error may have hidden it.
    pub fn missing(
        &mut self,
        key: &str,
        span: &Span,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if !self.is_mistyped(key) {
            let finding = Finding::error(self.file, span, message).help(help);
            self.findings.push(finding.consequence());
        }
    }

    /// Whether `key`, what it is in, or something in it has a finding about its type.
    pub fn is_mistyped(&self, key: &str) -> bool {
        let inside = |inner: &str, outer: &str| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        let mut mistyped = self.mistyped.iter();
        mistyped.any(|mistyped| inside(key, mistyped) || inside(mistyped, key))
    }

    /// The value of `text`, or an error at `at`.
    pub fn parsed<T, E: std::fmt::Display>(
        &mut self,
        at: &Span,
        parsed: Result<T, E>,
        help: impl FnOnce(&E) -> String,
    ) -> Option<T> {
        match parsed {
            Ok(value) => Some(value),
            Err(error) => {
                self.error(at, error.to_string(), help(&error));
                None
            }
        }
    }
}

// === impl Fields ===

impl<'d> Fields<'d> {
    /// The keys of the document itself.
    pub const fn top(table: &'d DeTable<'d>) -> Self {
        Self {
            path: String::new(),
            span: 0..0,
            table,
            known: Vec::new(),
        }
    }

    /// `key` with the path before it.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.into()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn take(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.known.push(key);
        self.table.get(key)
    }

    /// A value that `read` understands; `expected` names it for the message otherwise.
    fn leaf<T>(
        &mut self,
        notes: &mut Notes<'_>,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&DeValue<'d>) -> Option<T>,
    ) -> Option<At<T>> {
        let value = self.take(key)?;
        let path = self.path(key);
        leaf(notes, &path, value, expected, read)
    }

    /// A string.
    pub fn string(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Option<At<String>> {
        self.leaf(notes, key, "a string", string)
    }

    /// An integer.
    pub fn integer(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Option<At<i64>> {
        self.leaf(notes, key, "an integer", integer)
    }

    /// A moment: a date and time with an offset.
    pub fn moment(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Option<At<UnixMillis>> {
        let expected = "a date and time with an offset, such as 2027-12-31T00:00:00Z";
        self.leaf(notes, key, expected, |value| moment(value, false))
    }

    /// A moment, or a date for its midnight in UTC.
    pub fn date(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Option<At<UnixMillis>> {
        let expected = "a date, such as 2027-12-31";
        self.leaf(notes, key, expected, |value| moment(value, true))
    }

    /// A list of values that `read` understands; bad ones are left out.
    pub fn list<T>(
        &mut self,
        notes: &mut Notes<'_>,
        key: &'static str,
        expected: &str,
        read: impl Fn(&DeValue<'d>) -> Option<T>,
    ) -> Option<At<Vec<At<T>>>> {
        let value = self.take(key)?;
        let path = self.path(key);
        let Some(values) = value.get_ref().as_array() else {
            wrong_type(notes, &path, value, "a list");
            return None;
        };
        let elements = values.iter().enumerate();
        let read = elements.filter_map(|(index, value)| {
            leaf(notes, &format!("{path}[{index}]"), value, expected, &read)
        });
        Some(At {
            value: read.collect(),
            span: value.span(),
        })
    }

    /// A list of strings.
    pub fn strings(
        &mut self,
        notes: &mut Notes<'_>,
        key: &'static str,
    ) -> Option<At<Vec<At<String>>>> {
        self.list(notes, key, "a string", string)
    }

    /// A table.
    pub fn table(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Option<Self> {
        let value = self.take(key)?;
        let path = self.path(key);
        let Some(table) = value.get_ref().as_table() else {
            wrong_type(notes, &path, value, "a table");
            return None;
        };
        Some(Self {
            path,
            span: value.span(),
            table,
            known: Vec::new(),
        })
    }

    /// An array of tables.
    pub fn tables(&mut self, notes: &mut Notes<'_>, key: &'static str) -> Vec<Self> {
        let Some(value) = self.take(key) else {
            return Vec::new();
        };
        let path = self.path(key);
        let Some(values) = value.get_ref().as_array() else {
            wrong_type(
                notes,
                &path,
                value,
                &format!("an array of tables: write [[{path}]]"),
            );
            return Vec::new();
        };
        let mut tables = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            let path = format!("{path}[{index}]");
            match value.get_ref().as_table() {
                Some(table) => {
                    let span = value.span();
                    tables.push(Self {
                        path,
                        span,
                        table,
                        known: Vec::new(),
                    });
                }
                None => wrong_type(notes, &path, value, "a table"),
            }
        }
        tables
    }

    /// All keys with string values, whatever they are called.
    pub fn all_strings(self, notes: &mut Notes<'_>) -> Vec<(String, String)> {
        let mut pairs = Vec::with_capacity(self.table.len());
        for (key, value) in self.table {
            let name = key.get_ref().to_string();
            if let Some(text) = leaf(notes, &self.path(&name), value, "a string", string) {
                pairs.push((name, text.value));
            }
        }
        pairs
    }

    /// Reports every key that nothing asked for.
    pub fn finish(self, notes: &mut Notes<'_>) {
        for key in self.table.keys() {
            let name = key.get_ref().as_ref();
            if self.known.contains(&name) {
                continue;
            }
            let help = did_you_mean(name, self.known.iter().copied()).map_or_else(
                || format!("known here: {}", self.known.join(", ")),
                |nearest| format!("did you mean `{nearest}`?"),
            );
            let message = format!("unknown key {}", quoted(&self.path(name)));
            let finding = Finding::error(notes.file, &key.span(), message).help(help);
            notes.findings.push(finding.consequence());
        }
    }
}

fn leaf<'d, T>(
    notes: &mut Notes<'_>,
    path: &str,
    value: &Spanned<DeValue<'d>>,
    expected: &str,
    read: impl FnOnce(&DeValue<'d>) -> Option<T>,
) -> Option<At<T>> {
    let read = read(value.get_ref());
    if read.is_none() {
        wrong_type(notes, path, value, expected);
    }
    Some(At {
        value: read?,
        span: value.span(),
    })
}

fn wrong_type(notes: &mut Notes<'_>, path: &str, value: &Spanned<DeValue<'_>>, expected: &str) {
    let found = match value.get_ref() {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) if integer(value.get_ref()).is_none() => "an integer too large",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(datetime) if datetime.offset.is_none() => "a time without an offset",
        DeValue::Datetime(_) => "a time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    let message = format!("{} is {found}", quoted(path));
    notes.mistyped.push(path.to_owned());
    notes.error(&value.span(), message, format!("write {expected}"));
}

/// A string value.
pub fn string(value: &DeValue<'_>) -> Option<String> {
    value.as_str().map(Into::into)
}

/// An integer value of 64 bits.
pub fn integer(value: &DeValue<'_>) -> Option<i64> {
    let integer = value.as_integer()?;
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn moment(value: &DeValue<'_>, dates: bool) -> Option<UnixMillis> {
    let datetime = value.as_datetime()?;
    let mut text = datetime.to_string();
    if dates && datetime.time.is_none() && datetime.date.is_some() {
        text.push_str("T00:00:00Z");
    }
    let timestamp: jiff::Timestamp = text.parse().ok()?;
    Some(timestamp.as_millisecond())
}
