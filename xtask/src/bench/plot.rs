//! The plots, as SVG text. Written by hand: what they show (dots with intervals beside names, in
//! panels with scales of their own) takes a plotting crate more code than the drawing itself.

use std::fmt::Write as _;

use super::{
    growth::{Grown, Point},
    matrix::{Cell, DESIGNS, LARGE, Measured, WORKLOADS},
    stats::Ratio,
    table::{thousands, time, title, work},
};

const INK: &str = "#24292f";
const FAINT: &str = "#d0d7de";
const GREY: &str = "#6e7781";
const REMIT: &str = "#0969da";
const OTHER: &str = "#8c959f";
/// Colours of curves.
const CURVES: [&str; 2] = ["#0969da", "#bf3989"];

/// An SVG in the making.
struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    fn new(width: f64, height: f64) -> Self {
        Self {
            body: String::new(),
            width,
            height,
        }
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // A String takes all that is written to it.
        let _ = self.body.write_fmt(element);
        self.body.push('\n');
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, style: &str, text: &str) {
        self.push(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" {style}>{text}</text>"#
        ));
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), style: &str) {
        self.push(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {style}/>"#
        ));
    }

    fn dot(&mut self, (x, y): (f64, f64), colour: &str, filled: bool) {
        let fill = if filled { colour } else { "#ffffff" };
        self.push(format_args!(
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>"#
        ));
    }

    fn finish(self) -> String {
        let Self {
            body,
            width,
            height,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" \
             font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"{INK}\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
        )
    }
}

/// A scale from values to places.
struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let share = (value - self.from) / (self.to - self.from);
        self.start + share * (self.end - self.start)
    }

    /// Round numbers on it, some four to six.
    fn ticks(&self) -> Vec<f64> {
        let span = self.to - self.from;
        let rough = span / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|factor| factor * power)
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let mut ticks = Vec::new();
        let mut tick = (self.from / step).ceil() * step;
        while tick <= self.to + step / 1e6 {
            ticks.push(tick);
            tick += step;
        }
        ticks
    }
}

/// A whole number in few letters, for labels that stand close together.
fn short(number: u32) -> String {
    match number {
        1_000_000.. if number.is_multiple_of(1_000_000) => format!("{}M", number / 1_000_000),
        10_000.. if number.is_multiple_of(1_000) => format!("{}k", number / 1_000),
        _ => thousands(number),
    }
}

