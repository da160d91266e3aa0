//! Suspending, resuming and revoking an agent: the kernel first, then the disk, then what is open
//! and what runs.

use tracing::{info, warn};

use super::{core::Core, keeping};
use crate::{
    audit::{Change, Decision, Lifecycle, Subject},
    cgroup::CgroupPath,
    control::{
        Caller, Hold as HoldRequest, HoldState as Wanted, Processes, Reply, Resume,
        protocol::{Code, Held, Refusal},
    },
    state::{By, Hold, HoldState},
};

/// An answer that is ready but for what the freezer says.
pub(super) struct Pending {
    held: Held,
    freezing: Option<(bool, Vec<CgroupPath>)>,
}

impl Core {
    /// Answers a request to suspend or revoke.
    pub(super) fn answer_hold(
        &mut self,
        caller: &Caller,
        request: &HoldRequest,
        reply: Reply<Held>,
    ) {
        let change = match request.state {
            Wanted::Suspended => Change::Suspend,
            Wanted::Revoked => Change::Revoke,
        };
        let pending = self.hold(caller, request);
        self.conclude(
            caller,
            change,
            &request.id,
            request.reason.as_str(),
            pending,
            reply,
        );
    }

    /// Answers a request to resume.
    pub(super) fn answer_resume(&mut self, caller: &Caller, request: &Resume, reply: Reply<Held>) {
        let pending = self.resume(caller, request);
        let reason = request.reason.as_str();
        self.conclude(caller, Change::Resume, &request.id, reason, pending, reply);
    }

    /// Writes down what came of it, and answers once the freezer has done its work, on a thread of
    /// its own: a process that does not stop must not stop the daemon.
    fn conclude(
        &mut self,
        caller: &Caller,
        change: Change,
        id: &str,
        reason: &str,
        pending: Result<Pending, Refusal>,
        reply: Reply<Held>,
    ) {
        match &pending {
            Ok(pending) => self.decide_lifecycle(caller, change, &pending.held, None),
            Err(refusal) => {
                let state = self.state_of(id);
                let held = Held {
                    id: id.to_owned(),
                    before: state.clone(),
                    after: state,
                    reason: reason.to_owned(),
                    revision: self.force.revision,
                    closed: 0,
                    killed: 0,
                    frozen: 0,
                    durable: true,
                    warnings: Vec::new(),
                };
                self.decide_lifecycle(caller, change, &held, Some(refusal.message.clone()));
            }
        }
        match pending {
            Ok(Pending {
                mut held,
                freezing: Some((freeze, paths)),
            }) => {
                let hierarchy = self.hierarchy.clone();
                std::thread::spawn(move || {
                    for path in paths {
                        let done = if freeze {
                            hierarchy.freeze(&path)
                        } else {
                            hierarchy.thaw(&path)
                        };
                        if let Err(error) = done {
                            held.warnings.push(error.to_string());
                        }
                    }
                    drop(reply.send(Ok(held)));
                });
            }
            Ok(Pending {
                held,
                freezing: None,
            }) => drop(reply.send(Ok(held))),
            Err(refusal) => drop(reply.send(Err(refusal))),
        }
    }

