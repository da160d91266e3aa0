//! `remit log`: is the audit trail whole, what do the logs say. Neither needs a daemon; with one the
//! sums of the violation log are compared with the kernel's counters as well.

use std::{
    collections::VecDeque,
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;

use super::{
    Global, format,
    outcome::{Failure, Outcome, Result},
    output::{self, Columns, Output, Tone, plain},
};
use crate::{
    audit::{
        LogName,
        accounting::{Accounting, Counters, compare},
        encode::Format,
        files::beside,
        human,
        query::{Query, Search, Tally},
        tail::{self, Line},
        trail::{
            chain::Hash,
            check,
            keys::PublicKey,
            verify::{Complete, Report},
        },
        written_since,
    },
    control::protocol::Status,
    daemon::{self, settings::Settings},
};

/// How long the log may take to catch up with the counters: what is lost is written within five
/// seconds.
const CATCH_UP: Duration = Duration::from_secs(8);

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check the hash chain and signatures of the audit trail, and name the first bad record.
    ///
    /// Without FILES it is this host's own trail, checked against the head in the state directory;
    /// where a daemon answers, the sums of the violation log are compared with the kernel's
    /// counters too. FILES may be a copy on any machine: complete is then what `--head` says, else
    /// what the last signed checkpoint covers.
    ///
    /// Exit codes: 0 whole; 1 something is not as it was written; 3 whole as far as it goes, but
    /// nothing says that no more followed.
    Verify(Verify),
    /// Print the lines of all logs that are asked for, rotated files included: what agents attempted,
    /// what they reached, what was decided about them.
    Query(Box<Find>),
    /// Print the public key that the audit trail is signed with, as PEM.
    Key,
}

/// Arguments of `remit log verify`.
#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// Files of a trail, in any order, or folders of such.
    #[arg(value_name = "FILES")]
    files: Vec<PathBuf>,
    /// The hash of a record that must be there, as `verify` or a checkpoint printed it.
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
    /// A file with the public key that signs (PEM); more than one where the key was changed.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
}

/// Arguments of `remit log query`.
#[derive(Debug, clap::Args)]
pub(super) struct Find {
    /// Those of this agent; may be given more than once, as all that follow.
    #[arg(long, value_name = "ID")]
    agent: Vec<String>,
    /// Those about this destination: an address, CIDR, name or *.name, with :PORT or without.
    #[arg(long, value_name = "DEST")]
    dest: Vec<String>,
    /// Those for this reason, such as out_of_scope.
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Those of this kind: denied, monitored, lost, access, lifecycle, drift, registry, daemon, trail, or
    /// an event code.
    #[arg(long, value_name = "KIND")]
    kind: Vec<String>,
    /// Those from a time on: a duration such as 10m, or 2026-11-24T18:00:00Z.
    #[arg(long, value_name = "T")]
    since: Option<String>,
    /// Those before a time.
    #[arg(long, value_name = "T")]
    until: Option<String>,
    /// Print lines in this form: human, ocsf-1.9 (as in the file, the same as --json), ocsf-1.8 or
    /// ecs.
    #[arg(long, value_name = "FORM", conflicts_with = "count")]
    format: Option<String>,
    /// The last N only.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Print how many there are, by agent, verdict and reason.
    #[arg(long, conflicts_with = "last")]
    count: bool,
}

pub(super) fn run(global: &Global, command: &Command, output: &Output) -> Result {
    match command {
        Command::Verify(arguments) => verify(global, arguments, output),
        Command::Query(arguments) => query(global, arguments, output),
        Command::Key => key(global, output),
    }
}

// === verify ===

#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    report: &'a Report,
    accounting: Option<&'a Accounting>,
}