/// As few digits as tell ticks apart.
fn label(value: f64) -> String {
    let value = if value.abs() < 0.0005 { 0.0 } else { value };
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// One panel a workload: designs below each other, a dot for each size.
pub fn ratios(measured: &Measured) -> String {
    const COLUMNS: usize = 2;
    const PANEL: (f64, f64) = (450.0, 215.0);
    let panels: Vec<(&str, Vec<&Cell>)> = WORKLOADS
        .into_iter()
        .map(|workload| {
            let cells = measured.cells.iter();
            (
                workload,
                cells
                    .filter(|cell| cell.workload == workload)
                    .collect::<Vec<_>>(),
            )
        })
        .filter(|(_, cells)| !cells.is_empty())
        .collect();
    let rows = panels.len().div_ceil(COLUMNS);
    let mut svg = Svg::new(PANEL.0 * COLUMNS as f64, 34.0 + PANEL.1 * rows as f64);
    svg.text(
        (12.0, 22.0),
        "start",
        r#"font-size="13" font-weight="600""#,
        "Cost by that without a fence (a refusal: by the cheapest), median and 95 % interval",
    );
    let right = PANEL.0 * COLUMNS as f64;
    for (index, (name, filled)) in [("10 destinations", false), ("100,000", true)]
        .into_iter()
        .enumerate()
    {
        let x = right - 190.0 + 110.0 * index as f64;
        svg.dot((x, 18.0), GREY, filled);
        svg.text((x + 8.0, 22.0), "start", "", name);
    }
    for (index, (workload, cells)) in panels.iter().enumerate() {
        let x = PANEL.0 * (index % COLUMNS) as f64;
        let y = 34.0 + PANEL.1 * (index / COLUMNS) as f64;
        panel(&mut svg, (x, y), PANEL, workload, cells);
    }
    svg.finish()
}

fn panel(
    svg: &mut Svg,
    (x, y): (f64, f64),
    (width, height): (f64, f64),
    workload: &str,
    cells: &[&Cell],
) {
    const NAMES: f64 = 130.0;
    const LINE: f64 = 21.0;
    let found: Vec<(usize, usize, Ratio)> = cells
        .iter()
        .enumerate()
        .flat_map(|(at, cell)| {
            DESIGNS
                .iter()
                .enumerate()
                .filter_map(move |(row, design)| Some((at, row, cell.ratio(design)?)))
        })
        .collect();
    let lowest = found
        .iter()
        .fold(1.0_f64, |low, (_, _, ratio)| low.min(ratio.lo));
    let highest = found
        .iter()
        .fold(1.0_f64, |high, (_, _, ratio)| high.max(ratio.hi));
    let margin = (highest - lowest).max(0.01) * 0.06;
    let scale = Scale {
        from: lowest - margin,
        to: highest + margin,
        start: x + NAMES,
        end: x + width - 20.0,
    };
    let (top, bottom) = (y + 30.0, y + height - 28.0);
    let heading = r#"font-weight="600""#;
    svg.text((x + 12.0, y + 18.0), "start", heading, work(workload));
    let base = cells
        .last()
        .and_then(|cell| Some((cell.cost("")?, cell.unit())));
    if let Some((cost, unit)) = base {
        let unit = if unit.starts_with("CPU") {
            "CPU time"
        } else {
            "time"
        };
        let text = format!("1 = {} of {unit}", time(cost));
        let style = format!(r#"fill="{GREY}""#);
        svg.text((x + width - 20.0, y + 18.0), "end", &style, &text);
    }
    for tick in scale.ticks() {
        let at = scale.at(tick);
        svg.line((at, top), (at, bottom), &format!(r#"stroke="{FAINT}""#));
        let style = format!(r#"fill="{GREY}""#);
        svg.text((at, bottom + 14.0), "middle", &style, &label(tick));
    }
    let one = scale.at(1.0);
    svg.line(
        (one, top),
        (one, bottom),
        &format!(r#"stroke="{GREY}" stroke-dasharray="3 3""#),
    );
    for (row, design) in DESIGNS.iter().enumerate() {
        let middle = top + LINE * (row as f64 + 0.5);
        let strong = if *design == "remit" { heading } else { "" };
        svg.text(
            (x + NAMES - 10.0, middle + 4.0),
            "end",
            strong,
            title(design),
        );
        if !found.iter().any(|(_, found, _)| *found == row) {
            let style = format!(r#"fill="{GREY}" font-style="italic""#);
            svg.text(
                (scale.start + 6.0, middle + 4.0),
                "start",
                &style,
                "not measured",
            );
        }
    }
    for (at, row, ratio) in found {
        let large = cells.get(at).is_some_and(|cell| cell.size == LARGE);
        let apart = if cells.len() == 1 {
            0.0
        } else if large {
            4.0
        } else {
            -4.0
        };
        let middle = top + LINE * (row as f64 + 0.5) + apart;
        let colour = if DESIGNS.get(row) == Some(&"remit") {
            REMIT
        } else {
            OTHER
        };
        svg.line(
            (scale.at(ratio.lo), middle),
            (scale.at(ratio.hi), middle),
            &format!(r#"stroke="{colour}" stroke-width="2""#),
        );
        svg.dot((scale.at(ratio.median), middle), colour, large);
    }
}

/// One panel for each thing that grows, a curve for each workload.
pub fn growth(grown: &Grown) -> String {
    const PANEL: (f64, f64) = (300.0, 250.0);
    let rows = grown.rows();
    let mut axes: Vec<&str> = Vec::new();
    let mut works: Vec<&str> = Vec::new();
    for point in &rows {
        if !axes.contains(&point.axis) {
            axes.push(point.axis);
        }
        if !works.contains(&point.workload) {
            works.push(point.workload);
        }
    }
    let mut svg = Svg::new(PANEL.0 * axes.len().max(1) as f64, PANEL.1 + 34.0);
    svg.text(
        (12.0, 22.0),
        "start",
        r#"font-size="13" font-weight="600""#,
        "Remit's cost by that without a fence, median and 95 % interval",
    );
    for (index, (name, colour)) in works.iter().zip(CURVES).enumerate() {
        let x = svg.width - 330.0 + 180.0 * index as f64;
        svg.dot((x, 18.0), colour, true);
        svg.text((x + 8.0, 22.0), "start", "", work(name));
    }
    let lowest = rows.iter().fold(1.0_f64, |low, point| low.min(point.lo));
    let highest = rows.iter().fold(1.0_f64, |high, point| high.max(point.hi));
    for (index, axis) in axes.iter().enumerate() {
        let of_axis: Vec<&Point> = rows.iter().filter(|point| point.axis == *axis).collect();
        let x = PANEL.0 * index as f64;
        curves(
            &mut svg,
            (x, 34.0),
            PANEL,
            &of_axis,
            &works,
            (lowest, highest),
        );
    }
    svg.finish()
}

fn curves(
    svg: &mut Svg,
    (x, y): (f64, f64),
    (width, height): (f64, f64),
    points: &[&Point],
    works: &[&str],
    (lowest, highest): (f64, f64),
) {
    let (left, right, top, bottom) = (x + 46.0, x + width - 14.0, y + 12.0, y + height - 42.0);
    let margin = (highest - lowest).max(0.01) * 0.06;
    let up = Scale {
        from: lowest - margin,
        to: highest + margin,
        start: bottom,
        end: top,
    };
    let mut places: Vec<u32> = points.iter().map(|point| point.at).collect();
    places.sort_unstable();
    places.dedup();
    // Points are evenly apart: all axes are, or nearly are, logarithmic.
    let across = Scale {
        from: -0.25,
        to: places.len() as f64 - 0.75,
        start: left,
        end: right,
    };
    let place = |at: u32| {
        let index = places
            .iter()
            .position(|place| *place == at)
            .unwrap_or_default();
        across.at(index as f64)
    };
    for tick in up.ticks() {
        let at = up.at(tick);
        svg.line((left, at), (right, at), &format!(r#"stroke="{FAINT}""#));
        let style = format!(r#"fill="{GREY}""#);
        svg.text((left - 6.0, at + 4.0), "end", &style, &label(tick));
    }
    for at in &places {
        let style = format!(r#"fill="{GREY}""#);
        svg.text((place(*at), bottom + 16.0), "middle", &style, &short(*at));
    }
    if let Some(point) = points.first() {
        let middle = f64::midpoint(left, right);
        svg.text(
            (middle, bottom + 34.0),
            "middle",
            r#"font-weight="600""#,
            point.axis,
        );
    }
    let one = up.at(1.0);
    let dashed = format!(r#"stroke="{GREY}" stroke-dasharray="3 3""#);
    svg.line((left, one), (right, one), &dashed);
    for (index, (workload, colour)) in works.iter().zip(CURVES).enumerate() {
        // Apart, so that intervals do not hide each other.
        let place = |at| place(at) + 6.0 * index as f64 - 3.0;
        let of_work: Vec<_> = points
            .iter()
            .filter(|point| point.workload == *workload)
            .collect();
        for pair in of_work.windows(2) {
            if let [from, to] = pair {
                svg.line(
                    (place(from.at), up.at(from.ratio)),
                    (place(to.at), up.at(to.ratio)),
                    &format!(r#"stroke="{colour}" stroke-width="1.5""#),
                );
            }
        }
        for point in of_work {
            let at = place(point.at);
            svg.line(
                (at, up.at(point.lo)),
                (at, up.at(point.hi)),
                &format!(r#"stroke="{colour}" stroke-width="2""#),
            );
            svg.dot((at, up.at(point.ratio)), colour, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        let scale = Scale {
            from: 0.97,
            to: 1.23,
            start: 0.0,
            end: 100.0,
        };
        let ticks: Vec<String> = scale.ticks().into_iter().map(label).collect();
        assert_eq!(ticks, ["1", "1.1", "1.2"]);
    }

    #[test]
    fn large_numbers_are_short() {
        let short: Vec<String> = [12, 1_000, 10_000, 100_000, 1_000_000].map(short).into();
        assert_eq!(short, ["12", "1,000", "10k", "100k", "1M"]);
    }

    #[test]
    fn labels_have_no_idle_digits() {
        assert_eq!(label(1.0), "1");
        assert_eq!(label(1.05), "1.05");
        assert_eq!(label(20.0), "20");
        assert_eq!(label(-0.0), "0");
    }
}
