//! Finds lines in the logs, rotated files included, in the order of their times and in little
//! memory: one line of each log is held at a time.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    str::FromStr,
    time::{Duration, UNIX_EPOCH},
};

use ipnet::IpNet;
use serde_json::Value;

use super::{
    files::{FilesError, Lines, Opened, Piece, beside, open},
    ocsf::Code,
    tail::Line,
};
use crate::policy::tables::UnixMillis;

/// What is looked for: lines that have all of it. What is empty is not asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Those of one of these agents.
    pub agents: Vec<String>,
    /// Those about one of these destinations.
    pub destinations: Vec<Destination>,
    /// Those for one of these reasons.
    pub reasons: Vec<String>,
    /// Those of one of these kinds.
    pub kinds: Vec<Kind>,
    /// Those from this time on.
    pub since: Option<UnixMillis>,
    /// Those before this time.
    pub until: Option<UnixMillis>,
}

/// A destination that is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    host: Wanted,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Any,
    Net(IpNet),
    /// In lower case, without a dot at its end.
    Name(String),
    /// Names below this one, however deep.
    Below(String),
}

/// A kind of line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By `unmapped.verdict`.
    Verdict(&'static str),
    /// By the beginning of `metadata.event_code`.
    Code(&'static str),
}

/// Why a text says nothing that can be looked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// It is no destination.
    #[error(
        "`{0}` is no destination such as \"192.0.2.7\", \"10.0.0.0/8\", \"api.example.com:443\", \
         \"*.example.com\" or \":53\""
    )]
    Destination(String),
    /// It is no kind.
    #[error("`{0}` is no kind of line: the kinds are {kinds}, and event codes", kinds = KINDS.map(|(name, _)| name).join(", "))]
    Kind(String),
}

/// A search under way.
#[derive(Debug)]
pub struct Search {
    query: Query,
    streams: Vec<Stream>,
    skipped: u64,
}

/// One log, the oldest file first.
#[derive(Debug)]
struct Stream {
    /// The next one last.
    files: Vec<Opened>,
    lines: Option<Lines>,
    next: Option<Line>,
}

/// Attempts and lines by agent, verdict and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally(pub BTreeMap<(String, String, String), Counted>);

/// How much there is of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Lines.
    pub lines: u64,
    /// Attempts that they stand for.
    pub attempts: u64,
}

/// Kinds by name.
const KINDS: [(&str, Kind); 9] = [
    ("denied", Kind::Verdict("denied")),
    ("monitored", Kind::Verdict("monitored")),
    ("lost", Kind::Code("RM1003")),
    ("access", Kind::Code("RM1004")),
    ("lifecycle", Kind::Code("RM2")),
    ("drift", Kind::Code("RM3")),
    ("registry", Kind::Code("RM4")),
    ("daemon", Kind::Code("RM90")),
    ("trail", Kind::Code("RM91")),
];

// === impl Query ===

impl Query {
    /// Whether an event is one of those.
    pub fn wants(&self, event: &Value) -> bool {
        let time = event["time"].as_i64();
        let any = |found: Option<&str>, wanted: &[String]| {
            wanted.is_empty() || found.is_some_and(|found| wanted.iter().any(|one| one == found))
        };
        self.since
            .is_none_or(|since| time.is_some_and(|time| time >= since))
            && self
                .until
                .is_none_or(|until| time.is_some_and(|time| time < until))
            && any(agent(event), &self.agents)
            && any(event["unmapped"]["reason"].as_str(), &self.reasons)
            && (self.kinds.is_empty() || self.kinds.iter().any(|kind| kind.is_of(event)))
            && (self.destinations.is_empty()
                || self.destinations.iter().any(|one| one.is_of(event)))
    }
}

/// The agent that an event is about.
pub fn agent(event: &Value) -> Option<&str> {
    let places = [
        &event["ai_agent"]["uid"],
        &event["unmapped"]["agent"],
        &event["entity"]["uid"],
    ];
    places.into_iter().find_map(Value::as_str)
}

// === impl Kind ===

impl Kind {
    fn is_of(self, event: &Value) -> bool {
        match self {
            Self::Verdict(name) => event["unmapped"]["verdict"] == name,
            Self::Code(start) => event["metadata"]["event_code"]
                .as_str()
                .is_some_and(|code| code.starts_with(start)),
        }
    }
}

impl FromStr for Kind {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Self, QueryError> {
        if let Some((_, kind)) = KINDS.iter().find(|(name, _)| *name == text) {
            return Ok(*kind);
        }
        let code = Code::ALL.iter().find(|code| code.name() == text);
        code.map(|code| Self::Code(code.name()))
            .ok_or_else(|| QueryError::Kind(text.to_owned()))
    }
}

// === impl Destination ===

