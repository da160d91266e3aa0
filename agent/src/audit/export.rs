//! Other forms of the events beside the logs: files that shippers follow, and the systemd journal.
//! The log of record stays what it is; what is lost here is counted, and can be made again from it.

use std::path::Path;

use serde_json::Value;

use super::{
    encode::{
        Format,
        journal::{Journal, SOCKET},
    },
    writer::{Limits, Log, LogError},
};

/// Everything that events go to beside their log.
#[derive(Debug, Default)]
pub struct Exports {
    files: Vec<(Format, Log)>,
    journal: Option<Journal>,
    #[cfg(feature = "otlp")]
    otlp: Option<super::otlp::Otlp>,
    lost: u64,
    trouble: Option<String>,
}

// === impl Exports ===

impl Exports {
    /// Opens a file for each format in `dir`, `events.FORMAT.jsonl`, and a sender to the journal.
    pub fn open(
        dir: &Path,
        formats: &[Format],
        journal: bool,
        limits: Limits,
    ) -> Result<Self, LogError> {
        let mut exports = Self::default();
        for format in formats {
            let log = Log::open_unnumbered(dir, &file(*format), limits)?;
            exports.files.push((*format, log));
        }
        if journal {
            let path = Path::new(SOCKET);
            let journal = Journal::open(path).map_err(|source| LogError::Io {
                operation: "open",
                path: path.to_owned(),
                source,
            })?;
            exports.journal = Some(journal);
        }
        Ok(exports)
    }

    /// Sends events to a collector as well.
    #[cfg(feature = "otlp")]
    pub fn send_to(&mut self, collector: super::otlp::Collector) -> Result<(), LogError> {
        let otlp = super::otlp::Otlp::start(collector).map_err(|source| LogError::Io {
            operation: "start the thread of",
            path: "otlp".into(),
            source,
        })?;
        self.otlp = Some(otlp);
        Ok(())
    }

    /// Whether there is anything to write to.
    pub fn is_empty(&self) -> bool {
        #[cfg(feature = "otlp")]
        if self.otlp.is_some() {
            return false;
        }
        self.files.is_empty() && self.journal.is_none()
    }

    /// Writes an event to all of them.
    pub fn write(&mut self, event: &Value) {
        for (format, log) in &mut self.files {
            let line = format.encode(event);
            match log.append_text(line) {
                Ok(_) => self.trouble = None,
                Err(error) => {
                    self.lost += 1;
                    self.trouble = Some(format!("{:#}", anyhow::Error::from(error)));
                }
            }
        }
        if let Some(journal) = &mut self.journal {
            journal.send(event);
        }
        #[cfg(feature = "otlp")]
        if let Some(otlp) = &self.otlp {
            otlp.send(event);
        }
    }

    /// Opens the files anew, as after a rotation by somebody else.
    pub fn reopen(&mut self) -> Result<(), LogError> {
        self.files.iter_mut().try_for_each(|(_, log)| log.reopen())
    }

    /// Removes files that are too old or too many.
    pub fn prune(&self) -> Result<(), LogError> {
        self.files.iter().try_for_each(|(_, log)| log.prune())
    }

    /// Events that were not written somewhere, since the last call.
    pub fn take_lost(&mut self) -> u64 {
        let journal = self.journal.as_mut().map_or(0, Journal::take_lost);
        #[cfg(feature = "otlp")]
        let journal = journal + self.otlp.as_ref().map_or(0, super::otlp::Otlp::take_lost);
        std::mem::take(&mut self.lost) + journal
    }

    /// Why the last file was not written, as long as that is so.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
}

/// `events.ecs.jsonl`, `events.ocsf-1.8.jsonl`, `events.log`.
fn file(format: Format) -> String {
    match format {
        Format::Human => "events.log".to_owned(),
        Format::Ocsf19 | Format::Ocsf18 | Format::Ecs => format!("events.{}.jsonl", format.name()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::audit::record::tests::{host, violation};

    #[test]
    fn each_form_gets_a_file_that_rotates() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_size: 2_000,
            max_total: 1 << 30,
            retention: Duration::from_secs(1 << 30),
        };
        let formats = [Format::Ecs, Format::Ocsf18, Format::Human];
        let mut exports = Exports::open(dir.path(), &formats, false, limits).unwrap();
        let event = violation().to_ocsf(&host(), 1);
        for _ in 0..3 {
            exports.write(&event);
        }
        drop(exports);
        let mut exports = Exports::open(dir.path(), &formats, false, limits).unwrap();
        exports.write(&event);
        assert_eq!((exports.take_lost(), exports.trouble()), (0, None));
        let count = |name: &str| {
            let text = fs::read_to_string(dir.path().join(name)).unwrap_or_default();
            text.lines().count()
        };
        assert_eq!(count("events.log"), 4);
        let ecs = [
            "events.ecs.jsonl",
            "events.ecs.jsonl.1",
            "events.ecs.jsonl.2",
        ];
        assert_eq!(ecs.map(count).iter().sum::<usize>(), 4);
        let line = fs::read_to_string(dir.path().join("events.ecs.jsonl")).unwrap();
        assert!(line.starts_with("{\"@timestamp\""));
        assert!(Exports::default().is_empty() && !exports.is_empty());
    }
}