fn verify(global: &Global, arguments: &Verify, output: &Output) -> Result {
    let head = match &arguments.head {
        None => None,
        Some(text) => Some(
            text.parse::<Hash>()
                .map_err(|error| Failure::usage(format!("`--head {text}`: {error}")))?,
        ),
    };
    let mut pinned = Vec::new();
    for path in &arguments.key {
        pinned.push(PublicKey::open(path).context("cannot check signatures")?);
    }
    let on_host = arguments.files.is_empty() && head.is_none();
    let (report, accounting) = if on_host {
        let settings = global.settings()?;
        let places = daemon::places(&settings);
        let report = check::host(&places, pinned).context("cannot check the audit trail")?;
        (report, accounting(global, &settings)?)
    } else {
        let files = if arguments.files.is_empty() {
            beside(&daemon::places(&global.settings()?).file())
                .context("cannot check the audit trail")?
        } else {
            gather(&arguments.files)?
        };
        let report = check::copy(&files, head, pinned).context("cannot check the audit trail")?;
        (report, None)
    };
    if output.wants_json() {
        output.json(&Verified {
            report: &report,
            accounting: accounting.as_ref(),
        })?;
    } else {
        print(&report, accounting.as_ref(), output)?;
    }
    let differs = accounting.is_some_and(|accounting| !accounting.differences.is_empty());
    Ok(if report.findings_total > 0 || differs {
        Outcome::No
    } else {
        match report.complete {
            Complete::Head { .. } | Complete::Hash { .. } => Outcome::Yes,
            Complete::Nothing | Complete::Checkpoint { .. } | Complete::Unsigned { .. } => {
                Outcome::Unknown
            }
        }
    })
}

