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
    report::{Ask, End, Findings, Listener, Outcome},
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
pub fn run(command: Command, limits: &Limits, show: &Show<'_>) -> Result<Findings> {
    let mut session = Session::begin(limits, show)?;
    let end = match session.listen(command)? {
        Stop::End(end) => end,
        Stop::Again => End::Exited {
            bad: Some("a wish to be started again".to_owned()),
        },
    };
    Ok(session.listener.finish(&end))
}

/// Runs what `next` makes, to its end or to one of the `limits`, and anew each time that it asks
/// for that, `most` times at most. Its report goes on over the starts.
pub fn series(
    mut next: impl FnMut() -> Command,
    most: usize,
    limits: &Limits,
    show: &Show<'_>,
) -> Result<Findings> {
    let mut session = Session::begin(limits, show)?;
    for _ in 0..most {
        if let Stop::End(end) = session.listen(next())? {
            return Ok(session.listener.finish(&end));
        }
    }
    let bad = Some(format!("a wish for more than {most} starts"));
    Ok(session.listener.finish(&End::Exited { bad }))
}

/// Why there is no more to hear of a program.
enum Stop {
    End(End),
    /// It asked to be started anew, and has ended.
    Again,
}

/// One report, over one start of its program or several.
struct Session<'a> {
    log: File,
    listener: Listener,
    progress: Progress,
    began: Instant,
    limits: &'a Limits,
    show: &'a Show<'a>,
}

// === impl Session ===

impl<'a> Session<'a> {
    fn begin(limits: &'a Limits, show: &'a Show<'a>) -> Result<Self> {
        let log = File::create(show.log)
            .with_context(|| format!("cannot create {}", show.log.display()))?;
        Ok(Self {
            log,
            listener: Listener::default(),
            progress: Progress::start(&format!("{}: starting", show.name)),
            began: Instant::now(),
            limits,
            show,
        })
    }

    fn listen(&mut self, mut command: Command) -> Result<Stop> {
        let (limits, show) = (self.limits, self.show);
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
        let mut again = false;
        let ended = |status, again| match again {
            true => Stop::Again,
            false => Stop::End(exited(status)),
        };
        loop {
            let left = limits.whole.saturating_sub(self.began.elapsed());
            match lines.recv_timeout(limits.silence.min(left)) {
                Ok(line) => {
                    writeln!(self.log, "{line}")
                        .with_context(|| format!("cannot write {}", show.log.display()))?;
                    hear(&mut self.listener, &line, show, &self.progress);
                    match self.listener.take_ask() {
                        Some(Ask::Cut) => return Ok(Stop::Again),
                        Some(Ask::Reboot) => again = true,
                        None => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) if self.began.elapsed() >= limits.whole => {
                    return Ok(Stop::End(End::TooLong(limits.whole)));
                }
                Err(RecvTimeoutError::Timeout) => match child.0.try_wait() {
                    // Ended, with the stream still held by something it left behind.
                    Ok(Some(status)) => return Ok(ended(status, again)),
                    Ok(None) | Err(_) => return Ok(Stop::End(End::Silent(limits.silence))),
                },
                Err(RecvTimeoutError::Disconnected) => {
                    let status = child
                        .0
                        .wait()
                        .with_context(|| format!("cannot wait for {program}"))?;
                    return Ok(ended(status, again));
                }
            }
        }
    }
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
    fn a_report_goes_on_over_new_starts() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut scripts = [
            r#"echo '@@start {"test":"t"}'; echo '@@cut'; exec sleep 60"#,
            r#"echo '@@result {"test":"t","outcome":"passed"}'; echo '@@reboot'"#,
            r#"echo '@@done {"passed":1,"failed":0,"not_tested":0}'"#,
        ]
        .into_iter();
        let began = Instant::now();
        let findings = series(
            || {
                let mut command = Command::new("sh");
                command.args(["-c", scripts.next().unwrap()]);
                command
            },
            3,
            &Limits {
                silence: Duration::from_secs(10),
                whole: Duration::from_secs(20),
            },
            &Show {
                name: "sh",
                log: &log,
                verbose: false,
            },
        )
        .unwrap();
        assert_eq!(findings.sum.passed, 1);
        assert!(findings.problems.is_empty(), "{:?}", findings.problems);
        assert!(began.elapsed() < Duration::from_secs(10), "it was not cut");
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
