//! Where the time of a start or a reload goes, for the log at level `debug` and for whoever makes
//! them faster.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// What was done one after the other, and how long each took.
#[derive(Clone, Debug)]
pub(super) struct Laps {
    began: Instant,
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Laps {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: now,
            laps: Vec::new(),
        }
    }

    /// Whatever was done since the last call was this.
    pub(super) fn done(&mut self, what: &'static str) {
        let now = Instant::now();
        self.laps.push((what, now.duration_since(self.last)));
        self.last = now;
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        for (what, took) in &self.laps {
            write!(f, "{what} {:.1}, ", millis(*took))?;
        }
        let all = self.last.duration_since(self.began);
        write!(f, "all {:.1} ms", millis(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_are_told_in_order_and_sum_up() {
        let now = Instant::now();
        let laps = Laps {
            began: now,
            last: now + Duration::from_micros(2500),
            laps: vec![
                ("read", Duration::from_millis(1)),
                ("write", Duration::from_micros(1500)),
            ],
        };
        assert_eq!(laps.to_string(), "read 1.0, write 1.5, all 2.5 ms");
    }
}
