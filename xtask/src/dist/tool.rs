//! The tools that pack, each in one version, built once below target/tools.

use std::fs;

use anyhow::{Context as _, Result};
use xshell::cmd;

use crate::{apt, talk, workspace::Workspace};

/// Name and version. Neither changes without a look at what it then makes.
const TOOLS: [(&str, &str); 2] = [("cargo-deb", "3.8.0"), ("cargo-cyclonedx", "0.5.9")];

/// What makes the Debian package.
pub const PACKER: &str = "cargo-deb";

/// Makes sure that later commands find the tools, or those of them that are named.
pub fn ensure(workspace: &Workspace, only: Option<&str>) -> Result<()> {
    let tools = workspace.tools();
    for (name, version) in TOOLS {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let stamp = tools.join(format!("{name}.stamp"));
        let program = tools.join("bin").join(name);
        let ours = fs::read_to_string(&stamp).is_ok_and(|text| text.trim() == version);
        if ours && program.is_file() {
            continue;
        }
        if is_on_path(workspace, name, version) {
            continue;
        }
        talk::step(&format!("building {name} {version} (some minutes)"));
        let work = tools.join("build");
        let package = format!("{name}@{version}");
        workspace
            .cargo(&["install", &package, "--locked", "--force"])
            .arg("--root")
            .arg(&tools)
            .arg("--target-dir")
            .arg(&work)
            .run()?;
        fs::write(&stamp, version).with_context(|| format!("cannot write {}", stamp.display()))?;
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    workspace.prefer(&tools.join("bin"))
}

/// Whether the one on PATH is of this version: in a second checkout the first one's serve.
fn is_on_path(workspace: &Workspace, name: &str, version: &str) -> bool {
    let shell = &workspace.shell;
    let sub = name.trim_start_matches("cargo-");
    apt::on_path(shell, name)
        && cmd!(shell, "{name} {sub} --version")
            .quiet()
            .ignore_stderr()
            .read()
            .is_ok_and(|said| said.split_whitespace().any(|word| word == version))
}
