//! What `remit top` shows and how keys change it. Pure: no terminal, no clock.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::Value;

use crate::{
    audit::query::agent,
    control::protocol::{AgentStatus, Lease, Question, Status},
};

/// Violations kept.
const VIOLATIONS: usize = 500;
/// Longest filter.
const FILTER: usize = 63;
/// Lines that a page key moves by.
const PAGE: usize = 10;

/// What a key asks of the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The end.
    Quit,
    /// An answer of the kernel.
    Explain(Question),
}

/// What the agents are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Their names.
    #[default]
    Name,
    /// What is refused a second.
    Refused,
    /// What is let through a second.
    Allowed,
    /// All that was refused.
    Denied,
    /// Their end, the nearest first.
    Ends,
}

/// Where the keys go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Focus {
    /// The agents.
    #[default]
    Agents,
    /// The violations.
    Violations,
    /// The filter being typed.
    Filter,
}

/// Decisions a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// Let through.
    pub allowed: f64,
    /// Refused, or what monitor mode let through.
    pub refused: f64,
}

/// Everything on the screen.
#[derive(Debug, Default)]
pub struct View {
    /// As the daemon last said.
    pub status: Option<Status>,
    /// Why the daemon said nothing since.
    pub problem: Option<String>,
    /// By agent.
    pub rates: BTreeMap<String, Rate>,
    /// Where the keys go.
    pub focus: Focus,
    /// What the agents are sorted by.
    pub sort: Sort,
    /// The other way round.
    pub reversed: bool,
    /// What names must contain.
    pub filter: String,
    /// The agent that is opened.
    pub opened: Option<String>,
    /// The kernel's answer to the last question.
    pub explanation: Option<String>,
    /// The agent that is selected, by its place in [`Self::agents`].
    pub selected: usize,
    /// The violation that is selected, by its place in [`Self::violations`].
    pub line: usize,
    /// Newest first.
    seen: VecDeque<Value>,
    /// The counters that rates are counted from.
    counted: BTreeMap<String, (u64, u64)>,
    /// When they were read, by the daemon's clock.
    counted_at: Option<i64>,
}

// === impl Sort ===

impl Sort {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Refused => "denied/s",
            Self::Allowed => "allowed/s",
            Self::Denied => "denied",
            Self::Ends => "end",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Name => Self::Refused,
            Self::Refused => Self::Allowed,
            Self::Allowed => Self::Denied,
            Self::Denied => Self::Ends,
            Self::Ends => Self::Name,
        }
    }
}

// === impl View ===

impl View {
    /// A new status of the daemon.
    pub fn take(&mut self, status: Status) {
        // Guards are read back for each answer: their time is the answer's.
        let now = status.guards.iter().map(|guard| guard.checked_ms).max();
        let seconds = match (self.counted_at, now) {
            (Some(before), Some(now)) => (now - before) as f64 / 1000.0,
            _ => 0.0,
        };
        let mut counted = BTreeMap::new();
        for agent in &status.agents {
            let (allowed, refused) = (agent.allowed, agent.denied + agent.monitored);
            let rate = match self.counted.get(&agent.id) {
                Some((before, refused_before)) if seconds > 0.0 => Rate {
                    allowed: allowed.saturating_sub(*before) as f64 / seconds,
                    refused: refused.saturating_sub(*refused_before) as f64 / seconds,
                },
                Some(_) | None => Rate::default(),
            };
            self.rates.insert(agent.id.clone(), rate);
            counted.insert(agent.id.clone(), (allowed, refused));
        }
        self.rates.retain(|id, _| counted.contains_key(id));
        self.counted = counted;
        self.counted_at = now;
        self.problem = None;
        let selected = self
            .agents()
            .get(self.selected)
            .map(|agent| agent.id.clone());
        self.status = Some(status);
        // The same agent stays selected where it now is.
        let at = selected.and_then(|id| self.agents().iter().position(|agent| agent.id == id));
        self.selected = at.unwrap_or(self.selected);
        self.keep_in_bounds();
    }

    /// A new line of the log.
    pub fn saw(&mut self, event: Value) {
        let first = self.line == 0;
        let shown = self.wants(&event);
        self.seen.push_front(event);
        self.seen.truncate(VIOLATIONS);
        // A line that somebody has selected stays selected.
        if !first && shown {
            self.line += 1;
        }
        self.keep_in_bounds();
    }

    /// The kernel's answer.
    pub fn explained(&mut self, text: String) {
        self.explanation = Some(text);
    }

    /// There is no status.
    pub fn trouble(&mut self, why: String) {
        self.problem = Some(why);
    }

