//! Answers to the control socket, from the kernel where the kernel knows.

use std::collections::BTreeMap;

use agent_ebpf::abi::{self, Addr, Loopback, NEVER, NO_ENTRY, Reason, State};

use super::{
    core::{Core, boot_now},
    force::InForce,
    placing::place_by,
    settings::Containment,
    time::wall_millis,
};
use crate::{
    audit::Actor,
    cgroup::CgroupPath,
    control::{
        Call, Caller, Request,
        protocol::{
            Agent, AgentStatus, Agents, Answer, Cgroup, Code, Entry, Explain, Guard, GuardState,
            HoldInfo, Myself, Question, Refusal, Registry, Reload, RunGrant, RunRequest, Source,
            Status,
        },
    },
    policy::{self, AgentTables},
};

/// What the pseudo-agent is called outside the kernel's tables.
const UNREGISTERED: &str = "unregistered";

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
        self.recorder.settle(&mut self.enforcer);
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
        guards
    }

    fn counters(&self, id: &str) -> abi::Counters {
        self.enforcer
            .index_of(id)
            .and_then(|index| self.enforcer.counters(index))
            .unwrap_or(abi::Counters::zeroed())
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
        let mut by_reason = BTreeMap::new();
        for reason in Reason::ALL {
            let at = usize::from(*reason as u8);
            let count = counters.denied.get(at).copied().unwrap_or(0)
                + counters.monitored.get(at).copied().unwrap_or(0);
            if count > 0 {
                by_reason.insert(reason.name().to_owned(), count);
            }
        }
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
            by_reason,
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

    fn explain(&mut self, question: Question) -> Result<Explain, Refusal> {
        let id = question.agent.clone();
        let agent = self
            .force
            .agents
            .get(&id)
            .ok_or_else(|| Refusal::no_such_agent(&id))?;
        let (tables, revision) = (agent.tables.clone(), self.force.revision);
        let index = self
            .enforcer
            .index_of(&id)
            .ok_or_else(|| Refusal::new(Code::Internal, format!("`{id}` has no index")))?;
        let asked = policy::Question::to(question.addr, question.port, question.protocol);
        let said = self
            .enforcer
            .judge(abi::Question {
                now: boot_now(),
                addr: Addr::from(question.addr),
                agent: index,
                port: question.port,
                protocol: question.protocol,
                hook: asked.hook as u8,
                tcp_flags: if asked.opening { 2 } else { 0 },
                peer: 2,
                ..abi::Question::zeroed()
            })
            .map_err(|error| Refusal::new(Code::Internal, error.to_string()))?;
        let question_addr = question.addr;
        let verdict = match said.verdict {
            1 => Answer::Allowed,
            2 => Answer::Monitored,
            3 => Answer::Denied,
            _ => Answer::Fault,
        };
        let decided = (said.entry != NO_ENTRY)
            .then(|| {
                usize::try_from(said.entry)
                    .ok()
                    .and_then(|at| tables.entries.get(at))
            })
            .flatten();
        Ok(Explain {
            question,
            verdict,
            reason: Reason::from_byte(said.reason).map(|reason| reason.name().to_owned()),
            entry: decided.map(written),
            until_ms: (verdict == Answer::Allowed && said.deadline != NEVER && said.deadline != 0)
                .then(|| self.offset.wall(said.deadline)),
            source: Source::Kernel,
            hash: tables.hash.clone(),
            revision,
            lease: self.lease_at(index, question_addr, said.entry),
            cgroups: self
                .claims
                .iter()
                .filter(|(_, (_, agent))| *agent == index)
                .map(|(path, _)| path.to_string())
                .collect(),
            note: (said.cause != 0).then(|| {
                abi::Cause::from_byte(said.cause).map_or_else(
                    || "unknown cause".to_owned(),
                    |cause| cause.name().to_owned(),
                )
            }),
        })
    }

    /// Makes and claims a cgroup for `remit run --agent`. When this returns, what is started there
    /// is the agent.
    fn run(&mut self, request: &RunRequest) -> Result<RunGrant, Refusal> {
        let agent = self
            .force
            .agents
            .get(&request.agent)
            .ok_or_else(|| Refusal::no_such_agent(&request.agent))?;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Refusal::new(Code::Internal, format!("cannot {what}: {error}"))
        };
        let serial = boot_now();
        let path = self.place_for(&agent.tables, serial).ok_or_else(|| {
            Refusal::new(
                Code::Conflict,
                format!(
                    "no selector of `{}` names a cgroup below a governed root",
                    request.agent
                ),
            )
            .help("give it `selector.cgroup` a path below one of `enforcement.roots`")
        })?;
        self.hierarchy
            .create(&path)
            .map_err(|error| failed("create the cgroup", &error))?;
        self.survey();
        let id = self
            .hierarchy
            .id(&path)
            .map_err(|error| failed("read the cgroup", &error))?;
        let index = self.enforcer.index_of(&request.agent);
        let claimed = self
            .claims
            .iter()
            .any(|(claimed, (_, agent))| Some(*agent) == index && path.is_within(claimed));
        if !claimed {
            return Err(Refusal::new(
                Code::Conflict,
                format!("cgroup `{path}` is not attributed to `{}`", request.agent),
            )
            .help("`remit status` says what stands in the way"));
        }
        Ok(RunGrant {
            cgroup: self.hierarchy.directory(&path),
            id,
        })
    }

    /// A new cgroup that one of the agent's selectors claims.
    fn place_for(&self, tables: &AgentTables, serial: u64) -> Option<CgroupPath> {
        tables.selectors.iter().find_map(|selector| {
            let path = CgroupPath::new(place_by(selector, serial)?).ok()?;
            self.roots
                .iter()
                .any(|root| path.is_within(root) && path != *root)
                .then_some(path)
        })
    }

    fn myself(&mut self, caller: &Caller) -> Myself {
        let cgroup = caller.cgroup.clone();
        let guard = cgroup
            .as_deref()
            .and_then(|cgroup| self.guarded(cgroup).ok());
        let place = cgroup
            .as_deref()
            .and_then(|cgroup| CgroupPath::new(cgroup).ok());
        let index = place.and_then(|place| {
            self.claims
                .iter()
                .find(|(claimed, _)| place.is_within(claimed))
                .map(|(_, (_, agent))| *agent)
        });
        let found = index.and_then(|index| {
            self.force
                .agents
                .iter()
                .find(|(id, _)| self.enforcer.index_of(id) == Some(index))
                .map(|(id, agent)| (id.clone(), agent.clone()))
        });
        let revision = self.force.revision;
        let Some((id, agent)) = found else {
            return Myself {
                agent: None,
                name: None,
                owner: None,
                approval_ref: None,
                state: UNREGISTERED.to_owned(),
                hold: None,
                mode: self.force.unregistered.mode.name().to_owned(),
                expires_ms: None,
                cgroup,
                guard,
                revision,
                hash: None,
                scope: Vec::new(),
                denials: self.recorder.denials(UNREGISTERED),
                advice: "No registered agent claims this cgroup, so nothing can be reached. Do \
                         not retry; ask whoever runs this host to register the agent."
                    .to_owned(),
            };
        };
        let hold = held(&agent);
        let tables = agent.tables;
        let approval = tables
            .approval_ref
            .as_ref()
            .map_or_else(String::new, |reference| {
                format!(" (approval reference {reference})")
            });
        Myself {
            advice: advice(tables.state, hold.as_ref(), &tables.owner, &approval),
            agent: Some(id.clone()),
            name: Some(tables.name.clone()),
            owner: Some(tables.owner.clone()),
            approval_ref: tables.approval_ref.clone(),
            state: tables.state.name().to_owned(),
            hold,
            mode: tables.mode.name().to_owned(),
            expires_ms: tables.expires,
            cgroup,
            guard,
            revision,
            hash: Some(tables.hash.clone()),
            scope: tables.entries.iter().map(written).collect(),
            denials: self.recorder.denials(&id),
        }
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

/// What a process inside the fence is to do, by its agent's state.
fn advice(state: State, hold: Option<&HoldInfo>, owner: &str, approval: &str) -> String {
    if let Some(hold) = hold {
        return format!(
            "This agent was {} by {}, so nothing can be reached: {}. Do not retry, do not look for \
             another way; ask {owner}{approval}.",
            hold.state,
            hold.by,
            hold.reason.trim_end_matches('.')
        );
    }
    match state {
        State::Active => format!(
            "Only the destinations under `scope` can be reached. A refusal is permanent until the \
             scope changes: do not retry, do not look for another way; ask {owner}{approval} and \
             name the destination, the port and the purpose."
        ),
        State::Draft | State::Suspended | State::Revoked | State::Unregistered => format!(
            "This agent's registration is {}, so nothing can be reached. Do not retry, do not look \
             for another way; ask {owner}{approval}.",
            state.name()
        ),
    }
}

/// Who suspended or revoked an agent, besides its file.
fn held(agent: &InForce) -> Option<HoldInfo> {
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

fn written(entry: &policy::Entry) -> Entry {
    Entry {
        name: entry.name.clone(),
        text: entry.text.clone(),
        file: entry.file.clone(),
        line: entry.line,
        reason: entry.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_says_who_holds_the_agent_and_whom_to_ask() {
        let hold = HoldInfo {
            state: "suspended".to_owned(),
            reason: "leaked key.".to_owned(),
            by: "uid 0 (pid 7)".to_owned(),
            since_ms: 0,
            frozen: false,
        };
        let said = |state, hold| advice(state, hold, "alice@example.com", " (CHG-1)");
        assert_eq!(
            said(State::Suspended, Some(&hold)),
            "This agent was suspended by uid 0 (pid 7), so nothing can be reached: leaked key. Do \
             not retry, do not look for another way; ask alice@example.com (CHG-1)."
        );
        let draft = said(State::Draft, None);
        assert!(
            draft.starts_with("This agent's registration is draft, so nothing can be reached.")
        );
        assert!(said(State::Active, None).contains("ask alice@example.com (CHG-1) and name"));
    }
}
