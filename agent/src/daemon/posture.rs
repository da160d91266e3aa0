//! Whether this host enforces, from evidence: what the kernel lists now, what the last comparison
//! of its tables found, and when each loop of the daemon last came round.

use std::time::{Duration, Instant};

use agent_ebpf::abi::{self, Addr, Hook, Reason};

use super::{
    answers::host_guard,
    core::{Core, boot_now},
    observer::OBSERVER,
    settings::Settings,
    time::wall_millis,
};
use crate::{
    cgroup::CgroupPath,
    control::protocol::{Code, Guard, GuardState, Guarded, Posture, Refusal},
    kernel::{Fence, HOOKS},
    policy::UnixMillis,
};

/// A loop that has not come round for so long is no longer live: the interval of a comparison, so
/// that nothing stands longer than that without a word. The loops themselves come round after 5 ms
/// and a second; the rest is for a reload that takes its time.
pub(super) const STALE: Duration = Duration::from_secs(5);
/// Lost records are told for so long after the last one.
const LOST_FOR: Duration = Duration::from_secs(60);

/// When the daemon's own loops last came round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beats {
    /// Registry and kernel were compared.
    pub compared: Option<Instant>,
}

/// How often registry and kernel are compared.
pub(super) fn compare_every(settings: &Settings) -> Duration {
    settings.reconcile.every.unwrap_or(Duration::from_secs(5))
}

impl Core {
    /// The word and the reasons, by the guards as they were read back.
    pub(super) fn posture(&self, guards: &[Guard]) -> (Posture, Vec<String>) {
        let mut reasons: Vec<String> = self.problems.values().cloned().collect();
        let mut posture = if reasons.is_empty() {
            Posture::Enforcing
        } else {
            Posture::Degraded
        };
        // The observer guards nothing.
        for guard in guards.iter().filter(|guard| guard.kind != OBSERVER) {
            match guard.state {
                GuardState::Live | GuardState::Off => continue,
                GuardState::Degraded | GuardState::Absent if guard.kind == "link" => {
                    posture = Posture::NotEnforcing;
                }
                GuardState::Degraded | GuardState::Absent => {
                    if posture == Posture::Enforcing {
                        posture = Posture::Degraded;
                    }
                }
            }
            let root = guard.root.as_ref();
            let root = root.map_or_else(String::new, |root| format!(" on {root}"));
            reasons.push(format!("{}{root}: {}", guard.name, guard.evidence));
        }
        (posture, reasons)
    }

    /// Every guard, from evidence.
    pub(super) fn guards(&self) -> Vec<Guard> {
        let mut guards = self.link_guards();
        guards.extend([
            self.tables_guard(),
            self.ring_guard(),
            self.reader_guard(),
            self.log_guard(),
            self.audit_guard(),
            self.loop_guard(),
        ]);
        guards.extend(self.host_guards());
        guards
    }

    /// Each hook on each root that the settings name, read back now.
    fn link_guards(&self) -> Vec<Guard> {
        let mut guards = Vec::new();
        for root in &self.roots {
            let name = root.to_string();
            let fence = self.enforcer.fences().find(|(fenced, _)| *fenced == name);
            guards.extend(self.guards_of(&name, fence.map(|(_, fence)| fence)));
        }
        guards
    }

    fn guards_of(&self, root: &str, fence: Option<&Fence>) -> Vec<Guard> {
        let now = wall_millis();
        let link = |hook: &str, state, evidence: String| Guard {
            root: Some(root.to_owned()),
            ..host_guard(hook, "link", state, &evidence, now)
        };
        let Some(fence) = fence else {
            return HOOKS
                .iter()
                .map(|expected| {
                    let none = "the root is not fenced".to_owned();
                    link(expected.hook, GuardState::Absent, none)
                })
                .collect();
        };
        let stands = fence.stands();
        fence
            .guards()
            .into_iter()
            .map(|guard| {
                let (state, evidence) = match guard.link {
                    _ if !stands => (GuardState::Absent, "the root's cgroup is gone".to_owned()),
                    None => (GuardState::Absent, "the link is gone".to_owned()),
                    Some(held) if held.program != guard.wanted => (
                        GuardState::Degraded,
                        format!(
                            "link {} holds program {}, which is not ours ({})",
                            held.id, held.program, guard.wanted
                        ),
                    ),
                    Some(held) if !guard.listed => (
                        GuardState::Degraded,
                        format!(
                            "the kernel does not list program {} on the root",
                            held.program
                        ),
                    ),
                    Some(held) => (
                        GuardState::Live,
                        format!(
                            "link {} holds program {} on cgroup {}",
                            held.id, held.program, held.cgroup
                        ),
                    ),
                };
                Guard {
                    link_id: guard.link.map(|held| held.id),
                    prog_id: guard.link.map(|held| held.program),
                    run_cnt: self.enforcer.runs(guard.hook),
                    ..link(guard.hook, state, evidence)
                }
            })
            .collect()
    }

