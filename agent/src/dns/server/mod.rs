//! The guard at work: sockets, upstreams, and the way to whoever writes leases. Decides nothing;
//! [`super::guard`] does.
//!
//! A question costs its endpoint one of [`IN_FLIGHT`] places until it is answered. When an agent has
//! none left its next datagrams are dropped, as a full buffer would, and nobody else waits. What
//! goes to the daemon goes over one bounded channel: [`Request`].
//!
//! Here are the sockets; what is done with a question is in [`answer`].

mod answer;

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tracing::warn;

use super::{
    endpoint::Sockets,
    guard::{AddressLease, Guard, Limits, Report},
    lease::Shown,
    message::MAX_UDP,
    resolv::{self, Watched},
    tally::Tally,
    upstream,
};
use crate::policy::{AgentTables, Clock};

/// Questions of one endpoint that are being answered at once.
const IN_FLIGHT: usize = 128;
/// TCP connections to one endpoint.
const CONNECTIONS: usize = 32;
/// Questions that are being asked upstream at once, of all agents.
const UPSTREAM: usize = 1024;
/// How long a TCP connection may be silent.
const IDLE: Duration = Duration::from_secs(10);

/// A resolver to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Those of this `resolv.conf`.
    File(PathBuf),
    /// This one.
    At(SocketAddr),
}

/// How the guard works.
pub struct Config {
    /// Whom to ask.
    pub sources: Vec<Source>,
    /// Limits from the settings.
    pub limits: Limits,
    /// This moment.
    pub clock: Arc<dyn Fn() -> Clock + Send + Sync>,
}

/// Which protocol a question came over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A datagram.
    Udp,
    /// A connection.
    Tcp,
}

/// Who asked: the socket, not what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// The endpoint that was reached.
    pub endpoint: EndpointId,
    /// Over what.
    pub transport: Transport,
    /// The socket's address, in the endpoint's network namespace.
    pub from: SocketAddr,
    /// The guard's own address there.
    pub at: SocketAddr,
}

/// An endpoint; numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u64);

/// Whose a question is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The agent's tables in force.
    pub tables: Arc<AgentTables>,
    /// Where its resolver has its search domains from.
    pub search: SearchIn,
}

/// Where search domains are found.
#[derive(Clone, Debug)]
pub enum SearchIn {
    /// In the `resolv.conf` that this process sees, which is read when it matters.
    Process(u32),
    /// These are they: lower case, no trailing dot.
    Known(Arc<[String]>),
}

/// Why leases are not in force.
#[derive(Clone, Debug)]
pub enum LeaseError {
    /// The agent's tables are others by now: these. Judge again.
    Changed(Arc<AgentTables>),
    /// They could not be written, or were not what was read back.
    Failed(String),
}

/// What the guard asks of the daemon, or tells it.
#[derive(Debug)]
pub enum Request {
    /// Whose socket is this? None: nobody's whose question was noted.
    Identify {
        /// The socket.
        client: Client,
        /// Takes the answer.
        reply: oneshot::Sender<Option<Identity>>,
    },
    /// Put these in force, read them back, and say so: the answer waits for it.
    Lease {
        /// The tables under which they were judged.
        tables: Arc<AgentTables>,
        /// The rules of each address.
        leases: Vec<AddressLease>,
        /// The name that leads to them.
        host: String,
        /// All addresses that it led to, leased or not: for names in logs.
        addresses: Vec<std::net::IpAddr>,
        /// Takes the answer.
        reply: oneshot::Sender<Result<(), LeaseError>>,
    },
    /// Something was refused, or lifted by monitor mode.
    Report {
        /// What.
        report: Report,
        /// Who asked.
        client: Client,
    },
}

/// The guard, for the daemon. Ends with its endpoints when dropped.
pub struct Server {
    shared: Arc<Shared>,
}

/// An open endpoint; closed when dropped.
#[derive(Debug)]
pub struct Endpoint {
    /// Its number.
    pub id: EndpointId,
    /// Where IPv4 questions go.
    pub v4: Option<SocketAddr>,
    /// Where IPv6 questions go.
    pub v6: Option<SocketAddr>,
    tasks: Vec<JoinHandle<()>>,
}

/// What was dropped unanswered, or refused as nobody's.
#[derive(Debug, Default)]
struct Dropped {
    /// An endpoint had no place left.
    busy: AtomicU64,
    /// No DNS question.
    malformed: AtomicU64,
    /// From a socket that was not seen to ask.
    nobodys: AtomicU64,
}

/// Counts of what was not answered, since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unanswered {
    /// An agent had too many questions open.
    pub busy: u64,
    /// What arrived was no DNS question.
    pub malformed: u64,
    /// The kernel saw no agent send it.
    pub nobodys: u64,
}

struct Shared {
    guard: Mutex<Guard>,
    files: Mutex<Vec<Watched>>,
    /// The host's `resolv.conf`, whoever is asked upstream.
    own: Mutex<Watched>,
    tally: Mutex<Tally>,
    sources: Vec<Source>,
    clock: Arc<dyn Fn() -> Clock + Send + Sync>,
    requests: mpsc::Sender<Request>,
    upstream: Semaphore,
    next: AtomicU64,
    dropped: Dropped,
}

/// The places of one endpoint.
struct Places {
    questions: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    /// Of who reads an agent's files.
    reader: Arc<Semaphore>,
}

// === impl Server ===

