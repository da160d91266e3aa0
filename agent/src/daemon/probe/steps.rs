//! What the worker asks of the daemon's one task, which owns kernel and registry.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Addr, Counters, Hook, Rule};
use tracing::warn;

use super::worker::{Job, Work, Worker};
use crate::{
    audit::{Actor, Decision, ProbeResult, ProbeRun, metrics},
    cgroup::{CgroupPath, Hierarchy},
    control::{
        Caller, Hold, HoldState, Processes, Reply, Rights,
        protocol::{
            Attached, Code, LastProbe, ProbeCounts, ProbeVerdict, Probed, Question, Refusal,
        },
    },
    daemon::{
        core::{Core, boot_now},
        settings::OnProbeFail,
    },
    kernel::Loan,
    policy::{AgentTables, Clock},
};

/// What the worker asks for.
#[derive(Debug)]
pub enum Step {
    /// A place to try from.
    Begin(String, mpsc::Sender<Result<Ground, String>>),
    /// What there is to see now.
    Look(mpsc::Sender<Sight>),
    /// Whether a name has led the agent to an address.
    Leased(IpAddr, mpsc::Sender<bool>),
    /// Grants rules at exact addresses.
    Lend(Vec<(IpAddr, Vec<Rule>)>, mpsc::Sender<Result<(), String>>),
    /// Takes them back.
    TakeBack(mpsc::Sender<Result<(), String>>),
    /// What came of it.
    End(Box<Probed>, Job),
    /// What the attached program said.
    Told(Result<Attached, String>, Reply<Attached>),
}

/// A place to try from.
#[derive(Debug)]
pub struct Ground {
    pub hierarchy: Hierarchy,
    /// A fresh cgroup below one that the agent claims.
    pub cgroup: CgroupPath,
    /// The claimed one.
    pub claimed: CgroupPath,
    /// The agent as the registry has it.
    pub tables: Arc<AgentTables>,
    pub clock: Clock,
    /// Marks the probe's lines.
    pub run: String,
    /// What of the agent's row, word and claim in the kernel is not as it was put there.
    pub wrong: Vec<String>,
    /// Where the egress program is pinned, and the id of the one that is attached.
    pub egress: PathBuf,
    pub attached: Option<u32>,
    /// The agent's endpoint of the DNS guard; empty where it uses no names.
    pub guard: Vec<SocketAddr>,
    /// The violation log.
    pub log: PathBuf,
    pub revision: u64,
}

/// What there is to see.
#[derive(Clone, Debug)]
pub struct Sight {
    /// The agent's counters.
    pub counters: Counters,
    /// Why a line could not be written since the probe began.
    pub unwritten: Option<String>,
    /// What is wrong with the ring.
    pub ring: Option<String>,
    /// Questions that the DNS guard has dropped because an agent had too many open.
    pub busy: u64,
    /// Whether the agent's entry or row was changed since the probe began.
    pub changed: bool,
}

/// The probe that runs, those that wait, and what the last ones came to.
#[derive(Default)]
pub struct Probing {
    worker: Option<Worker>,
    now: Option<Current>,
    queue: VecDeque<String>,
    /// When the last scheduled round began.
    round: Option<Instant>,
    /// What all came to, since the start.
    pub counts: ProbeCounts,
    /// What the last probe of each agent came to.
    pub last: BTreeMap<String, LastProbe>,
}

/// The probe that runs.
struct Current {
    index: u32,
    policy: Option<u64>,
    revision: u64,
    loans: Vec<Loan>,
}

/// A helper's cgroups start with this.
const PREFIX: &str = "remit-probe-";

// === impl Probing ===

impl Probing {
    /// Takes note of the thread that does the work.
    pub fn set_worker(&mut self, worker: Worker) {
        self.worker = Some(worker);
    }

    /// What the last probe of each agent came to, for metrics.
    pub fn last_of_each(&self) -> Vec<metrics::Probe> {
        let last = self.last.iter().map(|(id, last)| metrics::Probe {
            agent: id.clone(),
            verdict: last.verdict.name(),
            time: last.time_ms,
        });
        last.collect()
    }

    /// Probes since the start, by what they came to.
    pub fn by_verdict(&self) -> BTreeMap<String, u64> {
        let counts = [
            (ProbeVerdict::Pass, self.counts.pass),
            (ProbeVerdict::Fail, self.counts.fail),
            (ProbeVerdict::Unknown, self.counts.unknown),
        ];
        let named = counts.map(|(verdict, count)| (verdict.name().to_owned(), count));
        named.into()
    }
}

