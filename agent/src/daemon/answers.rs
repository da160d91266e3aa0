//! Answers to the control socket, from the kernel where the kernel knows.

use std::collections::BTreeMap;

use agent_ebpf::abi::{self, Loopback, Reason};

use super::{core::Core, force::InForce, settings::Containment, time::wall_millis};
use crate::{
    audit::Actor,
    cgroup::CgroupPath,
    control::{
        Call, Caller, Request,
        protocol::{
            Agent, AgentStatus, Agents, Cgroup, Code, Entry, Former, Guard, GuardState, HoldInfo,
            Refusal, Registry, Reload, Status,
        },
    },
    policy::{self, AgentTables},
};

/// What the pseudo-agent is called outside the kernel's tables.
pub(super) const UNREGISTERED: &str = "unregistered";

impl Core {
    /// Answers a call; returns whether the registry was reloaded.
    pub fn answer(&mut self, call: Call) -> bool {
        // A caller that has gone away is no reason to complain.
        match call.request {
            Request::Status(reply) => drop(reply.send(Ok(self.status()))),
            Request::Agents(reply) => drop(reply.send(Ok(self.agents()))),
            Request::Agent(id, reply) => drop(reply.send(self.agent(&id))),
            Request::Explain(question, reply) => drop(reply.send(self.explain(question))),
            Request::Run(request, reply) => drop(reply.send(self.run(&request))),
            Request::Traffic(reply) => drop(reply.send(Ok(self.traffic()))),
            Request::Metrics(reply) => drop(reply.send(self.metrics())),
            Request::Myself(reply) => drop(reply.send(Ok(self.myself(&call.caller)))),
            Request::Reload(request, reply) => {
                drop(reply.send(self.reload_on_request(&call.caller, request.accept_clock)));
                return true;
            }
            Request::Hold(request, reply) => self.answer_hold(&call.caller, &request, reply),
            Request::Resume(request, reply) => self.answer_resume(&call.caller, &request, reply),
            Request::Attached(question, reply) => self.ask_attached(question, reply),
            Request::Probe(id, reply) => self.probe_on_request(&call.caller, id, reply),
            Request::Guard(path, reply) => drop(reply.send(self.guarded(&path))),
            Request::Reconcile { repair, reply } => {
                drop(reply.send(Ok(self.reconcile_on_request(&call.caller, repair))));
            }
        }
        false
    }

    fn reload_on_request(
        &mut self,
        caller: &Caller,
        accept_clock: bool,
    ) -> Result<Reload, Refusal> {
        if accept_clock && let Err(why) = self.accept_clock(caller) {
            let message = format!("the wall clock could not be accepted: {why}");
            return Err(Refusal::new(Code::Internal, message));
        }
        match self.reload() {
            Ok(changed) => Ok(Reload {
                revision: self.force.revision,
                changed: changed
                    .agents
                    .into_iter()
                    .filter(|id| id != policy::UNREGISTERED_ID)
                    .collect(),
                kept: self.force.bad.clone(),
                findings: self.force.findings.clone(),
                ok: self.force.errors == 0,
                closed: changed.closed,
            }),
            Err(why) => Ok(Reload {
                revision: self.force.revision,
                changed: Vec::new(),
                kept: self.force.agents.keys().cloned().collect(),
                findings: vec![format!("error: {why}")],
                ok: false,
                closed: 0,
            }),
        }
    }

