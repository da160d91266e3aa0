//! The suite: black-box tests of the `remit` binary on a real kernel, by its contract (command
//! line, registry, logs) alone. One static binary that is the runner, each case's process, and
//! the actors inside the fence: a VM needs nothing else.
//!
//! `remit-tests [--list] [FILTER…]`; see README.md.

use std::process::ExitCode;

mod actor;
mod bench;
mod budget;
mod bypass;
mod daemon;
mod evidence;
mod harness;
mod kernel;
mod machine;
mod names;
mod never_open;
mod proof;
mod support;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["actor"] => actor::serve(),
        ["probe", orders] => actor::probe(orders),
        ["zone", spec] => names::zone::serve(spec),
        ["generate", plan] => actor::traffic::generator::serve(plan),
        ["listen", spots] => actor::traffic::ear::serve(spots),
        ["daemon-with", object] => daemon::faults::daemon_with(object),
        ["exit", code] => code
            .parse::<u8>()
            .map(ExitCode::from)
            .map_err(anyhow::Error::from),
        ["bench", spec] => bench::command(&["bench-run", spec]),
        ["bench-run", spec, unique] => bench::run(spec, unique),
        ["bench-user", effort] => bench::command(&["bench-user-run", effort]),
        ["bench-user-run", effort, unique] => bench::user::run(effort, unique),
        ["machine"] => machine::drive(),
        ["machine-agent", name] => machine::agent::serve(name),
        ["machine-container", name] => machine::agent::contain(name),
        ["machine-ear"] => machine::ear::serve(),
        ["now"] => bench::user::now(),
        ["bench-worker", cpu] => bench::worker::serve(cpu),
        ["--list"] => harness::list(&cases()),
        ["--one", name, unique] => harness::one(&cases(), name, unique),
        filters if filters.iter().all(|filter| !filter.starts_with('-')) => {
            harness::run(&cases(), filters)
        }
        _ => {
            eprintln!("usage: remit-tests [--list] [FILTER…]");
            return ExitCode::from(2);
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("remit-tests: {error:#}");
        ExitCode::FAILURE
    })
}

/// All cases, in the order in which they run.
fn cases() -> Vec<harness::Case> {
    let mut cases = harness::faulty::cases();
    cases.extend(kernel::cases());
    cases.extend(names::cases());
    cases.extend(bypass::cases());
    cases.extend(daemon::cases());
    cases.extend(evidence::cases());
    cases.extend(never_open::cases());
    cases.extend(proof::cases());
    cases.extend(budget::cases());
    cases
}
