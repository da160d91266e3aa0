//! What Remit wants to reach, and whether it does. A target counts as met when the upper end of
//! the interval does not pass it, so a noisy run meets fewer.

use std::fmt::Write as _;

use super::{
    matrix::{LARGE, Measured, SMALL},
    stats::Ratio,
};

/// Workload, what Remit is compared with, at which size (none: at each), and the greatest ratio.
type Target = (&'static str, &'static str, Option<u32>, f64);

const TARGETS: &[Target] = &[
    ("connect", "nothing", None, 1.03),
    ("connect", "floor", None, 1.02),
    ("connect", "systemd", Some(LARGE), 1.00),
    ("connect", "nft", None, 0.97),
    ("connect", "nft_ct", None, 0.90),
    ("udp_send", "nothing", None, 1.06),
    ("udp_send", "floor", None, 1.02),
    ("udp_send", "systemd", Some(LARGE), 1.00),
    ("udp_send", "nft", Some(SMALL), 0.95),
    ("udp_send", "nft", Some(LARGE), 0.88),
    ("udp_send", "nft_ct", Some(SMALL), 0.90),
    ("udp_send", "nft_ct", Some(LARGE), 0.83),
    ("udp_connected", "nothing", None, 1.04),
    ("udp_connected", "floor", None, 1.015),
    ("udp_connected", "systemd", Some(LARGE), 0.985),
    ("udp_connected", "nft", Some(SMALL), 0.93),
    ("udp_connected", "nft", Some(LARGE), 0.85),
    ("udp_connected", "nft_ct", Some(SMALL), 0.87),
    ("udp_connected", "nft_ct", Some(LARGE), 0.80),
    ("live_set", "nothing", None, 1.06),
    ("live_set", "floor", None, 1.02),
    ("live_set", "systemd", None, 0.97),
    ("live_set", "nft", None, 0.87),
    ("live_set", "nft_ct", None, 0.82),
    ("cold_set", "nothing", None, 1.16),
    ("cold_set", "floor", None, 1.12),
    ("cold_set", "systemd", None, 0.90),
    ("cold_set", "nft", None, 0.84),
    ("cold_set", "nft_ct", None, 0.75),
    ("request_response", "nothing", None, 1.015),
    ("request_response", "floor", None, 1.01),
    ("request_response", "systemd", Some(LARGE), 0.99),
    ("request_response", "nft", None, 0.97),
    ("request_response", "nft_ct", None, 0.95),
    // Events are on: the daemon reads and writes them down meanwhile.
    ("deny", "floor", None, 1.60),
];

/// A target at one size, and what came of it.
pub struct Judged {
    /// Which workload.
    pub workload: &'static str,
    /// At how many destinations.
    pub size: u32,
    /// Remit's ratio to this design.
    pub to: &'static str,
    /// At most this.
    pub limit: f64,
    /// None: the design is not here, or the measurement is void.
    pub found: Option<Ratio>,
    /// The measurement is void.
    pub void: bool,
}

/// All targets of what was measured.
pub fn judge(measured: &Measured) -> Vec<Judged> {
    let mut judged = Vec::new();
    for &(workload, to, size, limit) in TARGETS {
        for cell in &measured.cells {
            if cell.workload == workload && size.is_none_or(|size| size == cell.size) {
                let void = cell.void().is_some();
                let found = if void { None } else { cell.remit_to(to) };
                judged.push(Judged {
                    workload,
                    size: cell.size,
                    to,
                    limit,
                    found,
                    void,
                });
            }
        }
    }
    judged
}

/// As lines for the terminal.
pub fn text(measured: &Measured) -> String {
    let judged = judge(measured);
    let met = judged.iter().filter(|one| one.met() == Some(true)).count();
    let known = judged.iter().filter(|one| one.found.is_some()).count();
    let mut text = format!(
        "\ntargets: {met} of {known} met, {} not told\n",
        judged.len() - known
    );
    for one in &judged {
        if one.met() == Some(true) {
            continue;
        }
        let word = one.word();
        // A String takes all that is written to it.
        let _ = write!(
            text,
            "  {word}: {} at {}, to {}: at most {}",
            one.workload, one.size, one.to, one.limit
        );
        let _ = match one.found {
            Some(Ratio { median, hi, .. }) => writeln!(text, ", is {median:.3} (up to {hi:.3})"),
            None => writeln!(text),
        };
    }
    text
}

impl Judged {
    /// What came of it.
    pub fn word(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "missed",
            None if self.void => "void",
            None => "not measured",
        }
    }

    /// Whether it is met; none if that can't be told.
    pub fn met(&self) -> Option<bool> {
        self.found.map(|ratio| ratio.hi <= self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::matrix::tests::measured;

    #[test]
    fn the_upper_end_decides() {
        let lanes = |remit| {
            measured(
                "connect",
                &[
                    ("nothing", 100.0),
                    ("aa", 100.0),
                    ("floor", 102.0),
                    ("remit", remit),
                ],
            )
        };
        let word = |remit, to: &str| {
            let judged = judge(&lanes(remit));
            let one = judged.iter().find(|one| one.to == to).unwrap();
            one.met()
        };
        assert_eq!(word(103.0, "nothing"), Some(true));
        assert_eq!(word(103.1, "nothing"), Some(false));
        assert_eq!(word(104.1, "floor"), Some(false));
        assert_eq!(word(103.0, "nft"), None, "nft is not here");
    }

    #[test]
    fn a_void_measurement_meets_nothing() {
        let void = measured(
            "connect",
            &[("nothing", 100.0), ("aa", 110.0), ("remit", 50.0)],
        );
        assert!(judge(&void).iter().all(|one| one.met().is_none()));
    }
}
