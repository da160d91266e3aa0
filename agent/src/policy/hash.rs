//! What an entry's hash covers: every value of the checked entry and of what it includes, in one
//! order, each quoted so that no two entries read alike. Not covered: comments, layout, places,
//! and the approved hash itself.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use super::{
    model::{Agent, Client, Grant, Scope},
    name::Id,
};

/// A canonical text under way.
#[derive(Debug, Default)]
pub struct Canonical(String);

// === impl Canonical ===

impl Canonical {
    /// The entry itself.
    pub fn agent(&mut self, agent: &Agent, scope: &Scope) {
        self.line("remit.agent", "1");
        self.line("id", agent.id.as_str());
        self.line("name", &agent.name);
        self.maybe("purpose", agent.purpose.as_deref());
        self.line("owner", &agent.owner);
        self.maybe("sponsor", agent.sponsor.as_deref());
        self.lines("backup_owner", &agent.backup_owners);
        for (key, value) in &agent.labels {
            self.line("label", key);
            self.line("is", value);
        }
        self.lines("capability", &agent.capabilities);
        self.lines("tool", &agent.tools);
        self.lines("model", &agent.models);
        self.maybe("risk", agent.risk.as_deref());
        self.lines("identity", &agent.identities);
        let lifecycle = &agent.lifecycle;
        self.line("state", lifecycle.state.name());
        self.maybe("approved_by", lifecycle.approved_by.as_deref());
        self.maybe("approval_ref", lifecycle.approval_ref.as_deref());
        self.number("not_before", lifecycle.not_before);
        self.number("expires", lifecycle.expires);
        self.number("review_every", lifecycle.review_every);
        self.number("last_review", lifecycle.last_review);
        for selector in &agent.selectors {
            self.line("selector", selector.as_str());
        }
        self.scope(scope);
    }

    fn scope(&mut self, scope: &Scope) {
        self.line("mode", scope.mode.name());
        self.line("loopback", scope.loopback.name());
        self.lines("unix", &scope.unix);
        for serve in &scope.serve {
            self.line("serve", &serve.ports.to_string());
            for client in &serve.from {
                match client {
                    Client::Net(cidr) => self.line("from", &cidr.to_string()),
                    Client::Loopback => self.line("from", "loopback"),
                }
            }
        }
        self.grants("allow", &scope.allow);
        self.grants("deny", &scope.deny);
    }

    /// A set that the entry includes.
    pub fn set(&mut self, name: &Id, allow: &[Grant]) {
        self.line("remit.set", name.as_str());
        self.grants("allow", allow);
    }

    /// The host-wide denials.
    pub fn floor(&mut self, deny: &[Grant]) {
        self.line("remit.floor", "1");
        self.grants("deny", deny);
    }

    fn grants(&mut self, key: &str, grants: &[Grant]) {
        for grant in grants {
            self.line(key, &grant.to.to_string());
            self.line("ports", &grant.ports.to_string());
            self.maybe("reason", grant.reason.as_deref());
            self.number("expires", grant.expires);
            for cidr in &grant.within {
                self.line("within", &cidr.value.to_string());
            }
        }
    }

    fn line(&mut self, key: &str, value: &str) {
        // A length before the value quotes it: nothing in it can end it.
        let _ = writeln!(self.0, "{key} {}:{value}", value.len());
    }

    fn lines(&mut self, key: &str, values: &[String]) {
        for value in values {
            self.line(key, value);
        }
    }

    fn maybe(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }

    fn number(&mut self, key: &str, value: Option<i64>) {
        if let Some(value) = value {
            self.line(key, &value.to_string());
        }
    }

    /// `sha256:` and 64 hex digits.
    pub fn hash(&self) -> String {
        let mut text = String::from("sha256:");
        for byte in Sha256::digest(self.0.as_bytes()) {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}
