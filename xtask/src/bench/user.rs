//! The user side: how long the daemon takes for a large registry, and what it takes to run it. The
//! measuring is in tests/bench/user.rs; here are table, JSON and the section of the docs.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Options, docs, json, measure::Host};
use crate::{build, talk::Progress, workspace::Workspace};

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// Of what: a registry, a flood.
    pub about: String,
    /// What was measured.
    pub figure: String,
    /// Its unit; empty for a count.
    pub unit: String,
    /// The middle of the measurements.
    pub median: f64,
    /// The least.
    pub lo: f64,
    /// The most.
    pub hi: f64,
    /// How many there were.
    pub n: usize,
}

/// Measures, prints, and writes the section `user` of the docs if it was the full thing.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    build::static_programs(workspace)?;
    let (host, figures) = measure(workspace, options.quick)?;
    print!("{}", text(&figures));
    if let Some(path) = &options.json {
        json(path, &figures)?;
    }
    if options.quick {
        println!("\n--quick: this shows that everything works, and nothing about speed");
    } else if !options.no_docs {
        docs::user(workspace, &host, &markdown(&figures))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(workspace: &Workspace, quick: bool) -> Result<(Host, Vec<Figure>)> {
    let programs = workspace.static_release();
    let mut child = Command::new(programs.join("remit-tests"))
        .args(["bench-user", if quick { "quick" } else { "full" }])
        .env("REMIT_BIN", programs.join("remit"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start remit-tests")?;
    let stream = child.stdout.take().context("remit-tests has no output")?;
    let progress = Progress::start("user side");
    let (mut host, mut figures) = (None, Vec::new());
    for line in BufReader::new(stream).lines() {
        let line = line.context("cannot read what remit-tests says")?;
        let said = read(&line).with_context(|| format!("remit-tests said: {line}"))?;
        match said {
            Said::Host(found) => host = Some(found),
            Said::Figure(figure) => {
                progress.update(format!("user side: {}: {}", figure.about, figure.figure));
                figures.push(figure);
            }
        }
    }
    let status = child.wait().context("cannot wait for remit-tests")?;
    drop(progress);
    if !status.success() {
        bail!("measuring failed: remit-tests ended with {status}; its reason is above");
    }
    Ok((
        host.context("remit-tests did not say where it ran")?,
        figures,
    ))
}

enum Said {
    Host(Host),
    Figure(Figure),
}

fn read(line: &str) -> Result<Said> {
    let value: Value = serde_json::from_str(line)?;
    Ok(match value.get("host") {
        Some(host) => Said::Host(Host::deserialize(host)?),
        None => Said::Figure(serde_json::from_value(value)?),
    })
}

// === impl Figure ===

impl Figure {
    /// With three digits that count, and the spread where there is one.
    fn value(&self) -> String {
        let unit = if self.unit.is_empty() {
            String::new()
        } else {
            format!(" {}", self.unit)
        };
        let middle = digits(self.median);
        if self.n > 1 {
            let (lo, hi) = (digits(self.lo), digits(self.hi));
            format!("{middle}{unit} ({lo} to {hi}, n = {})", self.n)
        } else {
            format!("{middle}{unit}")
        }
    }
}

/// Three digits, thousands apart.
fn digits(number: f64) -> String {
    let decimals = match number.abs() {
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{number:.decimals$}");
    let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if rest.is_empty() {
        grouped
    } else {
        format!("{grouped}.{rest}")
    }
}

/// The figures by what they are about, in order.
fn groups(figures: &[Figure]) -> impl Iterator<Item = &[Figure]> {
    figures.chunk_by(|left, right| left.about == right.about)
}

fn text(figures: &[Figure]) -> String {
    let mut text = String::new();
    for group in groups(figures) {
        let about = group.first().map_or("", |figure| figure.about.as_str());
        text += &format!("\n{about}\n");
        for figure in group {
            text += &format!("  {:42} {}\n", figure.figure, figure.value());
        }
    }
    text
}

fn markdown(figures: &[Figure]) -> String {
    let mut text = String::new();
    for group in groups(figures) {
        let about = group.first().map_or("", |figure| figure.about.as_str());
        text += &format!("\n| {about} | |\n|---|---|\n");
        for figure in group {
            text += &format!("| {} | {} |\n", figure.figure, figure.value());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_shown_by_what_they_are_about() {
        let lines = [
            r#"{"about":"a","figure":"READY","unit":"ms","median":1234.5,"lo":9.0,"hi":99.96,"n":3}"#,
            r#"{"about":"a","figure":"lines","unit":"","median":1234567.0,"lo":0.0,"hi":0.0,"n":1}"#,
            r#"{"about":"b","figure":"rest","unit":"%","median":0.5,"lo":0.5,"hi":0.5,"n":1}"#,
        ];
        let figures: Vec<Figure> = lines
            .iter()
            .map(|line| match read(line).unwrap() {
                Said::Figure(figure) => figure,
                Said::Host(_) => panic!("a host"),
            })
            .collect();
        assert_eq!(
            markdown(&figures),
            "\n| a | |\n|---|---|\n| READY | 1,234 ms (9.00 to 100.0, n = 3) |\n\
             | lines | 1,234,567 |\n\n| b | |\n|---|---|\n| rest | 0.50 % |\n"
        );
        let host = r#"{"host":{"kernel":"6.1","arch":"x","cpu":"c","cpus":2,"load":"0.1"}}"#;
        assert!(matches!(read(host).unwrap(), Said::Host(host) if host.cpus == 2));
        assert!(read(r#"{"figure":"x"}"#).is_err());
    }
}