    /// The agents that the filter lets through, as they are sorted.
    pub fn agents(&self) -> Vec<&AgentStatus> {
        let Some(status) = &self.status else {
            return Vec::new();
        };
        let mut agents: Vec<_> = status
            .agents
            .iter()
            .filter(|agent| agent.id.contains(&self.filter) || agent.name.contains(&self.filter))
            .collect();
        let rate = |agent: &AgentStatus| self.rates.get(&agent.id).copied().unwrap_or_default();
        match self.sort {
            Sort::Name => agents.sort_by(|a, b| a.id.cmp(&b.id)),
            Sort::Refused => {
                agents.sort_by(|a, b| rate(b).refused.total_cmp(&rate(a).refused));
            }
            Sort::Allowed => {
                agents.sort_by(|a, b| rate(b).allowed.total_cmp(&rate(a).allowed));
            }
            Sort::Denied => agents.sort_by_key(|agent| std::cmp::Reverse(agent.denied)),
            Sort::Ends => agents.sort_by_key(|agent| agent.expires_ms.unwrap_or(i64::MAX)),
        }
        if self.reversed {
            agents.reverse();
        }
        agents
    }

    /// The agent that is opened.
    pub fn open(&self) -> Option<&AgentStatus> {
        let id = self.opened.as_ref()?;
        let status = self.status.as_ref()?;
        status.agents.iter().find(|agent| agent.id == *id)
    }

    /// Leases of the agents on the screen, with whose they are; the nearest end first.
    pub fn leases(&self) -> Vec<(&str, &Lease)> {
        let shown = match self.open() {
            Some(agent) => vec![agent],
            None => self.agents(),
        };
        let mut leases: Vec<_> = shown
            .into_iter()
            .flat_map(|agent| agent.leases.iter().map(|lease| (agent.id.as_str(), lease)))
            .collect();
        leases.sort_by(|(a, left), (b, right)| {
            let key = |lease: &Lease| (lease.until_ms, lease.addr);
            (key(left), a).cmp(&(key(right), b))
        });
        leases
    }

    /// This moment, by the daemon's clock: guards are read back for each answer.
    pub fn now(&self) -> Option<i64> {
        let guards = &self.status.as_ref()?.guards;
        guards.iter().map(|guard| guard.checked_ms).max()
    }

    /// Violations of the agents on the screen, newest first.
    pub fn violations(&self) -> Vec<&Value> {
        self.seen.iter().filter(|event| self.wants(event)).collect()
    }

    fn wants(&self, event: &Value) -> bool {
        let id = agent(event).unwrap_or_default();
        match &self.opened {
            Some(opened) => id == opened,
            None => id.contains(&self.filter),
        }
    }

    /// A key was pressed.
    pub fn key(&mut self, key: KeyEvent) -> Effect {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Effect::Quit;
        }
        if self.focus == Focus::Filter {
            self.type_filter(key.code);
            return Effect::None;
        }
        match key.code {
            KeyCode::Char('q') => return Effect::Quit,
            KeyCode::Esc | KeyCode::Backspace => self.back(),
            KeyCode::Up | KeyCode::Char('k') => self.step(|at| at.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.step(|at| at + 1),
            KeyCode::PageUp => self.step(|at| at.saturating_sub(PAGE)),
            KeyCode::PageDown => self.step(|at| at + PAGE),
            KeyCode::Home => self.step(|_| 0),
            KeyCode::End => self.step(|_| usize::MAX),
            KeyCode::Tab => {
                self.focus = match self.focus {
                    Focus::Agents => Focus::Violations,
                    Focus::Violations | Focus::Filter => Focus::Agents,
                };
            }
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('/') => {
                self.opened = None;
                self.focus = Focus::Filter;
            }
            KeyCode::Enter if self.focus == Focus::Agents && self.opened.is_none() => {
                self.opened = self
                    .agents()
                    .get(self.selected)
                    .map(|agent| agent.id.clone());
                self.line = 0;
            }
            KeyCode::Enter | KeyCode::Char('e') => return self.explain(),
            _ => {}
        }
        Effect::None
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter | KeyCode::Tab => self.focus = Focus::Agents,
            KeyCode::Esc => {
                self.filter.clear();
                self.focus = Focus::Agents;
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(typed) if self.filter.len() < FILTER && !typed.is_control() => {
                self.filter.push(typed);
            }
            _ => {}
        }
        self.selected = 0;
        self.line = 0;
    }

    /// One thing less on the screen.
    fn back(&mut self) {
        if self.explanation.take().is_some() {
        } else if self.opened.take().is_some() {
            self.line = 0;
        } else if !self.filter.is_empty() {
            self.filter.clear();
        } else {
            self.focus = Focus::Agents;
        }
        self.keep_in_bounds();
    }

    fn step(&mut self, to: impl Fn(usize) -> usize) {
        // Of an opened agent there are only its violations to step through.
        if self.focus == Focus::Violations || self.opened.is_some() {
            self.line = to(self.line);
        } else {
            self.selected = to(self.selected);
        }
        self.keep_in_bounds();
    }

    fn keep_in_bounds(&mut self) {
        self.selected = self.selected.min(self.agents().len().saturating_sub(1));
        self.line = self.line.min(self.violations().len().saturating_sub(1));
    }

