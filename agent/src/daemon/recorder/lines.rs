//! The lines: what each is made of, how it is written, and what is kept of it to be told of.

use std::time::Instant;

use agent_ebpf::abi::{Addr, Event, Fold, NO_ENTRY};
use serde_json::Value;
use tracing::warn;

use super::{Recorder, Sink};
use crate::{
    audit::{Dropped, Key, LogError, Owed, ProcessInfo, Violation, human},
    control::protocol::{Denial, LastViolation},
    daemon::{advice, lookups::Refused, time::wall_millis},
};

/// Denials kept for each agent to be told of.
const DENIALS: usize = 16;

impl Recorder {
    /// Writes a lookup, which stands for `count`. False if the agent's allowance has no room, or it
    /// could not be written.
    pub fn write_lookup(&mut self, now: u64, refused: &Refused, count: u64) -> bool {
        self.ledger.admits(now, refused.agent) && self.put_lookup(now, refused, count, false)
    }

    /// Writes the one line of an agent for lookups that have none of their own.
    pub fn write_lookups_over(&mut self, now: u64, refused: &Refused, count: u64) {
        self.put_lookup(now, refused, count, true);
    }

    fn put_lookup(&mut self, now: u64, refused: &Refused, count: u64, over: bool) -> bool {
        let known = self.known(refused.agent, 0);
        let entry = refused.report.entry.unwrap_or(NO_ENTRY);
        let process = refused.process();
        let cgroup = refused.asked.cgroup;
        let context = self.context(&known, process, cgroup, entry, now, count);
        let mut lookup = refused.lookup(count, context.process);
        lookup.time = context.time;
        lookup.agent = context.agent;
        lookup.cgroup = context.cgroup;
        lookup.entry = context.entry;
        lookup.revision = context.revision;
        if over {
            lookup.text = format!(
                "{count} more lookups of {} without lines of their own; one of them: {}",
                known.subject.id, lookup.text
            );
            lookup.name.clear();
        }
        let host = self.host.clone();
        let run = self.probe_in(cgroup);
        self.put_line(now, refused.agent, |sequence| {
            marked(lookup.to_ocsf(&host, sequence), run.as_deref())
        })
        .is_ok()
    }

    /// The probe whose helper runs in this cgroup, if one does.
    fn probe_in(&self, cgroup: u64) -> Option<String> {
        let watch = self.watch.as_ref().filter(|watch| watch.cgroup == cgroup);
        watch.map(|watch| watch.run.clone())
    }

    pub(super) fn write_event(&mut self, now: u64, event: &Event, count: u64) {
        let known = self.known(event.agent, event.policy);
        let process = ProcessInfo::from_event(event);
        let mut context = self.context(
            &known,
            process,
            event.cgroup,
            event.entry,
            event.time,
            count,
        );
        context.dst_name = self.hostname(event.agent, event.addr);
        if let Some(violation) = Violation::from_event(event, context) {
            self.write(now, event.agent, &violation, count);
        }
    }

    pub(super) fn write_fold(&mut self, now: u64, id: u32, fold: &Fold, count: u64) {
        let (known, entry) = self.known_of(id, fold);
        let process = ProcessInfo::from_fold(fold);
        let mut context = self.context(&known, process, fold.cgroup, entry, now, count);
        context.dst_name = self.hostname(fold.agent, fold.addr);
        if let Some(violation) = Violation::from_fold(fold, context) {
            self.write(now, fold.agent, &violation, count);
        }
    }

    fn hostname(&self, agent: u32, addr: Addr) -> Option<String> {
        self.name_of(agent, addr.into()).map(str::to_owned)
    }

