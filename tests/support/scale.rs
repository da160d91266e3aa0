//! How much of a long case is done: all of it with `REMIT_TEST_FULL=1` (`remit.full` on a VM's
//! command line), else a twentieth, so that the suite stays short.

use std::time::Duration;

/// Whether the long form was asked for.
pub fn full() -> bool {
    std::env::var_os("REMIT_TEST_FULL").is_some_and(|value| value == "1")
}

/// Whether this is a VM of the suite, whose processors may be emulated.
pub fn emulated() -> bool {
    std::env::var_os("REMIT_TEST_VM").is_some()
}

/// `whole` or a twentieth of it, but five at least; on emulated processors, where a start of the
/// daemon takes seconds, a hundredth, but three at least.
pub fn of(whole: usize) -> usize {
    match (full(), emulated()) {
        (true, _) => whole,
        (false, false) => (whole / 20).max(5).min(whole),
        (false, true) => (whole / 100).max(3).min(whole),
    }
}

/// `count`, or a third of it on emulated processors.
pub fn third_of(count: usize) -> usize {
    if emulated() && !full() {
        count.div_ceil(3)
    } else {
        count
    }
}

/// So many seconds of patience; more on emulated processors.
pub fn patience(secs: u64) -> u64 {
    if emulated() { secs * 4 } else { secs }
}

/// How long a case may take.
pub fn deadline() -> Duration {
    Duration::from_secs(if full() { 1200 } else { 60 })
}

/// `p50 A ms, p99 B ms, most C ms` of durations in nanoseconds.
pub fn percentiles(nanos: &mut [u64]) -> String {
    nanos.sort_unstable();
    let at = |share: usize| {
        // Nearest rank.
        let rank = (nanos.len() * share).div_ceil(100).max(1);
        nanos.get(rank - 1).copied().unwrap_or_default() as f64 / 1e6
    };
    format!(
        "p50 {:.2} ms, p99 {:.2} ms, most {:.2} ms of {}",
        at(50),
        at(99),
        at(100),
        nanos.len()
    )
}

#[cfg(test)]
mod tests {
    use super::percentiles;

    #[test]
    fn ranks_are_nearest() {
        let mut nanos: Vec<u64> = (1..=200).rev().map(|ms| ms * 1_000_000).collect();
        assert_eq!(
            percentiles(&mut nanos),
            "p50 100.00 ms, p99 198.00 ms, most 200.00 ms of 200"
        );
        assert!(percentiles(&mut [7_000_000]).starts_with("p50 7.00 ms, p99 7.00 ms"));
    }
}
