//! `cargo xtask test`: unit and property tests, the kernel tests on this host, and the same in a
//! VM for each kernel of the matrix. Whatever could not run is in the table with its reason.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::unistd::geteuid;

use crate::{
    build, machine, python,
    report::{self, Findings, Outcome, Place, State, Sum, Verdict},
    talk, vm,
    watch::{self, Limits, Show},
    workspace::Workspace,
};

const UNIT: &str = "unit tests";
/// The unit test that has nothing to compare with where the OCSF schemas are not at hand.
const NEEDS_SCHEMAS: &str = "every_event_is_valid_ocsf";
/// The unit test that has nothing to compare with where Python lacks the packaged schemas.
const NEEDS_PACKAGE: &str = "every_event_has_a_valid_form_in_ocsf_1_8";
/// The tests of lines that the kernel tests wrote.
const OF_REAL_RUNS: [&str; 2] = [
    "lines_of_a_real_run_are_valid_in_1_9",
    "lines_of_a_real_run_have_valid_forms_in_1_8",
];
const HOST: &str = "host";
/// The whole machines that are booted when asked for; what differs between suites is systemd's
/// version.
const MACHINES: [&str; 1] = ["bookworm"];
/// One host test at a time says nothing, and none of them is emulated.
const LIMITS: Limits = Limits {
    silence: Duration::from_secs(120),
    whole: Duration::from_secs(20 * 60),
};

/// What `cargo xtask test` takes.
#[derive(Args, Clone, Default)]
pub struct Options {
    /// Only what needs no BPF object, no root and no VM
    #[arg(long)]
    quick: bool,
    /// Boot no VM
    #[arg(long)]
    no_vm: bool,
    /// Also boot a whole machine with systemd, as `cargo xtask vm --systemd` does
    #[arg(long)]
    systemd: bool,
    /// Print everything the tests say
    #[arg(long, short)]
    verbose: bool,
}

