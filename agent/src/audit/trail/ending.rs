//! How a trail that is taken up ends, and what that says about what happened to it.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::Path,
};

use super::{
    chain::{self, Flaw, Position, Record},
    event::{Resumed, Why},
    head::Head,
    keys::PublicKey,
};
use crate::audit::writer::Log;

/// First piece read from the end of a file in search of its last record; doubled until one is
/// found.
const WINDOW: u64 = 64 << 10;

/// The end of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// There is no record.
    Nothing,
    /// The last record.
    Record(Record),
    /// The last line is in a chain, but not as it was written.
    Altered,
}

/// What is to be said before the next record, because the disk was full when the trail was opened.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) resumed: Option<Resumed>,
    pub(super) old_key: Option<PublicKey>,
}

impl Opening {
    /// The same with lines that were cut short since.
    pub(super) fn with(mut self, fragments: Vec<(usize, chain::Hash)>, last: u64) -> Self {
        match &mut self.resumed {
            Some(resumed) => resumed.fragments.extend(fragments),
            None if fragments.is_empty() => {}
            None => {
                self.resumed = Some(Resumed {
                    why: Why::Fragment,
                    head: Some(last),
                    found: Some(last),
                    fragments,
                });
            }
        }
        self
    }
}

/// Where to go on, and what is not as it should be.
pub(super) fn judge(
    head: Option<&Head>,
    ending: &Ending,
    boot: &str,
) -> (Option<(String, Position)>, Option<Why>) {
    let at_head = head.map(|head| (head.chain.clone(), head.last));
    let (head, record) = match (head, ending) {
        (None, Ending::Nothing) => return (None, None),
        (None, Ending::Record(record)) => {
            let start = (record.chain.clone(), record.position);
            return (Some(start), Some(Why::HeadMissing));
        }
        // A chain of its own, for there is nothing to hang on.
        (None, Ending::Altered) => return (None, Some(Why::HeadMissing)),
        (Some(head), Ending::Nothing) => {
            let why = (head.last.record > 0).then_some(Why::Behind);
            return (at_head, why);
        }
        (Some(_), Ending::Altered) => return (at_head, Some(Why::Differs)),
        (Some(head), Ending::Record(record)) => (head, record),
    };
    let found = record.position;
    if record.chain != head.chain {
        return (at_head, Some(Why::Differs));
    }
    if found == head.last {
        return (at_head, None);
    }
    let start = (record.chain.clone(), found);
    if Some(found) == head.next {
        return (Some(start), None);
    }
    // What was not handed to the disk is lost when the machine stops, on either side.
    let stopped = !boot.is_empty() && boot != head.boot;
    if found.record > head.last.record {
        let why = if stopped { Why::PowerLoss } else { Why::Ahead };
        return (Some(start), Some(why));
    }
    if found.record == head.last.record {
        return (at_head, Some(Why::Differs));
    }
    let lost = stopped && found.record >= head.synced;
    let why = if lost { Why::PowerLoss } else { Why::Behind };
    (at_head, Some(why))
}

pub(super) fn fragments(log: &mut Log) -> Vec<(usize, chain::Hash)> {
    log.take_fragments()
        .iter()
        .map(|fragment| (fragment.len(), chain::hash(fragment)))
        .collect()
}

/// The last record of the log whose current file is at `path`: of that file, or of the youngest
/// one beside it that has any, whoever named it.
pub(super) fn ending_of(path: &Path) -> io::Result<Ending> {
    let ending = last_record(path)?;
    if ending != Ending::Nothing {
        return Ok(ending);
    }
    let mut others = Vec::new();
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Ok(ending);
    };
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|other| other.starts_with(name) && other != name);
        if ours && meta.is_file() {
            others.push((meta.modified()?, entry.path()));
        }
    }
    others.sort_unstable();
    for (_, path) in others.iter().rev() {
        let ending = last_record(path)?;
        if ending != Ending::Nothing {
            return Ok(ending);
        }
    }
    Ok(Ending::Nothing)
}

/// The last record of the file at `path`. Lines behind it that are no events do not count.
pub(super) fn last_record(path: &Path) -> io::Result<Ending> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ending::Nothing),
        other => other?,
    };
    let size = file.metadata()?.len();
    let mut window = WINDOW;
    loop {
        let start = size.saturating_sub(window);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        (&file).take(size - start).read_to_end(&mut bytes)?;
        let mut lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
        // The first piece may be the end of a line.
        if start > 0 {
            lines.remove(0);
        }
        for line in lines.into_iter().rev() {
            match chain::read(line) {
                Ok(record) => return Ok(Ending::Record(record)),
                Err(Flaw::NoEvent(_) | Flaw::Unchained(_)) => {}
                Err(Flaw::Form(_) | Flaw::Altered { .. }) => return Ok(Ending::Altered),
            }
        }
        if start == 0 {
            return Ok(Ending::Nothing);
        }
        window = window.saturating_mul(4);
    }
}
