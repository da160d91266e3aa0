//! An agent suspended, resumed, revoked: Entity Management, 3004.

use serde_json::{Value, json};

use super::{Actor, bounded, cleaned};
use crate::{
    audit::{
        ocsf::{Class, Code, Envelope, Severity, Status, put},
        record::Subject,
    },
    policy::tables::UnixMillis,
};

/// A change of an agent's lifecycle state that somebody asked for, or that a change of its file
/// brought with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    /// What was asked for.
    pub change: Change,
    /// Whose state. The hash is that of the entry in force.
    pub agent: Subject,
    /// The state in force before.
    pub before: String,
    /// The state in force now.
    pub after: String,
    /// Why, in the words of whoever asked.
    pub reason: String,
    /// Who asked.
    pub by: Actor,
    /// TCP connections closed because no grant is left for them.
    pub closed: u64,
    /// Processes killed.
    pub killed: u64,
    /// Processes frozen, or thawed by a resume.
    pub frozen: u64,
    /// Whether it is on disk, and so survives a restart.
    pub durable: bool,
    /// What did not go as it should have.
    pub warnings: Vec<String>,
    /// Why it was refused; none when it was done.
    pub refused: Option<String>,
    /// The registry state in force.
    pub revision: u64,
}

/// What is asked of an agent's lifecycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// `remit suspend`.
    Suspend,
    /// `remit resume`.
    Resume,
    /// `remit revoke`.
    Revoke,
    /// The file of a revoked agent has changed and is approved again.
    Lift,
}

// === impl Change ===

impl Change {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::Suspend, Self::Resume, Self::Revoke, Self::Lift];

    const fn code(self) -> Code {
        match self {
            Self::Suspend => Code::AgentSuspended,
            Self::Resume => Code::AgentResumed,
            Self::Revoke => Code::AgentRevoked,
            Self::Lift => Code::RevocationLifted,
        }
    }

    /// Activity of the class: revoking is its `Deactivate`, the way back its `Activate`.
    const fn activity(self) -> (u64, &'static str) {
        match self {
            Self::Suspend => (12, "Suspend"),
            Self::Resume => (13, "Resume"),
            Self::Revoke => (11, "Deactivate"),
            Self::Lift => (10, "Activate"),
        }
    }

    const fn severity(self) -> Severity {
        match self {
            Self::Suspend | Self::Revoke | Self::Lift => Severity::Medium,
            Self::Resume => Severity::Low,
        }
    }

    const fn verb(self) -> &'static str {
        match self {
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Revoke => "revoke",
            Self::Lift => "lift the revocation of",
        }
    }
}

// === impl Lifecycle ===

impl Lifecycle {
    pub(super) fn event(&self, time: UnixMillis) -> (Envelope, Value) {
        let envelope = Envelope {
            code: match self.refused {
                None => self.change.code(),
                Some(_) => Code::LifecycleRefused,
            },
            class: Class::EntityManagement,
            activity: self.change.activity(),
            severity: self.change.severity(),
            status: Status::of(self.refused.is_none()),
            time,
            feature: ("lifecycle", "lifecycle"),
            message: self.message(),
        };
        let agent = &self.agent;
        let mut fields = json!({
            "actor": self.by.to_ocsf(),
            "comment": cleaned(&self.reason),
            "entity": self.entity(&self.before),
            "updated_entity": self.entity(&self.after),
            "ai_agent": { "uid": agent.id, "name": cleaned(&agent.name) },
            "policy": {
                "uid": format!("agent/{}", agent.id),
                "name": agent.id,
                "version": agent.hash,
                "type": "egress-scope",
            },
            "unmapped": {
                "revision": self.revision,
                "before": self.before,
                "after": self.after,
                "closed": self.closed,
                "killed": self.killed,
                "frozen": self.frozen,
                "durable": self.durable,
                "warnings": bounded(&self.warnings),
            },
        });
        let detail = self.refused.as_ref().or(self.warnings.first());
        put(&mut fields, "status_detail", detail.map(|why| cleaned(why)));
        (envelope, fields)
    }

    fn entity(&self, state: &str) -> Value {
        json!({
            "uid": self.agent.id,
            "name": cleaned(&self.agent.name),
            "type": "AI Agent",
            "version": self.agent.hash,
            "data": { "state": state, "owner": cleaned(&self.agent.owner) },
        })
    }

    fn message(&self) -> String {
        let (id, by, reason) = (&self.agent.id, self.by, cleaned(&self.reason));
        let (change, after) = (self.change, &self.after);
        if let Some(why) = &self.refused {
            let (verb, why) = (change.verb(), cleaned(why));
            return format!("Refused {by} to {verb} agent {id}: {why}; reason given: {reason}");
        }
        let mut message = match change {
            Change::Lift => format!("Agent {id} is no longer revoked: {reason}"),
            Change::Suspend | Change::Resume | Change::Revoke if self.before == *after => {
                format!(
                    "Agent {id} stays {after}; {by} asked to {} it: {reason}",
                    change.verb()
                )
            }
            Change::Suspend => format!("Agent {id} suspended by {by}: {reason}"),
            Change::Resume => format!("Agent {id} resumed by {by}: {reason}"),
            Change::Revoke => format!("Agent {id} revoked by {by}: {reason}"),
        };
        if !self.durable {
            message.push_str("; not on disk, so a restart would undo it");
        }
        message
    }
}