impl Destination {
    fn is_of(&self, event: &Value) -> bool {
        let dst = &event["dst_endpoint"];
        let port = self
            .port
            .is_none_or(|port| dst["port"].as_u64() == Some(port.into()));
        let name = |found: &dyn Fn(&str) -> bool| {
            let names = [&dst["hostname"], &event["query"]["hostname"]];
            names
                .iter()
                .filter_map(|name| name.as_str())
                .any(|name| found(&plain(name)))
        };
        port && match &self.host {
            Wanted::Any => dst.is_object(),
            Wanted::Net(net) => dst["ip"]
                .as_str()
                .and_then(|ip| ip.parse::<IpAddr>().ok())
                .is_some_and(|ip| net.contains(&ip.to_canonical())),
            Wanted::Name(wanted) => name(&|found| found == wanted),
            Wanted::Below(parent) => name(&|found| {
                found
                    .strip_suffix(parent.as_str())
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }),
        }
    }
}

impl FromStr for Destination {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Self, QueryError> {
        let wrong = || QueryError::Destination(text.to_owned());
        let (host, port) = match text.rsplit_once(':') {
            // An address of version 6 without a port is full of colons.
            _ if text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok() => (text, None),
            Some((host, port)) => (host, Some(port.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let wanted = if host.is_empty() {
            port.is_some().then_some(Wanted::Any)
        } else if let Ok(ip) = host.parse::<IpAddr>() {
            Some(Wanted::Net(ip.to_canonical().into()))
        } else if let Ok(net) = host.parse::<IpNet>() {
            Some(Wanted::Net(net))
        } else if let Some(parent) = host.strip_prefix("**.").or_else(|| host.strip_prefix("*.")) {
            is_name(parent).then(|| Wanted::Below(plain(parent)))
        } else {
            is_name(host).then(|| Wanted::Name(plain(host)))
        };
        Ok(Self {
            host: wanted.ok_or_else(wrong)?,
            port,
        })
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_lowercase()
}

// === impl Search ===

impl Search {
    /// Searches the logs whose current files are at `paths`, as they are now. A log that is not
    /// there is an empty one.
    pub fn open(paths: &[PathBuf], query: Query) -> Result<Self, FilesError> {
        let since = query
            .since
            .map(|since| UNIX_EPOCH + Duration::from_millis(since.max(0).unsigned_abs()));
        let mut streams = Vec::new();
        for path in paths {
            let mut files = open(&beside(path)?)?;
            // What was written to last before then has no such lines.
            files.retain(|file| {
                since.is_none_or(|since| file.modified.is_none_or(|modified| modified >= since))
            });
            files.reverse();
            streams.push(Stream {
                files,
                lines: None,
                next: None,
            });
        }
        let mut search = Self {
            query,
            streams,
            skipped: 0,
        };
        for at in 0..search.streams.len() {
            search.fill(at)?;
        }
        Ok(search)
    }

    /// The next line, of whichever log has the earliest.
    pub fn next_line(&mut self) -> Result<Option<Line>, FilesError> {
        let time = |stream: &Stream| {
            let next = stream.next.as_ref()?;
            Some(next.event["time"].as_i64().unwrap_or_default())
        };
        let first = self
            .streams
            .iter()
            .enumerate()
            .filter_map(|(at, stream)| Some((time(stream)?, at)))
            .min();
        let Some((_, at)) = first else {
            return Ok(None);
        };
        let line = self
            .streams
            .get_mut(at)
            .and_then(|stream| stream.next.take());
        self.fill(at)?;
        Ok(line)
    }

    /// Lines that are no events.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Reads the stream on to its next line that is wanted.
    fn fill(&mut self, at: usize) -> Result<(), FilesError> {
        let Some(stream) = self.streams.get_mut(at) else {
            return Ok(());
        };
        loop {
            let Some(lines) = &mut stream.lines else {
                let Some(file) = stream.files.pop() else {
                    return Ok(());
                };
                stream.lines = Some(file.lines());
                continue;
            };
            let bytes = match lines.next()? {
                None => {
                    stream.lines = None;
                    continue;
                }
                // The daemon may be about to write the rest.
                Some(Piece::Torn(_)) => continue,
                Some(Piece::Overlong) => {
                    self.skipped += 1;
                    continue;
                }
                Some(Piece::Line(bytes)) => bytes,
            };
            let text = std::str::from_utf8(bytes).ok();
            let event = text.and_then(|text| serde_json::from_str::<Value>(text).ok());
            match text.zip(event) {
                Some((text, event)) if self.query.wants(&event) => {
                    stream.next = Some(Line {
                        raw: text.to_owned(),
                        event,
                    });
                    return Ok(());
                }
                Some(_) => {}
                None => self.skipped += 1,
            }
        }
    }
}

// === impl Tally ===

impl Tally {
    /// Adds a line.
    pub fn add(&mut self, event: &Value) {
        let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let verdict = match event["unmapped"]["verdict"].as_str() {
            Some(verdict) => verdict.to_owned(),
            None => word(&event["metadata"]["event_code"]),
        };
        let attempts = match &event["count"] {
            Value::Null => u64::from(event["unmapped"]["verdict"].is_string()),
            count => count.as_u64().unwrap_or(0),
        };
        let key = (
            agent(event).unwrap_or("-").to_owned(),
            verdict,
            word(&event["unmapped"]["reason"]),
        );
        let counted = self.0.entry(key).or_default();
        counted.lines += 1;
        counted.attempts = counted.attempts.saturating_add(attempts);
    }
}
