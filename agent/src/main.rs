//! The `remit` command.

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    remit::cli::main(env::args_os())
}
