//! What the compiler has to say about a file: where, what, and what to do. Rendered the way
//! compilers do it, so that editors can jump to `FILE:LINE:COL`.
//!
//! The excerpt is hostile text: control and direction characters never reach the terminal.

use std::{fmt, path::PathBuf};

use serde::Serialize;

use super::source::{SourceFile, Span};

/// Characters of a source line that an excerpt shows at most.
const EXCERPT: usize = 120;
/// Characters of a value that a message quotes at most.
const QUOTE: usize = 80;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file is not compiled.
    Error,
    /// The file is compiled, and somebody should look.
    Warning,
}

/// One mistake, or one thing to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file as it was named to the compiler.
    pub file: PathBuf,
    /// Bytes of the file that it is about.
    pub span: Span,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    #[serde(rename = "column")]
    pub col: u32,
    /// What is wrong: lower case, no full stop.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Ids of the agents it concerns: for an agent's file the file name without `.toml`, for a
    /// set the agents that use it, for the floor none.
    pub agents: Vec<String>,
    /// The source line and the carets below it, ready to print.
    #[serde(skip)]
    pub excerpt: String,
    /// It may only follow from a syntax error elsewhere in the file, and is dropped if there is one.
    #[serde(skip)]
    pub(super) consequence: bool,
    /// It is a syntax error itself.
    #[serde(skip)]
    pub(super) syntax: bool,
}

// === impl Severity ===

impl Severity {
    /// The word in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

// === impl Finding ===

impl Finding {
    /// A finding about `span` of `file`.
    pub fn new(
        severity: Severity,
        file: &SourceFile<'_>,
        span: &Span,
        message: impl Into<String>,
    ) -> Self {
        let (line, col) = file.position(span.start);
        Self {
            severity,
            file: file.source.path.clone(),
            span: span.clone(),
            line,
            col,
            message: message.into(),
            help: None,
            agents: Vec::new(),
            excerpt: excerpt(file, span, line, col),
            consequence: false,
            syntax: false,
        }
    }

    /// An error about `span` of `file`.
    pub fn error(file: &SourceFile<'_>, span: &Span, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, file, span, message)
    }

    /// A warning about `span` of `file`.
    pub fn warning(file: &SourceFile<'_>, span: &Span, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, file, span, message)
    }

    /// The same with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The same, to be dropped where the file has syntax errors.
    #[must_use]
    pub(super) fn consequence(mut self) -> Self {
        self.consequence = true;
        self
    }

    /// Whether the file is refused because of this.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, line, col) = (self.file.display(), self.line, self.col);
        writeln!(
            f,
            "{file}:{line}:{col}: {}: {}",
            self.severity.name(),
            self.message
        )?;
        write!(f, "{}", self.excerpt)?;
        if let Some(help) = &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        Ok(())
    }
}

/// `text` between backticks: shortened, and with nothing that a terminal obeys.
pub fn quoted(text: &str) -> String {
    if text.is_empty() {
        return "the empty string".into();
    }
    let mut shown: String = text.chars().take(QUOTE).map(printable).collect();
    if text.chars().count() > QUOTE {
        shown.push('…');
    }
    format!("`{shown}`")
}

/// The word of `known` that `word` is a slip of, if any.
pub fn did_you_mean<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let allowed = word.chars().count() / 3;
    let distances = known
        .into_iter()
        .map(|known| (distance(word, known), known));
    let nearest = distances.min_by_key(|(distance, _)| *distance)?;
    (nearest.0 <= allowed.max(1)).then_some(nearest.1)
}

/// Edits between two words, a swap of neighbours being one (optimal string alignment).
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=right.len()).collect();
    let mut last = None;
    for (row, ours) in left.chars().enumerate() {
        let mut current = Vec::with_capacity(above.len());
        current.push(row + 1);
        for (column, &theirs) in right.iter().enumerate() {
            let at = |line: &[usize], index: usize| line.get(index).copied().unwrap_or(usize::MAX);
            let replaced = at(&above, column) + usize::from(ours != theirs);
            let mut best = replaced
                .min(at(&above, column + 1).saturating_add(1))
                .min(at(&current, column).saturating_add(1));
            let swapped =
                column > 0 && last == Some(theirs) && right.get(column - 1) == Some(&ours);
            if swapped {
                best = best.min(at(&before, column - 1).saturating_add(1));
            }
            current.push(best);
        }
        before = std::mem::replace(&mut above, current);
        last = Some(ours);
    }
    above.last().copied().unwrap_or_default()
}

