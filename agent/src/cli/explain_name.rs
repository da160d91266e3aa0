//! `remit explain ID NAME`: whether the agent may resolve a name, and what its addresses would be
//! leased for, from the registry on disk. The kernel knows addresses only: what it says of one is
//! asked with the address.

use serde::Serialize;

use super::{
    Global,
    compiled::{clock, compile},
    destination::Named,
    explain::not_told,
    format,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain},
};
use crate::policy::{self, Entry, Outcome as Verdict};

/// The whole answer. The keys are those of an address's.
#[derive(Debug, Serialize)]
struct Told {
    agent: String,
    destination: String,
    /// Whether all, some or none of it is let through.
    verdict: &'static str,
    /// Always null: the kernel is not asked.
    agree: Option<bool>,
    /// Why there is no kernel's answer.
    kernel_missing: &'static str,
    answers: Vec<Row>,
}

/// The answer to one question.
#[derive(Debug, Serialize)]
struct Row {
    destination: String,
    registry: Registry,
    because: String,
    would_change: String,
}

/// What the registry says.
#[derive(Debug, Serialize)]
struct Registry {
    verdict: &'static str,
    reason: Option<&'static str>,
    entry: Option<Entry>,
    /// `registry`.
    source: &'static str,
    hash: String,
}

const NO_KERNEL: &str = "the kernel knows addresses, not names";

pub(super) fn run(global: &Global, agent: &str, named: &Named, output: &Output) -> Result {
    let settings = global.settings()?;
    let compiled = compile(&settings, &[]);
    let Some(tables) = compiled.agent(agent) else {
        return Err(not_told(agent, &compiled, NO_KERNEL));
    };
    let clock = clock()?;
    let answers: Vec<Row> = named
        .questions()
        .into_iter()
        .map(|(destination, port)| {
            let told = policy::explain_name(tables, &named.name, port, &clock);
            let verdict = match told.outcome {
                Verdict::Allowed => "allowed",
                Verdict::Monitored => "monitored",
                Verdict::Denied => "denied",
            };
            Row {
                destination,
                registry: Registry {
                    verdict,
                    reason: told.reason,
                    entry: told.entry,
                    source: "registry",
                    hash: tables.hash.clone(),
                },
                because: told.because,
                would_change: told.would_change,
            }
        })
        .collect();
    let passes = |row: &Row| row.registry.verdict != "denied";
    let verdict = match answers.as_slice() {
        [row] => row.registry.verdict,
        rows if rows.iter().all(passes) => "allowed",
        rows if rows.iter().any(passes) => "partly",
        _ => "denied",
    };
    let told = Told {
        agent: agent.to_owned(),
        destination: named.to_string(),
        verdict,
        agree: None,
        kernel_missing: NO_KERNEL,
        answers,
    };
    if output.wants_json() {
        output.json(&told)?;
    } else {
        print(&told, output)?;
    }
    Ok(Outcome::of(verdict != "denied"))
}

fn print(told: &Told, output: &Output) -> Result<()> {
    for row in &told.answers {
        let registry = &row.registry;
        let (tone, word) = match registry.verdict {
            "allowed" => (Tone::Good, "allowed"),
            "monitored" => (Tone::Doubtful, "allowed and reported"),
            _ => (Tone::Bad, "denied"),
        };
        let reason = registry
            .reason
            .map_or_else(String::new, |reason| format!(": {reason}"));
        output.line(format_args!(
            "{} {} to {}{}",
            output.paint(tone, word),
            plain(&told.agent),
            plain(&row.destination),
            plain(&reason)
        ))?;
        if let Some(entry) = &registry.entry {
            let place = format::place(&entry.file, entry.line);
            let text = format!("{} by {} ({place})", registry.verdict, entry.name);
            output.line(format_args!("  registry  {}", plain(&text)))?;
        }
        output.line(format_args!("  because   {}", plain(&row.because)))?;
        output.line(format_args!("  change    {}", plain(&row.would_change)))?;
    }
    Ok(())
}