    /// The tables, as of the last comparison.
    fn tables_guard(&self) -> Guard {
        let summary = self.drift_summary();
        let (state, evidence) = match summary.checked_ms {
            None => (
                GuardState::Degraded,
                "not compared with the registry yet".to_owned(),
            ),
            Some(_) if summary.open > 0 => (
                GuardState::Degraded,
                format!("{} differences stand unmended", summary.open),
            ),
            Some(_) => (
                GuardState::Live,
                format!(
                    "{} entries read back as the registry has them",
                    self.enforcer.compared()
                ),
            ),
        };
        let checked = summary.checked_ms.unwrap_or_else(wall_millis);
        host_guard("tables", "map", state, &evidence, checked)
    }

    /// The ring, by its own positions.
    fn ring_guard(&self) -> Guard {
        let ring =
            |state, evidence: String| host_guard("ring", "map", state, &evidence, wall_millis());
        match self.enforcer.ring_state() {
            Ok(found) => match found.waiting() {
                Some(waiting) if waiting <= u64::from(abi::RING_BYTES) / 2 => {
                    ring(GuardState::Live, format!("{waiting} bytes wait to be read"))
                }
                Some(waiting) => ring(
                    GuardState::Degraded,
                    format!("{waiting} bytes wait to be read: records are about to be lost"),
                ),
                None => ring(
                    GuardState::Degraded,
                    format!(
                        "read to {} of {}, which cannot be: the kernel drops every record",
                        found.consumed, found.produced
                    ),
                ),
            },
            Err(error) => ring(GuardState::Degraded, format!("cannot be read: {error}")),
        }
    }

    /// The loop that reads the ring, by its own beat.
    fn reader_guard(&self) -> Guard {
        let health = self.recorder.health();
        beat(
            "ring reader",
            health.drained,
            STALE,
            "the ring was looked into",
        )
    }

    fn loop_guard(&self) -> Guard {
        let every = compare_every(&self.settings);
        beat(
            "reconcile",
            self.beats.compared,
            every.saturating_mul(2) + STALE + self.drift_pause(),
            "registry and kernel were compared",
        )
    }

    /// The violation log.
    fn log_guard(&self) -> Guard {
        let health = self.recorder.health();
        let lost = health.lost.filter(|(at, _)| at.elapsed() < LOST_FOR);
        let (state, evidence) = match (self.recorder.log_fault(), lost) {
            (Some(why), _) => (GuardState::Degraded, why),
            (None, Some((_, lost))) => (
                GuardState::Degraded,
                format!("details of {lost} attempts could not be written within the last minute"),
            ),
            (None, None) => match health.written {
                Some(at) => (
                    GuardState::Live,
                    format!("the last line was written {} ago", ago(wall_millis() - at)),
                ),
                None => (
                    GuardState::Live,
                    "its file is there; no line was due yet".to_owned(),
                ),
            },
        };
        host_guard("violation log", "log", state, &evidence, wall_millis())
    }

    /// The audit trail, by its last line: there is one from the start on.
    fn audit_guard(&self) -> Guard {
        let (state, evidence) = match self.problems.get("audit") {
            Some(why) => (GuardState::Degraded, why.clone()),
            None => (GuardState::Live, "its last line was written".to_owned()),
        };
        host_guard("audit log", "log", state, &evidence, wall_millis())
    }