impl Server {
    /// A guard without endpoints; what it asks goes to `requests`.
    pub fn new(config: Config, requests: mpsc::Sender<Request>) -> Self {
        let files = config.sources.iter().filter_map(|source| match source {
            Source::File(path) => Some(Watched::new(path)),
            Source::At(_) => None,
        });
        let shared = Shared {
            guard: Mutex::new(Guard::new(config.limits)),
            files: Mutex::new(files.collect()),
            own: Mutex::new(Watched::new(resolv::PATH.as_ref())),
            tally: Mutex::default(),
            sources: config.sources,
            clock: config.clock,
            requests,
            upstream: Semaphore::new(UPSTREAM),
            next: AtomicU64::new(1),
            dropped: Dropped::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Listens on `sockets`.
    ///
    /// # Errors
    /// When they can't be given to the runtime.
    pub fn listen(&self, sockets: Sockets) -> io::Result<Endpoint> {
        let id = EndpointId(self.shared.next.fetch_add(1, Ordering::Relaxed));
        let (v4, v6) = (sockets.v4(), sockets.v6());
        let places = Arc::new(Places {
            questions: Arc::new(Semaphore::new(IN_FLIGHT)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            reader: Arc::new(Semaphore::new(1)),
        });
        let mut tasks = Vec::new();
        for pair in sockets.pairs {
            let udp = Arc::new(UdpSocket::from_std(pair.udp)?);
            let tcp = TcpListener::from_std(pair.tcp)?;
            let client = move |transport, from| Client {
                endpoint: id,
                transport,
                from,
                at: pair.at,
            };
            let (shared, room) = (Arc::clone(&self.shared), Arc::clone(&places));
            tasks.push(tokio::spawn(async move {
                serve_udp(shared, room, udp, |from| client(Transport::Udp, from)).await;
            }));
            let (shared, room) = (Arc::clone(&self.shared), Arc::clone(&places));
            tasks.push(tokio::spawn(async move {
                serve_tcp(shared, room, tcp, |from| client(Transport::Tcp, from)).await;
            }));
        }
        Ok(Endpoint { id, v4, v6, tasks })
    }

    /// All leases of `agent` anew, after its scope or the clocks have changed: what the kernel has
    /// to hold from then on.
    pub fn renew(&self, agent: &AgentTables) -> Vec<AddressLease> {
        let clock = self.shared.now();
        self.shared.guard().renew(agent, &clock)
    }

    /// Forgets an agent that is no more.
    pub fn forget(&self, agent: &str) {
        self.shared.guard().forget(agent);
        self.shared.tally().forget(agent);
    }

    /// The leases of an agent that have not ended.
    pub fn leases(&self, agent: &str) -> Vec<Shown> {
        let now = self.shared.now().boot_now_ns;
        self.shared.guard().leases(agent, now)
    }

    /// Drops what has ended; to be called now and then.
    pub fn sweep(&self) {
        let now = self.shared.now().boot_now_ns;
        self.shared.guard().sweep(now);
    }

    /// What came of lookups since the start.
    pub fn tally(&self) -> Tally {
        self.shared.tally().clone()
    }

    /// What was not answered.
    pub fn unanswered(&self) -> Unanswered {
        Unanswered {
            busy: self.shared.dropped.busy.load(Ordering::Relaxed),
            malformed: self.shared.dropped.malformed.load(Ordering::Relaxed),
            nobodys: self.shared.dropped.nobodys.load(Ordering::Relaxed),
        }
    }
}

impl Endpoint {
    /// Whether somebody listens at each of its sockets.
    pub fn is_served(&self) -> bool {
        !self.tasks.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

// === the sockets ===

async fn serve_udp(
    shared: Arc<Shared>,
    places: Arc<Places>,
    socket: Arc<UdpSocket>,
    client: impl Fn(SocketAddr) -> Client,
) {
    let mut buffer = [0; MAX_UDP as usize];
    // Aborted with the endpoint, for they hold its socket.
    let mut questions = JoinSet::new();
    loop {
        while questions.try_join_next().is_some() {}
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                warn!(message = "A socket of the DNS guard fails.", %error);
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places.questions).try_acquire_owned() else {
            shared.dropped.busy.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        let (shared, socket, client) = (Arc::clone(&shared), Arc::clone(&socket), client(from));
        let places = Arc::clone(&places);
        questions.spawn(async move {
            let _place = place;
            if let Some(reply) = shared.handle(&places, client, &bytes).await
                && let Err(error) = socket.send_to(&reply, from).await
            {
                // Whoever asked is gone.
                tracing::debug!(message = "A DNS reply was not taken.", %error);
            }
        });
    }
}

async fn serve_tcp(
    shared: Arc<Shared>,
    places: Arc<Places>,
    listener: TcpListener,
    client: impl Fn(SocketAddr) -> Client,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(message = "A socket of the DNS guard fails.", %error);
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places.connections).try_acquire_owned() else {
            shared.dropped.busy.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let (shared, places, client) = (Arc::clone(&shared), Arc::clone(&places), client(from));
        connections.spawn(async move {
            let _place = place;
            if let Err(error) = converse(&shared, &places, stream, client).await {
                tracing::debug!(message = "A DNS connection ended.", %error);
            }
        });
    }
}

/// Answers one question after the other, until the agent closes or falls silent.
async fn converse(
    shared: &Shared,
    places: &Places,
    mut stream: TcpStream,
    client: Client,
) -> io::Result<()> {
    loop {
        let Ok(read) = timeout(IDLE, upstream::read(&mut stream)).await else {
            return Ok(());
        };
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let Ok(_place) = places.questions.acquire().await else {
            return Ok(());
        };
        let Some(reply) = shared.handle(places, client, &bytes).await else {
            return Ok(());
        };
        upstream::write(&mut stream, &reply).await?;
    }
}
