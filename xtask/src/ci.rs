//! What CI runs, in order, stopping at the first command that fails.

use std::process::ExitCode;

use anyhow::Result;

use crate::{lint, test, workspace::Workspace};

/// `cargo xtask ci`.
pub fn command(workspace: &Workspace) -> Result<ExitCode> {
    lint::command(workspace)?;
    test::command(workspace, &test::Options::default())
}