    fn status(&mut self) -> Status {
        self.recorder.settle_now(&mut self.enforcer);
        let guards = self.guards();
        let (posture, reasons) = self.posture(&guards);
        let ids: Vec<String> = self.force.agents.keys().cloned().collect();
        let mut agents: Vec<AgentStatus> =
            ids.iter().filter_map(|id| self.agent_status(id)).collect();
        agents.extend(self.unregistered_status());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            posture,
            reasons,
            since_ms: self.started_ms,
            counted_since_ms: self.enforcer.born(),
            revision: self.force.revision,
            guards,
            agents,
            former: self.former(),
            findings: self.force.findings.clone(),
            registry: Registry {
                files: self.force.files as u64,
                errors: self.force.errors as u64,
                warnings: self.force.warnings as u64,
            },
            drift: self.drift.summary(),
            probes: self.probing.counts,
        }
    }

    /// The guards that are not on a root.
    pub(super) fn host_guards(&self) -> Vec<Guard> {
        let now = wall_millis();
        let mut guards = Vec::new();
        let host_wide = |name: &str, kind: &str, state, evidence: &str| {
            host_guard(name, kind, state, evidence, now)
        };
        guards.push(match self.settings.enforcement.containment {
            Containment::Off => host_wide(
                "containment",
                "lsm",
                GuardState::Off,
                "turned off by the settings",
            ),
            Containment::Auto | Containment::Require => host_wide(
                "containment",
                "lsm",
                GuardState::Absent,
                "this build has no containment guards: see docs/bypasses.md for the ways out that \
                 they would close",
            ),
        });
        let named = self
            .force
            .agents
            .values()
            .any(|agent| !agent.tables.names.is_empty());
        guards.push(match (self.settings.dns.enabled, named) {
            (false, _) => host_wide("dns", "dns", GuardState::Off, "turned off by the settings"),
            (true, false) => host_wide("dns", "dns", GuardState::Off, "no entry uses a name"),
            (true, true) => {
                let (state, evidence) = self.dns_guard();
                host_wide("dns", "dns", state, &evidence)
            }
        });
        guards.push(self.observer_guard());
        guards
    }

    fn counters(&self, id: &str) -> abi::Counters {
        self.enforcer
            .index_of(id)
            .and_then(|index| self.enforcer.counters(index))
            .unwrap_or(abi::Counters::zeroed())
    }

    fn former(&self) -> Vec<Former> {
        let indices = self.enforcer.indices().into_iter();
        let mut former: Vec<Former> = indices
            .filter(|(id, _)| id != policy::UNREGISTERED_ID && !self.force.agents.contains_key(id))
            .filter_map(|(id, index)| {
                let counters = self.enforcer.counters(index)?;
                let former = Former {
                    id,
                    denied: counters.denied.iter().sum(),
                    monitored: counters.monitored.iter().sum(),
                    by_reason: by_reason(&counters),
                };
                (former.denied + former.monitored > 0).then_some(former)
            })
            .collect();
        former.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        former
    }

    fn agent_status(&self, id: &str) -> Option<AgentStatus> {
        let agent = self.force.agents.get(id)?;
        let index = self.enforcer.index_of(id)?;
        let cgroups: Vec<Cgroup> = self
            .claims
            .iter()
            .filter(|(_, (_, claimant))| *claimant == index)
            .map(|(path, (cgroup, _))| Cgroup {
                path: path.to_string(),
                id: *cgroup,
                processes: self.processes(path),
            })
            .collect();
        let processes = cgroups.iter().map(|cgroup| cgroup.processes).sum();
        let mut status = self.status_of(id, id, agent.tables.as_ref(), agent.revision);
        status.cgroups = cgroups;
        status.processes = processes;
        status.finding = agent.kept.clone();
        status.hold = held(agent);
        (status.leases, status.leased) = self.leases_of(id, index);
        Some(status)
    }

    fn unregistered_status(&self) -> Option<AgentStatus> {
        let counters = self.counters(policy::UNREGISTERED_ID);
        let any = counters
            .denied
            .iter()
            .chain(&counters.monitored)
            .any(|count| *count > 0);
        any.then(|| {
            let tables = self.force.unregistered.as_ref();
            self.status_of(
                policy::UNREGISTERED_ID,
                UNREGISTERED,
                tables,
                self.force.revision,
            )
        })
    }

    fn status_of(&self, key: &str, id: &str, tables: &AgentTables, revision: u64) -> AgentStatus {
        let counters = self.counters(key);
        AgentStatus {
            id: id.to_owned(),
            name: tables.name.clone(),
            state: tables.state.name().to_owned(),
            mode: tables.mode.name().to_owned(),
            revision,
            hash: tables.hash.clone(),
            expires_ms: tables.expires,
            cgroups: Vec::new(),
            processes: 0,
            allowed: counters.allowed,
            denied: counters.denied.iter().sum(),
            monitored: counters.monitored.iter().sum(),
            by_reason: by_reason(&counters),
            last_violation: self.recorder.last(id).cloned(),
            finding: None,
            hold: None,
            leases: Vec::new(),
            leased: 0,
            last_probe: self.probing.last.get(id).cloned(),
        }
    }

    pub(super) fn processes(&self, path: &CgroupPath) -> u64 {
        self.hierarchy
            .processes(path, true)
            .map_or(0, |found| found.len() as u64)
    }

    fn agents(&self) -> Agents {
        Agents {
            revision: self.force.revision,
            agents: self.force.agents.values().map(entry).collect(),
        }
    }

    fn agent(&self, id: &str) -> Result<Agent, Refusal> {
        self.force
            .agents
            .get(id)
            .map(entry)
            .ok_or_else(|| Refusal::no_such_agent(id))
    }
}

