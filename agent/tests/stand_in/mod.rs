//! A served control socket with a stand-in for the daemon behind it.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses what it needs, and a failed expectation is how a test fails"
)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use remit::control::{
    Call, Hold, Reply, Request, Resume,
    protocol::{
        Agent, AgentStatus, Agents, Answer, Attached, Cgroup, DriftSummary, Entry, Explain,
        Exposition, Guard, GuardState, Guarded, Held, LastViolation, Myself, Posture, ProbeAttempt,
        ProbeCounts, ProbeVerdict, Probed, Question, Reconciled, Refusal, Registry, Reload,
        RunGrant, Source, Status, Traffic,
    },
    scrape,
    server::{Listener, serve},
};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// A root that no test runs in.
pub const ELSEWHERE: &[&str] = &["/remit-test-elsewhere.slice"];

/// What the stand-in answers.
#[derive(Clone)]
pub struct Answers {
    /// To a status request.
    pub status: Status,
    /// To a reload; none drops the request.
    pub reload: Option<Reload>,
    /// To a question.
    pub explain: fn(&Question) -> Answer,
    /// To a suspend or revoke.
    pub hold: fn(&Hold) -> Result<Held, Refusal>,
    /// To a resume.
    pub resume: fn(&Resume) -> Result<Held, Refusal>,
    /// To a comparison.
    pub reconcile: fn(bool) -> Reconciled,
    /// To who asks for traffic.
    pub traffic: Traffic,
}

impl Default for Answers {
    fn default() -> Self {
        Self {
            status: status(Posture::Enforcing),
            reload: None,
            explain: |_| Answer::Denied,
            hold: |hold| {
                Ok(held(
                    &hold.id,
                    "active",
                    hold.state.name(),
                    hold.reason.as_str(),
                ))
            },
            resume: |resume| {
                let reason = resume.reason.as_str();
                Ok(held(&resume.id, "suspended", "active", reason))
            },
            reconcile: |_| reconciled(),
            traffic: Traffic::default(),
        }
    }
}

/// What a change of lifecycle state came to.
pub fn held(id: &str, before: &str, after: &str, reason: &str) -> Held {
    Held {
        id: id.to_owned(),
        before: before.to_owned(),
        after: after.to_owned(),
        reason: reason.to_owned(),
        revision: 8,
        closed: 0,
        killed: 0,
        frozen: 0,
        durable: true,
        warnings: Vec::new(),
    }
}

/// No drift.
pub fn reconciled() -> Reconciled {
    Reconciled {
        checked_ms: 1_793_836_900_000,
        took_ms: 3,
        entries: 41,
        drift: Vec::new(),
        notices: Vec::new(),
        information: Vec::new(),
    }
}

/// A served socket; gone when dropped.
pub struct Served {
    pub socket: PathBuf,
    pub folder: TempDir,
    _runtime: tokio::runtime::Runtime,
}

/// Serves these answers to all but callers below `roots`.
pub fn served(roots: &[&str], answers: Answers) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("remit.sock");
    let runtime = serve_at(&socket, "no-such-group", roots, answers);
    Served {
        socket,
        folder,
        _runtime: runtime,
    }
}

/// Serves at a place of the caller's; ends when the runtime is dropped.
pub fn serve_at(
    socket: &Path,
    group: &str,
    roots: &[&str],
    answers: Answers,
) -> tokio::runtime::Runtime {
    let listener = Listener::bind(socket, group).unwrap();
    let roots = roots.iter().map(|root| (*root).to_owned()).collect();
    let (calls, requests) = mpsc::channel(8);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(serve(listener, roots, calls));
    runtime.spawn(stand_in(requests, answers));
    runtime
}

/// Serves metrics on a loopback address of the system's choice.
pub fn scraped() -> (std::net::SocketAddr, tokio::runtime::Runtime) {
    let listener = scrape::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let (calls, requests) = mpsc::channel(8);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(scrape::serve(listener, calls));
    runtime.spawn(stand_in(requests, Answers::default()));
    (address, runtime)
}

