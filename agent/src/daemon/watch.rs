//! The watch over a fence without a daemon: one thread takes in what the kernel tells, answers the
//! DNS guard for an agent with names, and ends with the command.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::{Builder, Runtime},
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval},
};

use super::{
    DRAIN_EVERY, DaemonError, SETTLE_EVERY,
    closing::close_unreachable,
    lookups::Lookups,
    names::{self, LeaseOrder, Names},
    recorder::Recorder,
};
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    dns::server::Request,
    kernel::Enforcer,
    policy::AgentTables,
};

/// How often what is still owed is looked for at the end, and how long lies between. The ledger
/// settles what it has seen twice, a second apart.
const LAST_LOOKS: usize = 4;
const LAST_PAUSE: Duration = Duration::from_millis(1_100);

/// What the watch is given.
pub struct Post {
    /// The fence.
    pub enforcer: Enforcer,
    /// Takes the lines.
    pub recorder: Recorder,
    /// The guard, without endpoints yet, and what it asks.
    pub names: (Names, mpsc::Receiver<Request>),
    /// The agent in force.
    pub tables: Arc<AgentTables>,
    /// Where the fence's cgroups are.
    pub hierarchy: Hierarchy,
    /// The fenced root.
    pub root: CgroupPath,
    /// The agent's cgroup, and its id.
    pub agent: (CgroupPath, u64),
}

/// The thread at work.
pub struct Watch {
    /// Ends it when dropped.
    stop: oneshot::Sender<()>,
    done: std_mpsc::Receiver<(Enforcer, Vec<Value>)>,
}

/// What the thread holds.
struct Watcher {
    enforcer: Enforcer,
    recorder: Recorder,
    names: Names,
    lookups: Lookups,
    tables: Arc<AgentTables>,
    hierarchy: Hierarchy,
    roots: [CgroupPath; 1],
    claims: BTreeMap<CgroupPath, (u64, u32)>,
    /// The agent, if it uses names.
    named: BTreeSet<u32>,
}

// === impl Watch ===

impl Watch {
    /// Opens the guard's endpoint, where the agent uses names, and starts the thread: after that
    /// the command may start.
    ///
    /// # Errors
    /// When the endpoint or the runtime for it can't be had.
    pub fn start(post: Post) -> Result<Self, DaemonError> {
        let system = |what| move |source| DaemonError::System { what, source };
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("start the runtime"))?;
        let (mut watcher, asked) = Watcher::new(post);
        {
            let _inside = runtime.enter();
            watcher.tend().map_err(DaemonError::Names)?;
        }
        let (stop, stopped) = oneshot::channel();
        let (send, done) = std_mpsc::channel();
        thread::Builder::new()
            .name("remit-watch".into())
            .spawn(move || {
                // The receiver is only gone when this process is ending anyway.
                drop(send.send(watcher.run(&runtime, asked, stopped)));
            })
            .map_err(system("start a thread"))?;
        Ok(Self { stop, done })
    }

    /// Ends it. The fence, and the lines for all that was attempted, of which nobody may be left;
    /// no fence if the thread has died.
    pub fn finish(self) -> (Option<Enforcer>, Vec<Value>) {
        drop(self.stop);
        match self.done.recv() {
            Ok((enforcer, lines)) => (Some(enforcer), lines),
            Err(std_mpsc::RecvError) => (None, Vec::new()),
        }
    }
}

// === impl Watcher ===

impl Watcher {
    fn new(post: Post) -> (Self, mpsc::Receiver<Request>) {
        let (names, asked) = post.names;
        let index = post.enforcer.index_of(&post.tables.id);
        let (path, id) = post.agent;
        let watcher = Self {
            named: index
                .filter(|_| !post.tables.names.is_empty())
                .into_iter()
                .collect(),
            claims: index.map(|index| (path, (id, index))).into_iter().collect(),
            enforcer: post.enforcer,
            recorder: post.recorder,
            names,
            lookups: Lookups::default(),
            tables: post.tables,
            hierarchy: post.hierarchy,
            roots: [post.root],
        };
        (watcher, asked)
    }

