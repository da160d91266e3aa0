//! The only module that prints. Data goes to stdout, talk to stderr; colour only where a terminal
//! is, and never when `NO_COLOR` is set. A reader that closes its end early is no failure.

use std::{
    cell::Cell,
    env,
    fmt::Display,
    io::{self, IsTerminal as _, Write as _},
};

use anyhow::Context as _;
use comfy_table::{Cell as TableCell, Table, presets};
use serde::Serialize;

use super::outcome::{Failure, Outcome, Result};
use crate::audit::text::clean;

/// Where a command prints.
#[derive(Debug)]
pub struct Output {
    json: bool,
    colour: bool,
    closed: Cell<bool>,
}

/// What a text means, and so how it is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Doubtful,
    /// As it should not be.
    Bad,
    /// What matters.
    Strong,
}

/// Columns with a heading each, for people.
#[derive(Debug)]
pub struct Columns {
    table: Table,
}

// === impl Output ===

impl Output {
    /// `json` as asked for on the command line.
    pub fn new(json: bool) -> Self {
        Self {
            json,
            colour: colour(&io::stdout()),
            closed: Cell::new(false),
        }
    }

    /// Whether a person looks at stdout.
    pub fn is_terminal() -> bool {
        io::stdout().is_terminal()
    }

    /// Whether JSON was asked for.
    pub const fn wants_json(&self) -> bool {
        self.json
    }

    /// Whether stdout takes colours.
    pub const fn colour(&self) -> bool {
        self.colour
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// A line of data.
    pub fn line(&self, text: impl Display) -> Result<()> {
        self.write(&format!("{text}\n"))
    }

    /// A value as JSON: indented for a person, on one line for a pipe.
    pub fn json(&self, value: &impl Serialize) -> Result<()> {
        let text = if io::stdout().is_terminal() {
            serde_json::to_string_pretty(value)
        } else {
            serde_json::to_string(value)
        };
        self.line(text.context("cannot write the answer as JSON")?)
    }

    /// Columns, as data.
    pub fn columns(&self, columns: &Columns) -> Result<()> {
        self.line(columns.table.trim_fmt())
    }

    /// Bytes as they are, such as a completion script.
    pub fn bytes(&self, bytes: &[u8]) -> Result<()> {
        self.check(io::stdout().lock().write_all(bytes))
    }

    /// Text in its colour, where stdout takes colours.
    pub fn paint(&self, tone: Tone, text: &str) -> String {
        paint(self.colour, tone, text)
    }

    fn write(&self, text: &str) -> Result<()> {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(text.as_bytes());
        self.check(written.and_then(|()| stdout.flush()))
    }

    fn check(&self, written: io::Result<()>) -> Result<()> {
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.set(true);
                Ok(())
            }
            other => Ok(other.context("cannot write to stdout")?),
        }
    }
}

// === impl Columns ===

impl Columns {
    /// Columns with these headings.
    pub fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(headings.iter().map(TableCell::new));
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Self { table }
    }

    /// One more row. Cells come from files and processes: they are made harmless here.
    pub fn row<T: AsRef<str>>(&mut self, cells: &[T]) {
        let cells = cells.iter().map(|cell| plain(cell.as_ref()));
        self.table.add_row(cells.map(TableCell::new));
    }
}

// === talk ===

/// Says something on stderr.
pub fn talk(text: impl Display) {
    // When even stderr is gone there is nobody to tell.
    let _gone = writeln!(io::stderr(), "{text}").is_err();
}

/// Says on stderr what must not be missed.
pub fn warning(text: impl Display) {
    let colour = colour(&io::stderr());
    talk(format_args!(
        "{} {text}",
        paint(colour, Tone::Bad, "warning:")
    ));
}

/// Says on stderr why a command came to nothing.
pub fn failure(failure: &Failure) {
    let colour = colour(&io::stderr());
    let error = &failure.error;
    // Findings and mistakes in files bring their own `FILE:LINE:COL: error:`.
    if error.is::<crate::daemon::settings::SettingsError>() && failure.help.is_none() {
        talk(error);
        return;
    }
    talk(format_args!(
        "{} {error:#}",
        paint(colour, Tone::Bad, "error:")
    ));
    if let Some(help) = &failure.help {
        talk(format_args!(
            "{} {help}",
            paint(colour, Tone::Strong, "help:")
        ));
    }
}

/// Prints what the argument parser has to say: help and version as data, mistakes as talk.
pub fn parser(error: &clap::Error) -> Outcome {
    let _gone = error.print().is_err();
    if error.use_stderr() {
        Outcome::Usage
    } else {
        Outcome::Yes
    }
}

/// Text from files, processes and the daemon, made harmless to a terminal.
pub fn plain(text: &str) -> String {
    clean(text.as_bytes(), text.len().saturating_mul(8))
}

/// Rendered findings: the same for each line.
pub fn plain_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(plain).collect();
    lines.join("\n")
}

fn colour(stream: &impl io::IsTerminal) -> bool {
    stream.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn paint(colour: bool, tone: Tone, text: &str) -> String {
    if !colour {
        return text.to_owned();
    }
    let code = match tone {
        Tone::Good => "32",
        Tone::Doubtful => "33",
        Tone::Bad => "1;31",
        Tone::Strong => "1",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_cannot_command_the_terminal() {
        let mut columns = Columns::new(&["AGENT", "NAME"]);
        columns.row(&["a", "x\u{1b}[2Jy\nz"]);
        let text = columns.table.trim_fmt();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn columns_line_up_and_end_without_blanks() {
        let mut columns = Columns::new(&["AGENT", "STATE"]);
        columns.row(&["billing-recon", "active"]);
        columns.row(&["x", ""]);
        assert_eq!(
            columns.table.trim_fmt(),
            "AGENT          STATE\nbilling-recon  active\nx"
        );
    }

    #[test]
    fn findings_keep_their_lines() {
        assert_eq!(plain_lines("a\u{1b}\n  ^^"), "a\\x1b\n  ^^");
    }
}
