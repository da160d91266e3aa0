//! The main measurement: every design under every workload, at a small and at a large policy.

use anyhow::{Context as _, Result};

use super::{
    ATTEMPTS, Row,
    measure::{Bench, Heard, Host, Lane, Missing, Program, Run, Series, Shape},
    rounded,
    stats::{Ratio, median, ratio},
    void_by,
};
use crate::talk;

/// All workloads.
pub const WORKLOADS: [&str; 8] = [
    "connect",
    "udp_send",
    "udp_connected",
    "live_set",
    "cold_set",
    "request_response",
    "deny",
    "bulk",
];
/// All designs that have rows, in the order of tables.
pub const DESIGNS: [&str; 7] = [
    "aa",
    "floor",
    "remit",
    "per_packet",
    "systemd",
    "nft",
    "nft_ct",
];
/// Destinations of the small policy.
pub const SMALL: u32 = 10;
/// Destinations of the large one.
pub const LARGE: u32 = 100_000;

/// Lane, and its name in tests/bench.
const LANES: [(&str, &str); 11] = [
    ("nothing", "nothing"),
    ("aa", "nothing"),
    ("floor", "floor"),
    ("remit", "remit"),
    ("per_packet", "per_packet"),
    ("systemd", "systemd"),
    ("nft", "nft"),
    ("nft_ct", "nft_ct"),
    ("refuse", "refuse"),
    ("refuse_aa", "refuse"),
    ("refuse_floor", "refuse"),
];

/// Workloads whose programs' own time is asked for.
const COUNTED: [&str; 4] = ["connect", "udp_send", "cold_set", "deny"];
/// Lanes without programs.
const UNCOUNTED: [&str; 6] = [
    "nothing",
    "aa",
    "nft",
    "nft_ct",
    "refuse_aa",
    "refuse_floor",
];

/// A policy, and what is measured with it.
struct Scene {
    size: u32,
    hosts: bool,
    workloads: &'static [&'static str],
}

const SCENES: [Scene; 3] = [
    Scene {
        size: SMALL,
        hosts: false,
        workloads: &[
            "connect",
            "udp_send",
            "udp_connected",
            "request_response",
            "deny",
            "bulk",
        ],
    },
    Scene {
        size: LARGE,
        hosts: false,
        workloads: &[
            "connect",
            "udp_send",
            "udp_connected",
            "live_set",
            "request_response",
            "deny",
            "bulk",
        ],
    },
    Scene {
        size: LARGE,
        hosts: true,
        workloads: &["cold_set"],
    },
];

/// One workload at one size.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Which.
    pub workload: &'static str,
    /// Destinations in the scope.
    pub size: u32,
    series: Series,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// The machine.
    pub host: Host,
    /// Designs that are not here.
    pub missing: Vec<Missing>,
    /// In the order of [`WORKLOADS`], small before large.
    pub cells: Vec<Cell>,
    /// Programs' own times, with the destinations in the scope.
    pub programs: Vec<(u32, Program)>,
}

/// Measures all, or the workloads named.
pub fn run(bench: &Bench<'_>, only: &[String]) -> Result<Measured> {
    let mut measured = Measured::default();
    for scene in &SCENES {
        let mut left: Vec<&'static str> = scene
            .workloads
            .iter()
            .copied()
            .filter(|name| only.is_empty() || only.iter().any(|wanted| wanted == name))
            .collect();
        for attempt in 1..=ATTEMPTS {
            if left.is_empty() {
                break;
            }
            let last = attempt == ATTEMPTS || bench.effort.quick;
            let heard = measure(bench, scene, &left)?;
            left = measured.take(heard, scene.size, last)?;
            if last {
                break;
            }
            if !left.is_empty() {
                let names = left.join(", ");
                talk::note(&format!("void, and measured anew: {names}"));
            }
        }
    }
    let place = |name: &str| WORKLOADS.iter().position(|workload| *workload == name);
    measured
        .cells
        .sort_by_key(|cell| (place(cell.workload), cell.size));
    Ok(measured)
}

fn measure(bench: &Bench<'_>, scene: &Scene, workloads: &[&'static str]) -> Result<Heard> {
    let shape = Shape {
        prefixes: scene.size,
        hosts: scene.hosts,
        agents: 1,
        depth: 1,
    };
    let runs: Vec<Run> = workloads
        .iter()
        .map(|workload| Run {
            workload,
            lanes: lanes_of(workload)
                .iter()
                .map(|&(name, _)| name.to_owned())
                .collect(),
        })
        .collect();
    let used = |name: &str| {
        runs.iter()
            .any(|run| run.lanes.iter().any(|lane| lane == name))
    };
    let lanes: Vec<Lane> = LANES
        .iter()
        .filter(|(name, _)| used(name))
        .map(|&(name, design)| Lane {
            name: name.to_owned(),
            design,
            shape,
        })
        .collect();
    let what = format!(
        "{} {}",
        scene.size,
        if scene.hosts { "addresses" } else { "networks" }
    );
    let statistics: Vec<Run> = runs
        .iter()
        .filter(|run| COUNTED.contains(&run.workload))
        .map(|run| {
            let lanes = run.lanes.iter();
            let programs = lanes.filter(|lane| !UNCOUNTED.contains(&lane.as_str()));
            Run {
                workload: run.workload,
                lanes: programs.cloned().collect(),
            }
        })
        .collect();
    bench.measure(&what, &lanes, &runs, &statistics)
}

