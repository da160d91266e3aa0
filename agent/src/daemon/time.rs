//! The two clocks that the daemon lives by. Deadlines in the kernel are boot times (which go on in
//! suspend to RAM); the registry and the log speak wall-clock time. The offset between them is
//! held still until the wall clock really steps, so that the same registry always makes the same
//! tables, also after a restart of the daemon.
//!
//! A wall clock that goes back must not revive what has expired. So the latest time ever seen is
//! kept, also across boots (see `state`), and what ends is counted by it: after a step back, time
//! goes on from there. The offset calls the difference its lead. What begins (`not_before`) goes by
//! the wall clock as it is. A lead that is wrong, after a step forward that was a mistake, is given
//! up by `remit reload --accept-clock` alone.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{
    kernel::boot_nanos,
    policy::{Clock, UnixMillis},
};

/// Steps smaller than this are slewing or noise, in milliseconds.
const STEP_MILLIS: i64 = 200;
/// Leads smaller than this are not worth a word, in milliseconds.
const LEAD_MILLIS: i64 = 2_000;

/// Milliseconds since the Unix epoch.
pub fn wall_millis() -> UnixMillis {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    }
}

/// An offset between the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// Wall-clock milliseconds at boot time zero.
    origin: UnixMillis,
    /// The same by the latest time ever seen; never before `origin`.
    latest: UnixMillis,
}

/// What an earlier daemon knew of the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Before {
    /// Offset and lead, if that was in this boot.
    pub same_boot: Option<Offset>,
    /// The latest time that it saw, in wall-clock milliseconds.
    pub high_water: UnixMillis,
}

impl Offset {
    /// The offset now, with nothing known of before.
    pub fn read() -> Self {
        let origin = origin();
        Self {
            origin,
            latest: origin,
        }
    }

    /// An offset as it was kept.
    pub fn new(origin: UnixMillis, latest: UnixMillis) -> Self {
        Self {
            origin,
            latest: latest.max(origin),
        }
    }

    /// The offset now, going on from what was known before.
    pub fn resume(before: &Before) -> Self {
        let high = before.high_water.saturating_sub(millis(boot_nanos()));
        match before.same_boot {
            Some(known) => {
                let known = Self {
                    latest: known.latest.max(high),
                    ..known
                };
                known.stepped().unwrap_or(known)
            }
            None => {
                let origin = origin();
                Self::new(origin, high)
            }
        }
    }

    /// The offset now, if the wall clock has stepped since this one was read.
    pub fn stepped(&self) -> Option<Self> {
        let origin = origin();
        ((origin - self.origin).abs() >= STEP_MILLIS).then(|| Self::new(origin, self.latest))
    }

    /// The same with the wall clock taken at its word.
    pub fn accepted(&self) -> Self {
        Self {
            latest: self.origin,
            ..*self
        }
    }

    /// How far the latest time is ahead of the wall clock, in milliseconds, where that is worth a
    /// word.
    pub fn lead(&self) -> Option<i64> {
        Some(self.latest - self.origin).filter(|lead| *lead >= LEAD_MILLIS)
    }

    /// Wall-clock milliseconds at boot time zero.
    pub fn origin(&self) -> UnixMillis {
        self.origin
    }

    /// The same by the latest time ever seen.
    pub fn latest(&self) -> UnixMillis {
        self.latest
    }

    /// The latest time that it can be now, in wall-clock milliseconds.
    pub fn high_water(&self) -> UnixMillis {
        self.latest + millis(boot_nanos())
    }

    /// Both clocks at a moment that is the same for equal offsets: boot time zero.
    pub fn clock(&self) -> Clock {
        Clock {
            boot_now_ns: 0,
            wall_now_ms: self.origin,
            latest_now_ms: self.latest,
        }
    }

    /// A boot time in nanoseconds on the wall clock.
    pub fn wall(&self, boot: u64) -> UnixMillis {
        self.origin + millis(boot)
    }
}

fn origin() -> UnixMillis {
    wall_millis() - millis(boot_nanos())
}

fn millis(nanos: u64) -> UnixMillis {
    i64::try_from(nanos / 1_000_000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400_000;

    #[test]
    fn equal_offsets_make_equal_deadlines() {
        let offset = Offset::new(1_000_000, 0);
        assert_eq!(offset.clock().deadline(Some(1_000_250)), 250_000_000);
        assert_eq!(offset.wall(250_000_000), 1_000_250);
        // Before boot: over, not endless.
        assert_eq!(offset.clock().deadline(Some(10)), 1);
        assert_eq!(offset.lead(), None);
    }

    #[test]
    fn a_step_is_noticed_and_noise_is_not() {
        let now = Offset::read();
        assert_eq!(now.stepped(), None);
        // The wall clock has gone a day ahead of what is known.
        let behind = Offset::new(now.origin - DAY, 0);
        let stepped = behind.stepped().unwrap();
        assert_eq!(stepped.lead(), None);
        // It has gone a day back: what ends goes on from where it was.
        let ahead = Offset::new(now.origin + DAY, 0);
        let stepped = ahead.stepped().unwrap();
        assert_eq!(stepped.latest, now.origin + DAY);
        assert!((stepped.lead().unwrap() - DAY).abs() < STEP_MILLIS);
        assert_eq!(stepped.accepted().lead(), None);
    }

    #[test]
    fn the_latest_time_survives_restarts_and_boots() {
        let now = Offset::read();
        let restart = Before {
            same_boot: Some(Offset::new(now.origin + 7, now.origin + DAY)),
            high_water: 0,
        };
        // Not read anew: the same registry makes the same tables.
        assert_eq!(Offset::resume(&restart), restart.same_boot.unwrap());

        let boot = Before {
            same_boot: None,
            high_water: wall_millis() + DAY,
        };
        let resumed = Offset::resume(&boot);
        assert!((resumed.lead().unwrap() - DAY).abs() < STEP_MILLIS);
        let fine = Before {
            same_boot: None,
            high_water: wall_millis() - DAY,
        };
        assert_eq!(Offset::resume(&fine).lead(), None);
    }
}
