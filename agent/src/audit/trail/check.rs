//! The check of files: which, in which order, and line by line in little memory.

use std::{
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use super::{
    Places,
    chain::{self, Flaw, Hash, Record},
    head::{Head, HeadError},
    keys::PublicKey,
    verify::{Anchor, Report, Seen, Verifier},
};
use crate::audit::files::{FilesError, Lines, Opened, Piece, beside, open, sort};

/// Checks the trail of this host against its head.
pub fn host(places: &Places, pinned: Vec<PublicKey>) -> Result<Report, FilesError> {
    let before = seen(&places.head())?;
    let files = open(&beside(&places.file())?)?;
    let key = PublicKey::open(&places.key()).ok();
    let anchor = Anchor::Host {
        after: Box::new(before.clone()),
        before: Box::new(before),
        key,
    };
    let mut verifier = Verifier::new(pinned, anchor);
    feed(&mut verifier, files)?;
    verifier.head_after(seen(&places.head())?);
    Ok(verifier.finish())
}

/// Checks files from anywhere, in the order in which they were written: by date or number in their
/// names. `head` is the hash of a record that must be there.
pub fn copy(
    files: &[PathBuf],
    head: Option<Hash>,
    pinned: Vec<PublicKey>,
) -> Result<Report, FilesError> {
    let mut files = files.to_vec();
    sort(&mut files);
    let anchor = head.map_or(Anchor::None, Anchor::Hash);
    let mut verifier = Verifier::new(pinned, anchor);
    feed(&mut verifier, open(&files)?)?;
    Ok(verifier.finish())
}

/// A head that may not be read is no head that was tampered with: the caller cannot tell.
fn seen(path: &Path) -> Result<Seen, FilesError> {
    match Head::read(path) {
        Ok(None) => Ok(Seen::Missing),
        Ok(Some((head, key))) => Ok(Seen::Head(head, key)),
        Err(HeadError::Io { path, source, .. }) => Err(FilesError { path, source }),
        Err(error @ HeadError::Untrusted { .. }) => Ok(Seen::Untrusted(error.to_string())),
    }
}

/// Bytes of lines that are worked on at a time.
const BATCH: usize = 4 << 20;
/// Lines that are worth a thread of their own.
const SHARE: usize = 64;
/// Threads at most: more than that the disk does not feed.
const THREADS: usize = 8;

/// Lines of one file, one behind the other.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    pieces: Vec<Kind>,
}

/// What a piece of a batch is, and where it ends.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Line(usize),
    Torn(usize),
    Overlong(usize),
}

/// A piece as the check needs it.
enum Read<'b> {
    Line(&'b [u8], Result<Record, Flaw>),
    Torn(&'b [u8]),
    Overlong,
}

/// Hands the lines of all files to the check. Each is read and hashed by itself, which is nearly all
/// of the work, so as many at a time as there are processors; the check then takes them in order.
fn feed(verifier: &mut Verifier, files: Vec<Opened>) -> Result<(), FilesError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (mut batch, mut next) = (Batch::default(), Batch::default());
    for file in files {
        verifier.begin(&file.path.display().to_string());
        let mut lines = file.lines();
        batch.fill(&mut lines)?;
        while !batch.pieces.is_empty() {
            let pieces = batch.pieces();
            let share = pieces.len().div_ceil(threads.min(THREADS)).max(SHARE);
            thread::scope(|scope| {
                let readers: Vec<_> = pieces
                    .chunks(share)
                    .map(|part| scope.spawn(|| part.iter().map(Read::new).collect::<Vec<_>>()))
                    .collect();
                next.fill(&mut lines)?;
                for reader in readers {
                    let read = reader.join().unwrap_or_else(|panic| resume_unwind(panic));
                    read.into_iter().for_each(|piece| piece.put(verifier));
                }
                Ok(())
            })?;
            std::mem::swap(&mut batch, &mut next);
        }
    }
    Ok(())
}

// === impl Batch ===

impl Batch {
    /// Takes the next lines in place of those that it has; none at the end of the file.
    fn fill(&mut self, lines: &mut Lines) -> Result<(), FilesError> {
        self.bytes.clear();
        self.pieces.clear();
        while self.bytes.len() < BATCH {
            let kind: fn(usize) -> Kind = match lines.next()? {
                None => break,
                Some(Piece::Line(line)) => {
                    self.bytes.extend_from_slice(line);
                    Kind::Line
                }
                Some(Piece::Torn(piece)) => {
                    self.bytes.extend_from_slice(piece);
                    Kind::Torn
                }
                Some(Piece::Overlong) => Kind::Overlong,
            };
            self.pieces.push(kind(self.bytes.len()));
        }
        Ok(())
    }

    fn pieces(&self) -> Vec<(Kind, &[u8])> {
        let mut start = 0;
        let piece = |kind: &Kind| {
            let (Kind::Line(end) | Kind::Torn(end) | Kind::Overlong(end)) = *kind;
            let bytes = self.bytes.get(start..end).unwrap_or_default();
            start = end;
            (*kind, bytes)
        };
        self.pieces.iter().map(piece).collect()
    }
}

// === impl Read ===

impl<'b> Read<'b> {
    fn new(&(kind, bytes): &(Kind, &'b [u8])) -> Self {
        match kind {
            Kind::Line(_) => Self::Line(bytes, chain::read(bytes)),
            Kind::Torn(_) => Self::Torn(bytes),
            Kind::Overlong(_) => Self::Overlong,
        }
    }

    fn put(self, verifier: &mut Verifier) {
        match self {
            Self::Line(line, read) => verifier.read(line, read),
            Self::Torn(piece) => verifier.torn(piece),
            Self::Overlong => verifier.overlong(),
        }
    }
}
