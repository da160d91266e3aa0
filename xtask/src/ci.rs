//! What CI runs, in order, stopping at the first command that fails.

use std::process::ExitCode;

use anyhow::Result;
use nix::unistd::geteuid;

use crate::{bench, lint, talk, test, workspace::Workspace};

/// `cargo xtask ci`.
pub fn command(workspace: &Workspace) -> Result<ExitCode> {
    lint::command(workspace)?;
    let code = test::command(workspace, &test::Options::default())?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    if !geteuid().is_root() {
        talk::note("the benchmark was not tried: not root");
        return Ok(code);
    }
    // That it works; a shared machine says nothing about speed.
    bench::command(workspace, &bench::Options::quick())
}
