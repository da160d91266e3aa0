//! Runs cases one after another, each as a child with a deadline.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Case, sweep};

/// Exit code of a case that could not be tested, as automake has it.
pub const NOT_TESTED: u8 = 77;
/// Emulated machines are some ten times slower; deadlines there are for hangs alone.
const EMULATED: u32 = 4;

struct Judged {
    outcome: &'static str,
    why: String,
}

/// Runs `cases` and prints the report.
pub fn run(cases: &[&Case]) -> Result<ExitCode> {
    sweep::adopt_orphans().context("cannot become a subreaper")?;
    let (mut passed, mut failed, mut not_tested) = (0, 0, 0);
    for (index, case) in cases.iter().enumerate() {
        println!("@@start {}", json!({ "test": case.name }));
        let started = Instant::now();
        let unique = format!("remit-test-{}-{index}", std::process::id());
        let judged = judge(case, &unique).unwrap_or_else(|error| Judged {
            outcome: "failed",
            why: format!("{error:#}"),
        });
        match judged.outcome {
            "passed" => passed += 1,
            "failed" => failed += 1,
            _ => not_tested += 1,
        }
        println!(
            "@@result {}",
            json!({
                "test": case.name,
                "outcome": judged.outcome,
                "why": judged.why,
                "ms": started.elapsed().as_millis() as u64,
            })
        );
    }
    println!(
        "@@done {}",
        json!({ "passed": passed, "failed": failed, "not_tested": not_tested })
    );
    println!("{passed} passed, {failed} failed, {not_tested} skipped");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn judge(case: &Case, unique: &str) -> Result<Judged> {
    let dir = std::env::temp_dir().join(unique);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let (out, err) = (dir.join("case.out"), dir.join("case.err"));
    // Files, not pipes: an orphan that keeps a pipe open must not hold up the runner.
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--one", &case.name, unique])
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?)
        .process_group(0)
        .spawn()
        .context("cannot start the case")?;
    let emulated = std::env::var_os("REMIT_TEST_VM").is_some();
    let deadline = case.deadline * if emulated { EMULATED } else { 1 };
    let status = wait(&mut child, deadline)?;
    let said = fs::read_to_string(&out).unwrap_or_default();
    let why = said.lines().last().unwrap_or_default().to_owned();
    let mut judged = match status.map(|status| status.code()) {
        None => Judged {
            outcome: "failed",
            why: format!("hung: no end after {} s", deadline.as_secs()),
        },
        Some(Some(0)) => Judged {
            outcome: "passed",
            why, // a passed case may have said how much it compared
        },
        Some(Some(code)) if code == i32::from(NOT_TESTED) => Judged {
            outcome: "not_tested",
            why,
        },
        Some(Some(_)) => Judged {
            outcome: "failed",
            why,
        },
        Some(None) => Judged {
            outcome: "failed",
            why: "the case's process was killed by a signal".to_owned(),
        },
    };
    let mut left = sweep::kill_children();
    if judged.outcome == "failed" {
        show(&out, &err);
    }
    left.extend(sweep::remove_traces(unique, &dir));
    if judged.outcome == "passed" && !left.is_empty() {
        judged = Judged {
            outcome: "failed",
            why: format!("left behind: {}", left.join(", ")),
        };
    }
    Ok(judged)
}

/// Waits for the child; none means that the deadline passed and it was killed.
fn wait(child: &mut Child, deadline: Duration) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        sleep(Duration::from_millis(5));
    }
}

/// What a failed case said, for the reader of the log.
fn show(out: &Path, err: &Path) {
    for path in [out, err] {
        let text = fs::read_to_string(path).unwrap_or_default();
        for line in text.lines() {
            println!("    {line}");
        }
    }
}