    fn hold(&mut self, caller: &Caller, request: &HoldRequest) -> Result<Pending, Refusal> {
        let id = request.id.as_str();
        let agent = self
            .force
            .agents
            .get(id)
            .ok_or_else(|| Refusal::no_such_agent(id))?;
        let before = agent.tables.state.name().to_owned();
        let wanted = match request.state {
            Wanted::Suspended => HoldState::Suspended,
            Wanted::Revoked => HoldState::Revoked,
        };
        let freeze = request.processes == Processes::Freeze;
        let known = self.holds.by_id.get(id);
        let mut warnings = Vec::new();
        let hold = match known {
            Some(known) if known.state >= wanted => {
                warnings.push(format!(
                    "it was {} already, for: {}",
                    known.state.name(),
                    known.reason
                ));
                Hold {
                    frozen: known.frozen || freeze,
                    ..known.clone()
                }
            }
            Some(_) | None => Hold {
                state: wanted,
                reason: request.reason.as_str().to_owned(),
                by: By {
                    uid: Some(caller.uid),
                    pid: caller.pid,
                    cgroup: caller.cgroup.clone(),
                },
                since_ms: super::time::wall_millis(),
                frozen: freeze || known.is_some_and(|known| known.frozen),
                approval: agent.approval(),
            },
        };
        let fresh = hold.state == HoldState::Revoked && known != Some(&hold);
        self.holds.by_id.insert(id.to_owned(), hold.clone());
        let in_force = self.put_in_force(id);
        let hold = if fresh {
            self.measured_by_files(id, hold)
        } else {
            hold
        };
        // On disk also where the kernel could not be told: the next start knows.
        let kept = self.store.hold(id, &hold);
        let (durable, why) = self.kept_hold(id, kept);
        warnings.extend(why);
        in_force.map_err(|why| {
            Refusal::new(
                Code::Internal,
                format!("`{id}` could not be taken out of service: {why}"),
            )
            .help("the entry in force is as it was; `remit status` says what stands in the way")
        })?;
        let index = self.enforcer.index_of(id);
        let closed = self.close_unreachable(Some(index.as_slice())).closed as u64;
        let paths = self.cgroups_of(id);
        let mut killed = 0;
        let mut frozen = 0;
        let mut freezing = None;
        match request.processes {
            Processes::Keep => {}
            Processes::Kill => {
                for path in &paths {
                    let there = self.processes(path);
                    match self.hierarchy.kill(path) {
                        Ok(()) => killed += there,
                        Err(error) => warnings.push(error.to_string()),
                    }
                }
            }
            Processes::Freeze => {
                frozen = paths.iter().map(|path| self.processes(path)).sum();
                freezing = Some((true, paths));
            }
        }
        let after = self.state_of(id);
        info!(
            message = "An agent is held.",
            agent = id,
            state = after,
            closed,
            killed,
            frozen
        );
        Ok(Pending {
            held: Held {
                id: id.to_owned(),
                before,
                after,
                reason: request.reason.as_str().to_owned(),
                revision: self.force.revision,
                closed,
                killed,
                frozen,
                durable,
                warnings,
            },
            freezing,
        })
    }

    /// A revocation whose measure is what the agent's file says now: an approval that was written
    /// before it, and not read yet, must not end it.
    fn measured_by_files(&mut self, id: &str, hold: Hold) -> Hold {
        let unmeasured = Hold {
            approval: None,
            ..hold.clone()
        };
        self.holds.by_id.insert(id.to_owned(), unmeasured);
        if let Err(why) = self.reload() {
            warn!(
                message = "A revocation goes by the entry in force.",
                agent = id,
                why
            );
        }
        match self.holds.by_id.get_mut(id) {
            Some(kept) if kept.approval.is_none() => {
                *kept = hold.clone();
                hold
            }
            Some(kept) => kept.clone(),
            None => hold,
        }
    }

