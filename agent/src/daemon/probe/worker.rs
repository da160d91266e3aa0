//! The thread that probes, one agent at a time.

use std::{
    io,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc as channel;

use super::{
    helper::PATIENCE,
    order::Task,
    packet::packet,
    steps::{Ground, Step},
    trial::Trial,
};
use crate::{
    audit::Actor,
    control::{
        Reply,
        protocol::{Attached, ProbeAttempt, ProbeVerdict, Probed, Question},
    },
    daemon::time::wall_millis,
};

/// Probes that may wait.
const WAITING: usize = 32;
/// How long the daemon may take for one of the worker's questions.
const DAEMON: Duration = Duration::from_secs(20);

/// Something to do inside a fence.
#[derive(Debug)]
pub enum Work {
    /// Probe an agent.
    Probe(Job),
    /// Have the attached program judge a packet.
    Ask(Question, Reply<Attached>),
}

/// An agent to probe.
#[derive(Debug)]
pub struct Job {
    /// Which.
    pub agent: String,
    /// Who asked.
    pub by: Actor,
    /// Who waits for the answer.
    pub reply: Option<Reply<Probed>>,
}

/// The worker, to give it jobs.
#[derive(Debug)]
pub struct Worker(mpsc::SyncSender<Work>);

/// Why a probe proves nothing.
pub(super) type Unclear = String;

// === impl Worker ===

impl Worker {
    /// Starts the thread. It ends with the daemon's task.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(steps: channel::Sender<Step>) -> io::Result<Self> {
        let (sender, works) = mpsc::sync_channel::<Work>(WAITING);
        thread::Builder::new()
            .name("probe".to_owned())
            .spawn(move || {
                for work in works {
                    let end = match work {
                        Work::Probe(job) => Step::End(Box::new(probe(&job.agent, &steps)), job),
                        Work::Ask(question, reply) => Step::Told(judged(&question, &steps), reply),
                    };
                    if steps.blocking_send(end).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self(sender))
    }

    /// Gives it a job, or gives it back when too many wait.
    pub fn give(&self, work: Work) -> Result<(), Work> {
        self.0.try_send(work).map_err(|error| match error {
            mpsc::TrySendError::Full(work) | mpsc::TrySendError::Disconnected(work) => work,
        })
    }
}

/// Asks the daemon's task.
pub(super) fn ask<T>(
    steps: &channel::Sender<Step>,
    step: impl FnOnce(mpsc::Sender<T>) -> Step,
) -> Result<T, Unclear> {
    let (reply, answer) = mpsc::channel();
    let stopping = || "the daemon is stopping".to_owned();
    steps.blocking_send(step(reply)).map_err(|_| stopping())?;
    answer
        .recv_timeout(DAEMON)
        .map_err(|_| "the daemon is busy".to_owned())
}

fn probe(agent: &str, steps: &channel::Sender<Step>) -> Probed {
    let began = Instant::now();
    let mut probed = Probed {
        agent: agent.to_owned(),
        verdict: ProbeVerdict::Unknown,
        why: Vec::new(),
        run: String::new(),
        began_ms: wall_millis(),
        took_ms: 0,
        cgroup: None,
        attempts: Vec::new(),
        revision: 0,
        hash: String::new(),
    };
    if let Err(why) = try_all(agent, steps, &mut probed) {
        probed.why.push(why);
    } else {
        let worst = probed.attempts.iter().map(|attempt| attempt.verdict).max();
        probed.verdict = worst.unwrap_or(ProbeVerdict::Unknown);
    }
    // What failed is told first, also where the rest could not be told.
    let mut bad: Vec<&ProbeAttempt> = probed
        .attempts
        .iter()
        .filter(|attempt| attempt.verdict != ProbeVerdict::Pass)
        .collect();
    bad.sort_by_key(|attempt| std::cmp::Reverse(attempt.verdict));
    if bad
        .iter()
        .any(|attempt| attempt.verdict == ProbeVerdict::Fail)
    {
        probed.verdict = ProbeVerdict::Fail;
    }
    let told = bad
        .iter()
        .map(|attempt| format!("{}: {}", attempt.name, attempt.evidence));
    probed.why = told.chain(std::mem::take(&mut probed.why)).collect();
    probed.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    probed
}

/// Has the attached program judge a packet, from inside the agent's cgroup.
fn judged(question: &Question, steps: &channel::Sender<Step>) -> Result<Attached, Unclear> {
    let ground = ask(steps, |reply| Step::Begin(question.agent.clone(), reply))??;
    let result = Trial::start(&ground, steps).and_then(|mut trial| {
        let tried = trial.tell(&Task::Run {
            program: ground.egress.clone(),
            packet: packet(question),
        });
        // Its line, if any, is taken in while it can still be marked.
        let looked = ask(steps, Step::Look);
        trial.end();
        looked.and(tried)
    });
    clear(&ground);
    let tried = result?.ok_or("the helper gave no answer")?;
    if tried.errno != 0 {
        return Err(format!("{} failed with errno {}", tried.step, tried.errno));
    }
    if ground.attached != Some(tried.program) {
        return Err(format!(
            "program {} was asked, and the root's link holds {:?}",
            tried.program, ground.attached
        ));
    }
    Ok(Attached {
        passes: tried.heard,
        program: tried.program,
        cgroup: ground.claimed.to_string(),
        run: ground.run,
    })
}

/// Ends what is left of a helper.
fn clear(ground: &Ground) {
    // The helper ends with its pipe; whatever keeps it is killed.
    drop(ground.hierarchy.kill(&ground.cgroup));
    let until = Instant::now() + PATIENCE;
    drop(ground.hierarchy.wait_empty(&ground.cgroup, until));
    drop(ground.hierarchy.remove(&ground.cgroup));
}

fn try_all(agent: &str, steps: &channel::Sender<Step>, probed: &mut Probed) -> Result<(), Unclear> {
    let ground = ask(steps, |reply| Step::Begin(agent.to_owned(), reply))??;
    probed.run.clone_from(&ground.run);
    probed.cgroup = Some(ground.claimed.to_string());
    probed.revision = ground.revision;
    probed.hash.clone_from(&ground.tables.hash);
    let result = Trial::run(&ground, steps, &mut probed.attempts);
    clear(&ground);
    result
}
