//! `remit tail`: violations out of the log, which needs no daemon. The line for people is derived
//! from the line in the file.

use std::{collections::VecDeque, time::Duration};

use anyhow::Context as _;

use super::{
    Global, format,
    outcome::{Failure, Outcome, Result},
    output::{self, Output},
};
use crate::audit::{
    LogName,
    encode::Format,
    human,
    line::is_of_probe,
    query::{Query, QueryError},
    tail::{self, Filter, Line, Repeats, Tail, Wake},
};

/// How long to wait for news where the system does not tell, and before what is held is looked at.
const PAUSE: Duration = Duration::from_millis(200);

/// Arguments of `remit tail`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Go on, and print new lines as they come; over rotation and over restarts of the daemon.
    #[arg(short, long)]
    follow: bool,
    /// Those of this agent alone; `unregistered` for processes that no agent claims. May be given
    /// more than once, as the next two.
    #[arg(long, value_name = "ID")]
    agent: Vec<String>,
    /// Those for this reason, such as out_of_scope.
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Those about this destination: an address, CIDR, name or *.name, with :PORT or without.
    #[arg(long, value_name = "DEST")]
    dest: Vec<String>,
    /// Those from a time on: a duration such as 10m, or 2026-11-24T18:00:00Z. Rotated files are
    /// read too; without this only the current one is.
    #[arg(long, value_name = "T")]
    since: Option<String>,
    /// The last N of those that are there, then what comes.
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
    /// Print lines in this form: human, ocsf-1.9 (as in the file, the same as --json), ocsf-1.8 or
    /// ecs.
    #[arg(long, value_name = "FORM")]
    format: Option<String>,
    /// Print every line. Without it, repeats of a line that was printed less than five seconds ago
    /// become one line with their count; lines for programs are never folded.
    #[arg(long)]
    all: bool,
    /// Those of probes too, which are no violations of an agent's own: `remit probe` made them.
    #[arg(long)]
    probes: bool,
    /// Whether lines for people are coloured.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    color: When,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum When {
    /// On a terminal.
    Auto,
    /// Also into a pipe.
    Always,
    /// Not at all.
    Never,
}

/// Prints lines as they are wanted.
struct Printer<'o> {
    output: &'o Output,
    format: Format,
    colour: bool,
    repeats: Option<Repeats>,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let query = query(arguments)?;
    let mut printer = Printer::new(arguments, output)?;
    let path = global
        .settings()?
        .paths
        .log
        .join(LogName::Violations.file());
    let filter = Filter {
        agent: None,
        since: query.since,
    };
    // Before the first reading, so that nothing falls between.
    let mut wake = arguments.follow.then(|| Wake::new(&path));
    let mut tail = Tail::open(&path, filter).context("cannot read the violations")?;
    let mut last = arguments.last.map(|most| (most, VecDeque::new()));
    loop {
        let lines = tail.read().context("cannot read the violations")?;
        let end = lines.is_empty();
        let wanted = |line: &Line| {
            query.wants(&line.event) && (arguments.probes || !is_of_probe(&line.event))
        };
        for line in lines.into_iter().filter(wanted) {
            match &mut last {
                Some((most, kept)) => {
                    kept.push_back(line);
                    if kept.len() > *most {
                        kept.pop_front();
                    }
                }
                None => printer.put(line)?,
            }
        }
        if end {
            for line in last.take().into_iter().flat_map(|(_, kept)| kept) {
                printer.put(line)?;
            }
        }
        if output.is_closed() {
            break;
        }
        if end {
            let Some(wake) = &mut wake else { break };
            printer.due()?;
            wake.wait(PAUSE);
        }
    }
    printer.rest()?;
    match tail.take_skipped() {
        0 => {}
        skipped => output::talk(format_args!(
            "{} in `{}` could not be read as JSON",
            format::count(skipped, "line"),
            path.display()
        )),
    }
    Ok(Outcome::Yes)
}

fn query(arguments: &Arguments) -> Result<Query> {
    let now = jiff::Timestamp::now().as_millisecond();
    let since = match &arguments.since {
        None => None,
        Some(text) => {
            let since = tail::since(text, now);
            Some(since.map_err(|error| Failure::usage(error.to_string()))?)
        }
    };
    let mut query = Query {
        agents: arguments.agent.clone(),
        reasons: arguments.reason.clone(),
        since,
        ..Query::default()
    };
    for text in &arguments.dest {
        let parsed = text.parse();
        let parsed = parsed.map_err(|error: QueryError| Failure::usage(error.to_string()))?;
        query.destinations.push(parsed);
    }
    Ok(query)
}

// === impl Printer ===

impl<'o> Printer<'o> {
    fn new(arguments: &Arguments, output: &'o Output) -> Result<Self> {
        let format = match &arguments.format {
            None if output.wants_json() => Format::Ocsf19,
            None => Format::Human,
            Some(text) => text
                .parse::<Format>()
                .map_err(|error| Failure::usage(format!("`--format`: {error}")))?,
        };
        let fold = format == Format::Human && !arguments.all;
        Ok(Self {
            output,
            format,
            colour: match arguments.color {
                When::Auto => output.colour(),
                When::Always => true,
                When::Never => false,
            },
            repeats: fold.then(Repeats::default),
        })
    }

    fn put(&mut self, line: Line) -> Result<()> {
        match (&mut self.repeats, self.format) {
            (Some(repeats), _) => {
                let events = repeats.put(line.event);
                self.people(events)
            }
            (None, Format::Human) => self.people([line.event]),
            // As it stands in the file, byte for byte.
            (None, Format::Ocsf19) => self.output.line(line.raw),
            (None, form @ (Format::Ocsf18 | Format::Ecs)) => {
                self.output.line(form.encode(&line.event))
            }
        }
    }

    /// Prints what has been held for long enough.
    fn due(&mut self) -> Result<()> {
        let now = jiff::Timestamp::now().as_millisecond();
        let due = self.repeats.as_mut().map(|repeats| repeats.due(now));
        self.people(due.into_iter().flatten())
    }

    /// Prints all that is held.
    fn rest(&mut self) -> Result<()> {
        let rest = self.repeats.as_mut().map(Repeats::rest);
        self.people(rest.into_iter().flatten())
    }

    fn people(&self, events: impl IntoIterator<Item = serde_json::Value>) -> Result<()> {
        for event in events {
            self.output.line(human(&event, self.colour))?;
        }
        Ok(())
    }
}