impl Core {
    /// Takes note of the thread that probes.
    pub(in crate::daemon) fn set_probe_worker(&mut self, worker: Worker) {
        self.probing.set_worker(worker);
    }

    /// Has an agent probed; the answer comes when that is done.
    pub(in crate::daemon) fn probe_on_request(
        &mut self,
        caller: &Caller,
        id: String,
        reply: Reply<Probed>,
    ) {
        if !self.force.agents.contains_key(&id) {
            drop(reply.send(Err(Refusal::no_such_agent(&id))));
            return;
        }
        let by = crate::daemon::keeping::actor(caller);
        let job = Job {
            agent: id,
            by,
            reply: Some(reply),
        };
        self.give(Work::Probe(job));
    }

    /// Has the attached program judge a packet of an agent.
    pub(in crate::daemon) fn ask_attached(&mut self, question: Question, reply: Reply<Attached>) {
        if self.force.agents.contains_key(&question.agent) {
            self.give(Work::Ask(question, reply));
        } else {
            drop(reply.send(Err(Refusal::no_such_agent(&question.agent))));
        }
    }

    fn give(&mut self, work: Work) {
        let refused = match &self.probing.worker {
            Some(worker) => worker.give(work).err(),
            None => Some(work),
        };
        let refusal = Refusal::new(Code::Unavailable, "too many probes wait already");
        match refused {
            Some(Work::Probe(Job {
                reply: Some(reply), ..
            })) => drop(reply.send(Err(refusal))),
            Some(Work::Ask(_, reply)) => drop(reply.send(Err(refusal))),
            Some(Work::Probe(Job { reply: None, .. })) | None => {}
        }
    }

    /// Id of the egress program under the link of the root around `path`.
    fn attached_to(&self, path: &CgroupPath) -> Option<u32> {
        let root = self
            .roots
            .iter()
            .find(|root| path.is_within(root))?
            .to_string();
        let (_, fence) = self.enforcer.fences().find(|(fenced, _)| *fenced == root)?;
        let guards = fence.guards();
        let egress = guards
            .iter()
            .find(|guard| guard.hook == Hook::Egress.name())?;
        egress.link.map(|link| link.program)
    }

    /// Once a second: the probes that are due.
    pub(in crate::daemon) fn probe_what_is_due(&mut self) {
        // One that has left the registry has nothing to fail at any more.
        let before = self.probing.last.len();
        let agents = &self.force.agents;
        self.probing.last.retain(|id, _| agents.contains_key(id));
        if self.probing.last.len() != before {
            self.tell_of_probes();
        }
        let Some(every) = self.settings.probe.every else {
            return;
        };
        let due = self
            .probing
            .round
            .is_none_or(|round| round.elapsed() >= every);
        if due && self.probing.queue.is_empty() {
            self.probing.round = Some(Instant::now());
            self.probing.queue = self
                .force
                .agents
                .keys()
                .filter(|id| {
                    let index = self.enforcer.index_of(id);
                    self.claims.values().any(|(_, agent)| Some(*agent) == index)
                })
                .cloned()
                .collect();
        }
        let Some(worker) = &self.probing.worker else {
            return;
        };
        // What does not fit waits for the next second.
        while let Some(agent) = self.probing.queue.pop_front() {
            let job = Job {
                agent,
                by: Actor::Daemon,
                reply: None,
            };
            if let Err(Work::Probe(job)) = worker.give(Work::Probe(job)) {
                self.probing.queue.push_front(job.agent);
                break;
            }
        }
    }

    /// Does what the worker asks for.
    pub(in crate::daemon) fn probe_step(&mut self, step: Step) {
        // A worker that has gone away needs no answer.
        match step {
            Step::Begin(id, reply) => drop(reply.send(self.begin_probe(&id))),
            Step::Look(reply) => {
                let sight = self.look();
                drop(reply.send(sight));
            }
            Step::Leased(addr, reply) => drop(reply.send(self.is_leased(addr))),
            Step::Lend(rules, reply) => drop(reply.send(self.lend(rules))),
            Step::TakeBack(reply) => drop(reply.send(self.take_back())),
            Step::End(probed, job) => self.end_probe(*probed, job),
            Step::Told(told, reply) => {
                self.probing.now = None;
                self.recorder.watch_no_more();
                let told = told.map_err(|why| {
                    Refusal::new(
                        Code::Conflict,
                        format!("the attached program could not be asked: {why}"),
                    )
                });
                drop(reply.send(told));
            }
        }
    }

