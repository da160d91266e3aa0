//! `cargo xtask dist`: what is published. A static program, a .deb, a tarball, an SBOM and their
//! checksums in target/packages, the same to the byte wherever they are built.
//!
//! What would tell builds apart is taken away: times are that of the last commit, paths of the
//! checkout, of cargo's home and of the toolchain are written as `/remit`, `/cargo` and `/rust` (by a
//! wrapper around rustc, so that the programs for the kernel get it too and no hash of a crate
//! depends on it), owners and order in archives are fixed.

mod pack;
mod page;
mod sbom;
mod tool;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Deserialize;
use xshell::{Shell, cmd};

use crate::{
    apt, build, talk,
    workspace::{STATIC_TARGET, Workspace},
};

/// Options of `cargo xtask dist`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Revision of the Debian package, for several packages of one version
    #[arg(long, value_name = "N", default_value = "1")]
    pub revision: String,
    /// Build everything a second time, in another folder, and compare
    #[arg(long)]
    pub reproduce: bool,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Made {
    /// The folder.
    pub folder: PathBuf,
    /// The Debian package in it.
    pub deb: PathBuf,
}

/// What a build of it is told.
struct Release<'w> {
    workspace: &'w Workspace,
    /// Cargo's profile of the program.
    profile: &'static str,
    /// Seconds since the Unix epoch that stand for every time.
    epoch: String,
    package: Package,
}

/// The package, as its manifest has it.
#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    metadata: Metadata,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    deb: Deb,
}

#[derive(Debug, Deserialize)]
struct Deb {
    /// Source, destination, mode.
    assets: Vec<[String; 3]>,
}

#[derive(Debug, Deserialize)]
struct Packages {
    packages: Vec<serde_json::Value>,
}

/// `cargo xtask dist`.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let made = make(workspace, &options.revision)?;
    lint(workspace, &made.deb)?;
    units(workspace)?;
    if options.reproduce {
        reproduce(workspace, options, &made)?;
    }
    let sums = fs::read_to_string(made.folder.join("SHA256SUMS"))?;
    print!("{sums}");
    Ok(ExitCode::SUCCESS)
}

/// Builds and packs all of it.
pub fn make(workspace: &Workspace, revision: &str) -> Result<Made> {
    build::set_up(workspace)?;
    tool::ensure(workspace, None)?;
    let release = Release {
        workspace,
        profile: "dist",
        epoch: epoch(&workspace.shell)?,
        package: package(workspace)?,
    };
    let folder = workspace.target.join("packages");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&folder)?;
    release.build()?;
    release.stage(&folder)?;
    let deb = release.deb(&folder, revision)?;
    release.tarball(&folder)?;
    release.sbom(&folder)?;
    checksums(workspace, &folder)?;
    talk::note(&format!("left {}", folder.display()));
    Ok(Made { folder, deb })
}

/// The Debian package alone, of the program that [`build::static_programs`] has left: the tests of the
/// package do not wait for the build that is published.
pub fn package_for_tests(workspace: &Workspace, folder: &Path) -> Result<PathBuf> {
    tool::ensure(workspace, Some(tool::PACKER))?;
    let release = Release {
        workspace,
        profile: "release",
        epoch: epoch(&workspace.shell)?,
        package: package(workspace)?,
    };
    release.stage(folder)?;
    release.deb(folder, "1")
}

/// The time of the last commit, unless the environment says another.
fn epoch(shell: &Shell) -> Result<String> {
    if let Ok(epoch) = shell.var("SOURCE_DATE_EPOCH") {
        return Ok(epoch);
    }
    cmd!(shell, "git log -1 --format=%ct")
        .quiet()
        .read()
        .context(
            "without a git checkout SOURCE_DATE_EPOCH has to say which time stands for every other",
        )
}

fn package(workspace: &Workspace) -> Result<Package> {
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--locked"];
    let text = workspace.cargo(&arguments).quiet().read()?;
    let all: Packages = serde_json::from_str(&text).context("cannot read `cargo metadata`")?;
    let ours = all
        .packages
        .into_iter()
        .find(|package| package.get("name").is_some_and(|name| name == "remit"))
        .context("there is no package `remit`")?;
    serde_json::from_value(ours).context("agent/Cargo.toml has no [package.metadata.deb]")
}

/// As cargo and Debian call the machine.
fn machine() -> &'static str {
    std::env::consts::ARCH
}

fn checksums(workspace: &Workspace, folder: &Path) -> Result<()> {
    let mut names: Vec<String> = fs::read_dir(folder)?
        .flatten()
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    let shell = workspace.shell.clone();
    shell.change_dir(folder);
    let sums = cmd!(shell, "sha256sum {names...}").quiet().read()?;
    fs::write(folder.join("SHA256SUMS"), format!("{sums}\n"))?;
    Ok(())
}