/// Lanes of a workload with the designs that they stand for. A refusal is compared with the
/// cheapest refusal there can be; the address filter has none at connect, so that its caller
/// would hang.
fn lanes_of(workload: &str) -> &'static [(&'static str, &'static str)] {
    const DENY: &[(&str, &str)] = &[
        ("refuse", ""),
        ("refuse_aa", "aa"),
        ("refuse_floor", "floor"),
        ("remit", "remit"),
        ("per_packet", "per_packet"),
        ("nft", "nft"),
        ("nft_ct", "nft_ct"),
    ];
    const OTHERS: &[(&str, &str)] = &[
        ("nothing", ""),
        ("aa", "aa"),
        ("floor", "floor"),
        ("remit", "remit"),
        ("per_packet", "per_packet"),
        ("systemd", "systemd"),
        ("nft", "nft"),
        ("nft_ct", "nft_ct"),
    ];
    if workload == "deny" { DENY } else { OTHERS }
}

// === impl Cell ===

impl Cell {
    /// Costs of a design over the cycles; of the base with an empty name.
    fn costs(&self, design: &str) -> Option<Vec<f64>> {
        let (lane, _) = lanes_of(self.workload)
            .iter()
            .find(|(_, name)| *name == design)?;
        self.series.costs(lane)
    }

    /// Ratio of a design to the base.
    pub fn ratio(&self, design: &str) -> Option<Ratio> {
        ratio(&self.costs(design)?, &self.costs("")?)
    }

    /// Ratio of Remit to a design; "nothing" is the base.
    pub fn remit_to(&self, design: &str) -> Option<Ratio> {
        let design = if design == "nothing" { "" } else { design };
        ratio(&self.costs("remit")?, &self.costs(design)?)
    }

    /// Median cost of an operation in nanoseconds; of the base with an empty name.
    pub fn cost(&self, design: &str) -> Option<f64> {
        median(&self.costs(design)?)
    }

    /// What a cost is.
    pub fn unit(&self) -> &str {
        &self.series.unit
    }

    /// Cycles.
    pub fn cycles(&self) -> usize {
        self.series.cycles.len()
    }

    /// Why its numbers hold nothing, if so.
    pub fn void(&self) -> Option<String> {
        match self.ratio("aa") {
            Some(aa) => void_by(&aa),
            None => Some("A/A was not measured".to_owned()),
        }
    }
}

// === impl Measured ===

impl Measured {
    /// Takes in what was heard; returns what is void and not kept.
    fn take(&mut self, heard: Heard, size: u32, last: bool) -> Result<Vec<&'static str>> {
        let mut void = Vec::new();
        self.host = heard.host;
        for missing in heard.missing {
            if !self.missing.iter().any(|known| known.lane == missing.lane) {
                self.missing.push(missing);
            }
        }
        // Measured anew: what is void now may have been so then.
        self.programs.retain(|(known, old)| {
            *known != size
                || !heard
                    .programs
                    .iter()
                    .any(|new| new.workload == old.workload)
        });
        let programs = heard.programs.into_iter();
        self.programs
            .extend(programs.map(|program| (size, program)));
        for series in heard.series {
            let workload = WORKLOADS
                .into_iter()
                .find(|name| *name == series.workload)
                .with_context(|| format!("nobody asked for workload {}", series.workload))?;
            let cell = Cell {
                workload,
                size,
                series,
            };
            if cell.void().is_some() && !last {
                void.push(workload);
            } else {
                self.cells.push(cell);
            }
        }
        Ok(void)
    }

    /// All rows.
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for cell in &self.cells {
            for design in DESIGNS {
                if let Some(Ratio { median, lo, hi }) = cell.ratio(design) {
                    rows.push(Row {
                        workload: cell.workload,
                        design,
                        size: cell.size,
                        ratio: rounded(median),
                        lo: rounded(lo),
                        hi: rounded(hi),
                    });
                }
            }
        }
        rows
    }

    /// What holds nothing, and why.
    pub fn void(&self) -> Vec<String> {
        let cells = self.cells.iter();
        cells
            .filter_map(|cell| {
                let why = cell.void()?;
                Some(format!("{} at {}: {why}", cell.workload, cell.size))
            })
            .collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Cells with the same costs in every cycle.
    pub fn measured(workload: &'static str, costs: &[(&str, f64)]) -> Measured {
        let lanes = costs.iter().map(|(lane, _)| (*lane).to_owned()).collect();
        let cycle: Vec<f64> = costs.iter().map(|(_, cost)| *cost).collect();
        Measured {
            cells: vec![Cell {
                workload,
                size: SMALL,
                series: Series {
                    workload: workload.to_owned(),
                    unit: "CPU ns".to_owned(),
                    lanes,
                    cycles: vec![cycle; 20],
                },
            }],
            ..Measured::default()
        }
    }

    #[test]
    fn rows_are_ratios_to_the_first_lane() {
        let measured = measured(
            "connect",
            &[("nothing", 200.0), ("aa", 201.0), ("remit", 206.0)],
        );
        let rows = measured.rows();
        assert_eq!(rows.len(), 2, "a design that is not here has no row");
        assert_eq!((rows[1].design, rows[1].ratio), ("remit", 1.03));
        assert!(measured.void().is_empty());
    }

    #[test]
    fn a_refusal_is_compared_with_the_cheapest() {
        let measured = measured(
            "deny",
            &[("refuse", 100.0), ("refuse_aa", 100.0), ("remit", 150.0)],
        );
        let rows = measured.rows();
        assert_eq!((rows[1].design, rows[1].ratio), ("remit", 1.5));
    }

    #[test]
    fn a_pair_of_equals_that_differs_makes_it_void() {
        let measured = measured("connect", &[("nothing", 200.0), ("aa", 197.0)]);
        assert!(measured.void()[0].starts_with("connect at 10: A/A is 0.985"));
    }

    #[test]
    fn without_a_pair_of_equals_it_is_void() {
        assert_eq!(measured("connect", &[("nothing", 200.0)]).void().len(), 1);
    }
}
