//! A Python with the packaged OCSF 1.8 schemas, in a folder of the build's own.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
    process::{Command, Output},
};

use crate::{talk, workspace::Workspace};

/// PyPI's package of schemas, with the version that events are held against.
const PACKAGE: &str = "ocsf-json-schema==1.2.0";

/// A Python that has the schemas: that of `REMIT_PYTHON`, else the one on the path if it happens to
/// have them, else one made below the build's folder.
///
/// # Errors
/// Why there is none.
pub fn with_schemas(workspace: &Workspace) -> Result<OsString, String> {
    if let Some(named) = env::var_os("REMIT_PYTHON") {
        return match has_schemas(&named) {
            true => Ok(named),
            false => Err(format!(
                "{} has no Python package ocsf-json-schema",
                named.display()
            )),
        };
    }
    let system = OsString::from("python3");
    if has_schemas(&system) {
        return Ok(system);
    }
    let folder = workspace.target.join("ocsf-schemas");
    let python = folder.join("bin/python").into_os_string();
    if has_schemas(&python) {
        return Ok(python);
    }
    talk::step("installing the packaged OCSF schemas");
    make(&system, &folder, &python)?;
    match has_schemas(&python) {
        true => Ok(python),
        false => Err(format!("{PACKAGE} was installed and cannot be imported")),
    }
}

fn make(system: &OsStr, folder: &Path, python: &OsStr) -> Result<(), String> {
    let made = Command::new(system)
        .args(["-m", "venv", "--clear"])
        .arg(folder)
        .output();
    said(made, "python3 -m venv")?;
    let installed = Command::new(python)
        .args(["-m", "pip", "install", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--timeout", "30", PACKAGE])
        .output();
    said(installed, "pip install")
}

/// What a program that failed said last.
fn said(output: std::io::Result<Output>, what: &str) -> Result<(), String> {
    let output = output.map_err(|error| format!("{what}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    Err(format!("{what}: {}", last.unwrap_or("no reason given")))
}

fn has_schemas(python: &OsStr) -> bool {
    let asked = Command::new(python)
        .args(["-c", "import ocsf_json_schema"])
        .output();
    asked.is_ok_and(|output| output.status.success())
}