/// A guard that is no link.
pub(super) fn host_guard(
    name: &str,
    kind: &str,
    state: GuardState,
    evidence: &str,
    checked_ms: policy::UnixMillis,
) -> Guard {
    Guard {
        name: name.to_owned(),
        kind: kind.to_owned(),
        root: None,
        state,
        evidence: evidence.to_owned(),
        checked_ms,
        link_id: None,
        prog_id: None,
        run_cnt: None,
    }
}

/// Who suspended or revoked an agent, besides its file.
pub(super) fn held(agent: &InForce) -> Option<HoldInfo> {
    let hold = agent.hold.as_ref()?;
    let by = hold.by.uid.map_or(Actor::Daemon, |uid| Actor::Caller {
        uid,
        pid: hold.by.pid,
    });
    Some(HoldInfo {
        state: hold.state.name().to_owned(),
        reason: hold.reason.clone(),
        by: by.to_string(),
        since_ms: hold.since_ms,
        frozen: hold.frozen,
    })
}

fn entry(agent: &InForce) -> Agent {
    let tables = &agent.tables;
    Agent {
        id: tables.id.clone(),
        name: tables.name.clone(),
        owner: tables.owner.clone(),
        approval_ref: tables.approval_ref.clone(),
        file: tables.file.clone(),
        hash: tables.hash.clone(),
        state: tables.state.name().to_owned(),
        mode: tables.mode.name().to_owned(),
        loopback: match tables.loopback {
            Loopback::None => "none",
            Loopback::Own => "own",
            Loopback::Any => "any",
        }
        .to_owned(),
        not_before_ms: tables.not_before,
        expires_ms: tables.expires,
        selectors: tables.selectors.clone(),
        entries: tables.entries.iter().map(written).collect(),
        finding: agent.kept.clone(),
        hold: held(agent),
    }
}

pub(super) fn written(entry: &policy::Entry) -> Entry {
    Entry {
        name: entry.name.clone(),
        text: entry.text.clone(),
        file: entry.file.clone(),
        line: entry.line,
        reason: entry.reason.clone(),
    }
}

/// Refused and monitored attempts by reason; those that did not happen are left out.
fn by_reason(counters: &abi::Counters) -> BTreeMap<String, u64> {
    let count = |reason: Reason| {
        let at = usize::from(reason as u8);
        let of = |counts: &[u64]| counts.get(at).copied().unwrap_or(0);
        of(&counters.denied) + of(&counters.monitored)
    };
    let all = Reason::ALL
        .iter()
        .map(|reason| (reason.name(), count(*reason)));
    all.filter(|(_, count)| *count > 0)
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}
