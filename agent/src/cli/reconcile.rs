//! `remit reconcile`: compares what the registry says with what the kernel has. 1 when they differ,
//! and with `--repair` when something could not be mended.

use super::{
    Global, format,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain, talk},
};
use crate::{
    audit::{Difference, Mending},
    control::protocol::{Drift, Reconciled},
};

/// Arguments of `remit reconcile`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Mend what differs, at once and whatever the settings say.
    #[arg(long)]
    repair: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let client = global.client()?;
    let path = "/reconcile";
    let reconciled: Reconciled = if arguments.repair {
        client.post(path)?
    } else {
        client.get(path)?
    };
    let open = reconciled.open();
    if output.wants_json() {
        output.json(&reconciled)?;
    } else {
        print(&reconciled, output)?;
    }
    Ok(Outcome::of(match arguments.repair {
        true => open == 0,
        false => reconciled.drift.is_empty(),
    }))
}

fn print(reconciled: &Reconciled, output: &Output) -> Result<()> {
    for drift in &reconciled.drift {
        let tone = match drift.repaired {
            Some(true) => Tone::Doubtful,
            Some(false) | None => Tone::Bad,
        };
        // Each part of the sentence is made harmless where it is made.
        let sentence = difference(drift).sentence();
        output.line(output.paint(tone, &sentence))?;
        output.line(format_args!("  since {}", format::time(drift.since_ms)))?;
        if let (None | Some(false), Some(remedy)) = (drift.repaired, &drift.remedy) {
            output.line(format_args!("  --repair: {}", plain(remedy)))?;
        }
    }
    for notice in &reconciled.notices {
        output.line(format_args!(
            "Notice: {}: {}: {}, since {}; {}",
            plain(&notice.kind),
            plain(&notice.what),
            plain(&notice.found),
            format::time(notice.since_ms),
            plain(notice.remedy.as_deref().unwrap_or("nothing to repair")),
        ))?;
    }
    for text in &reconciled.information {
        output.line(format_args!("Information: {}", plain(text)))?;
    }
    let found = match reconciled.drift.len() as u64 {
        0 => "no drift".to_owned(),
        drift => format!(
            "{}, {} mended",
            format::count(drift, "difference"),
            reconciled.drift.len() - reconciled.open()
        ),
    };
    talk(format_args!(
        "compared {} in {} ms: {found}",
        format::count(reconciled.entries, "item"),
        reconciled.took_ms
    ));
    Ok(())
}

/// The same as the audit log has it, which words the sentence.
fn difference(drift: &Drift) -> Difference {
    let drift = drift.clone();
    Difference {
        kind: drift.kind,
        what: drift.what,
        agent: drift.agent,
        root: drift.root,
        found: drift.found,
        wanted: drift.wanted,
        mending: match drift.repaired {
            None => Mending::NotTried,
            Some(true) => Mending::Mended,
            Some(false) => Mending::Failed(
                drift
                    .error
                    .unwrap_or_else(|| "the daemon does not say why".to_owned()),
            ),
        },
    }
}
