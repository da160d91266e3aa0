//! `remit status`: the posture, and the proof for it. 0 only when everything that the settings ask
//! for is live.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Global, format,
    lifecycle::hold_line,
    outcome::{Outcome, Result},
    output::{Columns, Output, Tone, plain, plain_lines, talk},
};
use crate::control::protocol::{
    AgentStatus, DriftSummary, Former, Guard, GuardState, LastProbe, Posture, ProbeVerdict, Status,
};

/// Arguments of `remit status`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print nothing but what is missing, and exit 0 only when the host enforces at least so: for
    /// scripts and unit files.
    #[arg(long, value_enum, value_name = "POSTURE")]
    require: Option<Required>,
}

/// What may be required.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Required {
    /// Everything that the settings ask for is live.
    Enforcing,
    /// Every hook is live; something else may not be.
    Degraded,
}

/// A daemon that does not answer within this is no proof of anything.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let client = match arguments.require {
        Some(_) => global.client()?.patient_for(PATIENCE),
        None => global.client()?,
    };
    let status: Status = client.get("/status")?;
    if output.wants_json() {
        output.json(&status)?;
    } else if arguments.require.is_some() {
        for reason in &status.reasons {
            talk(format_args!("{}: {}", status.posture.name(), plain(reason)));
        }
    } else {
        print(&status, output)?;
    }
    Ok(Outcome::of(match arguments.require {
        None | Some(Required::Enforcing) => status.posture == Posture::Enforcing,
        Some(Required::Degraded) => status.posture != Posture::NotEnforcing,
    }))
}

fn print(status: &Status, output: &Output) -> Result<()> {
    let (tone, posture) = match status.posture {
        Posture::Enforcing => (Tone::Good, "enforcing"),
        Posture::Degraded => (Tone::Doubtful, "degraded"),
        Posture::NotEnforcing => (Tone::Bad, "NOT ENFORCING"),
    };
    output.line(format_args!(
        "{} since {}, revision {}, remit {}",
        output.paint(tone, posture),
        format::time(status.since_ms),
        status.revision,
        plain(&status.version),
    ))?;
    for reason in &status.reasons {
        output.line(format_args!("  because {}", plain(reason)))?;
    }
    output.line("")?;
    output.columns(&guards(&status.guards))?;
    output.line("")?;
    if status.agents.is_empty() {
        output.line("No agents are registered: everything in the roots is denied.")?;
    } else {
        output.columns(&agents(&status.agents))?;
    }
    details(&status.agents, output)?;
    if !status.former.is_empty() {
        let sum = |of: fn(&Former) -> u64| status.former.iter().map(of).sum::<u64>();
        output.line(format_args!(
            "\nleft the registry: {}, {} denied and {} monitored until then",
            format::count(status.former.len() as u64, "agent"),
            sum(|former| former.denied),
            sum(|former| former.monitored),
        ))?;
    }
    output.line(format_args!(
        "\nregistry: {}, {}, {}",
        format::count(status.registry.files, "file"),
        format::count(status.registry.errors, "error"),
        format::count(status.registry.warnings, "warning"),
    ))?;
    output.line(drift(&status.drift, output))?;
    for finding in &status.findings {
        output.line(format_args!("\n{}", plain_lines(finding)))?;
    }
    Ok(())
}

fn drift(drift: &DriftSummary, output: &Output) -> String {
    let Some(checked) = drift.checked_ms else {
        return "drift: registry and kernel were not compared yet".to_owned();
    };
    let mut line = match drift.open {
        0 => "drift: none".to_owned(),
        open => {
            let open = format!("{} unmended", format::count(open, "difference"));
            format!("drift: {}", output.paint(Tone::Bad, &open))
        }
    };
    line.push_str(&format!(", compared {}", format::time(checked)));
    if let Some(last) = drift.last_ms {
        let (found, last) = (drift.found, format::time(last));
        line.push_str(&format!("; {found} found since the start, the last {last}"));
    }
    line
}

