//! What is remembered of the clocks: the latest wall-clock time that was ever seen, so that a
//! clock behind it revives nothing, and the offset of this boot.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::file::{self, Damage, Kind, StateError};

/// File in the state directory.
pub(super) const NAME: &str = "clock.json";
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

pub(super) fn read(state: &Path) -> Result<Option<ClockMark>, Damage> {
    let read = file::read::<ClockMark>(&state.join(NAME), KIND)?;
    Ok(read.map(|decoded| decoded.value))
}

pub(super) fn write(state: &Path, mark: &ClockMark) -> Result<(), StateError> {
    let path = state.join(NAME);
    file::replace(&path, &file::encode(&path, KIND, mark)?)
}
