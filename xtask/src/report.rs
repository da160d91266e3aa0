//! The report protocol of the kernel tests, and the table at the end. A test program prints
//! `@@start {…}`, `@@result {…}` and one `@@done {…}`, each on a line of its own; everything else
//! is free text. What was started and never answered, or answered by a program that did not
//! reach its end, is a failure and never forgotten.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use serde::Deserialize;

/// How many of the last lines a failure shows.
const KEPT_LINES: usize = 40;
/// How many characters of a failure's reason the table shows.
const SHORT: usize = 600;

/// What became of one test.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Passed,
    Failed,
    NotTested,
}

/// One test's answer.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Verdict {
    pub test: String,
    pub outcome: Outcome,
    /// Why it failed or was not tested.
    #[serde(default)]
    pub why: String,
    #[serde(default)]
    pub ms: u64,
}

#[derive(Deserialize)]
struct Started {
    test: String,
}

/// A sum of outcomes; also the content of `@@done`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct Sum {
    pub passed: u64,
    pub failed: u64,
    pub not_tested: u64,
}

impl Sum {
    /// Tests that gave an answer.
    pub fn ran(self) -> u64 {
        self.passed + self.failed
    }

    /// Counts one more outcome.
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::NotTested => self.not_tested += 1,
        }
    }
}

impl std::ops::AddAssign for Sum {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.not_tested += other.not_tested;
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            not_tested,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {not_tested} skipped")
    }
}

/// How a test program's run ended.
#[derive(Debug, PartialEq)]
pub enum End {
    /// By itself; the text describes its exit when that was not a success.
    Exited { bad: Option<String> },
    /// No output for this long.
    Silent(Duration),
    /// Still busy after this long.
    TooLong(Duration),
}

/// What a test program that goes on after a new start asks for: `@@reboot`, `@@cut`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ask {
    /// It ends by itself and is to be started again.
    Reboot,
    /// It is to be killed now, whatever it does, and started again.
    Cut,
}

/// Follows a test program's output.
#[derive(Debug, Default)]
pub struct Listener {
    asked: Option<Ask>,
    verdicts: Vec<Verdict>,
    running: Option<String>,
    done: Option<Sum>,
    problems: Vec<String>,
    tail: std::collections::VecDeque<String>,
}

impl Listener {
    /// Takes one line. Returns the verdict if it is one.
    ///
    /// The kernel may print into the middle of a console line, so the mark is looked for anywhere;
    /// a marked line that cannot be read is a problem of its own, as a verdict may be lost in it.
    pub fn line(&mut self, line: &str) -> Option<&Verdict> {
        let line = line.trim_end();
        if self.tail.len() == KEPT_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
        let (_, marked) = line.split_once("@@")?;
        let (word, body) = marked.split_once(' ').unwrap_or((marked, ""));
        match word {
            "start" => match serde_json::from_str::<Started>(body) {
                Ok(started) => self.running = Some(started.test),
                Err(error) => self.unreadable(line, &error),
            },
            "result" => match serde_json::from_str::<Verdict>(body) {
                Ok(verdict) => {
                    self.running = None;
                    self.verdicts.push(verdict);
                    return self.verdicts.last();
                }
                Err(error) => self.unreadable(line, &error),
            },
            "done" => match serde_json::from_str::<Sum>(body) {
                Ok(sum) => self.done = Some(sum),
                Err(error) => self.unreadable(line, &error),
            },
            "reboot" => self.asked = Some(Ask::Reboot),
            "cut" => self.asked = Some(Ask::Cut),
            _ => {}
        }
        None
    }

    /// What was asked for, once.
    pub fn take_ask(&mut self) -> Option<Ask> {
        self.asked.take()
    }

    /// The test that was started last and has not answered.
    pub fn running(&self) -> Option<&str> {
        self.running.as_deref()
    }

    /// How many tests have answered.
    pub fn answered(&self) -> usize {
        self.verdicts.len()
    }

    /// Judges the run as a whole.
    pub fn finish(mut self, end: &End) -> Findings {
        let mut sum = Sum::default();
        for verdict in &self.verdicts {
            sum.count(verdict.outcome);
        }
        let after = match &self.running {
            Some(test) => format!("while `{test}` was running"),
            None => match self.verdicts.last() {
                Some(verdict) => format!("after `{}` had ended", verdict.test),
                None => "before any test was started".to_owned(),
            },
        };
        match end {
            End::Silent(time) => {
                self.problems
                    .push(format!("hung: no output for {} s {after}", time.as_secs()));
            }
            End::TooLong(time) => {
                self.problems.push(format!(
                    "not finished in {} s, stopped {after}",
                    time.as_secs()
                ));
            }
            End::Exited { bad } => {
                match self.done {
                    None => self
                        .problems
                        .push(format!("ended {after}, without `@@done`")),
                    Some(_) if self.running.is_some() => {
                        self.problems.push(format!("`@@done` came {after}"));
                    }
                    Some(done) if done != sum => self.problems.push(format!(
                        "`@@done` counts {done}, the results are {sum}: some were lost"
                    )),
                    Some(_) => {}
                }
                if let Some(bad) = bad
                    && sum.failed == 0
                {
                    self.problems
                        .push(format!("no test failed, yet it ended with {bad}"));
                }
            }
        }
        let tail = if self.problems.is_empty() {
            Vec::new()
        } else {
            self.tail.into()
        };
        Findings {
            verdicts: self.verdicts,
            sum,
            problems: self.problems,
            tail,
        }
    }

