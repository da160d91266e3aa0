//! What is in the program: a CycloneDX SBOM by cargo-cyclonedx, of the crates that the static target
//! takes. A serial number and the place of the checkout would make each build's another.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;
use xshell::cmd;

use super::Release;
use crate::{talk, workspace::STATIC_TARGET};

/// It writes one file into the folder of each package of the workspace, under this name.
const NAME: &str = "remit-sbom";

impl Release<'_> {
    /// Writes the SBOM.
    pub(super) fn sbom(&self, folder: &std::path::Path) -> Result<()> {
        talk::step("writing the SBOM");
        let workspace = self.workspace;
        let root = &workspace.root;
        let made: Vec<PathBuf> = ["agent", "agent-ebpf", "xtask", "tests"]
            .iter()
            .map(|member| root.join(member).join(format!("{NAME}.json")))
            .collect();
        let arguments = [
            "cyclonedx",
            "--manifest-path",
            "agent/Cargo.toml",
            "--format",
            "json",
            "--spec-version",
            "1.5",
            "--target",
            STATIC_TARGET,
            "--override-filename",
            NAME,
        ];
        let ran = workspace
            .cargo(&arguments)
            .env("SOURCE_DATE_EPOCH", &self.epoch)
            .run();
        let text = made.first().map(fs::read_to_string);
        for file in &made {
            // Not all packages need have one.
            drop(fs::remove_file(file));
        }
        ran?;
        let text = text.context("no package")?.context("there is no SBOM")?;
        let text = text.replace(&format!("file://{}", root.display()), "file:///remit");
        let mut sbom: Value = serde_json::from_str(&text).context("the SBOM is no JSON")?;
        if let Some(fields) = sbom.as_object_mut() {
            fields.shift_remove("serialNumber");
        }
        let shell = &workspace.shell;
        let at = format!("@{}", self.epoch);
        let time = cmd!(shell, "date -u -d {at} +%FT%TZ").quiet().read()?;
        if let Some(when) = sbom.pointer_mut("/metadata/timestamp") {
            *when = Value::String(time);
        }
        let (name, version) = (&self.package.name, &self.package.version);
        let path = folder.join(format!("{name}-{version}.cdx.json"));
        fs::write(&path, serde_json::to_string_pretty(&sbom)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }
}
