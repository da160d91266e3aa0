//! Results as text: for the terminal, and as Markdown for the docs.

use std::fmt::Write as _;

use super::{
    growth::{Grown, Point},
    matrix::{Cell, DESIGNS, Measured},
    measure::{Host, Program},
    stats::Ratio,
    targets,
};

/// Name of a design for people.
pub fn title(design: &str) -> &'static str {
    match design {
        "aa" => "A/A",
        "floor" => "empty programs",
        "remit" => "Remit",
        "per_packet" => "look-up per packet",
        "systemd" => "systemd's filter",
        "nft" => "nftables",
        "nft_ct" => "nftables, conntrack",
        "nothing" => "no fence",
        "refuse" => "empty programs that refuse",
        _ => "?",
    }
}

/// Name of a workload for people.
pub fn work(workload: &str) -> &'static str {
    match workload {
        "connect" => "TCP connect and close",
        "udp_send" => "UDP sendto",
        "udp_connected" => "UDP send, connected",
        "live_set" => "UDP, 32 live destinations",
        "cold_set" => "UDP, 65,536 live destinations",
        "request_response" => "TCP request and response",
        "deny" => "Refused connect",
        "bulk" => "TCP bulk, 64 KiB",
        _ => "?",
    }
}

/// A number with commas.
pub fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time in a unit that suits it.
pub fn time(ns: f64) -> String {
    if ns.abs() < 1_000.0 {
        format!("{ns:.0} ns")
    } else if ns.abs() < 1_000_000.0 {
        format!("{:.2} µs", ns / 1_000.0)
    } else {
        format!("{:.2} ms", ns / 1_000_000.0)
    }
}

/// The main measurement, one block for each workload and size.
pub fn ratios(measured: &Measured) -> String {
    let mut text = machine(&measured.host);
    for cell in &measured.cells {
        // A String takes all that is written to it.
        let _ = writeln!(text, "\n{}", heading(cell));
        for design in DESIGNS {
            let _ = match (cell.ratio(design), cell.cost(design)) {
                (Some(Ratio { median, lo, hi }), Some(cost)) => writeln!(
                    text,
                    "  {design:<12}{median:7.3}  {lo:7.3} to{hi:7.3}  {:>10}",
                    time(cost)
                ),
                _ => writeln!(
                    text,
                    "  {design:<12}  not measured{}",
                    reason(measured, cell, design)
                ),
            };
        }
    }
    text
}

/// Programs' own times.
pub fn programs(measured: &Measured) -> String {
    let mut text = String::from("\nns a run of each program, by the kernel's statistics\n");
    for (size, program) in &measured.programs {
        let Program {
            program,
            lane,
            workload,
            runs,
            ns,
        } = program;
        let _ = writeln!(
            text,
            "  {workload:<10}{:>8}  {lane:<11} {program:<15}{ns:>7.0}  ({runs} runs)",
            thousands(*size),
        );
    }
    text
}

