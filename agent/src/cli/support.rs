//! `remit completions` and `remit man`: made out of the definitions, so they can't be out of date.

use std::path::PathBuf;

use anyhow::Context as _;
use clap_complete::Shell;

use super::{
    definitions,
    outcome::{Failure, Outcome, Result},
    output::Output,
};

/// Arguments of `remit completions`.
#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// Which shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Arguments of `remit man`.
#[derive(Debug, clap::Args)]
pub(super) struct Man {
    /// The page of this command instead of the main one: `status`, `log verify`.
    #[arg(value_name = "COMMAND")]
    command: Vec<String>,
    /// Write the pages of all commands into a folder instead.
    #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
    all: Option<PathBuf>,
}

pub(super) fn completions(arguments: &Completions, output: &Output) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut definitions(), "remit", &mut script);
    output.bytes(&script)?;
    Ok(Outcome::Yes)
}

pub(super) fn man(arguments: &Man, output: &Output) -> Result {
    let mut page = definitions();
    if let Some(folder) = &arguments.all {
        clap_mangen::generate_to(page, folder)
            .with_context(|| format!("cannot write pages into `{}`", folder.display()))?;
        return Ok(Outcome::Yes);
    }
    // Passes the global options on to the commands, and names their pages `remit-COMMAND`.
    page.build();
    for name in &arguments.command {
        page = page.find_subcommand(name).cloned().ok_or_else(|| {
            Failure::usage(format!("there is no command `{name}`"))
                .help("`remit --help` lists them")
        })?;
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(page)
        .render(&mut text)
        .context("cannot render the manual page")?;
    output.bytes(&text)?;
    Ok(Outcome::Yes)
}
