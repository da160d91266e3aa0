//! `remit check`: compiles the registry offline and prints every finding of every file.

use std::path::PathBuf;

use serde::Serialize;

use super::{
    Global,
    compiled::{Compiled, compile},
    format::count,
    outcome::{Outcome, Result},
    output::{self, Output, plain_lines},
};
use crate::{
    daemon::settings::{Settings, SettingsError},
    policy::Finding,
};

/// Arguments of `remit check`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Files or folders of agents to check instead of the registry, with the sets and the floor
    /// that the settings name or that lie beside them.
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// The findings as JSON.
#[derive(Debug, Serialize)]
struct Report<'c> {
    /// Whether there is no error.
    ok: bool,
    /// Files read.
    files: usize,
    /// Errors, what could not be read included.
    errors: usize,
    /// Warnings.
    warnings: usize,
    /// Findings in files that could be read.
    findings: &'c [Finding],
    /// What could not be read.
    unread: Vec<UnreadLine<'c>>,
}

/// A file or folder that could not be read.
#[derive(Debug, Serialize)]
struct UnreadLine<'c> {
    path: &'c std::path::Path,
    why: &'c str,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let settings = match global.load_settings() {
        // A mistake in the settings is what is asked for here: an answer, and it is no.
        Err(error @ SettingsError::Invalid(_)) => {
            output.line(plain_lines(&error.to_string()))?;
            return Ok(Outcome::No);
        }
        other => other?,
    };
    check(&settings, arguments, output)
}

fn check(settings: &Settings, arguments: &Arguments, output: &Output) -> Result {
    let compiled = compile(settings, &arguments.paths);
    let report = report(&compiled);
    let outcome = Outcome::of(report.ok);
    if output.wants_json() {
        output.json(&report)?;
        return Ok(outcome);
    }
    let unread = compiled.unread.iter().map(ToString::to_string);
    let findings = report.findings.iter().map(ToString::to_string);
    for text in unread.chain(findings) {
        output.line(format_args!("{}\n", plain_lines(&text)))?;
    }
    let agents = compiled.compilation.agents.len() as u64;
    output::talk(format_args!(
        "{}, {} compiled: {}, {}",
        count(report.files as u64, "file"),
        count(agents, "agent"),
        count(report.errors as u64, "error"),
        count(report.warnings as u64, "warning"),
    ));
    Ok(outcome)
}

fn report(compiled: &Compiled) -> Report<'_> {
    let findings = compiled.compilation.findings.as_slice();
    let errors = findings.iter().filter(|finding| finding.is_error()).count();
    let unread = compiled.unread.iter().map(|unread| UnreadLine {
        path: &unread.path,
        why: &unread.why,
    });
    Report {
        ok: compiled.is_good(),
        files: compiled.files,
        errors: errors + compiled.unread.len(),
        warnings: findings.len() - errors,
        findings,
        unread: unread.collect(),
    }
}