    /// Whether what runs in `path` is an active agent behind a fence that stands, by the kernel.
    pub(super) fn guarded(&mut self, path: &str) -> Result<Guarded, Refusal> {
        let place = CgroupPath::new(path)
            .map_err(|error| Refusal::new(Code::BadRequest, format!("`{path}`: {error}")))?;
        let mut why = Vec::new();
        let root = self
            .roots
            .iter()
            .find(|root| place.is_within(root))
            .cloned();
        let mut fenced = false;
        match &root {
            None => why.push("it is below no root, so nothing restricts it".to_owned()),
            Some(root) => {
                let name = root.to_string();
                let fence = self.enforcer.fences().find(|(fenced, _)| *fenced == name);
                let guards = self.guards_of(&name, fence.map(|(_, fence)| fence));
                let broken: Vec<String> = guards
                    .iter()
                    .filter(|guard| guard.state != GuardState::Live)
                    .map(|guard| format!("{}: {}", guard.name, guard.evidence))
                    .collect();
                fenced = broken.is_empty();
                why.extend(broken);
            }
        }
        let claimed = self
            .claims
            .iter()
            .find(|(claimed, _)| place.is_within(claimed))
            .map(|(claimed, (id, agent))| (claimed.clone(), *id, *agent));
        let mut agent = None;
        let mut state = "unregistered".to_owned();
        match claimed {
            None => why.push("no agent claims it".to_owned()),
            Some((claimed, known, index)) => {
                match self.hierarchy.id(&claimed) {
                    Ok(id) if id == known => {}
                    Ok(_) | Err(_) => {
                        why.push(format!(
                            "`{claimed}` is another cgroup than the one claimed"
                        ));
                    }
                }
                match self.enforcer.claimant(known) {
                    Ok(Some(found)) if found == index => {}
                    Ok(_) => {
                        why.push("the kernel gives it to another agent, or to none".to_owned())
                    }
                    Err(error) => why.push(format!("the kernel's claims cannot be read: {error}")),
                }
                let ids = self.enforcer.indices();
                agent = ids
                    .into_iter()
                    .find(|(_, at)| *at == index)
                    .map(|(id, _)| id);
                match self.state_in_kernel(index) {
                    Ok(None) => "active".clone_into(&mut state),
                    Ok(Some(reason)) => {
                        state = reason.name().to_owned();
                        why.push(format!("the agent is {state}"));
                    }
                    Err(error) => {
                        "unknown".clone_into(&mut state);
                        why.push(error);
                    }
                }
            }
        }
        Ok(Guarded {
            cgroup: place.to_string(),
            root: root.map(|root| root.to_string()),
            fenced,
            agent,
            state,
            ok: why.is_empty(),
            why,
        })
    }

    /// Why the kernel lets an agent reach nothing at all; none when it is active.
    fn state_in_kernel(&mut self, agent: u32) -> Result<Option<Reason>, String> {
        let said = self
            .enforcer
            .judge(abi::Question {
                now: boot_now(),
                addr: Addr::v4([192, 0, 2, 1]),
                agent,
                port: 9,
                protocol: 6,
                hook: Hook::Connect4 as u8,
                ..abi::Question::zeroed()
            })
            .map_err(|error| error.to_string())?;
        if said.verdict == 4 {
            return Err("the kernel has no row of the agent that makes sense".to_owned());
        }
        Ok(Reason::from_byte(said.reason).filter(|reason| lifeless(*reason)))
    }
}

/// Whether a reason is about the agent as a whole.
pub(super) const fn lifeless(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Draft
            | Reason::Suspended
            | Reason::Revoked
            | Reason::Expired
            | Reason::NotYetValid
            | Reason::Unregistered
    )
}

fn beat(name: &str, last: Option<Instant>, stale: Duration, what: &str) -> Guard {
    let now = wall_millis();
    let Some(last) = last else {
        let evidence = format!("never yet: {what}");
        return host_guard(name, "loop", GuardState::Degraded, &evidence, now);
    };
    let age = last.elapsed();
    let millis = UnixMillis::try_from(age.as_millis()).unwrap_or(UnixMillis::MAX);
    let state = if age <= stale {
        GuardState::Live
    } else {
        GuardState::Degraded
    };
    let evidence = format!("{what} {} ago", ago(millis));
    host_guard(name, "loop", state, &evidence, now.saturating_sub(millis))
}

/// A span as people say it.
fn ago(millis: UnixMillis) -> String {
    match millis.max(0) {
        millis if millis < 1_000 => format!("{millis} ms"),
        millis if millis < 120_000 => format!("{} s", millis / 1_000),
        millis => format!("{} min", millis / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_come_round_is_degraded() {
        let now = Instant::now();
        assert_eq!(beat("x", None, STALE, "y").state, GuardState::Degraded);
        assert_eq!(beat("x", Some(now), STALE, "y").state, GuardState::Live);
        let old = now.checked_sub(STALE + Duration::from_secs(1));
        let told = beat("x", old, STALE, "it was done");
        assert_eq!(told.state, GuardState::Degraded);
        assert_eq!(told.evidence, "it was done 6 s ago");
        assert!(old.is_some());
    }
}
