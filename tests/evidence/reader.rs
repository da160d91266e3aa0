//! A reader of a log as shippers are (Filebeat's filestream, Vector's file source): it looks at the
//! folder now and then, knows files by device and inode and not by name, and remembers how far it
//! has read each.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;

/// Where it is in one file.
#[derive(Default)]
struct Place {
    file: Option<File>,
    partial: Vec<u8>,
}

/// The reader of all files of a folder whose name starts so.
pub struct Shipper {
    folder: PathBuf,
    start: String,
    places: HashMap<(u64, u64), Place>,
    /// Whole lines, in the order in which they were read.
    pub lines: Vec<String>,
}

impl Shipper {
    /// Nothing read yet.
    pub fn new(folder: &Path, start: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            start: start.to_owned(),
            places: HashMap::new(),
            lines: Vec::new(),
        }
    }

    /// One look at the folder. Files are kept open, so that what was removed is read to its end.
    pub fn look(&mut self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.to_string_lossy().starts_with(&self.start) {
                continue;
            }
            // Renamed between the listing and now: the next look finds it.
            let Ok(file) = File::open(entry.path()) else {
                continue;
            };
            let meta = file.metadata()?;
            let place = self.places.entry((meta.dev(), meta.ino())).or_default();
            place.file.get_or_insert(file);
        }
        for place in self.places.values_mut() {
            let Some(file) = &mut place.file else {
                continue;
            };
            let mut bytes = std::mem::take(&mut place.partial);
            file.read_to_end(&mut bytes)?;
            let mut pieces = bytes.split(|&byte| byte == b'\n');
            place.partial = pieces.next_back().unwrap_or_default().to_vec();
            for piece in pieces {
                self.lines.push(String::from_utf8_lossy(piece).into_owned());
            }
        }
        Ok(())
    }
}

/// All whole lines of all files of a folder whose name starts so.
pub fn all_lines(folder: &Path, start: &str) -> Result<Vec<String>> {
    let mut shipper = Shipper::new(folder, start);
    shipper.look()?;
    Ok(shipper.lines)
}
