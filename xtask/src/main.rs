//! Set-up, builds, tests and VMs of Remit, as commands. A person and CI run the same ones.

mod apt;
mod bpf_linker;
mod build;
mod ci;
mod initramfs;
mod kernels;
mod layers;
mod lint;
mod report;
mod talk;
mod test;
mod vm;
mod watch;
mod workspace;

use std::process::ExitCode;

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
    /// Boot Debian kernels in QEMU and run the kernel tests in each
    Vm(vm::Options),
    /// Run unit tests, the kernel tests on this host, and the same in a VM for each kernel
    Test(test::Options),
    /// Check format, clippy, layering and names
    Lint,
    /// What CI runs: lint, then test
    Ci,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = Workspace::find().and_then(|workspace| match args.command {
        Command::Build => build::command(&workspace).map(|()| ExitCode::SUCCESS),
        Command::Vm(options) => vm::command(&workspace, &options),
        Command::Test(options) => test::command(&workspace, &options),
        Command::Lint => lint::command(&workspace).map(|()| ExitCode::SUCCESS),
        Command::Ci => ci::command(&workspace),
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            talk::failure(&error);
            ExitCode::FAILURE
        }
    }
}