/// Debian's own check of a package, where it is installed.
fn lint(workspace: &Workspace, deb: &Path) -> Result<()> {
    let shell = &workspace.shell;
    if !apt::on_path(shell, "lintian") {
        talk::note("not tested: lintian is not installed");
        return Ok(());
    }
    talk::step("lintian");
    cmd!(shell, "lintian --fail-on error,warning --info {deb}").run()?;
    Ok(())
}

/// What the services could do if they were taken over, by systemd's own measure, in tenths: 25 is 2.5.
const EXPOSURE: &str = "--threshold=25";

/// Holds the services against [`EXPOSURE`], where systemd is installed.
fn units(workspace: &Workspace) -> Result<()> {
    let shell = &workspace.shell;
    if !apt::on_path(shell, "systemd-analyze") {
        talk::note("not tested: systemd-analyze is not installed");
        return Ok(());
    }
    talk::step("how much the services are exposed");
    for unit in ["remit-fence.service", "remit.service"] {
        let path = workspace.root.join("agent/package/systemd").join(unit);
        let said = cmd!(
            shell,
            "systemd-analyze security --no-pager --offline=yes {EXPOSURE} {path}"
        )
        .quiet()
        .ignore_stderr()
        .read()
        .with_context(|| {
            format!("{unit} is exposed too much: `systemd-analyze security` says how")
        })?;
        if let Some(figure) = said.lines().last() {
            talk::note(figure.trim_start_matches(['→', ' ']));
        }
    }
    Ok(())
}

/// Builds it all again from a copy of the checkout elsewhere, and compares to the byte.
fn reproduce(workspace: &Workspace, options: &Options, made: &Made) -> Result<()> {
    talk::step("building again in another folder");
    let place = tempfile::Builder::new()
        .prefix("remit-again-")
        .tempdir_in(&workspace.target)?;
    let root = place.path().join("another-checkout");
    fs::create_dir(&root)?;
    let shell = &workspace.shell;
    let list = cmd!(
        shell,
        "git ls-files -z --cached --others --exclude-standard"
    )
    .quiet()
    .read()?;
    for name in list.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (workspace.root.join(name), root.join(name));
        // What is deleted and not yet committed is listed all the same.
        if !from.exists() {
            continue;
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    let again = Workspace {
        target: root.join("target"),
        shell: shell.clone(),
        root,
    };
    again.shell.change_dir(&again.root);
    again.shell.set_var("SOURCE_DATE_EPOCH", epoch(shell)?);
    again.prefer(&workspace.tools().join("bin"))?;
    let second = make(&again, &options.revision)?;
    let sums = |folder: &Path| fs::read_to_string(folder.join("SHA256SUMS"));
    let (first, second) = (sums(&made.folder)?, sums(&second.folder)?);
    if first != second {
        bail!("the second build differs:\n{first}\nand\n{second}");
    }
    talk::note("the second build is the same to the byte");
    Ok(())
}

impl Release<'_> {
    /// Where the build leaves its program; what is packed is gathered in `package/` below.
    fn built(&self) -> PathBuf {
        self.workspace.target.join(STATIC_TARGET).join(self.profile)
    }

    fn staged(&self) -> PathBuf {
        self.built().join("package")
    }

    /// Builds the static program.
    fn build(&self) -> Result<()> {
        talk::step("building the static program");
        let workspace = self.workspace;
        let arguments = [
            "build",
            "--locked",
            "--profile",
            self.profile,
            "--target",
            STATIC_TARGET,
            "-p",
            "remit",
            "--bin",
            "remit",
        ];
        workspace
            .cargo(&arguments)
            .env("RUSTC_WRAPPER", self.wrapper()?)
            .env("SOURCE_DATE_EPOCH", &self.epoch)
            .env("CARGO_INCREMENTAL", "0")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .run()?;
        Ok(())
    }

    /// A wrapper that has rustc write other paths than it reads.
    fn wrapper(&self) -> Result<PathBuf> {
        let shell = &self.workspace.shell;
        let sysroot = cmd!(shell, "rustc --print sysroot").quiet().read()?;
        let cargo = match shell.var("CARGO_HOME") {
            Ok(home) => PathBuf::from(home),
            Err(_) => PathBuf::from(shell.var("HOME").context("neither CARGO_HOME nor HOME")?)
                .join(".cargo"),
        };
        let path = self.workspace.target.join("dist-rustc");
        let quoted =
            |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
        let script = format!(
            "#!/bin/sh\nexec \"$@\" --remap-path-prefix={}=/cargo --remap-path-prefix={}=/rust \
             --remap-path-prefix={}=/remit\n",
            quoted(&cargo),
            quoted(Path::new(&sysroot)),
            quoted(&self.workspace.root),
        );
        fs::create_dir_all(&self.workspace.target)?;
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }
}
