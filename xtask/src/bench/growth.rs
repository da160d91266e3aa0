//! How Remit's cost grows: with agents, with destinations, and with levels of cgroups between a
//! process and its agent. The points of one curve are measured in one run, interleaved.

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    ATTEMPTS,
    measure::{Bench, Host, Lane, Ready, Run, Series, Shape},
    rounded,
    stats::{Ratio, difference, ratio},
    void_by,
};
use crate::talk;

const WORKLOADS: [&str; 2] = ["connect", "udp_send"];
const FIRST: Shape = Shape {
    prefixes: 100,
    hosts: false,
    agents: 1,
    depth: 1,
};

/// What grows.
struct Axis {
    name: &'static str,
    points: &'static [u32],
    quick: &'static [u32],
    at: fn(u32) -> Shape,
}

const AXES: [Axis; 3] = [
    Axis {
        name: "agents",
        points: &[1, 10, 100, 1_000, 10_000],
        quick: &[1, 10],
        at: |agents| Shape { agents, ..FIRST },
    },
    Axis {
        name: "prefixes",
        points: &[10, 100, 1_000, 10_000, 100_000, 1_000_000],
        quick: &[10, 1_000],
        at: |prefixes| Shape { prefixes, ..FIRST },
    },
    Axis {
        name: "nesting",
        points: &[1, 2, 4, 6, 12],
        quick: &[1, 6],
        at: |depth| Shape { depth, ..FIRST },
    },
];

/// One point of a curve, as a row.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// What grows.
    pub axis: &'static str,
    /// How large it is.
    pub at: u32,
    /// What was done.
    pub workload: &'static str,
    /// Median ratio to no fence.
    pub ratio: f64,
    /// Lower end of the 95 % interval.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
    /// Median of what an operation costs more than without a fence, in nanoseconds.
    pub more_ns: f64,
    /// From the start of the daemon to its being ready, in milliseconds.
    pub ready_ms: u64,
    /// Resident memory of the daemon, in MiB.
    pub resident_mib: f64,
}

/// A curve under one workload.
#[derive(Clone, Debug)]
struct Curve {
    axis: &'static str,
    points: &'static [u32],
    workload: &'static str,
    series: Series,
    ready: Vec<Ready>,
}

/// All curves.
#[derive(Clone, Debug, Default)]
pub struct Grown {
    /// The machine.
    pub host: Host,
    curves: Vec<Curve>,
}

/// Measures all, or the workloads named.
pub fn run(bench: &Bench<'_>, only: &[String]) -> Result<Grown> {
    let mut grown = Grown::default();
    for axis in &AXES {
        let points = if bench.effort.quick {
            axis.quick
        } else {
            axis.points
        };
        let mut left: Vec<&'static str> = WORKLOADS
            .into_iter()
            .filter(|name| only.is_empty() || only.iter().any(|wanted| wanted == name))
            .collect();
        for attempt in 1..=ATTEMPTS {
            if left.is_empty() {
                break;
            }
            let last = attempt == ATTEMPTS || bench.effort.quick;
            let curves = measure(bench, axis, points, &left, &mut grown.host)?;
            left.clear();
            for curve in curves {
                if curve.void().is_some() && !last {
                    left.push(curve.workload);
                } else {
                    grown.curves.push(curve);
                }
            }
            if !left.is_empty() {
                talk::note(&format!("void, and measured anew: {}", left.join(", ")));
            }
        }
    }
    Ok(grown)
}

