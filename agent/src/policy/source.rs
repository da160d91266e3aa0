//! Named text, and where in it a byte is. Knows nothing of what the text means.

use std::{ops::Range, path::PathBuf};

/// A range of bytes of one source.
pub type Span = Range<usize>;

/// What a file of the registry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// One agent's entry (`agents.d/ID.toml`).
    Agent,
    /// A named set of destinations (`sets.d/NAME.toml`); of two with one name the earlier counts.
    Set,
    /// The host-wide denials (`floor.toml`).
    Floor,
}

/// One file of the registry, read by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The path as messages should show it. Its stem must be the agent's id or the set's name.
    pub path: PathBuf,
    /// The content.
    pub text: String,
    /// What it is.
    pub kind: SourceKind,
}

/// A source with an index of its lines.
#[derive(Debug)]
pub struct SourceFile<'a> {
    /// The source itself.
    pub source: &'a Source,
    /// Offset of the first byte of each line.
    starts: Vec<usize>,
}

// === impl Source ===

impl Source {
    /// The file name without `.toml`: what the id or name inside has to be.
    pub fn stem(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default();
        stem.to_string_lossy().into_owned()
    }
}

// === impl SourceFile ===

impl<'a> SourceFile<'a> {
    /// Indexes the lines of `source`.
    pub fn new(source: &'a Source) -> Self {
        let breaks = source.text.bytes().enumerate();
        let after_breaks = breaks
            .filter(|(_, byte)| *byte == b'\n')
            .map(|(at, _)| at + 1);
        let starts = std::iter::once(0).chain(after_breaks).collect();
        Self { source, starts }
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn position(&self, offset: usize) -> (u32, u32) {
        let line = self.line_index(offset);
        let start = self.starts.get(line).copied().unwrap_or_default();
        let before = self.source.text.get(start..offset).unwrap_or_default();
        (clamp(line + 1), clamp(before.chars().count() + 1))
    }

    /// The line with this number (from 1), without its line break.
    pub fn line(&self, number: u32) -> &'a str {
        let index = (number as usize).saturating_sub(1);
        let Some(&start) = self.starts.get(index) else {
            return "";
        };
        let end = self.starts.get(index + 1).copied();
        let line = self
            .source
            .text
            .get(start..end.unwrap_or(self.source.text.len()));
        line.unwrap_or_default().trim_end_matches(['\n', '\r'])
    }

    fn line_index(&self, offset: usize) -> usize {
        self.starts
            .partition_point(|&start| start <= offset)
            .saturating_sub(1)
    }
}

/// Four thousand million lines are refused by memory long before this.
fn clamp(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_characters_from_one() {
        let source = Source {
            path: "dir/x.toml".into(),
            text: "a = 1\nö = \"ü\" # x\r\nlast".into(),
            kind: SourceKind::Agent,
        };
        let file = SourceFile::new(&source);
        assert_eq!(source.stem(), "x");
        assert_eq!(file.position(0), (1, 1));
        assert_eq!(
            file.position(5),
            (1, 6),
            "the line break belongs to its line"
        );
        let quote = source.text.find('"').unwrap();
        assert_eq!(file.position(quote), (2, 5), "ö is one column");
        assert_eq!(file.position(source.text.len()), (3, 5));
        assert_eq!(file.line(2), "ö = \"ü\" # x");
        assert_eq!(file.line(3), "last");
        assert_eq!(file.line(9), "");
    }
}