/// The line of `span`, or the part of a long one around it, and carets below.
fn excerpt(file: &SourceFile<'_>, span: &Span, line: u32, col: u32) -> String {
    let text: Vec<char> = file.line(line).chars().map(printable).collect();
    let start = (col as usize - 1).min(text.len());
    let width = {
        let bytes = file.source.text.get(span.clone()).unwrap_or_default();
        let first = bytes.split(['\n', '\r']).next().unwrap_or_default();
        first.chars().count().max(1)
    };
    let from = if text.len() <= EXCERPT {
        0
    } else {
        start.saturating_sub(EXCERPT / 3)
    };
    let to = text.len().min(from + EXCERPT);
    let shown: String = text.get(from..to).unwrap_or_default().iter().collect();
    let carets = "^".repeat(width.min((to - start.min(to)).max(1)));
    let (before, after) = (mark(from > 0), mark(to < text.len()));
    let indent = " ".repeat(start - from + before.chars().count());

    let number = line.to_string();
    let gutter = " ".repeat(number.len());
    format!("{gutter} |\n{number} | {before}{shown}{after}\n{gutter} | {indent}{carets}")
}

const fn mark(cut: bool) -> &'static str {
    if cut { "…" } else { "" }
}

/// `c`, or what stands for it where a terminal would obey it: control characters and those that
/// turn the direction of text (which can make a line read other than it is). A tab is one space,
/// so that the carets stand right.
fn printable(c: char) -> char {
    match c {
        '\t' => ' ',
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::source::{Source, SourceKind},
        *,
    };

    fn source(text: &str) -> Source {
        Source {
            path: "agents.d/x.toml".into(),
            text: text.into(),
            kind: SourceKind::Agent,
        }
    }

    #[test]
    fn a_finding_reads_like_a_compilers() {
        let source = source("schema = 1\n\tto = \"10.0.0.1/8\"\n");
        let file = SourceFile::new(&source);
        let finding = Finding::error(&file, &(17..29), "host bits are set").help("write it so");
        assert_eq!(
            finding.to_string(),
            "agents.d/x.toml:2:7: error: host bits are set\n  \
             |\n2 |  to = \"10.0.0.1/8\"\n  \
             |       ^^^^^^^^^^^^\nhelp: write it so"
        );
    }

    #[test]
    fn excerpts_carry_nothing_that_a_terminal_obeys() {
        let source = source("a = \"\u{1b}[31m\u{202e}\"");
        let file = SourceFile::new(&source);
        let shown = Finding::error(&file, &(4..9), quoted("\u{1b}]0;x\u{7}")).to_string();
        assert!(
            !shown
                .chars()
                .any(|c| c != '\n' && c.is_control() || c == '\u{202e}'),
            "{shown:?}"
        );
    }

    #[test]
    fn long_lines_are_cut_around_the_place() {
        let text = format!("{}HERE{}", "x".repeat(500), "y".repeat(500));
        let source = source(&text);
        let file = SourceFile::new(&source);
        let finding = Finding::error(&file, &(500..504), "m");
        let lines: Vec<&str> = finding.excerpt.lines().collect();
        let column = lines[2].chars().position(|c| c == '^').unwrap();
        let under: String = lines[1].chars().skip(column).take(4).collect();
        assert_eq!(under, "HERE");
        assert!(lines[1].chars().count() < 130);
    }

    #[test]
    fn a_span_past_the_end_still_renders() {
        let source = source("");
        let file = SourceFile::new(&source);
        let finding = Finding::error(&file, &(0..0), "empty");
        assert_eq!(finding.excerpt, "  |\n1 | \n  | ^");
    }

    #[test]
    fn slips_are_recognised_and_other_words_are_not() {
        let known = ["ports", "reason", "expires", "to"];
        assert_eq!(did_you_mean("prots", known), Some("ports"));
        assert_eq!(did_you_mean("port", known), Some("ports"));
        assert_eq!(did_you_mean("expiry", known), Some("expires"));
        assert_eq!(did_you_mean("colour", known), None);
        assert_eq!(distance("abcd", "acbd"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
