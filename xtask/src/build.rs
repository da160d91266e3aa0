//! Set-up and the builds that several commands share.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use xshell::cmd;

use crate::{
    apt, bpf_linker, talk,
    workspace::{STATIC_TARGET, Workspace},
};

/// `cargo xtask build`.
pub fn command(workspace: &Workspace) -> Result<()> {
    set_up(workspace)?;
    daemon(workspace)
}

/// Builds target/release/remit.
pub fn daemon(workspace: &Workspace) -> Result<()> {
    talk::step("building the daemon");
    workspace
        .cargo(&["build", "--locked", "--release", "-p", "remit"])
        .run()?;
    talk::note(&format!(
        "left {}",
        workspace.target.join("release/remit").display()
    ));
    Ok(())
}

/// The daemon of the next ABI version, beside the static programs: for tests of migration.
pub const NEXT: &str = "remit-next";

/// Builds the programs that the VMs and the host tests run, in one go: the same build serves all.
pub fn static_programs(workspace: &Workspace) -> Result<()> {
    set_up(workspace)?;
    next_daemon(workspace)?;
    talk::step("building the static daemon and the kernel tests");
    let arguments = [
        "build",
        "--locked",
        "--release",
        "--target",
        STATIC_TARGET,
        "-p",
        "remit",
        "-p",
        "remit-tests",
    ];
    workspace.cargo(&arguments).run()?;
    Ok(())
}

/// Builds [`NEXT`]. Cargo keeps both daemons' parts apart by their features and puts the one built
/// last in place, so this comes first, and neither makes the other stale.
fn next_daemon(workspace: &Workspace) -> Result<()> {
    talk::step("building the daemon of the next ABI version");
    let arguments = [
        "build",
        "--locked",
        "--release",
        "--target",
        STATIC_TARGET,
        "-p",
        "remit",
        "--features",
        "abi-next",
    ];
    workspace.cargo(&arguments).run()?;
    let programs = workspace.static_release();
    let (from, to) = (programs.join("remit"), programs.join(NEXT));
    fs::copy(&from, &to).with_context(|| format!("cannot make {}", to.display()))?;
    Ok(())
}

/// Everything that a build needs and a machine with rustup's stable toolchain may lack. What is
/// there is used as it is; when nothing is missing this says nothing.
pub fn set_up(workspace: &Workspace) -> Result<()> {
    let shell = &workspace.shell;
    apt::ensure(shell, "cc", &["gcc", "libc6-dev"], "to link programs")?;
    let rust = Rust::of(workspace)?;
    add_component(
        workspace,
        "rust-src",
        "lib/rustlib/src/rust/library/core/src/lib.rs",
    )?;
    if !Path::new(&rust.sysroot)
        .join("lib/rustlib")
        .join(STATIC_TARGET)
        .join("lib")
        .exists()
    {
        rustup(workspace, ["target", STATIC_TARGET])?;
    }
    bpf_linker::ensure(workspace, &rust)
}

/// Adds a component of the toolchain unless its `file`, below the toolchain's folder, is there.
pub fn add_component(workspace: &Workspace, component: &str, file: &str) -> Result<()> {
    if Path::new(&Rust::of(workspace)?.sysroot).join(file).exists() {
        return Ok(());
    }
    rustup(workspace, ["component", component])
}

fn rustup(workspace: &Workspace, [kind, what]: [&str; 2]) -> Result<()> {
    let shell = &workspace.shell;
    if !apt::on_path(shell, "rustup") {
        bail!(
            "the toolchain lacks {what}, and there is no rustup to add it: see https://rustup.rs"
        );
    }
    talk::step(&format!("adding the {kind} {what} to the toolchain"));
    cmd!(shell, "rustup {kind} add {what}").run()?;
    Ok(())
}

/// The compiler that builds everything here.
pub struct Rust {
    /// All that `rustc -vV` says.
    pub version: String,
    /// The major version of its LLVM.
    pub llvm: u32,
    /// Its folder.
    pub sysroot: String,
}

impl Rust {
    fn of(workspace: &Workspace) -> Result<Self> {
        let shell = &workspace.shell;
        let version = cmd!(shell, "rustc -vV").quiet().read()?;
        let llvm = version
            .lines()
            .find_map(|line| {
                line.strip_prefix("LLVM version: ")?
                    .split('.')
                    .next()?
                    .parse()
                    .ok()
            })
            .with_context(|| format!("`rustc -vV` names no LLVM version: {version}"))?;
        let sysroot = cmd!(shell, "rustc --print sysroot").quiet().read()?;
        Ok(Self {
            version,
            llvm,
            sysroot,
        })
    }
}