    fn unreadable(&mut self, line: &str, error: &serde_json::Error) {
        self.problems
            .push(format!("cannot read the report line `{line}`: {error}"));
    }
}

/// What a run of a test program came to.
#[derive(Debug, Default)]
pub struct Findings {
    pub verdicts: Vec<Verdict>,
    pub sum: Sum,
    /// What went wrong around the tests: a hang, a crash, a report that does not add up.
    pub problems: Vec<String>,
    /// The last lines of output, kept when there is a problem.
    pub tail: Vec<String>,
}

impl Findings {
    /// A run that could not take place although it had to: a failure, not an absence.
    pub fn broken(error: &anyhow::Error) -> Self {
        Self {
            problems: vec![format!("{error:#}")],
            ..Self::default()
        }
    }
}

/// A place that tests are meant to run in.
pub struct Place {
    pub name: String,
    /// The kernel there, as `uname -r` says it; `-` where it does not matter.
    pub kernel: String,
    pub state: State,
    pub took: Duration,
}

/// What happened at a [`Place`].
pub enum State {
    Ran(Findings),
    /// Nothing ran, for the reason given.
    NotTested(String),
}

impl Place {
    /// The place's sum. A problem counts as one failure, an untested place as one not tested, so
    /// that neither disappears from the totals.
    pub fn sum(&self) -> Sum {
        match &self.state {
            State::NotTested(_) => Sum {
                not_tested: 1,
                ..Sum::default()
            },
            State::Ran(findings) => {
                let mut sum = findings.sum;
                sum.failed += findings.problems.len() as u64;
                sum
            }
        }
    }

    /// The suite's own closing line.
    pub fn closing(&self) -> String {
        match &self.state {
            State::Ran(_) => format!("{}: {}", self.name, self.sum()),
            State::NotTested(why) => format!("{}: not tested: {why}", self.name),
        }
    }
}

/// The sum over `places`.
pub fn total(places: &[Place]) -> Sum {
    let mut total = Sum::default();
    for place in places {
        total += place.sum();
    }
    total
}

