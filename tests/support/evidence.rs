//! What Remit says happened: `status --json`, and the lines of its logs.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::remit::Output;

/// `remit status --json`.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

/// One line of `violations.jsonl` or `audit.jsonl`.
#[derive(Clone, Debug)]
pub struct Line(pub Value);

// === impl Status ===

impl Status {
    /// Reads the output; the command must have been able to tell.
    pub fn parse(output: &Output) -> Result<Self> {
        if output.code > 1 {
            bail!("remit status exits {}: {}", output.code, output.stderr);
        }
        let value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("remit status --json prints {:?}", output.stdout))?;
        Ok(Self(value))
    }

    /// An agent's part.
    pub fn agent(&self, id: &str) -> Result<&Value> {
        self.0["agents"]
            .as_array()
            .context("status has no agents")?
            .iter()
            .find(|agent| agent["id"] == id)
            .with_context(|| format!("status has no agent {id}"))
    }

    /// Attempts refused, of all reasons or of one; 0 before the first of a reason. The processes
    /// that nobody claims are listed only from their first attempt on.
    pub fn denied(&self, id: &str, reason: Option<&str>) -> Result<u64> {
        if id == "unregistered" && self.agent(id).is_err() {
            return Ok(0);
        }
        let agent = self.agent(id)?;
        match reason {
            None => agent["denied"].as_u64().context("denied is no number"),
            Some(reason) => Ok(agent["by_reason"]
                .as_object()
                .context("by_reason is no object")?
                .get(reason)
                .and_then(Value::as_u64)
                .unwrap_or(0)),
        }
    }

    /// Attempts that monitor mode let through.
    pub fn monitored(&self, id: &str) -> Result<u64> {
        self.agent(id)?["monitored"]
            .as_u64()
            .context("monitored is no number")
    }

    /// Ids of an agent's cgroups.
    pub fn cgroups(&self, id: &str) -> Result<Vec<u64>> {
        Ok(self.agent(id)?["cgroups"]
            .as_array()
            .context("cgroups is no list")?
            .iter()
            .filter_map(|cgroup| cgroup["id"].as_u64())
            .collect())
    }
}

// === impl Line ===

impl Line {
    /// All whole lines of a log, but for what a kill cut short; a file that is not there yet has none.
    pub fn read_all(path: &Path) -> Result<Vec<Self>> {
        let Ok(text) = fs::read_to_string(path) else {
            return Ok(Vec::new());
        };
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .filter_map(|line| match serde_json::from_str(line) {
                Ok(value) => Some(Ok(Self(value))),
                // A kill in the middle of a write leaves the beginning of a line, which the next
                // daemon ends; what it stood for is told again in the sums.
                Err(error) if error.is_eof() => None,
                Err(error) => Some(Err(error).with_context(|| format!("not JSON: {line}"))),
            })
            .collect()
    }

    /// `ai_agent.uid`, or `unmapped.agent`.
    pub fn agent(&self) -> &str {
        let named = self.text("/ai_agent/uid");
        if named.is_empty() {
            self.text("/unmapped/agent")
        } else {
            named
        }
    }

    /// Attempts that it stands for.
    pub fn count(&self) -> u64 {
        self.0["count"].as_u64().unwrap_or(1)
    }

    /// Whether it tells of a refusal.
    pub fn is_denial(&self) -> bool {
        self.0["class_uid"] == 4001 && self.0["activity_id"] == 5
    }

    /// Whether it tells of what monitor mode let through.
    pub fn is_monitored(&self) -> bool {
        self.0["class_uid"] == 4001 && self.0["activity_id"] == 1
    }

    /// A text at a JSON pointer; empty when there is none.
    pub fn text(&self, pointer: &str) -> &str {
        self.0
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// A number at a JSON pointer.
    pub fn number(&self, pointer: &str) -> Option<u64> {
        self.0.pointer(pointer).and_then(Value::as_u64)
    }
}