async fn stand_in(mut requests: mpsc::Receiver<Call>, answers: Answers) {
    while let Some(Call { caller, request }) = requests.recv().await {
        match request {
            Request::Status(reply) => answer(reply, Ok(answers.status.clone())),
            Request::Agents(reply) => answer(
                reply,
                Ok(Agents {
                    revision: 7,
                    agents: vec![agent()],
                }),
            ),
            Request::Agent(id, reply) if id == "billing-recon" => answer(reply, Ok(agent())),
            Request::Agent(id, reply) => answer(reply, Err(Refusal::no_such_agent(&id))),
            Request::Explain(question, reply) => {
                let verdict = (answers.explain)(&question);
                let explain = Explain {
                    question,
                    verdict,
                    reason: (verdict != Answer::Allowed).then(|| "out_of_scope".to_owned()),
                    entry: None,
                    until_ms: None,
                    source: Source::Kernel,
                    hash: "sha256:00".to_owned(),
                    revision: 7,
                    cgroups: Vec::new(),
                    note: None,
                    lease: None,
                };
                answer(reply, Ok(explain));
            }
            Request::Reload(request, reply) => {
                // Without an answer the request is dropped.
                if let Some(mut reload) = answers.reload.clone() {
                    if request.accept_clock {
                        reload.findings.push("clock accepted".to_owned());
                    }
                    answer(reply, Ok(reload));
                }
            }
            Request::Hold(hold, reply) => answer(reply, (answers.hold)(&hold)),
            Request::Resume(resume, reply) => answer(reply, (answers.resume)(&resume)),
            Request::Reconcile { repair, reply } => answer(reply, Ok((answers.reconcile)(repair))),
            Request::Attached(question, reply) => answer(
                reply,
                Ok(Attached {
                    passes: question.port == 443,
                    program: 44,
                    cgroup: "/agents.slice/x.service".to_owned(),
                    run: "1f".to_owned(),
                }),
            ),
            Request::Probe(id, reply) => answer(reply, probed(id)),
            Request::Guard(cgroup, reply) => answer(reply, Ok(guarded(cgroup))),
            Request::Run(request, reply) => {
                let cgroup = PathBuf::from(format!("/cg/{}", request.agent));
                answer(reply, Ok(RunGrant { cgroup, id: 5 }));
            }
            Request::Metrics(reply) => answer(
                reply,
                Ok(Exposition {
                    content_type: "application/openmetrics-text; version=1.0.0",
                    text: "remit_problems 0\n# EOF\n".to_owned(),
                }),
            ),
            Request::Traffic(reply) => answer(reply, Ok(answers.traffic.clone())),
            Request::Myself(reply) => answer(reply, Ok(myself(caller.cgroup))),
        }
    }
}

/// A caller that went away is no failure of the stand-in.
fn answer<T>(reply: Reply<T>, answer: Result<T, Refusal>) {
    let _gone = reply.send(answer).is_err();
}

pub fn status(posture: Posture) -> Status {
    let missing = posture != Posture::Enforcing;
    Status {
        version: "0.1.0".to_owned(),
        posture,
        reasons: if missing {
            vec!["egress is not attached at /agents.slice".to_owned()]
        } else {
            Vec::new()
        },
        since_ms: 1_793_836_800_000,
        counted_since_ms: Some(1_793_836_800_000),
        revision: 7,
        guards: vec![
            guard("connect4", GuardState::Live),
            guard(
                "egress",
                if missing {
                    GuardState::Absent
                } else {
                    GuardState::Live
                },
            ),
        ],
        former: Vec::new(),
        agents: vec![AgentStatus {
            id: "billing-recon".to_owned(),
            name: "Billing reconciliation".to_owned(),
            state: "active".to_owned(),
            mode: "enforce".to_owned(),
            revision: 6,
            hash: "sha256:00".to_owned(),
            expires_ms: Some(1_830_297_599_000),
            cgroups: vec![Cgroup {
                path: "/agents.slice/billing-recon.service".to_owned(),
                id: 99,
                processes: 2,
            }],
            processes: 2,
            allowed: 120,
            denied: 3,
            monitored: 0,
            by_reason: BTreeMap::from([("floor".to_owned(), 1), ("out_of_scope".to_owned(), 2)]),
            last_violation: Some(LastViolation {
                time_ms: 1_793_836_900_000,
                text: "denied billing-recon \u{1b}[31mcurl to 192.0.2.7:443/tcp".to_owned(),
            }),
            finding: None,
            hold: None,
            leases: Vec::new(),
            leased: 0,
            last_probe: None,
        }],
        findings: Vec::new(),
        registry: Registry {
            files: 3,
            errors: 0,
            warnings: 1,
        },
        drift: DriftSummary::default(),
        probes: ProbeCounts::default(),
    }
}