    fn resume(&mut self, _caller: &Caller, request: &Resume) -> Result<Pending, Refusal> {
        let id = request.id.as_str();
        let agent = self
            .force
            .agents
            .get(id)
            .ok_or_else(|| Refusal::no_such_agent(id))?;
        let before = agent.tables.state.name().to_owned();
        let mut warnings = Vec::new();
        let known = self.holds.by_id.get(id).cloned();
        match &known {
            Some(hold) if hold.state == HoldState::Revoked => {
                return Err(Refusal::new(
                    Code::Conflict,
                    format!("`{id}` is revoked, for: {}", hold.reason),
                )
                .help(
                    "a revocation is final: change its file, have it approved again (another \
                     `approval_ref`, `approved_by` or `approved_hash`), and reload",
                ));
            }
            None if self.holds.blind.is_some() => {
                return Err(Refusal::new(
                    Code::Conflict,
                    format!("it cannot be told whether `{id}` was revoked: no state can be read"),
                )
                .help("mend the state directory and the registry's folder, and reload"));
            }
            Some(_) => {}
            None => warnings.push("it was not suspended".to_owned()),
        }
        if known.is_some() {
            // The disk first: whoever is free in the kernel must be free after a restart as well.
            self.store.release(id).map_err(|error| {
                Refusal::new(
                    Code::Internal,
                    format!("`{id}` stays suspended: {}", keeping::chain(&error)),
                )
                .help("mend the state directory and the registry's folder, and try again")
            })?;
            self.kept("state-holds", "the end of a suspension", Ok(()));
            self.holds.by_id.remove(id);
            if let Err(why) = self.put_in_force(id) {
                return Err(Refusal::new(
                    Code::Internal,
                    format!("`{id}` is free on disk and still suspended in the kernel: {why}"),
                ));
            }
        }
        let after = self.state_of(id);
        if after != "active" {
            warnings.push(format!("its file says `state = \"{after}\"`"));
        }
        let thaw = known.is_some_and(|hold| hold.frozen);
        let paths = self.cgroups_of(id);
        let frozen = if thaw {
            paths.iter().map(|path| self.processes(path)).sum()
        } else {
            0
        };
        info!(message = "An agent is resumed.", agent = id, state = after);
        Ok(Pending {
            held: Held {
                id: id.to_owned(),
                before,
                after,
                reason: request.reason.as_str().to_owned(),
                revision: self.force.revision,
                closed: 0,
                killed: 0,
                frozen,
                durable: true,
                warnings,
            },
            freezing: thaw.then_some((false, paths)),
        })
    }

    /// Puts one agent in force as the holds in memory have it. Nothing else changes.
    pub(super) fn put_in_force(&mut self, id: &str) -> Result<(), String> {
        let Some(agent) = self.force.hold_one(id, &self.holds) else {
            return Err("it is not in the registry in force".to_owned());
        };
        let image = self.image(&agent.tables);
        self.enforcer
            .apply_one(image)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        self.force.put(id, agent);
        self.recorder.learn(
            &self.enforcer,
            self.force.revision,
            super::core::all(&self.force),
        );
        if let Err(why) = self.self_test(Some(&[id.to_owned()]), None) {
            warn!(message = "The self-test fails.", why);
            self.problems
                .insert("self-test", format!("the self-test fails: {why}"));
        }
        Ok(())
    }

    fn state_of(&self, id: &str) -> String {
        self.force
            .agents
            .get(id)
            .map_or("unknown", |agent| agent.tables.state.name())
            .to_owned()
    }

    fn cgroups_of(&self, id: &str) -> Vec<CgroupPath> {
        let Some(index) = self.enforcer.index_of(id) else {
            return Vec::new();
        };
        self.claims
            .iter()
            .filter(|(_, (_, claimant))| *claimant == index)
            .map(|(path, _)| path.clone())
            .collect()
    }

    fn decide_lifecycle(
        &mut self,
        caller: &Caller,
        change: Change,
        held: &Held,
        refused: Option<String>,
    ) {
        let agent = self.force.agents.get(&held.id).map_or_else(
            || Subject {
                id: held.id.clone(),
                ..Subject::unregistered(String::new())
            },
            |agent| Subject::from(agent.tables.as_ref()),
        );
        let lifecycle = Lifecycle {
            change,
            agent,
            before: held.before.clone(),
            after: held.after.clone(),
            reason: held.reason.clone(),
            by: keeping::actor(caller),
            closed: held.closed,
            killed: held.killed,
            frozen: held.frozen,
            durable: held.durable,
            warnings: held.warnings.clone(),
            refused,
            revision: held.revision,
        };
        self.decide(Decision::Lifecycle(Box::new(lifecycle)));
    }
}