    fn begin_probe(&mut self, id: &str) -> Result<Ground, String> {
        self.take_back()?;
        let agent = self.force.agents.get(id).ok_or("it is not in force")?;
        let tables = Arc::clone(&agent.tables);
        let index = self
            .enforcer
            .index_of(id)
            .ok_or("it has no index in the kernel")?;
        let claimed = self
            .claims
            .iter()
            .filter(|(_, (_, agent))| *agent == index)
            .map(|(path, _)| path.clone())
            .max_by_key(|path| self.processes(path))
            .ok_or("it has no cgroup, so there is nowhere to try from")?;
        let mut wrong = self.enforcer.inspect_row(index);
        let known = self.claims.get(&claimed).map_or(0, |(id, _)| *id);
        match self.enforcer.claimant(known) {
            Ok(Some(found)) if found == index => {}
            Ok(_) => wrong.push(format!("the kernel does not give `{claimed}` to it")),
            Err(error) => wrong.push(format!("the kernel's claims cannot be read: {error}")),
        }
        let run = format!("{:x}", boot_now());
        self.sweep_probes(&claimed);
        let cgroup = claimed
            .child(format!("{PREFIX}{run}"))
            .map_err(|error| error.to_string())?;
        self.hierarchy
            .create(&cgroup)
            .map_err(|error| format!("no cgroup for the helper: {error}"))?;
        let place = self
            .hierarchy
            .id(&cgroup)
            .map_err(|error| error.to_string())?;
        self.recorder.watch(place, run.clone());
        self.probing.now = Some(Current {
            index,
            policy: self.enforcer.policy_of(index),
            revision: self.force.revision,
            loans: Vec::new(),
        });
        let attached = self.attached_to(&claimed);
        Ok(Ground {
            hierarchy: self.hierarchy.clone(),
            cgroup,
            claimed,
            tables,
            clock: self.offset.clock(),
            run,
            wrong,
            egress: self.enforcer.program_pin("remit_egress"),
            attached,
            guard: self.names.asked.at(index),
            log: self.settings.paths.log.join("violations.jsonl"),
            revision: self.force.revision,
        })
    }

    /// Removes what a daemon that died in a probe left.
    fn sweep_probes(&self, claimed: &CgroupPath) {
        let Ok(below) = self.hierarchy.subtree(claimed) else {
            return;
        };
        for path in below {
            let name = path.names().last().unwrap_or_default();
            let ours = name.to_string_lossy().starts_with(PREFIX);
            if ours && path.parent().as_ref() == Some(claimed) {
                // One that holds a process stays.
                drop(self.hierarchy.remove(&path));
            }
        }
    }

    fn look(&mut self) -> Sight {
        self.drain();
        let now = self.probing.now.as_ref();
        let index = now.map(|now| now.index);
        let counters = index.and_then(|index| self.enforcer.counters(index));
        let policy = index.and_then(|index| self.enforcer.policy_of(index));
        let ring = match self.enforcer.ring_state() {
            Ok(state) if state.waiting().is_some() => None,
            Ok(state) => Some(format!(
                "the ring was read to {} of {}, which cannot be",
                state.consumed, state.produced
            )),
            Err(error) => Some(format!("the ring cannot be read: {error}")),
        };
        Sight {
            counters: counters.unwrap_or(Counters::zeroed()),
            unwritten: self.recorder.unwritten(),
            busy: self
                .names
                .server()
                .map_or(0, |server| server.unanswered().busy),
            ring,
            changed: now
                .is_none_or(|now| now.policy != policy || now.revision != self.force.revision),
        }
    }

    /// Whether a name has led the agent to an address, also if that is over: then what must come of
    /// an attempt there is no matter of the registry alone.
    fn is_leased(&self, addr: IpAddr) -> bool {
        let now = self.probing.now.as_ref();
        now.is_some_and(|now| {
            let addr = Addr::from(addr).effective();
            self.enforcer.leased_at(now.index, addr).is_some()
        })
    }

