//! `remit agents`: the registry as it is in force, which may differ from what the files say now.

use super::{
    Global, format,
    lifecycle::hold_line,
    outcome::{Outcome, Result},
    output::{Columns, Output, Tone, plain, plain_lines},
};
use crate::control::protocol::{Agent, Agents};

/// Arguments of `remit agents`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// This agent alone, with its scope.
    #[arg(value_name = "ID")]
    id: Option<String>,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let client = global.client()?;
    if let Some(id) = &arguments.id {
        let agent: Agent = client.get(&format!("/agents/{}", segment(id)))?;
        if output.wants_json() {
            output.json(&agent)?;
        } else {
            one(&agent, output)?;
        }
        return Ok(Outcome::Yes);
    }
    let agents: Agents = client.get("/agents")?;
    if output.wants_json() {
        output.json(&agents)?;
    } else {
        all(&agents, output)?;
    }
    Ok(Outcome::Yes)
}

fn all(agents: &Agents, output: &Output) -> Result<()> {
    if agents.agents.is_empty() {
        return output.line(format_args!("revision {}: no agents", agents.revision));
    }
    let mut columns = Columns::new(&["AGENT", "STATE", "MODE", "OWNER", "EXPIRES", "FILE"]);
    for agent in &agents.agents {
        columns.row(&[
            agent.id.clone(),
            agent.state.clone(),
            agent.mode.clone(),
            agent.owner.clone(),
            format::end(agent.expires_ms),
            agent.file.display().to_string(),
        ]);
    }
    output.columns(&columns)
}

fn one(agent: &Agent, output: &Output) -> Result<()> {
    let id = output.paint(Tone::Strong, &plain(&agent.id));
    output.line(format_args!("{id}  {}", plain(&agent.name)))?;
    let lines = [
        ("file", agent.file.display().to_string()),
        ("owner", agent.owner.clone()),
        (
            "approval",
            agent.approval_ref.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("state", agent.state.clone()),
        ("mode", agent.mode.clone()),
        ("loopback", agent.loopback.clone()),
        (
            "not before",
            agent
                .not_before_ms
                .map_or_else(|| "-".to_owned(), format::time),
        ),
        ("expires", format::end(agent.expires_ms)),
        ("cgroups", agent.selectors.join(", ")),
        ("hash", agent.hash.clone()),
    ];
    for (name, value) in lines {
        output.line(format_args!("  {name:<11} {}", plain(&value)))?;
    }
    if let Some(hold) = &agent.hold {
        output.line(format_args!(
            "  {}",
            output.paint(Tone::Bad, &hold_line(hold))
        ))?;
    }
    if let Some(finding) = &agent.finding {
        let mark = output.paint(Tone::Bad, "last good entry kept:");
        output.line(format_args!("  {mark} {}", plain_lines(finding)))?;
    }
    output.line("")?;
    let mut columns = Columns::new(&["ENTRY", "SAYS", "AT", "REASON"]);
    for entry in &agent.entries {
        columns.row(&[
            entry.name.clone(),
            entry.text.clone(),
            format::place(&entry.file, entry.line),
            entry.reason.clone().unwrap_or_default(),
        ]);
    }
    output.columns(&columns)
}

/// An id as a path segment: what is not plainly an id's character is escaped, so that no id reads
/// as another path.
pub(super) fn segment(id: &str) -> String {
    let mut segment = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => segment.push(byte.into()),
            b'.' if id != "." && id != ".." => segment.push('.'),
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_segment_whatever_it_holds() {
        assert_eq!(segment("billing-recon.2"), "billing-recon.2");
        assert_eq!(segment("../status?x"), "..%2Fstatus%3Fx");
        assert_eq!(segment(".."), "%2E%2E");
    }
}
