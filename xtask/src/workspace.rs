//! Where things are, and how cargo is run. Everything that xtask makes lies below the target
//! folder, so that `cargo clean` takes it all away.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use xshell::{Cmd, Shell, cmd};

/// Variables that cargo sets for xtask itself. A build script that watches one of them would
/// otherwise run again whenever the same build is started without xtask.
const OWN: [&str; 4] = [
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
    "CARGO_PKG_NAME",
    "CARGO_PKG_VERSION",
];

/// The checkout and its build folder.
pub struct Workspace {
    /// The repository's top folder.
    pub root: PathBuf,
    /// Cargo's target folder, also when `CARGO_TARGET_DIR` names another.
    pub target: PathBuf,
    /// Runs commands in `root` and echoes them.
    pub shell: Shell,
}

impl Workspace {
    /// Finds the checkout that this xtask was built from.
    pub fn find() -> Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest
            .parent()
            .with_context(|| format!("{} has no folder above it", manifest.display()))?
            .to_owned();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => root.join(folder),
            None => root.join("target"),
        };
        let shell = Shell::new().context("cannot read the current folder")?;
        shell.change_dir(&root);
        Ok(Self {
            root,
            target,
            shell,
        })
    }

    /// The tools that xtask builds for itself.
    pub fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// Kernels, images and console logs of the VMs.
    pub fn vm(&self) -> PathBuf {
        self.target.join("vm")
    }

    /// Where a build for the static target leaves its programs.
    pub fn static_release(&self) -> PathBuf {
        self.target.join(STATIC_TARGET).join("release")
    }

    /// A cargo command with `arguments`, of the toolchain that runs xtask.
    pub fn cargo(&self, arguments: &[&str]) -> Cmd<'_> {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        OWN.iter().fold(
            cmd!(self.shell, "{cargo} {arguments...}"),
            |command, variable| command.env_remove(variable),
        )
    }

    /// Lets every later command find the programs in `folder` first.
    pub fn prefer(&self, folder: &Path) -> Result<()> {
        let path = self.shell.var_os("PATH").unwrap_or_default();
        let all = std::iter::once(folder.to_owned()).chain(env::split_paths(&path));
        let joined = env::join_paths(all)
            .with_context(|| format!("cannot put {} into PATH", folder.display()))?;
        self.shell.set_var("PATH", joined);
        Ok(())
    }
}

/// Programs for it need nothing of the machine or VM that runs them.
#[cfg(target_arch = "x86_64")]
pub const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";
/// Programs for it need nothing of the machine or VM that runs them.
#[cfg(target_arch = "aarch64")]
pub const STATIC_TARGET: &str = "aarch64-unknown-linux-musl";