/// When the evidence is from: just now, and the same for all who ask.
static CHECKED: std::sync::LazyLock<i64> = std::sync::LazyLock::new(|| {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_millis()).unwrap()
});

fn guard(name: &str, state: GuardState) -> Guard {
    Guard {
        name: name.to_owned(),
        kind: "link".to_owned(),
        root: Some("/agents.slice".to_owned()),
        state,
        evidence: "link 12, program 44".to_owned(),
        checked_ms: *CHECKED,
        link_id: Some(12),
        prog_id: Some(44),
        run_cnt: None,
    }
}

fn guarded(cgroup: String) -> Guarded {
    let ok = cgroup.starts_with("/agents.slice/");
    Guarded {
        root: ok.then(|| "/agents.slice".to_owned()),
        fenced: ok,
        agent: ok.then(|| "billing-recon".to_owned()),
        state: if ok { "active" } else { "unregistered" }.to_owned(),
        ok,
        why: if ok {
            Vec::new()
        } else {
            vec!["it is below no root".to_owned()]
        },
        cgroup,
    }
}

fn probed(id: String) -> Result<Probed, Refusal> {
    let (verdict, evidence) = match id.as_str() {
        "holds" => (ProbeVerdict::Pass, "refused at once"),
        "open" => (ProbeVerdict::Fail, "connect succeeded, and must be refused"),
        "dark" => (ProbeVerdict::Unknown, "connect ended with ENETUNREACH"),
        _ => return Err(Refusal::no_such_agent(&id)),
    };
    let why = match verdict {
        ProbeVerdict::Pass => Vec::new(),
        ProbeVerdict::Fail | ProbeVerdict::Unknown => {
            vec![format!("IPv4 TCP connect: {evidence}")]
        }
    };
    Ok(Probed {
        agent: id,
        verdict,
        why,
        run: "1f".to_owned(),
        began_ms: 1_793_836_800_000,
        took_ms: 80,
        cgroup: Some("/agents.slice/x.service".to_owned()),
        attempts: vec![ProbeAttempt {
            name: "IPv4 TCP connect".to_owned(),
            hook: "cgroup/connect4".to_owned(),
            to: Some("192.0.2.7:4000".to_owned()),
            wanted: "must be refused as out_of_scope".to_owned(),
            verdict,
            evidence: evidence.to_owned(),
        }],
        revision: 7,
        hash: "sha256:00".to_owned(),
    })
}

fn agent() -> Agent {
    Agent {
        id: "billing-recon".to_owned(),
        name: "Billing reconciliation".to_owned(),
        owner: "alice@example.com".to_owned(),
        approval_ref: Some("CHG-20931".to_owned()),
        file: PathBuf::from("/etc/remit/agents.d/billing-recon.toml"),
        hash: "sha256:00".to_owned(),
        state: "active".to_owned(),
        mode: "enforce".to_owned(),
        loopback: "own".to_owned(),
        not_before_ms: None,
        expires_ms: Some(1_830_297_599_000),
        selectors: vec!["/agents.slice/billing-recon.service".to_owned()],
        entries: vec![Entry {
            name: "scope.allow[0]".to_owned(),
            text: "10.20.0.0/16 5432/tcp".to_owned(),
            file: "/etc/remit/agents.d/billing-recon.toml".to_owned(),
            line: 17,
            reason: Some("ledger".to_owned()),
        }],
        finding: None,
        hold: None,
    }
}

fn myself(cgroup: Option<String>) -> Myself {
    Myself {
        agent: None,
        name: None,
        owner: None,
        approval_ref: None,
        state: "unregistered".to_owned(),
        hold: None,
        mode: "enforce".to_owned(),
        expires_ms: None,
        cgroup,
        guard: None,
        revision: 7,
        hash: None,
        scope: Vec::new(),
        denials: Vec::new(),
        advice: "ask".to_owned(),
    }
}