fn measure(
    bench: &Bench<'_>,
    axis: &Axis,
    points: &'static [u32],
    workloads: &[&'static str],
    host: &mut Host,
) -> Result<Vec<Curve>> {
    let mut lanes = vec![
        Lane {
            name: "nothing".to_owned(),
            design: "nothing",
            shape: FIRST,
        },
        Lane {
            name: "aa".to_owned(),
            design: "nothing",
            shape: FIRST,
        },
    ];
    lanes.extend(points.iter().map(|&at| Lane {
        name: lane(at),
        design: "remit",
        shape: (axis.at)(at),
    }));
    let runs: Vec<Run> = workloads
        .iter()
        .map(|workload| Run {
            workload,
            lanes: lanes.iter().map(|lane| lane.name.clone()).collect(),
        })
        .collect();
    let heard = bench.measure(axis.name, &lanes, &runs, &[])?;
    *host = heard.host;
    let curves = heard.series.into_iter().map(|series| {
        let workload = WORKLOADS
            .into_iter()
            .find(|name| *name == series.workload)
            .with_context(|| format!("nobody asked for workload {}", series.workload))?;
        Ok(Curve {
            axis: axis.name,
            points,
            workload,
            series,
            ready: heard.ready.clone(),
        })
    });
    curves.collect()
}

fn lane(at: u32) -> String {
    format!("remit{at}")
}

/// What growth may cost at most, and what it does.
pub struct Bound {
    /// What is bounded, with its limit.
    pub what: &'static str,
    limit: f64,
    found: Ratio,
}

// === impl Bound ===

impl Bound {
    /// Whether the upper end of the interval keeps to it.
    pub fn met(&self) -> bool {
        self.found.hi <= self.limit
    }

    /// What was found.
    pub fn found(&self) -> String {
        format!("{:.3} (up to {:.3})", self.found.median, self.found.hi)
    }
}

// === impl Curve ===

impl Curve {
    fn void(&self) -> Option<String> {
        let aa = ratio(&self.series.costs("aa")?, &self.series.costs("nothing")?)?;
        void_by(&aa)
    }

    fn point(&self, at: u32) -> Option<Point> {
        let (of, to) = (self.series.costs(&lane(at))?, self.series.costs("nothing")?);
        let Ratio {
            median: middle,
            lo,
            hi,
        } = ratio(&of, &to)?;
        let ready = self.ready.iter().find(|ready| ready.lane == lane(at))?;
        Some(Point {
            axis: self.axis,
            at,
            workload: self.workload,
            ratio: rounded(middle),
            lo: rounded(lo),
            hi: rounded(hi),
            more_ns: difference(&of, &to)?.median.round(),
            ready_ms: ready.ready_ms,
            resident_mib: (ready.resident_kib as f64 / 102.4).round() / 10.0,
        })
    }
}

// === impl Grown ===

impl Grown {
    /// All points, curve by curve.
    pub fn rows(&self) -> Vec<Point> {
        let curves = self.curves.iter();
        curves
            .flat_map(|curve| curve.points.iter().filter_map(|at| curve.point(*at)))
            .collect()
    }

    /// What holds nothing, and why.
    pub fn void(&self) -> Vec<String> {
        let curves = self.curves.iter();
        curves
            .filter_map(|curve| {
                let why = curve.void()?;
                Some(format!("{} over {}: {why}", curve.workload, curve.axis))
            })
            .collect()
    }

    /// Bounds of what was measured and is not void.
    pub fn bounds(&self) -> Vec<Bound> {
        let between = |axis: &str, from: u32, to: u32, how: fn(&[f64], &[f64]) -> Option<Ratio>| {
            let curve = self.curves.iter().find(|curve| {
                curve.axis == axis && curve.workload == "udp_send" && curve.void().is_none()
            })?;
            let costs = |at| curve.series.costs(&lane(at));
            how(&costs(to)?, &costs(from)?)
        };
        let bound =
            |what, limit, found: Option<Ratio>| found.map(|found| Bound { what, limit, found });
        let bounds = [
            bound(
                "UDP sendto at a million prefixes by that at ten: at most 1.10",
                1.10,
                between("prefixes", 10, 1_000_000, ratio),
            ),
            bound(
                "five levels of nesting more, ns a packet: at most 10",
                10.0,
                between("nesting", 1, 6, difference),
            ),
        ];
        bounds.into_iter().flatten().collect()
    }

    /// Cycles behind each point.
    pub fn cycles(&self) -> usize {
        self.curves
            .first()
            .map_or(0, |curve| curve.series.cycles.len())
    }
}