    fn lend(&mut self, rules: Vec<(IpAddr, Vec<Rule>)>) -> Result<(), String> {
        let now = self.probing.now.as_mut().ok_or("no probe runs")?;
        for (addr, rules) in rules {
            let addr = Addr::from(addr).effective();
            let lent = self.enforcer.lend(now.index, addr, &rules);
            match lent.map_err(|error| format!("{:#}", anyhow::Error::from(error)))? {
                Some(loan) => now.loans.push(loan),
                None => return Err("the agent is not in force".to_owned()),
            }
        }
        Ok(())
    }

    fn take_back(&mut self) -> Result<(), String> {
        let Some(now) = &mut self.probing.now else {
            return Ok(());
        };
        let mut result = Ok(());
        for loan in now.loans.drain(..) {
            if let Err(error) = self.enforcer.take_back(loan) {
                let why = format!("{:#}", anyhow::Error::from(error));
                warn!(message = "A probe's grant stays until its deadline.", why);
                result = Err(why);
            }
        }
        result
    }

    fn end_probe(&mut self, probed: Probed, job: Job) {
        drop(self.take_back());
        self.probing.now = None;
        self.recorder.watch_no_more();
        let id = probed.agent.clone();
        let why = probed.why.first().cloned();
        match probed.verdict {
            ProbeVerdict::Pass => self.probing.counts.pass += 1,
            ProbeVerdict::Fail => self.probing.counts.fail += 1,
            ProbeVerdict::Unknown => self.probing.counts.unknown += 1,
        }
        self.probing.last.insert(
            id.clone(),
            LastProbe {
                time_ms: probed.began_ms,
                verdict: probed.verdict,
                why: why.clone(),
            },
        );
        self.tell_of_probes();
        self.decide(Decision::Probed(Box::new(ProbeRun {
            agent: id.clone(),
            hash: probed.hash.clone(),
            run: probed.run.clone(),
            result: match probed.verdict {
                ProbeVerdict::Pass => ProbeResult::Pass,
                ProbeVerdict::Fail => ProbeResult::Fail,
                ProbeVerdict::Unknown => ProbeResult::Unknown,
            },
            why: probed.why.clone(),
            began: probed.began_ms,
            checks: probed
                .attempts
                .iter()
                .map(|attempt| {
                    let to = attempt.to.as_deref().unwrap_or("-");
                    let text = format!("to {to}, {}: {}", attempt.wanted, attempt.evidence);
                    (attempt.name.clone(), attempt.verdict.name(), text)
                })
                .collect(),
            by: job.by,
            revision: probed.revision,
        })));
        if probed.verdict == ProbeVerdict::Fail
            && self.settings.enforcement.on_probe_fail == OnProbeFail::Deny
            && !self.holds.by_id.contains_key(&id)
        {
            self.deny_after_probe(&id, why.as_deref().unwrap_or("the fence does not hold"));
        }
        if let Some(reply) = job.reply {
            // A caller that has gone away is no reason to complain.
            drop(reply.send(Ok(probed)));
        }
    }

    /// A probe that failed stands in the posture until one passes.
    pub(in crate::daemon) fn tell_of_probes(&mut self) {
        let failed = self
            .probing
            .last
            .iter()
            .find(|(_, last)| last.verdict == ProbeVerdict::Fail);
        match failed {
            Some((id, last)) => {
                let why = last.why.as_deref().unwrap_or("the fence does not hold");
                let problem = format!("the last probe of `{id}` failed: {why}");
                self.problems.insert("probe", problem);
            }
            None => drop(self.problems.remove("probe")),
        }
    }

    /// `on_probe_fail = "deny"`.
    fn deny_after_probe(&mut self, id: &str, why: &str) {
        let mut reason = format!("the probe of its fence failed: {why}");
        let mut end = reason.len().min(900);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        let Ok(reason) = reason.parse() else {
            return;
        };
        let daemon = Caller {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            pid: i32::try_from(std::process::id()).ok(),
            cgroup: None,
            rights: Rights::Change,
        };
        let hold = Hold {
            id: id.to_owned(),
            state: HoldState::Suspended,
            reason,
            processes: Processes::Keep,
        };
        let (reply, _nobody) = tokio::sync::oneshot::channel();
        self.answer_hold(&daemon, &hold, reply);
    }
}

/// How long a grant to the probe lasts at most, should nobody take it back.
pub(super) const LEND_FOR: Duration = Duration::from_secs(15);
