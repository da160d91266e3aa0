//! The runner. Each case runs in a process of its own (`--one`), in its own network and mount
//! namespaces, under a deadline; a hang is a failure, and the runner sweeps up behind it.
//!
//! Standard output is the report: `@@start`, `@@result` and `@@done` lines with JSON, then one
//! line for people. A case that could not be tested says why and never counts as passed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

pub mod faulty;
mod need;
mod runner;
mod samples;
pub mod sweep;

pub use need::Need;

use crate::support::{Ctx, scale};

/// What came of a case that neither failed nor panicked.
pub enum Outcome {
    /// All of its claims hold.
    Passed,
    /// Something that it needs is missing here.
    NotTested(String),
}

/// The body of a case.
pub type Body = Box<dyn Fn(&mut Ctx) -> Result<Outcome>>;

/// One case.
pub struct Case {
    /// `group::claim`.
    pub name: String,
    /// What must be there.
    pub needs: Vec<Need>,
    /// Its deadline; longer under emulation.
    pub deadline: Duration,
    /// What it does.
    pub run: Body,
}

impl Case {
    /// A case on the daemon: root, cgroup v2 and the binary must be there.
    pub fn new(name: impl Into<String>, run: impl Fn(&mut Ctx) -> Result<()> + 'static) -> Self {
        Self::with_outcome(name, move |ctx| run(ctx).map(|()| Outcome::Passed))
    }

    /// The same, for a body that may find something missing.
    pub fn with_outcome(
        name: impl Into<String>,
        run: impl Fn(&mut Ctx) -> Result<Outcome> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            needs: vec![Need::Root, Need::CgroupV2, Need::Remit],
            deadline: Duration::from_secs(40),
            run: Box::new(run),
        }
    }

    /// For a claim that shows the same on every kernel: in a VM, where all takes ten times as long,
    /// it is not tested but in the full runs.
    pub fn once(self) -> Self {
        let run = self.run;
        Self {
            run: Box::new(move |ctx| {
                if scale::emulated() && !scale::full() {
                    let why = "it does not depend on the kernel, and takes long here";
                    return Ok(Outcome::NotTested(why.to_owned()));
                }
                run(ctx)
            }),
            ..self
        }
    }

    /// Adds a need.
    pub fn needs(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }

    /// Takes the need of the binary away: the case is about the suite itself.
    pub fn without_remit(mut self) -> Self {
        self.needs.retain(|need| !matches!(need, Need::Remit));
        self
    }
}

/// Prints the names.
pub fn list(cases: &[Case]) -> Result<ExitCode> {
    for case in cases {
        println!("{}", case.name);
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the cases whose names contain one of `filters` (all, without any).
pub fn run(cases: &[Case], filters: &[&str]) -> Result<ExitCode> {
    let chosen: Vec<&Case> = cases
        .iter()
        .filter(|case| filters.is_empty() || filters.iter().any(|part| case.name.contains(part)))
        .collect();
    if chosen.is_empty() {
        bail!("no case matches {filters:?}");
    }
    runner::run(&chosen)
}

/// Runs one case in this process: exit 0 passed, 1 failed, 77 not tested; the reason is the last
/// line of standard output.
pub fn one(cases: &[Case], name: &str, unique: &str) -> Result<ExitCode> {
    let case = cases
        .iter()
        .find(|case| case.name == name)
        .with_context(|| format!("no case {name}"))?;
    for need in &case.needs {
        if let Err(missing) = need.check() {
            println!("{missing}");
            return Ok(ExitCode::from(runner::NOT_TESTED));
        }
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut ctx = Ctx::enter(unique)?;
        let outcome = (case.run)(&mut ctx);
        match &outcome {
            Ok(_) => samples::keep(&ctx)?,
            Err(_) => ctx.explain(),
        }
        outcome
    }));
    match outcome {
        Ok(Ok(Outcome::Passed)) => Ok(ExitCode::SUCCESS),
        Ok(Ok(Outcome::NotTested(why))) => {
            println!("{why}");
            Ok(ExitCode::from(runner::NOT_TESTED))
        }
        Ok(Err(error)) => {
            println!("{}", format!("{error:#}").replace('\n', " | "));
            Ok(ExitCode::FAILURE)
        }
        Err(_) => {
            println!("panicked");
            Ok(ExitCode::FAILURE)
        }
    }
}
