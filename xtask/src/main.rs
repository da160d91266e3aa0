//! Set-up, builds, tests and VMs of Remit, as commands. A person and CI run the same ones.

mod apt;
mod bench;
mod bpf_linker;
mod build;
mod ci;
mod demo;
mod dist;
mod initramfs;
mod kernels;
mod layers;
mod lint;
mod machine;
mod python;
mod report;
mod talk;
mod test;
mod vm;
mod watch;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Builds and tests Remit. Each command sets up what it needs and reuses what is there.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Set up the toolchain and bpf-linker, then leave the daemon in target/release/remit
    Build,
    /// Build, then show an agent inside its scope and what it is refused
    Demo(demo::Options),
    /// Boot Debian kernels in QEMU and run the kernel tests in each, or whole Debian machines
    Vm(vm::Options),
    /// Run unit tests, the kernel tests on this host, and the same in a VM for each kernel
    Test(test::Options),
    /// Measure what Remit costs, beside no fence, empty programs and other designs
    Bench(bench::Options),
    /// Make what is published: a static program, a .deb, a tarball, an SBOM, checksums
    Dist(dist::Options),
    /// Check format, clippy, layering and names
    Lint,
    /// What CI runs: lint, then test
    Ci,
    /// What the demo runs inside the fence
    #[command(hide = true)]
    DemoAgent(demo::AgentOptions),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        // It may run as another user, and where the checkout is out of reach.
        Command::DemoAgent(options) => demo::agent_command(&options),
        command => Workspace::find().and_then(|workspace| run(&workspace, command)),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            talk::failure(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(workspace: &Workspace, command: Command) -> Result<ExitCode> {
    match command {
        Command::Build => build::command(workspace).map(|()| ExitCode::SUCCESS),
        Command::Demo(options) => demo::command(workspace, &options),
        Command::Vm(options) => vm::command(workspace, &options),
        Command::Test(options) => test::command(workspace, &options),
        Command::Bench(options) => bench::command(workspace, &options),
        Command::Dist(options) => dist::command(workspace, &options),
        Command::Lint => lint::command(workspace).map(|()| ExitCode::SUCCESS),
        Command::Ci => ci::command(workspace),
        Command::DemoAgent(options) => demo::agent_command(&options),
    }
}
