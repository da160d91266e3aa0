//! The package on a whole machine with systemd: installed as the README says, then held to what it
//! promises over restarts, upgrades, crashes, power cuts and new boots, and removed.
//!
//! `remit-tests machine` runs on each boot, takes up where it was, and prints the report on the
//! console. `@@reboot` says that the machine is about to end and must be started again, `@@cut` that
//! it must be killed at once and started again. Cases build on each other: what is installed,
//! registered and running stays for those that follow.

use std::{
    fs,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub mod agent;
mod agents;
mod boot;
pub mod ear;
mod install;
mod leave;
mod life;
mod system;
mod users;

const CONSOLE: &str = "/dev/console";
const STATE: &str = "/var/lib/remit-check/state.json";

/// What the driver does next.
enum Step {
    /// A claim; the text is what it measured.
    Case(&'static str, fn() -> Result<String>),
    /// The same, without which nothing that follows means anything.
    Foundation(&'static str, fn() -> Result<String>),
    /// An orderly new start, after a change.
    Reboot(fn() -> Result<()>),
    /// The power goes while this runs.
    Cut(fn() -> Result<()>),
}

/// Where the driver is, on disk.
#[derive(Debug, Default, Deserialize, Serialize)]
struct State {
    /// The step to come.
    next: usize,
    passed: u64,
    failed: u64,
    not_tested: u64,
    /// Why the rest is not tested.
    broken: Option<String>,
}

fn steps() -> Vec<Step> {
    [
        install::steps(),
        agents::steps(),
        users::steps(),
        life::steps(),
        boot::steps(),
        leave::steps(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `remit-tests machine`. Whatever comes of it, the machine ends: one that stays up is a hang for
/// its host.
pub fn drive() -> Result<ExitCode> {
    let end = go_on();
    if let Err(error) = &end {
        console(&format!("the driver gave up: {error:#}"));
    }
    system::sh("systemctl --no-block poweroff")?;
    end.map(|()| ExitCode::SUCCESS)
}

/// Takes the steps that are left.
fn go_on() -> Result<()> {
    let mut state = State::read()?;
    let steps = steps();
    while let Some(step) = steps.get(state.next) {
        state.next += 1;
        match step {
            Step::Case(name, run) => case(&mut state, name, *run, false)?,
            Step::Foundation(name, run) => case(&mut state, name, *run, true)?,
            // Nothing that follows is tested.
            Step::Reboot(_) | Step::Cut(_) if state.broken.is_some() => {}
            Step::Reboot(change) => {
                if let Err(error) = change() {
                    state.broken = Some(format!("a new boot could not be prepared: {error:#}"));
                    state.failed += 1;
                    report("preparation", "failed", &format!("{error:#}"), 0);
                }
                state.write()?;
                console("@@reboot");
                system::sh("systemctl --no-block reboot")?;
                sleep(Duration::from_secs(300));
                bail!("the machine did not reboot");
            }
            Step::Cut(run) => {
                state.write()?;
                run()?;
                console("@@cut");
                sleep(Duration::from_secs(300));
                bail!("the power did not go");
            }
        }
    }
    let State {
        passed,
        failed,
        not_tested,
        ..
    } = state;
    let sum = json!({ "passed": passed, "failed": failed, "not_tested": not_tested });
    console(&format!("@@done {sum}"));
    Ok(())
}

fn case(
    state: &mut State,
    name: &str,
    run: fn() -> Result<String>,
    foundation: bool,
) -> Result<()> {
    let name = format!("machine::{name}");
    console(&format!("@@start {}", json!({ "test": name })));
    let began = Instant::now();
    let (outcome, why) = match &state.broken {
        Some(broken) => {
            state.not_tested += 1;
            ("not_tested", broken.clone())
        }
        None => match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(said)) => {
                state.passed += 1;
                ("passed", said)
            }
            ended => {
                state.failed += 1;
                system::explain();
                if foundation {
                    state.broken = Some(format!("{name} failed"));
                }
                match ended {
                    Ok(Err(error)) => ("failed", format!("{error:#}").replace('\n', " | ")),
                    _ => ("failed", "panicked".to_owned()),
                }
            }
        },
    };
    let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    // On disk before it is told: a case is never told twice.
    state.write()?;
    report(&name, outcome, &why, ms);
    Ok(())
}

fn report(test: &str, outcome: &str, why: &str, ms: u64) {
    let result = json!({ "test": test, "outcome": outcome, "why": why, "ms": ms });
    console(&format!("@@result {result}"));
}

/// One line on the console. The kernel may write there as well, so it begins on a line of its own.
fn console(line: &str) {
    let text = format!("\n{line}\n");
    let written = fs::OpenOptions::new()
        .write(true)
        .open(CONSOLE)
        .and_then(|mut console| console.write_all(text.as_bytes()));
    if let Err(error) = written {
        eprintln!("cannot write to {CONSOLE}: {error}: {line}");
    }
}

// === impl State ===

impl State {
    /// Of the boots before; the first has none.
    fn read() -> Result<Self> {
        match fs::read_to_string(STATE) {
            Ok(text) => serde_json::from_str(&text).context("the driver's own state"),
            Err(_) => Ok(Self::default()),
        }
    }

    /// Written beside, synced, renamed, and the folder synced: a power cut comes when it likes.
    fn write(&self) -> Result<()> {
        let path = Path::new(STATE);
        let folder = path.parent().context("a folder")?;
        fs::create_dir_all(folder)?;
        let beside = path.with_extension("new");
        let mut file = fs::File::create(&beside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        fs::File::open(folder)?.sync_all()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let mut names: Vec<_> = steps()
            .iter()
            .filter_map(|step| match step {
                Step::Case(name, _) | Step::Foundation(name, _) => Some(*name),
                Step::Reboot(_) | Step::Cut(_) => None,
            })
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
