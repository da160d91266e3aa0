//! Puts results into docs/: tables between markers in performance.md, and two plots beside it.
//! What people write around the markers stays.

use std::fs;

use anyhow::{Context as _, Result};

use super::{growth::Grown, matrix::Measured, measure::Host, plot, table};
use crate::{talk, workspace::Workspace};

const PAGE: &str = "docs/performance.md";
const RATIOS: &str = "docs/performance-ratios.svg";
const GROWTH: &str = "docs/performance-growth.svg";

/// Writes the main measurement.
pub fn ratios(workspace: &Workspace, measured: &Measured) -> Result<()> {
    let cycles = measured.cells.iter().map(super::matrix::Cell::cycles).min();
    let mut text = origin(&measured.host, cycles.unwrap_or_default())?;
    text.push_str(&format!(
        "\n![Cost of each design as a ratio]({})\n\n",
        name_of(RATIOS)
    ));
    text.push_str(&table::ratios_markdown(measured));
    for missing in &measured.missing {
        text.push_str(&format!(
            "\n{}: not measured: {}\n",
            table::title(&missing.lane),
            missing.why
        ));
    }
    text.push_str("\n### Targets\n\n");
    text.push_str(&table::targets_markdown(measured));
    text.push_str("\n### Programs\n\nNanoseconds a run, by the kernel's own statistics.\n\n");
    text.push_str(&table::programs_markdown(measured));
    put(workspace, RATIOS, &plot::ratios(measured))?;
    replace(workspace, "ratios", &text)
}

/// Writes the curves.
pub fn growth(workspace: &Workspace, grown: &Grown) -> Result<()> {
    let mut text = origin(&grown.host, grown.cycles())?;
    text.push_str(&format!("\n![How cost grows]({})\n\n", name_of(GROWTH)));
    text.push_str(&table::growth_markdown(grown));
    text.push('\n');
    text.push_str(&table::bounds(grown, "**"));
    put(workspace, GROWTH, &plot::growth(grown))?;
    replace(workspace, "growth", &text)
}

/// Writes the figures of the user side.
pub fn user(workspace: &Workspace, host: &Host, tables: &str) -> Result<()> {
    let text = format!("{}{tables}", measured_on(host)?);
    replace(workspace, "user", &text)
}

fn name_of(path: &str) -> &str {
    path.trim_start_matches("docs/")
}

/// Machine, kernel and date.
fn origin(host: &Host, cycles: usize) -> Result<String> {
    let on = measured_on(host)?;
    Ok(format!(
        "{}, {cycles} cycles.\n",
        on.trim_end_matches(".\n")
    ))
}

fn measured_on(host: &Host) -> Result<String> {
    let date = std::process::Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()
        .context("cannot tell the date")?;
    Ok(format!(
        "Measured on {}: kernel {}, {} with {} processors ({}).\n",
        String::from_utf8_lossy(&date.stdout).trim(),
        host.kernel,
        host.cpu,
        host.cpus,
        host.arch,
    ))
}

fn put(workspace: &Workspace, path: &str, text: &str) -> Result<()> {
    let path = workspace.root.join(path);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    talk::note(&format!("wrote {}", path.display()));
    Ok(())
}

fn replace(workspace: &Workspace, name: &str, text: &str) -> Result<()> {
    let path = workspace.root.join(PAGE);
    let page =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    put(workspace, PAGE, &between(&page, name, text)?)
}

/// `page` with `text` between the markers of `name`.
fn between(page: &str, name: &str, text: &str) -> Result<String> {
    let (begin, end) = (
        format!("<!-- bench {name} -->\n"),
        format!("<!-- bench {name} end -->\n"),
    );
    let (before, rest) = page
        .split_once(&begin)
        .with_context(|| format!("{PAGE} has no line `{}`", begin.trim()))?;
    let (_, after) = rest
        .split_once(&end)
        .with_context(|| format!("{PAGE} has no line `{}` after its beginning", end.trim()))?;
    Ok(format!("{before}{begin}{text}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let page = "# A\n<!-- bench x -->\nold\n<!-- bench x end -->\nprose\n";
        let once = between(page, "x", "new\n").unwrap();
        assert_eq!(
            once,
            "# A\n<!-- bench x -->\nnew\n<!-- bench x end -->\nprose\n"
        );
        assert_eq!(between(&once, "x", "new\n").unwrap(), once);
        assert!(between(page, "y", "").is_err());
        assert!(between("<!-- bench x -->\n", "x", "").is_err());
    }
}