    /// What the kernel says now of the selected violation.
    fn explain(&mut self) -> Effect {
        let violations = self.violations();
        let question = violations.get(self.line).and_then(|event| question(event));
        match question {
            Some(question) => Effect::Explain(question),
            None => {
                self.explanation = Some("This line names no destination to ask about.".to_owned());
                Effect::None
            }
        }
    }
}

fn question(event: &Value) -> Option<Question> {
    let dst = &event["dst_endpoint"];
    let addr: IpAddr = dst["ip"].as_str()?.parse().ok()?;
    let port = u16::try_from(dst["port"].as_u64().unwrap_or(0)).ok()?;
    let protocol = event["connection_info"]["protocol_num"].as_u64()?;
    Some(Question {
        agent: agent(event)?.to_owned(),
        addr,
        port,
        protocol: u8::try_from(protocol).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A status with these agents: id, allowed, denied.
    fn status(at: i64, agents: &[(&str, u64, u64)]) -> Status {
        let agents: Vec<_> = agents
            .iter()
            .map(|(id, allowed, denied)| {
                json!({
                    "id": id, "name": id, "state": "active", "mode": "enforce", "revision": 1,
                    "hash": "", "cgroups": [], "processes": 0, "allowed": allowed,
                    "denied": denied, "monitored": 0, "by_reason": {},
                })
            })
            .collect();
        let guard = json!({
            "name": "egress", "kind": "link", "state": "live", "evidence": "", "checked_ms": at,
        });
        serde_json::from_value(json!({
            "version": "", "posture": "enforcing", "reasons": [], "since_ms": 0, "revision": 1,
            "guards": [guard], "agents": agents, "findings": [],
            "registry": { "files": 0, "errors": 0, "warnings": 0 },
        }))
        .unwrap()
    }

    fn press(view: &mut View, code: KeyCode) -> Effect {
        view.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn rates_are_by_the_daemons_clock_and_never_negative() {
        let mut view = View::default();
        view.take(status(1_000, &[("a", 10, 0), ("b", 5, 5)]));
        assert_eq!(view.rates["a"], Rate::default());
        view.take(status(3_000, &[("a", 30, 1), ("b", 1, 5), ("c", 9, 9)]));
        let rate = |allowed, refused| Rate { allowed, refused };
        assert_eq!(view.rates["a"], rate(10.0, 0.5));
        // Counters that were made anew.
        assert_eq!(view.rates["b"], rate(0.0, 0.0));
        assert_eq!(view.rates["c"], Rate::default());
        view.take(status(3_000, &[("a", 40, 2)]));
        assert_eq!(view.rates["a"], Rate::default(), "no time has passed");
        assert!(!view.rates.contains_key("b"));
    }

    #[test]
    fn what_is_selected_stays_selected_where_it_now_is() {
        let mut view = View::default();
        view.take(status(1_000, &[("a", 0, 0), ("c", 0, 9)]));
        press(&mut view, KeyCode::Down);
        assert_eq!(view.agents()[view.selected].id, "c");
        view.take(status(2_000, &[("a", 0, 0), ("b", 0, 0), ("c", 0, 9)]));
        assert_eq!(view.agents()[view.selected].id, "c");
        press(&mut view, KeyCode::End);
        press(&mut view, KeyCode::Down);
        assert_eq!(view.selected, 2);
        view.take(status(3_000, &[]));
        assert_eq!(view.selected, 0);
        assert_eq!(press(&mut view, KeyCode::Enter), Effect::None);
        assert_eq!(view.opened, None);
    }

    #[test]
    fn explain_asks_about_the_selected_line() {
        let mut view = View::default();
        for (ip, port) in [("192.0.2.1", 443), ("2001:db8::1", 53)] {
            view.saw(json!({
                "class_uid": 4001, "ai_agent": { "uid": "a" },
                "dst_endpoint": { "ip": ip, "port": port },
                "connection_info": { "protocol_num": 17 },
            }));
        }
        press(&mut view, KeyCode::Tab);
        press(&mut view, KeyCode::Down);
        let Effect::Explain(asked) = press(&mut view, KeyCode::Char('e')) else {
            panic!("nothing was asked");
        };
        assert_eq!(
            (asked.addr.to_string().as_str(), asked.port),
            ("192.0.2.1", 443)
        );
        // News do not move the selection to another line.
        view.saw(json!({ "class_uid": 4001, "ai_agent": { "uid": "a" } }));
        assert_eq!(press(&mut view, KeyCode::Enter), Effect::Explain(asked));
        press(&mut view, KeyCode::Home);
        assert_eq!(press(&mut view, KeyCode::Enter), Effect::None);
        assert!(view.explanation.is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let mut view = View::default();
        for _ in 0..2 * VIOLATIONS {
            view.saw(json!({}));
        }
        assert_eq!(view.violations().len(), VIOLATIONS);
        press(&mut view, KeyCode::Char('/'));
        for _ in 0..200 {
            press(&mut view, KeyCode::Char('x'));
        }
        assert_eq!(view.filter.len(), FILTER);
    }
}
