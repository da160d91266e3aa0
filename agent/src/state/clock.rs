//! What is remembered of the clocks: the latest wall-clock time that was ever seen, so that a
//! clock behind it revives nothing, and the offset of this boot.

use std::{fs, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::file::{self, Damage, Kind, StateError};

/// File in the state directory.
pub(super) const NAME: &str = "clock.json";
/// The same beside the registry, should the state directory be lost.
pub(super) const MARKER: &str = ".clock";
const KIND: Kind = Kind {
    word: "clock",
    max: 4096,
};

/// Both clocks as they were when they were last looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockMark {
    /// The boot that [`Self::origin_ms`] belongs to, as [`boot_id`] tells it.
    pub boot_id: String,
    /// Wall-clock milliseconds since the Unix epoch at boot time zero.
    pub origin_ms: i64,
    /// The same by the latest time that was ever seen; never before [`Self::origin_ms`].
    pub latest_ms: i64,
    /// Latest wall-clock time that was seen, in milliseconds since the Unix epoch.
    pub high_water_ms: i64,
}

/// The kernel's name for this boot; none if it does not say.
pub fn boot_id() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned()).filter(|id| !id.is_empty())
}

/// The mark of the two copies that knows the later time; what could not be read.
pub(super) fn read(copies: &[PathBuf; 2]) -> (Option<ClockMark>, Vec<Damage>) {
    let mut marks = Vec::new();
    let mut damage = Vec::new();
    for path in copies {
        match file::read::<ClockMark>(path, KIND) {
            Ok(read) => marks.extend(read.map(|decoded| decoded.value)),
            Err(damaged) => damage.push(damaged),
        }
    }
    let latest = marks.into_iter().max_by_key(|mark| mark.high_water_ms);
    (latest, damage)
}

pub(super) fn write(copies: &[PathBuf; 2], mark: &ClockMark) -> Result<(), StateError> {
    let mut written = Ok(());
    for path in copies {
        let wrote = file::encode(path, KIND, mark).and_then(|text| file::replace(path, &text));
        // Both are tried: each alone keeps the time.
        written = written.and(wrote);
    }
    written
}
