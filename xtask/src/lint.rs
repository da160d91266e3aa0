//! What can be told without running anything: format, clippy for the host and for the BPF target,
//! the layering of the daemon's modules, and names that the kernel would cut.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use xshell::cmd;

use crate::{apt, build, layers, talk, workspace::Workspace};

/// The kernel keeps 16 bytes of a program's or map's name, the last of them zero.
const NAME_BYTES: usize = 15;
const BPF_TARGET: &str = "bpfel-unknown-none";

/// A check by name; it fails with what it found.
type Check = (&'static str, fn(&Workspace) -> Result<()>);

const CHECKS: [Check; 6] = [
    ("format", format),
    ("layering", layering),
    ("names in the kernel", names),
    ("clippy", clippy),
    ("clippy for BPF", clippy_bpf),
    ("dependencies", dependencies),
];

/// `cargo xtask lint`: runs every check, then names those that failed.
pub fn command(workspace: &Workspace) -> Result<()> {
    build::add_component(workspace, "rustfmt", "bin/rustfmt")?;
    build::add_component(workspace, "clippy", "bin/cargo-clippy")?;
    build::set_up(workspace)?;
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        talk::step(name);
        if let Err(error) = check(workspace) {
            talk::failure(&error);
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

fn format(workspace: &Workspace) -> Result<()> {
    Ok(workspace.cargo(&["fmt", "--all", "--check"]).run()?)
}

fn clippy(workspace: &Workspace) -> Result<()> {
    let arguments = [
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    // The object's bytes do not matter to clippy, and building them takes longest.
    workspace
        .cargo(&arguments)
        .env("AYA_BUILD_SKIP", "1")
        .run()?;
    // What the usual build leaves out.
    let mut with_features = vec!["clippy", "--features", "remit/otlp"];
    with_features.extend(arguments.iter().skip(1));
    Ok(workspace
        .cargo(&with_features)
        .env("AYA_BUILD_SKIP", "1")
        .run()?)
}

/// The host's clippy sees an empty `main` where the hooks are.
fn clippy_bpf(workspace: &Workspace) -> Result<()> {
    // A folder of its own: `RUSTC_BOOTSTRAP` makes other builds of the same crates stale.
    let target = workspace.target.join("lint");
    let target = target
        .to_str()
        .with_context(|| format!("{} is not UTF-8", target.display()))?;
    let arguments = [
        "clippy",
        "--locked",
        "-p",
        "agent-ebpf",
        "--features",
        "bench",
        "--target",
        BPF_TARGET,
        "--target-dir",
        target,
        "-Z",
        "build-std=core",
        "--release",
        "--",
        "-D",
        "warnings",
    ];
    let flags = format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    Ok(workspace
        .cargo(&arguments)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .run()?)
}

fn dependencies(workspace: &Workspace) -> Result<()> {
    if !apt::on_path(&workspace.shell, "cargo-deny") {
        talk::note("not checked: cargo-deny is not installed");
        return Ok(());
    }
    Ok(cmd!(workspace.shell, "cargo-deny check").run()?)
}

fn layering(workspace: &Workspace) -> Result<()> {
    report(layers::check(&workspace.root)?)
}

fn names(workspace: &Workspace) -> Result<()> {
    let mut findings = Vec::new();
    let source = workspace.root.join("agent-ebpf/src");
    let mut files = sources(&source.join("kernel"))?;
    files.extend(sources(&source.join("observe"))?);
    files.extend(sources(&source.join("bench"))?);
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for (line, name) in kernel_names(&text) {
            if name.len() > NAME_BYTES {
                let length = name.len();
                let file = file.display();
                findings.push(format!(
                    "{file}:{line}: `{name}` has {length} bytes, of 15 kept"
                ));
            }
        }
    }
    report(findings)
}

fn report(findings: Vec<String>) -> Result<()> {
    match findings.as_slice() {
        [] => Ok(()),
        _ => bail!("{}", findings.join("\n       ")),
    }
}

/// Every Rust file below `folder`, in a fixed order.
pub fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot list {}", folder.display()))?;
    for path in entries.into_iter().map(|entry| entry.path()) {
        if path.is_dir() {
            files.extend(sources(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Names under which programs and maps are loaded, with their lines: the attribute's own `name`,
/// else that of the item below it.
fn kernel_names(text: &str) -> Vec<(usize, String)> {
    const ATTRIBUTES: [&str; 11] = [
        "#[map",
        "#[btf_map",
        "#[cgroup_",
        "#[lsm",
        "#[tracepoint",
        "#[raw_tracepoint",
        "#[btf_tracepoint",
        "#[fentry",
        "#[fexit",
        "#[kprobe",
        "#[sock_ops",
    ];
    let mut names = Vec::new();
    let mut awaited = false;
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if ATTRIBUTES
            .iter()
            .any(|attribute| line.starts_with(attribute))
        {
            let given = line
                .split_once("name = \"")
                .and_then(|(_, rest)| rest.split_once('"'));
            awaited = given.is_none();
            names.extend(given.map(|(name, _)| (number, name.to_owned())));
        } else if awaited
            && let Some((_, rest)) = line
                .split_once("fn ")
                .or_else(|| line.split_once("static "))
        {
            let rest = rest.trim_start_matches("mut ");
            let end = rest.find(|character: char| !character.is_alphanumeric() && character != '_');
            names.push((
                number,
                rest.split_at(end.unwrap_or(rest.len())).0.to_owned(),
            ));
            awaited = false;
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_attribute_or_the_item() {
        let text = "#[map(name = \"rows\")]\npub static ROWS: A = A;\n\
                    #[map]\nstatic mut COUNTERS_OF_ALL: A = A;\n\
                    #[cgroup_skb(egress)]\npub fn remit_egress(ctx: C) -> i32 {\n}\n\
                    fn helper_with_a_long_name() {}\n";
        let names = kernel_names(text);
        assert_eq!(
            names,
            [
                (1, "rows".to_owned()),
                (4, "COUNTERS_OF_ALL".to_owned()),
                (6, "remit_egress".to_owned()),
            ]
        );
    }
}