/// The table per place and kernel; below it every test that did not run, with the reason, and
/// last every failure.
pub fn table(places: &[Place]) -> String {
    const HEAD: [&str; 7] = [
        "place",
        "kernel",
        "ran",
        "passed",
        "failed",
        "not tested",
        "time",
    ];
    let rows: Vec<[String; 7]> = places
        .iter()
        .map(|place| {
            let sum = place.sum();
            let ran = match &place.state {
                // Without its problems: those are failures around the tests.
                State::Ran(findings) => findings.sum.ran().to_string(),
                State::NotTested(_) => "-".to_owned(),
            };
            [
                place.name.clone(),
                place.kernel.clone(),
                ran,
                sum.passed.to_string(),
                sum.failed.to_string(),
                sum.not_tested.to_string(),
                format!("{} s", place.took.as_secs()),
            ]
        })
        .collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let mut text = String::new();
    let head = HEAD.map(str::to_owned);
    let rule = widths.map(|width| "-".repeat(width));
    for row in [&head, &rule].into_iter().chain(&rows) {
        let cells: Vec<_> = row
            .iter()
            .zip(widths)
            .enumerate()
            // Words to the left, numbers to the right.
            .map(|(column, (cell, width))| match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    for place in places {
        untested(&mut text, place);
    }
    for place in places {
        last_lines(&mut text, place);
    }
    // Last, where somebody who sees only the end of the output finds them.
    for place in places {
        failures(&mut text, place);
    }
    text
}

/// A line for each reason for which something was not tested, with all that was not.
fn untested(text: &mut String, place: &Place) {
    let name = &place.name;
    match &place.state {
        State::NotTested(why) => {
            let _ = writeln!(text, "{name}: not tested: {why}");
        }
        State::Ran(findings) => {
            let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
            for verdict in &findings.verdicts {
                if verdict.outcome != Outcome::NotTested {
                    continue;
                }
                match reasons.iter_mut().find(|(why, _)| *why == verdict.why) {
                    Some((_, tests)) => tests.push(&verdict.test),
                    None => reasons.push((&verdict.why, vec![&verdict.test])),
                }
            }
            for (why, tests) in reasons {
                let _ = writeln!(text, "{name}: not tested, {why}: {}", tests.join(", "));
            }
        }
    }
}

/// What a place with a problem around its tests printed last.
fn last_lines(text: &mut String, place: &Place) {
    let State::Ran(findings) = &place.state else {
        return;
    };
    if !findings.tail.is_empty() {
        let _ = writeln!(text, "{}: the last lines were:", place.name);
        for line in &findings.tail {
            let _ = writeln!(text, "    | {line}");
        }
    }
}

/// Every failed test, and every problem around the tests.
fn failures(text: &mut String, place: &Place) {
    let State::Ran(findings) = &place.state else {
        return;
    };
    for verdict in &findings.verdicts {
        if verdict.outcome == Outcome::Failed {
            let Verdict { test, why, .. } = verdict;
            // The whole is in the log, and was printed when it happened.
            let short = why.chars().take(SHORT).collect::<String>();
            let _ = writeln!(text, "{}: FAILED {test}: {short}", place.name);
        }
    }
    for problem in &findings.problems {
        let _ = writeln!(text, "{}: FAILED {problem}", place.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: End = End::Exited { bad: None };

    fn heard(lines: &[&str]) -> Listener {
        let mut listener = Listener::default();
        for line in lines {
            listener.line(line);
        }
        listener
    }

    const START: &str = r#"@@start {"test":"tcp"}"#;
    const PASS: &str = r#"@@result {"test":"tcp","outcome":"passed","why":"","ms":3}"#;

    #[test]
    fn a_whole_report_is_clean() {
        let findings = heard(&[
            "booting",
            START,
            PASS,
            r#"@@result {"test":"lsm","outcome":"not_tested","why":"no LSM","ms":0}"#,
            "@@done {\"passed\":1,\"failed\":0,\"not_tested\":1}\r",
        ])
        .finish(&CLEAN);
        assert_eq!(
            findings.sum,
            Sum {
                passed: 1,
                failed: 0,
                not_tested: 1
            }
        );
        assert!(findings.problems.is_empty(), "{:?}", findings.problems);
        assert!(findings.tail.is_empty());
    }

    #[test]
    fn a_hang_names_the_test_that_was_running() {
        let findings = heard(&[START]).finish(&End::Silent(Duration::from_secs(90)));
        assert_eq!(
            findings.problems,
            ["hung: no output for 90 s while `tcp` was running"]
        );
        assert_eq!(findings.tail, [START]);
    }

    #[test]
    fn an_end_without_done_is_a_failure() {
        let place = Place {
            name: "VM".to_owned(),
            kernel: "6.1".to_owned(),
            state: State::Ran(heard(&[START, PASS]).finish(&CLEAN)),
            took: Duration::ZERO,
        };
        assert_eq!(
            place.sum(),
            Sum {
                passed: 1,
                failed: 1,
                not_tested: 0
            }
        );
        assert!(table(&[place]).contains("ended after `tcp` had ended, without `@@done`"));
    }

    #[test]
    fn a_lost_result_is_noticed() {
        let done = r#"@@done {"passed":2,"failed":0,"not_tested":0}"#;
        let findings = heard(&[START, PASS, done]).finish(&CLEAN);
        assert!(findings.problems[0].contains("some were lost"));
        let findings = heard(&["@@result {\"test\":\"tc[ 3.1] oops"]).finish(&CLEAN);
        assert!(findings.problems[0].starts_with("cannot read the report line"));
    }

    #[test]
    fn a_bad_exit_without_a_failed_test_is_a_failure() {
        let done = r#"@@done {"passed":1,"failed":0,"not_tested":0}"#;
        let bad = End::Exited {
            bad: Some("exit status: 101".to_owned()),
        };
        let findings = heard(&[START, PASS, done]).finish(&bad);
        assert_eq!(
            findings.problems,
            ["no test failed, yet it ended with exit status: 101"]
        );
    }

    #[test]
    fn only_the_last_lines_are_kept() {
        let mut listener = Listener::default();
        for number in 0..100 {
            listener.line(&number.to_string());
        }
        let findings = listener.finish(&CLEAN);
        assert_eq!(findings.tail.len(), KEPT_LINES);
        assert_eq!(findings.tail[0], "60");
    }

    #[test]
    fn failures_come_last_and_reasons_once() {
        let not_tested = |test: &str| {
            format!(r#"@@result {{"test":"{test}","outcome":"not_tested","why":"no LSM"}}"#)
        };
        let failed = r#"@@result {"test":"udp","outcome":"failed","why":"it left"}"#;
        let done = r#"@@done {"passed":0,"failed":1,"not_tested":2}"#;
        let lines = [failed, &not_tested("lsm"), &not_tested("exec"), done];
        let place = Place {
            name: "VM".to_owned(),
            kernel: "6.1".to_owned(),
            state: State::Ran(heard(&lines).finish(&CLEAN)),
            took: Duration::ZERO,
        };
        let table = table(&[place]);
        assert!(
            table.contains("VM: not tested, no LSM: lsm, exec\n"),
            "{table}"
        );
        assert!(table.ends_with("VM: FAILED udp: it left\n"), "{table}");
    }

    #[test]
    fn a_place_that_did_not_run_is_counted_and_explained() {
        let place = Place {
            name: "VM newest".to_owned(),
            kernel: "-".to_owned(),
            state: State::NotTested("no mirror".to_owned()),
            took: Duration::ZERO,
        };
        assert_eq!(
            total(std::slice::from_ref(&place)).to_string(),
            "0 passed, 0 failed, 1 skipped"
        );
        assert!(table(&[place]).ends_with("VM newest: not tested: no mirror\n"));
    }
}