/// The same as a Markdown table: a line for each program, a column for each workload.
pub fn programs_markdown(measured: &Measured) -> String {
    let mut columns: Vec<(&str, u32)> = Vec::new();
    let mut lines: Vec<(&str, &str)> = Vec::new();
    for (size, program) in &measured.programs {
        let column = (program.workload.as_str(), *size);
        let line = (program.lane.as_str(), program.program.as_str());
        if !columns.contains(&column) {
            columns.push(column);
        }
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.sort_unstable();
    let mut text = String::from("| program |");
    for (workload, size) in &columns {
        let _ = write!(text, " {}, {} |", work(workload), thousands(*size));
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(columns.len()));
    text.push('\n');
    for line in lines {
        let _ = write!(text, "| `{}` ({}) |", line.1, title(line.0));
        for column in &columns {
            let found = measured.programs.iter().find(|(size, program)| {
                (program.workload.as_str(), *size) == *column
                    && (program.lane.as_str(), program.program.as_str()) == line
            });
            let _ = match found {
                Some((_, program)) => write!(text, " {:.0} |", program.ns),
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
    text
}

fn machine(host: &Host) -> String {
    let Host {
        kernel,
        arch,
        cpu,
        cpus,
        load,
    } = host;
    format!("kernel {kernel}, {cpu} ({arch}), {cpus} processors, load {load} at the start\n")
}

fn heading(cell: &Cell) -> String {
    let base = if cell.workload == "deny" {
        "the cheapest refusal"
    } else {
        "no fence"
    };
    format!(
        "{}, {} destinations; {base} takes {} ({}), {} cycles",
        cell.workload,
        thousands(cell.size),
        time(cell.cost("").unwrap_or_default()),
        cell.unit(),
        cell.cycles(),
    )
}

fn reason(measured: &Measured, cell: &Cell, design: &str) -> String {
    if cell.workload == "deny" && design == "systemd" {
        return ": it has no say at connect, and the caller would hang".to_owned();
    }
    let missing = measured
        .missing
        .iter()
        .find(|missing| missing.lane == design);
    missing.map_or_else(String::new, |missing| format!(": {}", missing.why))
}

/// The same as a Markdown table.
pub fn ratios_markdown(measured: &Measured) -> String {
    let mut text = String::from("| workload | destinations | base |");
    for design in DESIGNS {
        let _ = write!(text, " {} |", title(design));
    }
    text.push_str("\n|---|---:|---:|");
    text.push_str(&"---:|".repeat(DESIGNS.len()));
    text.push('\n');
    for cell in &measured.cells {
        let _ = write!(
            text,
            "| {} | {} | {} |",
            work(cell.workload),
            thousands(cell.size),
            time(cell.cost("").unwrap_or_default())
        );
        for design in DESIGNS {
            let _ = match cell.ratio(design) {
                Some(Ratio { median, lo, hi }) => {
                    let strong = if design == "remit" { "**" } else { "" };
                    write!(text, " {strong}{median:.3}{strong} ({lo:.3}–{hi:.3}) |")
                }
                None => write!(text, " – |"),
            };
        }
        text.push('\n');
    }
    text
}

/// Targets as a Markdown table.
pub fn targets_markdown(measured: &Measured) -> String {
    let mut text = String::from(
        "| workload | destinations | Remit to | at most | is | up to | |\n\
         |---|---:|---|---:|---:|---:|---|\n",
    );
    for one in targets::judge(measured) {
        let (is, up_to) = one.found.map_or_else(
            || ("–".to_owned(), "–".to_owned()),
            |ratio| (format!("{:.3}", ratio.median), format!("{:.3}", ratio.hi)),
        );
        let strong = if one.met() == Some(false) { "**" } else { "" };
        let word = format!("{strong}{}{strong}", one.word());
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.3} | {is} | {up_to} | {word} |",
            work(one.workload),
            thousands(one.size),
            title(one.to),
            one.limit,
        );
    }
    text
}

/// The curves.
pub fn growth(grown: &Grown) -> String {
    let mut text = machine(&grown.host);
    let mut last = ("", "");
    for point in grown.rows() {
        if (point.axis, point.workload) != last {
            last = (point.axis, point.workload);
            let _ = writeln!(text, "\n{} over {}", point.workload, point.axis);
        }
        let Point { ratio, lo, hi, .. } = point;
        let _ = writeln!(
            text,
            "  {:>10}{ratio:8.3}  {lo:7.3} to{hi:7.3}  {:>10} more; ready after {} ms, {} MiB",
            thousands(point.at),
            time(point.more_ns),
            point.ready_ms,
            point.resident_mib,
        );
    }
    text
}

/// What growth may cost, as lines; `strong` sets off what is missed.
pub fn bounds(grown: &Grown, strong: &str) -> String {
    let mut text = String::new();
    for bound in grown.bounds() {
        let word = if bound.met() {
            "met".to_owned()
        } else {
            format!("{strong}missed{strong}")
        };
        let _ = writeln!(text, "- {}: is {}: {word}", bound.what, bound.found());
    }
    text
}

/// The curves as a Markdown table.
pub fn growth_markdown(grown: &Grown) -> String {
    let mut text = String::from(
        "| grows | to | workload | to no fence | more | daemon ready after | its memory |\n\
         |---|---:|---|---:|---:|---:|---:|\n",
    );
    for point in grown.rows() {
        let Point { ratio, lo, hi, .. } = point;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {ratio:.3} ({lo:.3}–{hi:.3}) | {} | {} ms | {} MiB |",
            point.axis,
            thousands(point.at),
            work(point.workload),
            time(point.more_ns),
            point.ready_ms,
            point.resident_mib,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::matrix::tests::measured;

    #[test]
    fn numbers_get_commas() {
        assert_eq!(thousands(7), "7");
        assert_eq!(thousands(1_000), "1,000");
        assert_eq!(thousands(1_234_567), "1,234,567");
    }

    #[test]
    fn what_is_not_here_is_said() {
        let mut measured = measured("connect", &[("nothing", 100.0), ("aa", 100.0)]);
        measured.missing.push(crate::bench::measure::Missing {
            lane: "nft".to_owned(),
            why: "there is no `nft`".to_owned(),
        });
        let text = ratios(&measured);
        assert!(
            text.contains("nft           not measured: there is no `nft`"),
            "{text}"
        );
        assert!(ratios_markdown(&measured).contains("| 1.000 (1.000–1.000) | – |"));
    }
}
