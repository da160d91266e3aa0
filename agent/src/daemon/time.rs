//! The two clocks that the daemon lives by. Deadlines in the kernel are boot times; the registry
//! and the log speak wall-clock time. The offset between them is held still until the wall clock
//! really steps, so that the same registry always makes the same tables.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{
    kernel::boot_nanos,
    policy::{Clock, UnixMillis},
};

/// Steps smaller than this are slewing or noise, in milliseconds.
const STEP_MILLIS: i64 = 200;

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
}

impl Offset {
    /// The offset now.
    pub fn read() -> Self {
        Self {
            origin: wall_millis() - millis(boot_nanos()),
        }
    }

    /// The offset now, if the wall clock has stepped since this one was read.
    pub fn stepped(&self) -> Option<Self> {
        let now = Self::read();
        ((now.origin - self.origin).abs() >= STEP_MILLIS).then_some(now)
    }

    /// Both clocks at a moment that is the same for equal offsets: boot time zero.
    pub fn clock(&self) -> Clock {
        Clock {
            boot_now_ns: 0,
            wall_now_ms: self.origin,
        }
    }

    /// A boot time in nanoseconds on the wall clock.
    pub fn wall(&self, boot: u64) -> UnixMillis {
        self.origin + millis(boot)
    }
}

fn millis(nanos: u64) -> UnixMillis {
    i64::try_from(nanos / 1_000_000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_offsets_make_equal_deadlines() {
        let offset = Offset { origin: 1_000_000 };
        assert_eq!(offset.clock().deadline(Some(1_000_250)), 250_000_000);
        assert_eq!(offset.wall(250_000_000), 1_000_250);
        // Before boot: over, not endless.
        assert_eq!(offset.clock().deadline(Some(10)), 1);
    }

    #[test]
    fn a_step_is_noticed_and_noise_is_not() {
        let now = Offset::read();
        assert_eq!(now.stepped(), None);
        let before = Offset {
            origin: now.origin - 86_400_000,
        };
        assert!(before.stepped().is_some());
    }
}
