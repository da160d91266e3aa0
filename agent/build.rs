//! Builds the BPF objects that the daemon embeds: what enforces, and the observer beside it.
//! `AYA_BUILD_SKIP=1` leaves empty ones, so that every pure test runs on a machine without bpf-linker;
//! the loader then says `ObjectMissing`.

#![expect(
    clippy::disallowed_methods,
    reason = "a build script's variables are for the cargo that it starts"
)]

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain};

fn main() -> Result<()> {
    // A change of `[profile.release]` or of a locked version changes the object too.
    println!("cargo:rerun-if-changed=../Cargo.toml");
    println!("cargo:rerun-if-changed=../Cargo.lock");
    println!("cargo:rerun-if-env-changed=REMIT_BPF_TOOLCHAIN");

    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    // Present before the build so that a skipped one still compiles; a real build replaces them.
    if env::var_os("AYA_BUILD_SKIP").is_some_and(|skip| skip == "1" || skip == "true") {
        for name in ["agent-ebpf", "agent-ebpf-observe"] {
            let object = out.join(name);
            fs::write(&object, []).with_context(|| format!("cannot write {}", object.display()))?;
        }
    }

    // `cargo xtask` keeps the linker here, so that a plain `cargo build` works after it.
    let tools = PathBuf::from("../target/tools/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let searched = tools
        .canonicalize()
        .into_iter()
        .chain(env::split_paths(&path));
    let path = env::join_paths(searched).context("PATH cannot be extended")?;
    // SAFETY: a build script's main thread, before any other thread exists.
    unsafe { env::set_var("PATH", path) };

    // SAFETY: a build script's main thread, before any other thread exists. The variable lets the
    // child cargo use `-Z build-std` on the stable toolchain; it is set for nobody else.
    unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    // The object must not depend on who builds it. An incremental build leaves inlining to LLVM
    // alone; with rustc's own beside it the verifier follows up to twice the instructions
    // (tests/budget.toml).
    // SAFETY: a build script's main thread, before any other thread exists.
    unsafe { env::set_var("CARGO_INCREMENTAL", "1") };
    let toolchain = env::var("REMIT_BPF_TOOLCHAIN").or_else(|_| env::var("RUSTUP_TOOLCHAIN"));
    let next = env::var_os("CARGO_FEATURE_ABI_NEXT").map(|_| "abi-next");
    aya_build::build_ebpf(
        [Package {
            name: "agent-ebpf",
            root_dir: "../agent-ebpf",
            features: next.as_slice(),
            ..Package::default()
        }],
        Toolchain::Custom(toolchain.as_deref().unwrap_or("stable")),
    )
}