/// Runs the tests and prints the table; the last line on stdout is the sum alone.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let mut places = Vec::new();
    if options.quick {
        places.push(unit_tests(workspace, true)?);
        places.push(not_tested(HOST, "--quick"));
        places.extend(vm::not_tested("--quick"));
        places.extend(machine::not_tested(&MACHINES, "--quick"));
    } else {
        build::set_up(workspace)?;
        places.push(unit_tests(workspace, false)?);
        in_kernels(workspace, options, &mut places)?;
    }
    let sum = report::total(&places);
    println!();
    print!("{}", report::table(&places));
    println!("{sum}");
    Ok(if sum.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The host and the VMs, which run the same static programs.
fn in_kernels(workspace: &Workspace, options: &Options, places: &mut Vec<Place>) -> Result<()> {
    if let Err(error) = build::static_programs(workspace) {
        // In the table, so that the sum counts it and the unit tests' result still shows.
        let findings = Findings::broken(&error.context("the kernel tests do not build"));
        places.push(Place {
            state: State::Ran(findings),
            ..not_tested(HOST, "")
        });
        places.extend(vm::not_tested("the kernel tests do not build"));
        places.extend(machine::not_tested(
            &MACHINES,
            "the kernel tests do not build",
        ));
        return Ok(());
    }
    places.push(host(workspace, options.verbose)?);
    if options.no_vm {
        places.extend(vm::not_tested("--no-vm"));
    } else {
        places.extend(vm::run(workspace, &vm::Options::all(options.verbose))?);
    }
    if options.no_vm || !options.systemd {
        let why = if options.no_vm {
            "--no-vm"
        } else {
            "without --systemd"
        };
        places.extend(machine::not_tested(&MACHINES, why));
    } else {
        let suites = MACHINES.map(str::to_owned);
        places.extend(machine::run(workspace, &suites, options.verbose)?);
    }
    Ok(())
}

fn not_tested(name: &str, why: &str) -> Place {
    Place {
        name: name.to_owned(),
        kernel: "-".to_owned(),
        state: State::NotTested(why.to_owned()),
        took: Duration::ZERO,
    }
}

/// The kernel tests in this machine's own kernel.
fn host(workspace: &Workspace, verbose: bool) -> Result<Place> {
    let kernel = nix::sys::utsname::uname().context("cannot tell this kernel's release")?;
    let kernel = kernel.release().to_string_lossy().into_owned();
    let mut place = not_tested(HOST, "not root");
    place.kernel = kernel;
    if geteuid().is_root() {
        talk::step("running the kernel tests on this host");
        let began = Instant::now();
        let programs = workspace.static_release();
        let mut command = Command::new(programs.join("remit-tests"));
        command
            .env("REMIT_BIN", programs.join("remit"))
            .env("REMIT_NEXT_BIN", programs.join(build::NEXT))
            .env("REMIT_POLICIES", workspace.root.join("policies"));
        let samples = workspace.target.join("samples");
        if samples.exists() {
            fs::remove_dir_all(&samples).context("cannot empty the folder of samples")?;
        }
        fs::create_dir_all(&samples).context("cannot make the folder of samples")?;
        command.env("REMIT_SAMPLES", &samples);
        let log: PathBuf = workspace.target.join("host.log");
        let show = Show {
            name: HOST,
            log: &log,
            verbose,
        };
        let findings = watch::run(command, &LIMITS, &show);
        let mut findings = findings.unwrap_or_else(|error| Findings::broken(&error));
        real_runs(workspace, &samples, &mut findings)?;
        place.state = State::Ran(findings);
        place.took = began.elapsed();
    }
    talk::note(&place.closing());
    Ok(place)
}

/// `cargo test` over everything but the kernel tests, with cargo's own output passed on.
fn unit_tests(workspace: &Workspace, skip_object: bool) -> Result<Place> {
    talk::step("running the unit and property tests");
    let began = Instant::now();
    let mut arguments = vec![
        "test",
        "--locked",
        "--workspace",
        "--exclude",
        "remit-tests",
        "--no-fail-fast",
        // What is left out of the usual build is tested as well.
        "--features",
        "remit/otlp",
    ];
    arguments.push("--");
    if geteuid().is_root() {
        // Those marked so need root; for anybody else they count as not tested.
        arguments.push("--include-ignored");
    }
    // Those come behind the kernel tests.
    arguments.extend(OF_REAL_RUNS.iter().flat_map(|test| ["--skip", *test]));
    let schemas = schemas(workspace);
    if !schemas.is_dir() {
        arguments.extend(["--skip", NEEDS_SCHEMAS]);
    }
    let python = python::with_schemas(workspace);
    if python.is_err() {
        arguments.extend(["--skip", NEEDS_PACKAGE]);
    }
    let mut cargo = Command::from(workspace.cargo(&arguments));
    cargo.envs(python.iter().map(|python| ("REMIT_PYTHON", python)));
    if skip_object {
        cargo.env("AYA_BUILD_SKIP", "1");
    }
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo test")?;
    let stream = child.stdout.take().context("cargo test has no output")?;
    let mut listener = Libtest::default();
    for line in BufReader::new(stream).split(b'\n') {
        let line = line.context("cannot read cargo test's output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        listener.line(&line);
    }
    let status = child.wait().context("cannot wait for cargo test")?;
    let mut findings = listener.0;
    let mut not_tested = |test: &str, why: String| {
        findings.sum.not_tested += 1;
        findings.verdicts.push(Verdict {
            test: test.to_owned(),
            outcome: Outcome::NotTested,
            why,
            ms: 0,
        });
    };
    if !schemas.is_dir() {
        let why = format!("no OCSF schemas at {}", schemas.display());
        not_tested(NEEDS_SCHEMAS, why);
    }
    if let Err(why) = python {
        not_tested(NEEDS_PACKAGE, format!("no packaged schemas: {why}"));
    }
    if !status.success() && findings.sum.failed == 0 {
        findings.problems.push(format!(
            "no test failed, yet cargo test ended with {status}"
        ));
    }
    if status.success() && findings.sum.ran() == 0 {
        findings
            .problems
            .push("cargo test ran no test at all".to_owned());
    }
    let place = Place {
        name: UNIT.to_owned(),
        kernel: "-".to_owned(),
        state: State::Ran(findings),
        took: began.elapsed(),
    };
    talk::note(&place.closing());
    Ok(place)
}

/// Where the schemas of OCSF 1.9.0 are, if they are there.
fn schemas(workspace: &Workspace) -> PathBuf {
    env::var_os("REMIT_OCSF_SCHEMAS")
        .map_or_else(|| workspace.root.join("../shared/ocsf"), PathBuf::from)
}

/// Holds what the kernel tests of this host have written against the schemas.
fn real_runs(workspace: &Workspace, samples: &Path, findings: &mut Findings) -> Result<()> {
    let python = python::with_schemas(workspace);
    let here = [schemas(workspace).is_dir(), python.is_ok()];
    for (test, is_here) in OF_REAL_RUNS.into_iter().zip(here) {
        let (outcome, why) = if is_here {
            let arguments = [
                "test",
                "--locked",
                "--package",
                "remit",
                "--features",
                "otlp",
                "--test",
                "real_run",
                "--",
                "--exact",
                test,
            ];
            let mut cargo = Command::from(workspace.cargo(&arguments));
            let passed = cargo
                .env("REMIT_SAMPLES", samples)
                .envs(python.iter().map(|python| ("REMIT_PYTHON", python)))
                .status()
                .context("cannot start cargo test")?
                .success();
            match passed {
                true => (Outcome::Passed, ""),
                false => (Outcome::Failed, "see its output above"),
            }
        } else {
            (Outcome::NotTested, "its schemas are not here")
        };
        match outcome {
            Outcome::Passed => findings.sum.passed += 1,
            Outcome::Failed => findings.sum.failed += 1,
            Outcome::NotTested => findings.sum.not_tested += 1,
        }
        findings.verdicts.push(Verdict {
            test: test.to_owned(),
            outcome,
            why: why.to_owned(),
            ms: 0,
        });
    }
    Ok(())
}

/// Reads what the standard test harness prints: sums from its closing lines, names and reasons
/// from the lines of single tests.
#[derive(Default)]
struct Libtest(Findings);

impl Libtest {
    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            for part in rest.split(['.', ';']) {
                let mut words = part.split_whitespace();
                let (Some(number), Some(what)) = (words.next(), words.next()) else {
                    continue;
                };
                let Ok(number) = number.parse::<u64>() else {
                    continue;
                };
                let sum: &mut Sum = &mut self.0.sum;
                match what {
                    "passed" => sum.passed += number,
                    "failed" => sum.failed += number,
                    "ignored" => sum.not_tested += number,
                    _ => {}
                }
            }
        } else if let Some((test, said)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            let (outcome, why) = match said.split_once(", ").unwrap_or((said, "")) {
                ("FAILED", _) => (Outcome::Failed, "see its output above"),
                ("ignored", "") => (Outcome::NotTested, "marked as ignored"),
                ("ignored", why) => (Outcome::NotTested, why),
                _ => return,
            };
            let (test, why) = (test.to_owned(), why.to_owned());
            self.0.verdicts.push(Verdict {
                test,
                outcome,
                why,
                ms: 0,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_reasons_are_read_from_the_harness() {
        let mut libtest = Libtest::default();
        for line in [
            "running 3 tests",
            "test policy::a ... ok",
            "test policy::b ... FAILED",
            "test policy::c ... ignored, needs root",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; \
             finished in 0.00s",
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            libtest.line(line);
        }
        assert_eq!(
            libtest.0.sum,
            Sum {
                passed: 13,
                failed: 1,
                not_tested: 1
            }
        );
        let said: Vec<_> = libtest
            .0
            .verdicts
            .iter()
            .map(|verdict| verdict.why.as_str())
            .collect();
        assert_eq!(said, ["see its output above", "needs root"]);
    }
}