fn guards(guards: &[Guard]) -> Columns {
    let mut columns = Columns::new(&["GUARD", "KIND", "ROOT", "STATE", "AGE", "EVIDENCE"]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX));
    for guard in guards {
        let state = match guard.state {
            GuardState::Live => "live",
            GuardState::Degraded => "DEGRADED",
            GuardState::Absent => "ABSENT",
            GuardState::Off => "off",
        };
        let evidence = match guard.run_cnt {
            Some(runs) => format!("{}, which ran {runs} times", guard.evidence),
            None => guard.evidence.clone(),
        };
        columns.row(&[
            guard.name.as_str(),
            &guard.kind,
            guard.root.as_deref().unwrap_or("-"),
            state,
            &age(now.saturating_sub(guard.checked_ms)),
            &evidence,
        ]);
    }
    columns
}

fn probed(probe: &LastProbe, output: &Output) -> String {
    let (tone, word) = match probe.verdict {
        ProbeVerdict::Pass => (Tone::Good, "PASS"),
        ProbeVerdict::Unknown => (Tone::Doubtful, "UNKNOWN"),
        ProbeVerdict::Fail => (Tone::Bad, "FAIL"),
    };
    let why = probe.why.as_ref();
    let why = why.map_or_else(String::new, |why| format!(": {}", plain(why)));
    let at = format::time(probe.time_ms);
    format!("probe {} at {at}{why}", output.paint(tone, word))
}

/// How old evidence is.
fn age(millis: i64) -> String {
    match millis.max(0) {
        millis if millis < 1_000 => "now".to_owned(),
        millis if millis < 120_000 => format!("{} s", millis / 1_000),
        millis => format!("{} min", millis / 60_000),
    }
}

fn agents(agents: &[AgentStatus]) -> Columns {
    let mut columns = Columns::new(&[
        "AGENT",
        "STATE",
        "MODE",
        "REVISION",
        "CGROUPS",
        "PROCESSES",
        "ALLOWED",
        "DENIED",
        "MONITORED",
        "EXPIRES",
    ]);
    for agent in agents {
        columns.row(&[
            agent.id.clone(),
            agent.state.clone(),
            agent.mode.clone(),
            agent.revision.to_string(),
            agent.cgroups.len().to_string(),
            agent.processes.to_string(),
            agent.allowed.to_string(),
            agent.denied.to_string(),
            agent.monitored.to_string(),
            format::end(agent.expires_ms),
        ]);
    }
    columns
}

/// Leases of an agent that are shown.
const LEASES: usize = 5;

/// What does not fit into a column: who holds it, cgroups, reasons, the last violation, a kept entry.
fn details(agents: &[AgentStatus], output: &Output) -> Result<()> {
    for agent in agents {
        let mut lines = Vec::new();
        if let Some(hold) = &agent.hold {
            lines.push(output.paint(Tone::Bad, &hold_line(hold)));
        }
        for cgroup in &agent.cgroups {
            let (path, processes) = (plain(&cgroup.path), cgroup.processes);
            lines.push(format!("cgroup {path}, processes: {processes}"));
        }
        if !agent.by_reason.is_empty() {
            let reasons: Vec<_> = agent
                .by_reason
                .iter()
                .map(|(reason, count)| format!("{} {count}", plain(reason)))
                .collect();
            lines.push(format!("reasons {}", reasons.join(", ")));
        }
        for lease in agent.leases.iter().take(LEASES) {
            let name = lease
                .name
                .as_deref()
                .unwrap_or("(resolved before this daemon)");
            lines.push(format!(
                "lease {} {} until {}",
                plain(name),
                lease.addr,
                format::time(lease.until_ms)
            ));
        }
        let shown = (agent.leases.len().min(LEASES)) as u64;
        if agent.leased > shown {
            lines.push(format!("and {} leases more", agent.leased - shown));
        }
        if let Some(last) = &agent.last_violation {
            lines.push(format!("last {}", plain(&last.text)));
        }
        if let Some(probe) = &agent.last_probe {
            lines.push(probed(probe, output));
        }
        if let Some(finding) = &agent.finding {
            let mark = output.paint(Tone::Bad, "last good entry kept:");
            lines.push(format!("{mark} {}", plain_lines(finding)));
        }
        if lines.is_empty() {
            continue;
        }
        output.line(format_args!(
            "\n{}",
            output.paint(Tone::Strong, &plain(&agent.id))
        ))?;
        for line in lines {
            output.line(format_args!("  {line}"))?;
        }
    }
    Ok(())
}