    fn run(
        mut self,
        runtime: &Runtime,
        mut asked: mpsc::Receiver<Request>,
        stopped: oneshot::Receiver<()>,
    ) -> (Enforcer, Vec<Value>) {
        runtime.block_on(self.watch(&mut asked, stopped));
        // What was refused last may not have been told yet.
        while let Ok(request) = asked.try_recv() {
            self.answer(request);
        }
        self.lookups.settle(&mut self.recorder);
        // Nobody is left who could add to the counters: what they say now is final.
        self.recorder.settle(&mut self.enforcer);
        for _ in 0..LAST_LOOKS {
            if !self.recorder.owes(&self.enforcer) {
                break;
            }
            thread::sleep(LAST_PAUSE);
            self.recorder.settle(&mut self.enforcer);
        }
        (self.enforcer, self.recorder.lines())
    }

    async fn watch(
        &mut self,
        asked: &mut mpsc::Receiver<Request>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        // SAFETY: an `OwnedFd` keeps its descriptor until it is dropped, with what is around it.
        let register = |ring| unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        // Without it there is still a look every few milliseconds.
        let ring = self
            .enforcer
            .ring()
            .ok()
            .and_then(|ring| register(ring).ok());
        let mut drain = interval(DRAIN_EVERY);
        drain.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settle = interval(SETTLE_EVERY);
        settle.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // Dropped is told as well.
                _ = &mut stopped => return,
                Some(request) = asked.recv() => self.answer(request),
                () = readable(ring.as_ref()) => self.drain(),
                _ = drain.tick() => self.drain(),
                _ = settle.tick() => self.settle(),
            }
        }
    }

    fn drain(&mut self) {
        self.recorder.drain(&mut self.enforcer);
        let unguarded = self.recorder.take_unguarded();
        if !unguarded.is_empty() && self.names.looks_again() {
            self.see_to_endpoints();
        }
    }

    fn settle(&mut self) {
        self.recorder.settle(&mut self.enforcer);
        if self.named.is_empty() {
            return;
        }
        self.lookups.settle(&mut self.recorder);
        self.enforcer.sweep();
        self.see_to_endpoints();
        let over = self.names.turn(&mut self.enforcer);
        if !over.is_empty() {
            // Whatever can't be ended is refused packet by packet all the same.
            let _closed = close_unreachable(
                &mut self.enforcer,
                &self.hierarchy,
                &self.roots,
                &self.claims,
                Some(&over),
            );
        }
    }

    /// Opens what endpoints are missing. Where that fails lookups are refused, and it is tried again.
    fn see_to_endpoints(&mut self) {
        if let Err(why) = self.tend() {
            tracing::warn!(message = "An endpoint of the DNS guard is missing.", why);
        }
    }

    fn tend(&mut self) -> Result<(), String> {
        if self.named.is_empty() {
            return Ok(());
        }
        let hierarchy = &self.hierarchy;
        let processes = self.claims.iter().flat_map(|(path, (_, agent))| {
            let inside = hierarchy.processes(path, true).unwrap_or_default();
            inside.into_iter().map(move |pid| (*agent, pid))
        });
        self.names.tend(&mut self.enforcer, &self.named, processes)
    }

    /// Answers the guard.
    fn answer(&mut self, request: Request) {
        // One that waits no longer is no reason to complain.
        match request {
            Request::Identify { client, reply } => {
                let tables = |id: &str| (id == self.tables.id).then(|| Arc::clone(&self.tables));
                let identity = self.names.identify(&self.enforcer, &client, tables);
                drop(reply.send(identity));
            }
            Request::Lease {
                tables,
                leases,
                host,
                addresses,
                reply,
            } => {
                let order = LeaseOrder {
                    tables,
                    leases,
                    host,
                    addresses,
                };
                let current = Some(&self.tables);
                let done =
                    names::put_leases(&mut self.enforcer, &mut self.recorder, current, order);
                drop(reply.send(done));
            }
            Request::Report { report, client } => {
                if let Some(refused) = self.names.refused(&self.enforcer, report, client) {
                    self.lookups.tell(&mut self.recorder, refused);
                }
            }
        }
    }
}

/// Waits until a CPU says that there are records; for ever without a ring to ask.
async fn readable(ring: Option<&AsyncFd<std::os::fd::OwnedFd>>) {
    let Some(ring) = ring else {
        return std::future::pending().await;
    };
    match ring.readable().await {
        Ok(mut guard) => guard.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}
