//! Runs a test program and listens to it: every line into a log and the report, and an end to the
//! waiting when it says nothing for too long.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    report::{End, Findings, Listener, Outcome},
    talk::Progress,
};

/// When to give up on a test program.
pub struct Limits {
    /// Longest pause between two lines.
    pub silence: Duration,
    /// Longest run as a whole.
    pub whole: Duration,
}

/// How a run is shown and kept.
pub struct Show<'a> {
    /// The place's name, before each line.
    pub name: &'a str,
    /// Gets every line.
    pub log: &'a Path,
    /// Prints every line too, not only failures.
    pub verbose: bool,
}

/// Ends the child on every way out.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to do and no one to tell.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Runs `command` to its end or to one of the `limits`.
pub fn run(mut command: Command, limits: &Limits, show: &Show<'_>) -> Result<Findings> {
    let mut log =
        File::create(show.log).with_context(|| format!("cannot create {}", show.log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut child = Guard(child);
    let (sender, lines) = mpsc::channel();
    let streams: [Option<Box<dyn Read + Send>>; 2] = [
        child.0.stdout.take().map(|stream| Box::new(stream) as _),
        child.0.stderr.take().map(|stream| Box::new(stream) as _),
    ];
    for stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        // Never joined: a grandchild may hold the stream open after the program's end.
        thread::spawn(move || forward(stream, &sender));
    }
    drop(sender);

    let mut listener = Listener::default();
    let progress = Progress::start(&format!("{}: starting", show.name));
    let began = Instant::now();
    let end = loop {
        let left = limits.whole.saturating_sub(began.elapsed());
        match lines.recv_timeout(limits.silence.min(left)) {
            Ok(line) => {
                writeln!(log, "{line}")
                    .with_context(|| format!("cannot write {}", show.log.display()))?;
                hear(&mut listener, &line, show, &progress);
            }
            Err(RecvTimeoutError::Timeout) if began.elapsed() >= limits.whole => {
                break End::TooLong(limits.whole);
            }
            Err(RecvTimeoutError::Timeout) => match child.0.try_wait() {
                // Ended, with the stream still held by something it left behind.
                Ok(Some(status)) => break exited(status),
                Ok(None) | Err(_) => break End::Silent(limits.silence),
            },
            Err(RecvTimeoutError::Disconnected) => {
                let status = child
                    .0
                    .wait()
                    .with_context(|| format!("cannot wait for {program}"))?;
                break exited(status);
            }
        }
    };
    Ok(listener.finish(&end))
}

fn exited(status: std::process::ExitStatus) -> End {
    End::Exited {
        bad: (!status.success()).then(|| status.to_string()),
    }
}

fn hear(listener: &mut Listener, line: &str, show: &Show<'_>, progress: &Progress) {
    if show.verbose {
        progress.print(&format!("{} | {line}", show.name));
    }
    if let Some(verdict) = listener.line(line)
        && verdict.outcome == Outcome::Failed
    {
        progress.print(&format!(
            "{}: FAILED {}: {}",
            show.name, verdict.test, verdict.why
        ));
    }
    if let Some(test) = listener.running() {
        progress.update(format!(
            "{}: {} done, now {test}",
            show.name,
            listener.answered()
        ));
    }
}

/// Sends `stream` line by line, whatever bytes are in it.
fn forward(stream: impl Read, sender: &mpsc::Sender<String>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, silence: Duration) -> Findings {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let limits = Limits {
            silence,
            whole: Duration::from_secs(20),
        };
        let show = Show {
            name: "sh",
            log: &log,
            verbose: false,
        };
        let findings = run(command, &limits, &show).unwrap();
        assert!(std::fs::read_to_string(&log).unwrap().contains("@@"));
        findings
    }

    #[test]
    fn a_program_that_falls_silent_is_stopped_and_reported() {
        let began = Instant::now();
        let findings = shell(
            r#"echo '@@start {"test":"t"}'; exec sleep 60"#,
            Duration::from_millis(300),
        );
        assert!(
            findings.problems[0].starts_with("hung"),
            "{:?}",
            findings.problems
        );
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn both_streams_are_heard_to_their_end() {
        let findings = shell(
            r#"echo '@@start {"test":"t"}'
               echo noise >&2
               echo '@@result {"test":"t","outcome":"failed","why":"so"}'
               echo '@@done {"passed":0,"failed":1,"not_tested":0}'; exit 1"#,
            Duration::from_secs(10),
        );
        assert_eq!(findings.sum.failed, 1);
        assert!(findings.problems.is_empty(), "{:?}", findings.problems);
    }
}