/// Folders stand for the trail in them.
fn gather(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        if fs::metadata(path).is_ok_and(|meta| meta.is_dir()) {
            let found = beside(&path.join(LogName::Audit.file()))
                .context("cannot check the audit trail")?;
            files.extend(found);
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

fn print(report: &Report, accounting: Option<&Accounting>, output: &Output) -> Result<()> {
    for finding in &report.findings {
        let mut line = format!("{}:{}: ", plain(&finding.file), finding.line);
        if let Some(record) = finding.record {
            line.push_str(&format!("record {record}: "));
        }
        if let Some(sequence) = finding.sequence {
            line.push_str(&format!("sequence {sequence}: "));
        }
        output.line(line + &output.paint(Tone::Bad, &plain(&finding.what)))?;
    }
    let listed = report.findings.len() as u64;
    if report.findings_total > listed {
        output.line(format_args!(
            "… and {} more",
            report.findings_total - listed
        ))?;
    }
    for note in &report.notes {
        output.line(format_args!("note: {}", plain(note)))?;
    }
    output.line(format_args!(
        "{} in the chain{}, {}",
        format::count(report.records, "record"),
        match report.unchained {
            0 => String::new(),
            lines => format!(
                " (and {} from before it, of which nothing is known)",
                format::count(lines, "line")
            ),
        },
        format::count(report.checkpoints, "signed checkpoint"),
    ))?;
    if let Some(key) = &report.key {
        let pinned = if report.key_pinned {
            "as named by `--key`"
        } else {
            "as the trail names it"
        };
        output.line(format_args!("key {key}, {pinned}"))?;
    }
    let (tone, complete) = match &report.complete {
        Complete::Nothing => (Tone::Doubtful, "there is no trail here".to_owned()),
        Complete::Head { record } => (Tone::Good, format!("complete to the head: record {record}")),
        Complete::Hash { record, behind } => (
            Tone::Good,
            format!("complete to `--head`: record {record}, {behind} more behind it"),
        ),
        Complete::Checkpoint {
            number,
            record,
            time,
            behind,
        } => (
            Tone::Doubtful,
            format!(
                "complete to checkpoint {number}: record {record} of {}, {behind} more behind it; \
                 whether more followed cannot be told",
                format::time(*time)
            ),
        ),
        Complete::Unsigned { record } => (
            Tone::Doubtful,
            format!("records up to {record} follow each other, and nothing vouches for them"),
        ),
    };
    let (tone, complete) = match report.findings_total {
        0 => (tone, complete),
        wrong => (
            Tone::Bad,
            format!("NOT WHOLE: {}; {complete}", format::count(wrong, "finding")),
        ),
    };
    output.line(output.paint(tone, &complete))?;
    if let Some(head) = &report.head {
        output.line(format_args!("head {head}"))?;
    }
    match accounting {
        None => {}
        Some(accounting) => print_accounting(accounting, output)?,
    }
    Ok(())
}

fn print_accounting(accounting: &Accounting, output: &Output) -> Result<()> {
    for difference in &accounting.differences {
        let line = format!(
            "agent {}, {}: {} attempts counted by the kernel, {} in the log",
            plain(&difference.agent),
            plain(&difference.what),
            difference.counted,
            difference.logged
        );
        output.line(output.paint(Tone::Bad, &line))?;
    }
    if let Some(why) = &accounting.not_compared {
        return output.line(format_args!("accounting not tested: {why}"));
    }
    output.line(format_args!(
        "accounting: {}, {} in the kernel, {} in the log",
        format::count(accounting.agents, "agent"),
        format::count(accounting.counted, "attempt"),
        accounting.logged
    ))
}

/// The sums of the violation log beside the kernel's counters, asked until they agree or the log
/// has had time to catch up with what was counted at first. None where no daemon answers.
fn accounting(global: &Global, settings: &Settings) -> Result<Option<Accounting>> {
    let client = global.client()?;
    let path = settings.paths.log.join(LogName::Violations.file());
    let begun = Instant::now();
    let counted = || match client.get::<Status>("/status") {
        Ok(status) => Some((status.counted_since_ms, counters(&status))),
        Err(error) => {
            output::talk(format_args!(
                "accounting not tested: no daemon answers ({error})"
            ));
            None
        }
    };
    let Some(mut before) = counted() else {
        return Ok(None);
    };
    loop {
        let Some(since) = before.0 else {
            return Ok(Some(Accounting::not_compared(
                "the daemon does not say since when the kernel counts",
            )));
        };
        let sums = written_since(&path, since).context("cannot read the violations")?;
        let first = first_time(&path)?;
        let Some(after) = counted() else {
            return Ok(None);
        };
        if after.0 == before.0 {
            let cut = first.is_some_and(|first| first > since);
            let accounting = compare(&before.1, &after.1, &sums, cut);
            if accounting.differences.is_empty() || begun.elapsed() > CATCH_UP {
                return Ok(Some(accounting));
            }
        } else if begun.elapsed() > CATCH_UP {
            return Ok(Some(Accounting::not_compared(
                "the kernel's counters were made anew meanwhile",
            )));
        } else {
            before = after;
        }
        thread::sleep(Duration::from_millis(500));
    }
}

fn counters(status: &Status) -> Vec<Counters> {
    let former = status.former.iter().map(|former| Counters {
        agent: former.id.clone(),
        denied: former.denied,
        monitored: former.monitored,
        by_reason: former.by_reason.clone(),
    });
    let counters = status.agents.iter().map(|agent| Counters {
        agent: agent.id.clone(),
        denied: agent.denied,
        monitored: agent.monitored,
        by_reason: agent.by_reason.clone(),
    });
    counters.chain(former).collect()
}

/// When the oldest line of a log was written; none where files before it were removed by nobody,
/// that is where its first file is the first one.
fn first_time(path: &std::path::Path) -> Result<Option<i64>> {
    let files = beside(path).context("cannot read the violations")?;
    // One file alone has lost nothing.
    if files.len() < 2 {
        return Ok(None);
    }
    let mut search =
        Search::open(&[path.to_owned()], Query::default()).context("cannot read the violations")?;
    let first = search.next_line().context("cannot read the violations")?;
    Ok(first.and_then(|line| line.event["time"].as_i64()))
}

// === query ===

fn query(global: &Global, arguments: &Find, output: &Output) -> Result {
    let now = jiff::Timestamp::now().as_millisecond();
    let time = |text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => tail::since(text, now)
            .map(Some)
            .map_err(|error| Failure::usage(error.to_string())),
    };
    let usage = |error: crate::audit::query::QueryError| Failure::usage(error.to_string());
    let mut query = Query {
        agents: arguments.agent.clone(),
        reasons: arguments.reason.clone(),
        since: time(&arguments.since)?,
        until: time(&arguments.until)?,
        ..Query::default()
    };
    for text in &arguments.dest {
        query.destinations.push(text.parse().map_err(usage)?);
    }
    for text in &arguments.kind {
        query.kinds.push(text.parse().map_err(usage)?);
    }
    let form = match &arguments.format {
        None => None,
        Some(text) => Some(
            text.parse::<Format>()
                .map_err(|error| Failure::usage(format!("`--format`: {error}")))?,
        ),
    };
    let folder = global.settings()?.paths.log;
    let logs = [LogName::Violations, LogName::Access, LogName::Audit];
    let paths = logs.map(|name| folder.join(name.file()));
    let mut search = Search::open(&paths, query).context("cannot search the logs")?;
    let mut last = VecDeque::new();
    let mut tally = Tally::default();
    while let Some(line) = search.next_line().context("cannot search the logs")? {
        if arguments.count {
            tally.add(&line.event);
        } else if let Some(most) = arguments.last {
            last.push_back(line);
            if last.len() > most {
                last.pop_front();
            }
        } else {
            show(&line, form, output)?;
        }
        if output.is_closed() {
            break;
        }
    }
    for line in &last {
        show(line, form, output)?;
    }
    if arguments.count {
        count(&tally, output)?;
    }
    match search.skipped() {
        0 => {}
        skipped => output::talk(format_args!(
            "{} could not be read as JSON",
            format::count(skipped, "line")
        )),
    }
    Ok(Outcome::Yes)
}

fn show(line: &Line, form: Option<Format>, output: &Output) -> Result<()> {
    match form {
        // As it stands in the file, byte for byte.
        Some(Format::Ocsf19) => output.line(&line.raw),
        Some(form @ (Format::Ocsf18 | Format::Ecs)) => output.line(form.encode(&line.event)),
        None if output.wants_json() => output.line(&line.raw),
        Some(Format::Human) | None => output.line(human(&line.event, output.colour())),
    }
}

fn count(tally: &Tally, output: &Output) -> Result<()> {
    if output.wants_json() {
        let rows = tally.0.iter().map(|((agent, verdict, reason), counted)| {
            json!({
                "agent": agent,
                "verdict": verdict,
                "reason": reason,
                "lines": counted.lines,
                "attempts": counted.attempts,
            })
        });
        return output.json(&rows.collect::<Vec<_>>());
    }
    let mut columns = Columns::new(&["AGENT", "VERDICT", "REASON", "LINES", "ATTEMPTS"]);
    for ((agent, verdict, reason), counted) in &tally.0 {
        columns.row(&[
            agent.clone(),
            verdict.clone(),
            reason.clone(),
            counted.lines.to_string(),
            counted.attempts.to_string(),
        ]);
    }
    output.columns(&columns)
}

// === key ===

fn key(global: &Global, output: &Output) -> Result {
    let path = daemon::places(&global.settings()?).key();
    let key = PublicKey::open(&path)
        .context("cannot tell the key; the daemon makes it when it starts first")?;
    let pem = key
        .to_pem()
        .ok_or_else(|| Failure::unknown("the key cannot be written as PEM"))?;
    if output.wants_json() {
        output.json(&json!({ "key": key.to_string(), "pem": pem }))?;
    } else {
        output.bytes(pem.as_bytes())?;
    }
    Ok(Outcome::Yes)
}
