//! A hand in a daemon's tables: the pins are found by name, wherever below its bpffs they are, and
//! entries read and changed by bytes of the map's own sizes. See [`super::bpf`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::bpf::Pinned;

/// A pinned map.
pub struct Map {
    pinned: Pinned,
    key: usize,
    value: usize,
}

/// The pins of a daemon.
pub struct Pins(PathBuf);

// === impl Pins ===

impl Pins {
    /// Those below a bpffs folder.
    pub fn below(bpffs: &Path) -> Self {
        Self(bpffs.to_owned())
    }

    /// The map pinned as `name`.
    pub fn map(&self, name: &str) -> Result<Map> {
        Map::open(&self.only(name)?)
    }

    /// Where the one link of a program is pinned.
    pub fn link(&self, program: &str) -> Result<PathBuf> {
        let mut found = Vec::new();
        self.find(&self.0, program, &mut found);
        found.retain(|path| path.components().any(|part| part.as_os_str() == "links"));
        one(found, program)
    }

    /// The ring.
    pub fn ring(&self) -> Result<Pinned> {
        Ok(Pinned::open(&self.only("events")?)?)
    }

    fn only(&self, name: &str) -> Result<PathBuf> {
        let mut found = Vec::new();
        self.find(&self.0, name, &mut found);
        one(found, name)
    }

    fn find(&self, dir: &Path, name: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                self.find(&path, name, found);
            } else if entry.file_name() == name {
                found.push(path);
            }
        }
    }
}

fn one(found: Vec<PathBuf>, name: &str) -> Result<PathBuf> {
    match found.as_slice() {
        [path] => Ok(path.clone()),
        [] => bail!("`{name}` is not pinned"),
        more => bail!("`{name}` is pinned more than once: {more:?}"),
    }
}

/// Detaches a link for good, whoever holds it.
pub fn detach(pin: &Path) -> Result<()> {
    Ok(Pinned::open(pin)?.detach()?)
}

// === impl Map ===

impl Map {
    fn open(pin: &Path) -> Result<Self> {
        let pinned = Pinned::open(pin).with_context(|| format!("cannot open {}", pin.display()))?;
        let (key, value) = pinned.sizes()?;
        Ok(Self { pinned, key, value })
    }

    /// An entry.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>> {
        self.fits("key", key, self.key)?;
        let mut value = vec![0; self.value];
        self.pinned
            .lookup(key, &mut value)
            .with_context(|| format!("no entry {key:?}"))?;
        Ok(value)
    }

    /// Sets an entry, new or not.
    pub fn set(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.fits("key", key, self.key)?;
        self.fits("value", value, self.value)?;
        self.pinned
            .update(key, value)
            .with_context(|| format!("cannot set entry {key:?}"))
    }

    /// Deletes an entry.
    pub fn delete(&self, key: &[u8]) -> Result<()> {
        self.fits("key", key, self.key)?;
        self.pinned
            .delete(key)
            .with_context(|| format!("cannot delete entry {key:?}"))
    }

    /// Every key.
    pub fn keys(&self) -> Result<Vec<Vec<u8>>> {
        Ok(self.pinned.keys()?)
    }

    /// The kernel reads as many bytes as the map says, whatever it is handed.
    fn fits(&self, what: &str, bytes: &[u8], size: usize) -> Result<()> {
        if bytes.len() != size {
            bail!("{} bytes for a {what} of {size}", bytes.len());
        }
        Ok(())
    }
}
