//! `remit probe`: the fence, tried from inside an agent's cgroup. 0 PASS, 1 FAIL, 3 UNKNOWN; of
//! several agents the worst counts.

use super::{
    Global, agents,
    outcome::{Failure, Outcome, Result},
    output::{Output, Tone, plain},
};
use crate::{
    control::{
        client::ClientError,
        protocol::{Agents, Code, ProbeVerdict, Probed},
    },
    daemon,
};

/// Arguments of `remit probe`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The agents to probe; without one, all that the registry has.
    #[arg(value_name = "ID")]
    agents: Vec<String>,
    /// Print every attempt, not only those that prove something else than a pass.
    #[arg(long, short)]
    verbose: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let client = global.client()?;
    let ids = if arguments.agents.is_empty() {
        let all: Agents = client.get("/agents")?;
        all.agents.into_iter().map(|agent| agent.id).collect()
    } else {
        arguments.agents.clone()
    };
    let mut all = Vec::new();
    for id in ids {
        let path = format!("/agents/{}/probe", agents::segment(&id));
        let probed: Probed = match client.post(&path) {
            Ok(probed) => probed,
            // One that is gone meanwhile, or a daemon that is busy, leaves the others alone.
            Err(ClientError::Refused(refusal))
                if matches!(refusal.code, Code::Timeout | Code::Unavailable) =>
            {
                return Err(Failure::unknown(format!("{}: {refusal}", plain(&id))));
            }
            Err(error) => return Err(error.into()),
        };
        if !output.wants_json() {
            print(&probed, arguments.verbose, output)?;
        }
        all.push(probed);
    }
    if output.wants_json() {
        output.json(&all)?;
    }
    let worst = all.iter().map(|probed| probed.verdict).max();
    Ok(match worst {
        Some(ProbeVerdict::Pass) => Outcome::Yes,
        Some(ProbeVerdict::Fail) => Outcome::No,
        // Nothing was probed: nothing is proved.
        Some(ProbeVerdict::Unknown) | None => Outcome::Unknown,
    })
}

/// The helper's side.
pub(super) fn help() -> Result {
    daemon::serve_probe()
        .map(|()| Outcome::Yes)
        .map_err(|error| Failure::unknown(error.to_string()))
}

fn print(probed: &Probed, verbose: bool, output: &Output) -> Result<()> {
    let place = match &probed.cgroup {
        Some(cgroup) => format!(" in {}", plain(cgroup)),
        None => String::new(),
    };
    output.line(format_args!(
        "{} {}{place}: {} attempts in {} ms",
        painted(probed.verdict, output),
        plain(&probed.agent),
        probed.attempts.len(),
        probed.took_ms,
    ))?;
    for attempt in &probed.attempts {
        if attempt.verdict == ProbeVerdict::Pass && !verbose {
            continue;
        }
        let to = match &attempt.to {
            Some(to) => format!(" to {}", plain(to)),
            None => String::new(),
        };
        output.line(format_args!(
            "  {} {}{to} at {}: {}: {}",
            painted(attempt.verdict, output),
            plain(&attempt.name),
            plain(&attempt.hook),
            plain(&attempt.wanted),
            plain(&attempt.evidence)
        ))?;
    }
    // What is about no attempt.
    for why in probed.why.iter().filter(|why| {
        let told = |name: &str| why.starts_with(&format!("{name}: "));
        !probed.attempts.iter().any(|attempt| told(&attempt.name))
    }) {
        output.line(format_args!("  {}", plain(why)))?;
    }
    Ok(())
}

fn painted(verdict: ProbeVerdict, output: &Output) -> String {
    let (tone, word) = match verdict {
        ProbeVerdict::Pass => (Tone::Good, "PASS"),
        ProbeVerdict::Unknown => (Tone::Doubtful, "UNKNOWN"),
        ProbeVerdict::Fail => (Tone::Bad, "FAIL"),
    };
    output.paint(tone, word)
}
