//! Wall-clock times of the registry as boot times of the kernel. Pure: the caller reads both
//! clocks, at one moment.

use agent_ebpf::abi::{NEVER, Rule};

use super::tables::{TimedRule, UnixMillis};

const NANOS_PER_MILLI: i128 = 1_000_000;

/// The same moment on both clocks.
///
/// The wall clock may be behind a time that was seen already. What begins then goes by the wall
/// clock, and what ends by the latest time: each by the one that grants less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// CLOCK_BOOTTIME in nanoseconds.
    pub boot_now_ns: u64,
    /// Milliseconds since the Unix epoch.
    pub wall_now_ms: UnixMillis,
    /// The latest time that this moment can be: the wall clock, or later.
    pub latest_now_ms: UnixMillis,
}

// === impl Clock ===

impl Clock {
    /// A moment at which the wall clock is to be believed.
    pub const fn at(boot_now_ns: u64, wall_now_ms: UnixMillis) -> Self {
        Self {
            boot_now_ns,
            wall_now_ms,
            latest_now_ms: wall_now_ms,
        }
    }

    /// The boot time from which something is expired; none is [`NEVER`]. A time in the past comes
    /// out as a boot time that has passed, never as 0 or [`NEVER`].
    pub fn deadline(&self, expires: Option<UnixMillis>) -> u64 {
        expires.map_or(NEVER, |expires| {
            self.boot_time(expires, self.latest_now_ms.max(self.wall_now_ms))
                .clamp(1, NEVER - 1)
        })
    }

    /// The boot time from which something is valid; none is 0.
    pub fn not_before(&self, from: Option<UnixMillis>) -> u64 {
        from.map_or(0, |from| {
            self.boot_time(from, self.wall_now_ms).min(NEVER - 1)
        })
    }

    /// A rule as the kernel takes it.
    pub fn rule(&self, timed: &TimedRule) -> Rule {
        Rule {
            deadline: self.deadline(timed.expires),
            entry: timed.entry,
            low: timed.low,
            high: timed.high,
            class: timed.class.map_or(0, |class| class as u8),
            effect: timed.effect as u8,
            ..Rule::zeroed()
        }
    }

    fn boot_time(&self, wall: UnixMillis, now: UnixMillis) -> u64 {
        let ahead = (i128::from(wall) - i128::from(now)) * NANOS_PER_MILLI;
        let boot = i128::from(self.boot_now_ns) + ahead;
        u64::try_from(boot.max(0)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: Clock = Clock::at(5_000_000_000, 1_000_000);

    #[test]
    fn a_clock_that_is_behind_neither_revives_nor_hastens() {
        let behind = Clock {
            latest_now_ms: 1_002_000,
            ..CLOCK
        };
        // Over a second ago by the latest time, though a second ahead by the wall clock.
        assert_eq!(behind.deadline(Some(1_001_000)), 4_000_000_000);
        assert_eq!(behind.not_before(Some(1_001_000)), 6_000_000_000);
        // A latest time that is none changes nothing.
        let odd = Clock {
            latest_now_ms: 0,
            ..CLOCK
        };
        assert_eq!(odd.deadline(Some(1_000_250)), 5_250_000_000);
    }

    #[test]
    fn times_keep_their_distance_to_now() {
        assert_eq!(CLOCK.deadline(Some(1_000_250)), 5_250_000_000);
        assert_eq!(CLOCK.deadline(Some(999_000)), 4_000_000_000);
        assert_eq!(CLOCK.not_before(Some(1_000_250)), 5_250_000_000);
    }

    #[test]
    fn the_past_has_passed_and_the_far_future_is_not_forever() {
        assert_eq!(CLOCK.deadline(Some(0)), 1);
        assert_eq!(CLOCK.deadline(Some(i64::MIN)), 1);
        assert_eq!(CLOCK.deadline(Some(i64::MAX)), NEVER - 1);
        assert_eq!(CLOCK.deadline(None), NEVER);
        assert_eq!(CLOCK.not_before(Some(0)), 0);
        assert_eq!(CLOCK.not_before(None), 0);
        assert_eq!(CLOCK.not_before(Some(i64::MAX)), NEVER - 1);
    }
}
