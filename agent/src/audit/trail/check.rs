//! The check of files: which, in which order, and line by line in little memory.

use std::path::{Path, PathBuf};

use super::{
    Places,
    chain::Hash,
    head::{Head, HeadError},
    keys::PublicKey,
    verify::{Anchor, Report, Seen, Verifier},
};
use crate::audit::files::{FilesError, Opened, Piece, beside, open, sort};

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

fn feed(verifier: &mut Verifier, files: Vec<Opened>) -> Result<(), FilesError> {
    for file in files {
        verifier.begin(&file.path.display().to_string());
        let mut lines = file.lines();
        while let Some(line) = lines.next()? {
            match line {
                Piece::Line(line) => verifier.line(line),
                Piece::Torn(piece) => verifier.torn(piece),
                Piece::Overlong => verifier.overlong(),
            }
        }
    }
    Ok(())
}
