//! Where the view's news come from: the daemon's status, asked now and then, the violation log as it
//! grows, and answers to questions.

use std::{
    path::Path,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::super::{agents::segment, format};
use crate::{
    audit::{
        LogName,
        line::is_of_probe,
        tail::{Filter, Tail, Wake},
    },
    control::{
        client::Client,
        protocol::{Answer, Explain, Question, Status},
    },
};

/// How long the log's folder may be silent before the file is looked at all the same.
const LOOK: Duration = Duration::from_millis(500);
/// Of a log that is there already, what was written so long ago is of interest.
const BEFORE: i64 = 10 * 60 * 1000;

/// Something new.
pub enum Said {
    /// The daemon's status.
    Status(Box<Status>),
    /// A line of the log.
    Violation(Value),
    /// The answer to a question.
    Explained(String),
    /// There is no status, and why.
    Trouble(String),
}

/// Threads that ask and read. They end with the process.
pub struct Feed {
    news: Receiver<Said>,
    questions: Sender<Question>,
}

impl Feed {
    /// Asks the daemon `every` so often, and reads the log in `folder`, lines of `probes` if wanted.
    pub fn start(client: Client, folder: &Path, every: Duration, probes: bool) -> Self {
        let (say, news) = channel();
        let (questions, asked) = channel();
        let path = folder.join(LogName::Violations.file());
        let say_violations = say.clone();
        thread::spawn(move || read(&path, probes, &say_violations));
        thread::spawn(move || ask(&client, every, &asked, &say));
        Self { news, questions }
    }

    /// What is new.
    pub fn news(&self) -> impl Iterator<Item = Said> {
        self.news.try_iter()
    }

    /// Asks the kernel; the answer is news.
    pub fn explain(&self, question: Question) {
        // The thread ends with the process alone.
        drop(self.questions.send(question));
    }
}

fn ask(client: &Client, every: Duration, asked: &Receiver<Question>, say: &Sender<Said>) {
    loop {
        let said = match client.get::<Status>("/status") {
            Ok(status) => Said::Status(Box::new(status)),
            Err(error) => Said::Trouble(error.to_string()),
        };
        if say.send(said).is_err() {
            return;
        }
        let until = Instant::now() + every;
        loop {
            match asked.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(question) => {
                    let text = explain(client, &question);
                    if say.send(Said::Explained(text)).is_err() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

fn explain(client: &Client, question: &Question) -> String {
    let path = format!(
        "/explain?agent={}&addr={}&port={}&protocol={}",
        segment(&question.agent),
        question.addr,
        question.port,
        question.protocol
    );
    match client.get::<Explain>(&path) {
        Ok(explain) => told(&explain),
        Err(error) => error.to_string(),
    }
}

/// What the kernel would say now, in a few lines.
fn told(explain: &Explain) -> String {
    let question = &explain.question;
    let protocol = match question.protocol {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => format!("protocol {other}"),
    };
    let addr = if question.addr.is_ipv6() {
        format!("[{}]:{}", question.addr, question.port)
    } else {
        format!("{}:{}", question.addr, question.port)
    };
    let verdict = match explain.verdict {
        Answer::Allowed => "allowed now",
        Answer::Monitored => "let through and reported, for the agent is in monitor mode",
        Answer::Denied => "denied now",
        Answer::Fault => "denied, for the kernel side cannot tell",
    };
    let mut lines = vec![
        format!("{} to {addr} by {protocol}", question.agent),
        format!(
            "{verdict}{}",
            match &explain.reason {
                Some(reason) => format!(": {reason}"),
                None => String::new(),
            }
        ),
    ];
    match &explain.entry {
        Some(entry) => {
            lines.push(format!("by {}: {}", entry.name, entry.text));
            lines.push(format!("   {}", format::place(&entry.file, entry.line)));
        }
        None => lines.push("by no entry".to_owned()),
    }
    if let Some(until) = explain.until_ms {
        lines.push(format!("until {}", format::time(until)));
    }
    lines.extend(explain.note.clone());
    lines.join("\n")
}

fn read(path: &Path, probes: bool, say: &Sender<Said>) {
    let mut wake = Wake::new(path);
    let since = jiff::Timestamp::now().as_millisecond() - BEFORE;
    let filter = Filter {
        agent: None,
        since: Some(since),
    };
    // A log that cannot be read shows nothing; `remit tail` says why.
    let Ok(mut tail) = Tail::open(path, filter) else {
        return;
    };
    loop {
        let lines = tail.read().unwrap_or_default();
        if lines.is_empty() {
            wake.wait(LOOK);
        }
        for line in lines {
            if !probes && is_of_probe(&line.event) {
                continue;
            }
            if say.send(Said::Violation(line.event)).is_err() {
                return;
            }
        }
    }
}
