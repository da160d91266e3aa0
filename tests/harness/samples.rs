//! Lines of the logs of real runs, kept for whoever holds them against the schemas: some of each
//! event code of each case, in the folder that `REMIT_SAMPLES` names.

use std::{collections::BTreeMap, env, fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::support::{Ctx, Line};

/// Lines of one code kept of one case.
const EACH: usize = 3;

/// Keeps some of what the case's daemons have written.
pub fn keep(ctx: &Ctx) -> Result<()> {
    let Some(folder) = env::var_os("REMIT_SAMPLES").map(PathBuf::from) else {
        return Ok(());
    };
    let mut kept: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for log in ["violations", "audit", "access"] {
        let path = ctx.dir().join("log").join(format!("{log}.jsonl"));
        // A case may have bent its logs on purpose: those are no samples.
        for line in Line::read_all(&path).unwrap_or_default() {
            let code = line.text("/metadata/event_code").to_owned();
            let lines = kept.entry(code).or_default();
            if lines.len() < EACH {
                lines.push(line.0.to_string());
            }
        }
    }
    let text: Vec<String> = kept.into_values().flatten().collect();
    if text.is_empty() {
        return Ok(());
    }
    let path = folder.join(format!("{}.jsonl", ctx.unique()));
    fs::write(&path, text.join("\n") + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}
