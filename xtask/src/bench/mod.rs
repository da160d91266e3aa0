//! `cargo xtask bench`: Remit beside no fence at all, beside empty programs, and beside other ways
//! to do the same, in one run. What it measures and how is in docs/performance.md; the processes
//! that are timed are in tests/bench.

mod docs;
mod growth;
mod matrix;
mod measure;
mod plot;
mod stats;
mod table;
mod targets;
mod user;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use nix::unistd::geteuid;
use serde::Serialize;

use self::{
    measure::{Bench, Effort},
    stats::Ratio,
};
use crate::{apt, build, talk, workspace::Workspace};

/// An A/A ratio farther from 1 than this voids what was measured beside it.
const VOID: f64 = 0.01;
/// A measurement that is void is made anew so often.
const ATTEMPTS: u32 = 3;

/// What `cargo xtask bench` takes.
#[derive(Args, Clone)]
pub struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// Few and short slices, to see that everything works; says nothing about speed
    #[arg(long, global = true)]
    quick: bool,
    /// Write the rows here, as a JSON array
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    /// Measure only this workload; may be given more than once
    #[arg(long, value_name = "NAME", global = true)]
    workload: Vec<String>,
    /// Leave docs/ as it is (it is written only by a full run that is not void)
    #[arg(long, global = true)]
    no_docs: bool,
}

#[derive(Clone, Copy, Subcommand)]
enum What {
    /// How cost grows with agents, prefixes and nesting
    Growth,
    /// The user side: starts, reloads, memory, floods, at 100,000 prefixes and 1,000 agents
    User,
}

/// One result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub workload: &'static str,
    /// Around what.
    pub design: &'static str,
    /// Destinations in the scope.
    pub size: u32,
    /// Median over the cycles of its cost by that of the base.
    pub ratio: f64,
    /// Lower end of the 95 % interval.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

// === impl Options ===

impl Options {
    /// `--quick`.
    pub fn quick() -> Self {
        Self {
            what: None,
            quick: true,
            json: None,
            workload: Vec::new(),
            no_docs: true,
        }
    }
}

/// Runs the benchmark.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    if !geteuid().is_root() {
        bail!("the benchmark attaches programs to cgroups of its own: run it as root");
    }
    check_workloads(&options.workload)?;
    if let Some(What::User) = options.what {
        return user::command(workspace, options);
    }
    build::static_programs(workspace)?;
    let object = measure::object(workspace)?;
    if let Err(error) = apt::ensure(
        &workspace.shell,
        "nft",
        &["nftables"],
        "to compare with nftables",
    ) {
        talk::note(&format!("nftables will not be measured: {error:#}"));
    }
    let effort = if options.quick {
        Effort::QUICK
    } else {
        Effort::FULL
    };
    let bench = Bench {
        workspace,
        object,
        effort,
    };
    let write_docs = !options.quick && !options.no_docs && options.workload.is_empty();
    match options.what {
        None | Some(What::User) => ratios(&bench, options, write_docs),
        Some(What::Growth) => grow(&bench, options, write_docs),
    }
}

fn check_workloads(names: &[String]) -> Result<()> {
    for name in names {
        if !matrix::WORKLOADS.contains(&name.as_str()) {
            bail!(
                "no workload `{name}`; there are: {}",
                matrix::WORKLOADS.join(", ")
            );
        }
    }
    Ok(())
}

fn ratios(bench: &Bench<'_>, options: &Options, write_docs: bool) -> Result<ExitCode> {
    let measured = matrix::run(bench, &options.workload)?;
    print!("{}", table::ratios(&measured));
    print!("{}", table::programs(&measured));
    if !options.quick {
        print!("{}", targets::text(&measured));
    }
    if let Some(path) = &options.json {
        json(path, &measured.rows())?;
    }
    picture(bench.workspace, "ratios", &plot::ratios(&measured))?;
    let void = measured.void();
    let code = close(&void, options.quick);
    if write_docs && void.is_empty() {
        docs::ratios(bench.workspace, &measured)?;
    }
    Ok(code)
}

fn grow(bench: &Bench<'_>, options: &Options, write_docs: bool) -> Result<ExitCode> {
    let grown = growth::run(bench, &options.workload)?;
    print!("{}", table::growth(&grown));
    if !options.quick {
        print!("\n{}", table::bounds(&grown, ""));
    }
    if let Some(path) = &options.json {
        json(path, &grown.rows())?;
    }
    picture(bench.workspace, "growth", &plot::growth(&grown))?;
    let void = grown.void();
    let code = close(&void, options.quick);
    if write_docs && void.is_empty() {
        docs::growth(bench.workspace, &grown)?;
    }
    Ok(code)
}

/// Says what is void. A quick run may be.
fn close(void: &[String], quick: bool) -> ExitCode {
    println!();
    for what in void {
        println!("VOID: {what}");
    }
    if quick {
        println!("--quick: this shows that everything works, and nothing about speed");
    } else if !void.is_empty() {
        println!("the run is void; docs/ is left as it is");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The plot of this run, also of one that does not go into docs/.
fn picture(workspace: &Workspace, name: &str, svg: &str) -> Result<()> {
    let path = workspace.target.join("bench").join(format!("{name}.svg"));
    fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    talk::note(&format!("plotted in {}", path.display()));
    Ok(())
}

/// One row a line, in one array.
fn json<T: Serialize>(path: &PathBuf, rows: &[T]) -> Result<()> {
    let mut lines = Vec::new();
    for row in rows {
        lines.push(serde_json::to_string(row)?);
    }
    let text = format!("[\n{}\n]\n", lines.join(",\n"));
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// To the fourth digit: no run is better than that.
fn rounded(number: f64) -> f64 {
    (number * 10_000.0).round() / 10_000.0
}

/// Why a pair of equals makes what stands beside it void; nothing if it does not.
fn void_by(aa: &Ratio) -> Option<String> {
    ((aa.median - 1.0).abs() > VOID).then(|| {
        format!(
            "A/A is {:.3} and should be 1: too much else is going on on this machine",
            aa.median
        )
    })
}
