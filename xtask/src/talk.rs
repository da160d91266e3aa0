//! What xtask says while it works. Talk goes to stderr; results (tables, sums) to stdout.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// Announces a step that is about to run.
pub fn step(what: &str) {
    line("==>", what);
}

/// Adds a detail to the step before it.
pub fn note(what: &str) {
    line("   ", what);
}

/// Reports why a command gave up, with the chain of causes.
pub fn failure(error: &anyhow::Error) {
    line("error:", &format!("{error:#}"));
}

fn line(mark: &str, what: &str) {
    // A closed stderr must not end a test run that is otherwise fine.
    drop(writeln!(io::stderr(), "{mark} {what}"));
}

/// A line that moves while something runs. Without a terminal it says its first text once.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Starts a progress line with `text`.
    pub fn start(text: &str) -> Self {
        if !io::stderr().is_terminal() {
            step(text);
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{elapsed_precise}] {wide_msg}")
        {
            bar.set_style(style);
        }
        bar.set_message(text.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(Some(bar))
    }

    /// Replaces the text; only a terminal shows it.
    pub fn update(&self, text: String) {
        if let Some(bar) = &self.0 {
            bar.set_message(text);
        }
    }

    /// Prints a line above the moving one.
    pub fn print(&self, text: &str) {
        match &self.0 {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Asks a yes-or-no question on the terminal; no terminal or an end of input means no.
pub fn ask(question: &str) -> bool {
    if !io::stdin().is_terminal() {
        return false;
    }
    drop(write!(io::stderr(), "{question} [y/N] "));
    let mut answer = String::new();
    match io::stdin().read_line(&mut answer) {
        Ok(_) => matches!(answer.trim(), "y" | "Y" | "yes"),
        Err(_) => false,
    }
}
