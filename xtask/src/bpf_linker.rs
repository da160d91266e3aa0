//! bpf-linker, which links the kernel programs. It must read the bitcode that rustc writes, so
//! its LLVM may not be older than rustc's. The one on PATH is used if that can be shown; else one
//! is built that links to the toolchain's own LLVM, so that no LLVM need be installed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use xshell::cmd;

use crate::{apt, build::Rust, talk, workspace::Workspace};

const NAME: &str = "bpf-linker";
/// The release that is built here.
const VERSION: &str = "0.13.0";
/// The LLVM majors that this release can be built for, by its `llvm-NN` features.
const LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Makes sure that later commands find a bpf-linker that fits `rust`.
pub fn ensure(workspace: &Workspace, rust: &Rust) -> Result<()> {
    let shell = &workspace.shell;
    let tools = workspace.tools();
    let program = tools.join("bin").join(NAME);
    let stamp = tools.join("bpf-linker.stamp");
    // Another toolchain has another LLVM, under another name or at another place.
    let built_for = format!("{NAME} {VERSION}\n{}\n{}\n", rust.version, rust.sysroot);
    let ours = fs::read_to_string(&stamp).is_ok_and(|text| text == built_for)
        && cmd!(shell, "{program} --version")
            .quiet()
            .ignore_stdout()
            .run()
            .is_ok();
    if ours {
        return workspace.prefer(&tools.join("bin"));
    }
    if apt::on_path(shell, NAME) {
        match judge(workspace, rust) {
            Ok(()) => return Ok(()),
            Err(why) => talk::note(&format!("not using the {NAME} on PATH: {why:#}")),
        }
    }
    build(workspace, rust, &tools)?;
    fs::write(&stamp, built_for).with_context(|| format!("cannot write {}", stamp.display()))?;
    workspace.prefer(&tools.join("bin"))
}

/// Whether the bpf-linker on PATH reads what `rust` writes; the error says why not.
fn judge(workspace: &Workspace, rust: &Rust) -> Result<()> {
    let shell = &workspace.shell;
    let said = cmd!(shell, "{NAME} --version")
        .quiet()
        .ignore_stderr()
        .read()?;
    let path = shell.var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|folder| folder.join(NAME))
        .find(|program| program.is_file())
        .context("it vanished")?;
    let libraries = cmd!(shell, "ldd {program}")
        .quiet()
        .ignore_stderr()
        .ignore_status()
        .read()?;
    match llvm_in(&libraries) {
        Some(llvm) if llvm >= rust.llvm => Ok(()),
        Some(llvm) => bail!(
            "`{said}` uses LLVM {llvm}, and rustc writes for {}",
            rust.llvm
        ),
        None => bail!("`{said}` does not tell which LLVM it contains"),
    }
}

/// The major version in the name of an LLVM library: `libLLVM.so.22.1-…` or `libLLVM-22.so`.
fn llvm_in(libraries: &str) -> Option<u32> {
    let (_, name) = libraries.split_once("libLLVM")?;
    let name = name
        .strip_prefix(".so.")
        .or_else(|| name.strip_prefix('-'))?;
    let digits: String = name.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn build(workspace: &Workspace, rust: &Rust, tools: &Path) -> Result<()> {
    let llvm = rust.llvm;
    if !LLVM.contains(&llvm) {
        bail!(
            "rustc uses LLVM {llvm}, and {NAME} {VERSION} can be built for {} to {} only: put a \
             {NAME} that reads LLVM {llvm} into PATH, or use another toolchain",
            LLVM.start(),
            LLVM.end()
        );
    }
    talk::step(&format!(
        "building {NAME} {VERSION} with rustc's own LLVM {llvm} (about a minute)"
    ));
    let prefix = link_llvm(&rust.sysroot, &tools.join("llvm"))?;
    let work = tools.join("build");
    let feature = format!("llvm-{llvm}");
    let root = tools
        .to_str()
        .with_context(|| format!("{} is not UTF-8", tools.display()))?;
    let target = work
        .to_str()
        .with_context(|| format!("{} is not UTF-8", work.display()))?;
    let package = format!("{NAME}@{VERSION}");
    let arguments = [
        "install",
        &package,
        "--locked",
        "--force",
        "--no-default-features",
        "--features",
        &feature,
        "--root",
        root,
        "--target-dir",
        target,
    ];
    workspace
        .cargo(&arguments)
        .env("LLVM_PREFIX", &prefix)
        .run()?;
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}

/// Makes a folder that looks like an installed LLVM. It stays: the linker's rpath points into it.
fn link_llvm(sysroot: &str, prefix: &Path) -> Result<PathBuf> {
    let from = Path::new(sysroot).join("lib");
    let library = fs::read_dir(&from)
        .with_context(|| format!("cannot list {}", from.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"libLLVM.so."))
        })
        .with_context(|| format!("the toolchain has no libLLVM.so.* in {}", from.display()))?;
    let folder = prefix.join("lib");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Its own name is what programs ask for at run time; without `libLLVM.so` none can be linked.
    let own = library.file_name().unwrap_or_default();
    for name in [own, "libLLVM.so".as_ref()] {
        let link = folder.join(name);
        symlink(&library, &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    Ok(prefix.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_is_read_from_either_library_name() {
        let rust = "\tlibLLVM.so.22.1-rust-1.95.0-stable => /l/libLLVM.so.22.1 (0x0)";
        assert_eq!(llvm_in(rust), Some(22));
        assert_eq!(
            llvm_in("\tlibLLVM-19.so.1 => /usr/lib/libLLVM-19.so.1"),
            Some(19)
        );
        assert_eq!(llvm_in("\tlibc.so.6 => /lib/libc.so.6"), None);
        assert_eq!(llvm_in("\tlibLLVM.so => /l/libLLVM.so"), None);
    }

    #[test]
    fn the_linked_llvm_has_both_names() {
        let folder = tempfile::tempdir().unwrap();
        let sysroot = folder.path().join("rust");
        fs::create_dir_all(sysroot.join("lib")).unwrap();
        let library = sysroot.join("lib/libLLVM.so.22.1-rust-1.95.0-stable");
        fs::write(&library, "").unwrap();
        let prefix = folder.path().join("llvm");
        // The second time replaces the first.
        for _ in 0..2 {
            link_llvm(sysroot.to_str().unwrap(), &prefix).unwrap();
        }
        for name in ["libLLVM.so", "libLLVM.so.22.1-rust-1.95.0-stable"] {
            assert_eq!(
                fs::read_link(prefix.join("lib").join(name)).unwrap(),
                library
            );
        }
    }
}