    fn write(&mut self, now: u64, agent: u32, violation: &Violation, count: u64) {
        let key = Key {
            agent,
            verdict: violation.verdict,
            reason: violation.reason,
        };
        let host = self.host.clone();
        let run = self.probe_in(violation.cgroup_id);
        let line = self.append(now, key, count, |sequence| {
            marked(violation.to_ocsf(&host, sequence), run.as_deref())
        });
        let Some(text) = line else {
            if run.is_some()
                && let Some(watch) = &mut self.watch
            {
                let why = self.health.broken.as_ref().map(|(_, why)| why.clone());
                watch.unwritten = Some(why.unwrap_or_else(|| "the log cannot be written".into()));
            }
            return;
        };
        // What a probe provoked is no violation of the agent's own.
        if run.is_some() {
            return;
        }
        let id = violation.agent.id.clone();
        self.last.insert(
            id.clone(),
            LastViolation {
                time_ms: violation.time,
                text: text.clone(),
            },
        );
        let destination = violation
            .dst
            .map_or_else(String::new, |dst| match dst.port {
                Some(port) => std::net::SocketAddr::new(dst.ip, port).to_string(),
                None => dst.ip.to_string(),
            });
        let denials = self.denials.entry(id).or_default();
        denials.push_front(Denial {
            time_ms: violation.time,
            destination,
            reason: violation.reason.name().to_owned(),
            text,
            advice: advice::on(violation),
        });
        denials.truncate(DENIALS);
    }

    pub(super) fn write_owed(&mut self, now: u64, owed: &Owed) {
        let known = self.known(owed.key.agent, 0);
        let dropped = Dropped {
            time: self.offset.wall(now),
            agent: known.subject,
            verdict: owed.key.verdict,
            reason: owed.key.reason,
            lost: owed.lost,
            cgroup: None,
            revision: self.revision,
        };
        let host = self.host.clone();
        let count = owed.lost.sum();
        // What an agent loses by its own rate is no fault of the reader's.
        if owed.lost.disk > 0 {
            self.health.lost = Some((Instant::now(), owed.lost.disk));
        }
        self.lost = self.lost + owed.lost;
        self.append(now, owed.key, count, |sequence| {
            dropped.to_ocsf(&host, sequence)
        });
    }

    /// Appends a line; returns its text for people, or none where it could not be written, which
    /// the ledger is told.
    fn append(
        &mut self,
        now: u64,
        key: Key,
        count: u64,
        build: impl Fn(u64) -> Value,
    ) -> Option<String> {
        match self.put_line(now, key.agent, build) {
            Ok(text) => Some(text),
            Err(error) => {
                warn!(message = "A violation could not be written; it is counted.", %error);
                self.ledger.unwritten(key, count);
                None
            }
        }
    }

    /// Appends a line; returns its text for people.
    fn put_line(
        &mut self,
        now: u64,
        agent: u32,
        build: impl Fn(u64) -> Value,
    ) -> Result<String, LogError> {
        match &mut self.sink {
            Sink::Memory(lines) => {
                let value = build(lines.len() as u64 + 1);
                let text = human(&value, false);
                lines.push(value);
                Ok(text)
            }
            Sink::Log(log) => {
                let mut text = String::new();
                let mut exported = None;
                let exports = &mut self.exports;
                let appended = log.append(|sequence| {
                    let value = build(sequence);
                    text = human(&value, false);
                    if !exports.is_empty() {
                        exported = Some(value.clone());
                    }
                    value
                });
                let bytes = match appended {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        let since = self
                            .health
                            .broken
                            .take()
                            .map_or_else(wall_millis, |(at, _)| at);
                        self.health.broken = Some((since, error.to_string()));
                        return Err(error);
                    }
                };
                self.health.written = Some(wall_millis());
                self.health.broken = None;
                if let Some(event) = exported {
                    exports.write(&event);
                }
                self.ledger.spend(now, agent, bytes);
                Ok(text)
            }
        }
    }
}

/// A line that a probe has provoked says so.
fn marked(mut line: Value, run: Option<&str>) -> Value {
    if let Some(run) = run
        && let Some(unmapped) = line.pointer_mut("/unmapped")
        && let Some(unmapped) = unmapped.as_object_mut()
    {
        unmapped.insert("probe".to_owned(), run.into());
    }
    line
}
