//! The DNS guard over real sockets of loopback: an upstream that answers, lies or is silent, and a
//! daemon that says whose a socket is and when leases are in force.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use remit::{
    dns::{
        budget::Limit,
        endpoint::Sockets,
        guard::{Limits, Report},
        lease::Bounds,
        server::{
            Config, Endpoint, Identity, LeaseError, Request, SearchIn, Server, Source, Transport,
        },
        tally::Came,
    },
    policy::{self, AgentTables, Clock, SourceKind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{mpsc, watch},
    time::timeout,
};

/// 2026-10-01T00:00:00Z
const NOW: i64 = 1_790_812_800_000;
const BOOT: u64 = 1 << 50;
const SOON: Duration = Duration::from_secs(10);

fn agent(id: &str, names: &[&str]) -> Arc<AgentTables> {
    let mut text = format!(
        "schema = 1\n[agent]\nid = \"{id}\"\nowner = \"alice@example.com\"\n[lifecycle]\nstate = \
         \"active\"\napproved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = \
         [\"/r/{id}\"]\n"
    );
    for name in names {
        text += &format!("[[scope.allow]]\nto = \"{name}\"\nports = [443]\n");
    }
    let source = policy::Source {
        path: format!("{id}.toml").into(),
        text,
        kind: SourceKind::Agent,
    };
    let compilation = policy::compile(&[source], NOW);
    assert!(!compilation.has_errors(), "{:?}", compilation.findings);
    Arc::clone(&compilation.agents[0])
}

// === upstream ===

/// What an upstream sends back to a question: over UDP any number of datagrams, over TCP one.
type Says = Arc<dyn Fn(&Message, Transport) -> Vec<Vec<u8>> + Send + Sync>;

struct Upstream {
    at: SocketAddr,
    udp: Arc<AtomicUsize>,
    tcp: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<Message>>>,
}

async fn upstream(says: Says) -> Upstream {
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = udp.local_addr().unwrap();
    let listener = TcpListener::bind(at).await.unwrap();
    let made = Upstream {
        at,
        udp: Arc::default(),
        tcp: Arc::default(),
        asked: Arc::default(),
    };
    let (count, asked, answer) = (
        Arc::clone(&made.udp),
        Arc::clone(&made.asked),
        Arc::clone(&says),
    );
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            let question = Message::from_vec(&buffer[..length]).unwrap();
            for reply in answer(&question, Transport::Udp) {
                udp.send_to(&reply, from).await.unwrap();
            }
            asked.lock().unwrap().push(question);
        }
    });
    let count = Arc::clone(&made.tcp);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            let question = Message::from_vec(&read(&mut stream).await).unwrap();
            for reply in says(&question, Transport::Tcp) {
                write(&mut stream, &reply).await;
            }
        }
    });
    made
}

async fn read(stream: &mut TcpStream) -> Vec<u8> {
    let length = stream.read_u16().await.unwrap();
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await.unwrap();
    bytes
}

async fn write(stream: &mut TcpStream, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).unwrap();
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await
        .unwrap();
}

/// The true answer: one address.
fn truth(question: &Message) -> Message {
    let mut reply = Message::response(question.metadata.id, OpCode::Query);
    reply.add_queries(question.queries.clone());
    let name = question.queries[0].name().clone();
    let data = RData::A(A(Ipv4Addr::new(203, 0, 113, 7)));
    reply.add_answer(Record::from_rdata(name, 30, data));
    reply
}

fn honest() -> Says {
    Arc::new(|question, _| vec![truth(question).to_vec().unwrap()])
}

// === daemon ===

/// What the daemon was told.
#[derive(Default)]
struct Book {
    leases: Mutex<Vec<(IpAddr, String)>>,
    reports: Mutex<Vec<Report>>,
}

struct Daemon {
    book: Arc<Book>,
    /// Leases are in force only while this is true.
    gate: watch::Sender<bool>,
}

type Whose = Arc<dyn Fn(remit::dns::server::Client) -> Option<Arc<AgentTables>> + Send + Sync>;
type Writes = Arc<dyn Fn(&Arc<AgentTables>) -> Result<(), LeaseError> + Send + Sync>;

fn daemon(mut requests: mpsc::Receiver<Request>, whose: Whose, writes: Writes) -> Daemon {
    let book: Arc<Book> = Arc::default();
    let (gate, open) = watch::channel(true);
    let kept = Arc::clone(&book);
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            match request {
                Request::Identify { client, reply } => {
                    let identity = whose(client).map(|tables| Identity {
                        tables,
                        search: SearchIn::Known(Arc::from(["corp.example".to_owned()])),
                    });
                    let _gone = reply.send(identity);
                }
                Request::Lease {
                    tables,
                    leases,
                    host,
                    reply,
                    ..
                } => {
                    let (writes, book, mut open) =
                        (Arc::clone(&writes), Arc::clone(&kept), open.clone());
                    tokio::spawn(async move {
                        open.wait_for(|open| *open).await.unwrap();
                        let told = writes(&tables);
                        if told.is_ok() {
                            let mut list = book.leases.lock().unwrap();
                            list.extend(leases.iter().map(|lease| (lease.addr, host.clone())));
                        }
                        let _gone = reply.send(told);
                    });
                }
                Request::Report { report, .. } => kept.reports.lock().unwrap().push(report),
            }
        }
    });
    Daemon { book, gate }
}

// === the scene ===

struct Scene {
    server: Server,
    daemon: Daemon,
}

fn scene(sources: Vec<Source>, whose: Whose, writes: Writes) -> Scene {
    let (sender, receiver) = mpsc::channel(64);
    let config = Config {
        sources,
        limits: Limits {
            min_lease: 60_000_000_000,
            max_lease: 3_600_000_000_000,
            budget: Limit { names: 1_000 },
            bounds: Bounds {
                per_name: 64,
                per_agent: 32_768,
            },
        },
        clock: Arc::new(|| Clock::at(BOOT, NOW)),
    };
    Scene {
        server: Server::new(config, sender),
        daemon: daemon(receiver, whose, writes),
    }
}

fn simple(at: SocketAddr) -> (Scene, Endpoint) {
    let tables = agent("a", &["api.example"]);
    let scene = scene(
        vec![Source::At(at)],
        Arc::new(move |_| Some(Arc::clone(&tables))),
        Arc::new(|_| Ok(())),
    );
    let endpoint = scene.server.listen(Sockets::open().unwrap()).unwrap();
    (scene, endpoint)
}

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.set_edns(Edns::new());
    message.to_vec().unwrap()
}

async fn client(at: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((at.ip(), 0)).await.unwrap();
    socket.connect(at).await.unwrap();
    socket
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 4096];
    let length = timeout(SOON, socket.recv(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn ask(at: SocketAddr, name: &str) -> Message {
    let socket = client(at).await;
    socket.send(&question(name)).await.unwrap();
    receive(&socket).await
}

fn addresses(message: &Message) -> Vec<String> {
    let answers = message.answers.iter();
    answers.map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn an_answer_waits_for_its_leases() {
    let upstream = upstream(honest()).await;
    let (scene, endpoint) = simple(upstream.at);
    scene.daemon.gate.send(false).unwrap();
    let socket = client(endpoint.v4.unwrap()).await;
    socket.send(&question("aPi.example.")).await.unwrap();
    let mut buffer = [0; 512];
    let early = timeout(Duration::from_millis(300), socket.recv(&mut buffer)).await;
    assert!(early.is_err(), "answered before the leases were in force");
    assert_eq!(upstream.udp.load(Ordering::SeqCst), 1);
    scene.daemon.gate.send(true).unwrap();
    let reply = receive(&socket).await;
    assert_eq!(reply.metadata.id, 4711);
    assert_eq!(reply.queries[0].name().to_ascii(), "aPi.example.");
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
    let leases = scene.daemon.book.leases.lock().unwrap().clone();
    assert_eq!(
        leases,
        [([203, 0, 113, 7].into(), "api.example".to_owned())]
    );
    assert_eq!(scene.server.leases("a").len(), 1);
}

#[tokio::test]
async fn ipv6_and_tcp_are_served_alike() {
    let upstream = upstream(honest()).await;
    let (_scene, endpoint) = simple(upstream.at);
    if let Some(v6) = endpoint.v6 {
        assert_eq!(addresses(&ask(v6, "api.example.").await), ["203.0.113.7"]);
    }
    let mut stream = TcpStream::connect(endpoint.v4.unwrap()).await.unwrap();
    write(&mut stream, &question("api.example.")).await;
    write(&mut stream, &question("evil.example.")).await;
    let first = Message::from_vec(&read(&mut stream).await).unwrap();
    let second = Message::from_vec(&read(&mut stream).await).unwrap();
    assert_eq!(addresses(&first), ["203.0.113.7"]);
    assert_eq!(second.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn what_is_out_of_scope_goes_nowhere_and_is_reported() {
    let upstream = upstream(honest()).await;
    let (scene, endpoint) = simple(upstream.at);
    let reply = ask(endpoint.v4.unwrap(), "secret.evil.example.").await;
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    let searched = ask(endpoint.v4.unwrap(), "api.example.corp.example.").await;
    assert_eq!(searched.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(upstream.udp.load(Ordering::SeqCst), 0);
    assert_eq!(upstream.tcp.load(Ordering::SeqCst), 0);
    let reports = scene.daemon.book.reports.lock().unwrap();
    let names: Vec<&str> = reports.iter().map(|each| each.name.as_str()).collect();
    assert_eq!(names, ["secret.evil.example", "api.example.corp.example"]);
    assert!(scene.daemon.book.leases.lock().unwrap().is_empty());
}

#[tokio::test]
async fn nothing_of_the_agents_bytes_reaches_the_upstream() {
    let upstream = upstream(honest()).await;
    let (_scene, endpoint) = simple(upstream.at);
    for _ in 0..8 {
        ask(endpoint.v4.unwrap(), "API.EXAMPLE.").await;
    }
    let asked = upstream.asked.lock().unwrap();
    let spelled: Vec<String> = asked
        .iter()
        .map(|each| each.queries[0].name().to_ascii())
        .collect();
    // Ten letters of random case, eight times: alike with a chance of one in 2^70.
    assert!(
        spelled.windows(2).any(|pair| pair[0] != pair[1]),
        "{spelled:?}"
    );
    let ids: Vec<u16> = asked.iter().map(|each| each.metadata.id).collect();
    assert!(ids.windows(2).any(|pair| pair[0] != pair[1]), "{ids:?}");
}

#[tokio::test]
async fn without_leases_in_force_there_is_no_answer() {
    let upstream = upstream(honest()).await;
    let tables = agent("a", &["api.example"]);
    let scene = scene(
        vec![Source::At(upstream.at)],
        Arc::new(move |_| Some(Arc::clone(&tables))),
        Arc::new(|_| Err(LeaseError::Failed("the map is full".into()))),
    );
    let endpoint = scene.server.listen(Sockets::open().unwrap()).unwrap();
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert!(reply.answers.is_empty());
}

#[tokio::test]
async fn a_scope_that_changed_meanwhile_is_judged_again() {
    let upstream = upstream(honest()).await;
    let (old, new) = (agent("a", &["api.example"]), agent("a", &["other.example"]));
    let (before, after) = (Arc::clone(&old), Arc::clone(&new));
    let scene = scene(
        vec![Source::At(upstream.at)],
        Arc::new(move |_| Some(Arc::clone(&before))),
        Arc::new(move |tables| {
            if Arc::ptr_eq(tables, &after) {
                Ok(())
            } else {
                Err(LeaseError::Changed(Arc::clone(&after)))
            }
        }),
    );
    let endpoint = scene.server.listen(Sockets::open().unwrap()).unwrap();
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    assert!(reply.answers.is_empty());
    assert!(scene.daemon.book.leases.lock().unwrap().is_empty());
}

#[tokio::test]
async fn who_comes_by_himself_learns_nothing() {
    let upstream = upstream(honest()).await;
    let scene = scene(
        vec![Source::At(upstream.at)],
        Arc::new(|_| None),
        Arc::new(|_| Ok(())),
    );
    let endpoint = scene.server.listen(Sockets::open().unwrap()).unwrap();
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    assert_eq!(upstream.udp.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_cut_answer_is_asked_for_over_tcp() {
    let upstream = upstream(Arc::new(|question, transport| {
        let mut reply = truth(question);
        if transport == Transport::Udp {
            reply = reply.truncate();
        }
        vec![reply.to_vec().unwrap()]
    }))
    .await;
    let (_scene, endpoint) = simple(upstream.at);
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
    assert_eq!(upstream.tcp.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn guesses_are_not_taken_for_the_answer() {
    let upstream = upstream(Arc::new(|question, _| {
        let lie = |change: &dyn Fn(&mut Message)| {
            let mut lie = truth(question);
            lie.answers[0].data = RData::A(A(Ipv4Addr::new(198, 51, 100, 66)));
            change(&mut lie);
            lie.to_vec().unwrap()
        };
        let elsewhere = Query::query(Name::from_ascii("b.example.").unwrap(), RecordType::A);
        vec![
            lie(&|lie| lie.metadata.id ^= 1),
            lie(&|lie| lie.queries = vec![elsewhere.clone()]),
            lie(&|lie| lie.metadata.message_type = MessageType::Query),
            b"nonsense".to_vec(),
            truth(question).to_vec().unwrap(),
        ]
    }))
    .await;
    let (_scene, endpoint) = simple(upstream.at);
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
    assert_eq!(upstream.tcp.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_answer_in_another_case_is_asked_for_over_tcp() {
    let upstream = upstream(Arc::new(|question, transport| {
        let mut reply = truth(question);
        if transport == Transport::Udp {
            reply.answers[0].data = RData::A(A(Ipv4Addr::new(198, 51, 100, 66)));
            // As a blind guess has it: the case of every letter is wrong.
            let flipped: String = question.queries[0]
                .name()
                .to_ascii()
                .chars()
                .map(|c| match c {
                    'a'..='z' => c.to_ascii_uppercase(),
                    _ => c.to_ascii_lowercase(),
                })
                .collect();
            let name = Name::from_ascii(flipped).unwrap();
            reply.queries = vec![Query::query(name, RecordType::A)];
        }
        vec![reply.to_vec().unwrap()]
    }))
    .await;
    let (_scene, endpoint) = simple(upstream.at);
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
    assert_eq!(upstream.tcp.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_flood_of_lies_ends_over_tcp() {
    let upstream = upstream(Arc::new(|question, transport| {
        let mut reply = truth(question);
        if transport == Transport::Udp {
            reply.metadata.id ^= 1;
            return vec![reply.to_vec().unwrap(); 50];
        }
        vec![reply.to_vec().unwrap()]
    }))
    .await;
    let (_scene, endpoint) = simple(upstream.at);
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
}

#[tokio::test]
async fn a_silent_upstream_is_told_before_resolvers_give_up() {
    let upstream = upstream(Arc::new(|_, _| Vec::new())).await;
    let (_scene, endpoint) = simple(upstream.at);
    let started = Instant::now();
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert!(
        started.elapsed() < Duration::from_millis(4_900),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn the_next_upstream_is_asked_when_the_first_is_gone() {
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let nobody = gone.local_addr().unwrap();
    drop(gone);
    let upstream = upstream(honest()).await;
    let tables = agent("a", &["api.example"]);
    let scene = scene(
        vec![Source::At(nobody), Source::At(upstream.at)],
        Arc::new(move |_| Some(Arc::clone(&tables))),
        Arc::new(|_| Ok(())),
    );
    let endpoint = scene.server.listen(Sockets::open().unwrap()).unwrap();
    let started = Instant::now();
    let reply = ask(endpoint.v4.unwrap(), "api.example.").await;
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
    assert!(
        started.elapsed() < Duration::from_millis(700),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn one_agents_flood_does_not_slow_another() {
    // Never answers what the flooding agent asks for.
    let upstream = upstream(Arc::new(|question, _| {
        let name = question.queries[0].name().to_ascii().to_ascii_lowercase();
        if name.contains("slow") {
            return Vec::new();
        }
        vec![truth(question).to_vec().unwrap()]
    }))
    .await;
    let (flooder, quiet) = (
        agent("flooder", &["**.slow.example"]),
        agent("quiet", &["api.example"]),
    );
    let first: Arc<Mutex<Option<u64>>> = Arc::default();
    let seen = Arc::clone(&first);
    let scene = scene(
        vec![Source::At(upstream.at)],
        Arc::new(move |client| {
            let flooding = *seen.lock().unwrap() == Some(client.endpoint.0);
            Some(Arc::clone(if flooding { &flooder } else { &quiet }))
        }),
        Arc::new(|_| Ok(())),
    );
    let flooded = scene.server.listen(Sockets::open().unwrap()).unwrap();
    let calm = scene.server.listen(Sockets::open().unwrap()).unwrap();
    *first.lock().unwrap() = Some(flooded.id.0);
    let socket = client(flooded.v4.unwrap()).await;
    let flood = tokio::spawn(async move {
        for number in 0..20_000_u32 {
            let name = format!("n{number}.slow.example.");
            // A full buffer is the flooder's own trouble.
            let _full = socket.send(&question(&name)).await;
            if number % 50 == 0 {
                tokio::task::yield_now().await;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let started = Instant::now();
        let reply = ask(calm.v4.unwrap(), "api.example.").await;
        slowest = slowest.max(started.elapsed());
        assert_eq!(addresses(&reply), ["203.0.113.7"]);
    }
    flood.abort();
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    assert!(scene.server.unanswered().busy > 0, "the flood met no bound");
}

#[tokio::test]
async fn hostile_messages_are_refused_or_dropped_and_counted() {
    let upstream = upstream(honest()).await;
    let (scene, endpoint) = simple(upstream.at);
    let socket = client(endpoint.v4.unwrap()).await;
    let good = question("api.example.");
    let mut response = good.clone();
    response[2] |= 0x80;
    for silent in [&[][..], &[0; 11], &response] {
        socket.send(silent).await.unwrap();
    }
    let mut two = good.clone();
    two[5] = 2;
    let mut many = good.clone();
    many[4] = 0xff;
    for refused in [&good[..20], &two, &many, &[0xff; 64][..]] {
        socket.send(refused).await.unwrap();
    }
    // Longer than any question: cut by the socket, and then no message.
    let mut long = good.clone();
    long[11] = 2;
    long.resize(9_000, 0xc0);
    socket.send(&long).await.unwrap();
    socket.send(&good).await.unwrap();
    loop {
        let reply = receive(&socket).await;
        if reply.metadata.response_code == ResponseCode::NoError {
            assert_eq!(addresses(&reply), ["203.0.113.7"]);
            break;
        }
    }
    assert!(scene.server.unanswered().malformed >= 7);
}

#[tokio::test]
async fn what_came_of_lookups_is_counted() {
    let upstream = upstream(honest()).await;
    let (scene, endpoint) = simple(upstream.at);
    let at = endpoint.v4.unwrap();
    for name in [
        "api.example.",
        "api.example.",
        "evil.example.",
        "x.corp.example.",
    ] {
        ask(at, name).await;
    }
    let tally = scene.server.tally();
    let each: Vec<_> = tally.each().collect();
    assert_eq!(
        each,
        [
            ("a", Came::Answered, 2),
            ("a", Came::Refused("name"), 1),
            ("a", Came::Refused("search"), 1),
        ]
    );
    assert_eq!(tally.upstream.counts.iter().sum::<u64>(), 2);
    assert_eq!(tally.guard.counts.iter().sum::<u64>(), 4);
    scene.server.forget("a");
    assert_eq!(scene.server.tally().each().count(), 0);
}

#[tokio::test]
async fn a_closed_endpoint_refuses_at_once() {
    let upstream = upstream(honest()).await;
    let (_scene, endpoint) = simple(upstream.at);
    let at = endpoint.v4.unwrap();
    ask(at, "api.example.").await;
    drop(endpoint);
    let deadline = Instant::now() + SOON;
    loop {
        let socket = client(at).await;
        let sent = socket.send(&question("api.example.")).await;
        let mut buffer = [0; 512];
        let heard = timeout(Duration::from_millis(200), socket.recv(&mut buffer)).await;
        let refused = sent.is_err() || matches!(heard, Ok(Err(_)));
        if refused {
            break;
        }
        assert!(Instant::now() < deadline, "still answered, or silent");
    }
    assert!(TcpStream::connect(at).await.is_err());
}

/// A process that keeps a network namespace of its own open; killed when dropped.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Self {
        let mut child = std::process::Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo made && exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(line, "made\n");
        Self(child)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    fn open(&self) -> std::os::fd::OwnedFd {
        std::fs::File::open(self.path()).unwrap().into()
    }

    fn run(&self, command: &[&str]) -> bool {
        std::process::Command::new("nsenter")
            .arg(format!("--net={}", self.path()))
            .args(command)
            .status()
            .unwrap()
            .success()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn an_endpoint_is_in_the_namespace_that_it_was_opened_in() {
    let upstream = upstream(honest()).await;
    let tables = agent("a", &["api.example"]);
    let scene = scene(
        vec![Source::At(upstream.at)],
        Arc::new(move |_| Some(Arc::clone(&tables))),
        Arc::new(|_| Ok(())),
    );
    let namespace = Namespace::new();
    assert!(namespace.run(&["ip", "link", "set", "lo", "up"]));
    let sockets = Sockets::open_in(namespace.open()).unwrap();
    let endpoint = scene.server.listen(sockets).unwrap();
    let at = endpoint.v4.unwrap();
    // Nobody hears it out here.
    assert!(TcpStream::connect(at).await.is_err());
    let path = namespace.path();
    let reply = tokio::task::spawn_blocking(move || {
        let netns = std::fs::File::open(path).unwrap();
        std::thread::spawn(move || {
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket.send_to(&question("api.example."), at).unwrap();
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).unwrap();
            Message::from_vec(&buffer[..length]).unwrap()
        })
        .join()
        .unwrap()
    })
    .await
    .unwrap();
    assert_eq!(addresses(&reply), ["203.0.113.7"]);
}

/// Many lookups, one after the other and side by side: none is lost. What the guard adds to one, as
/// a ratio in this run, and how many it takes a second are printed and not judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lookup_of_many_is_lost() {
    let upstream = upstream(honest()).await;
    let (_scene, endpoint) = simple(upstream.at);
    let at = endpoint.v4.unwrap();
    let (mut direct, mut guarded) = (Vec::new(), Vec::new());
    let (asks, answers) = (client(upstream.at).await, client(at).await);
    for _ in 0..1_000 {
        for (socket, times) in [(&asks, &mut direct), (&answers, &mut guarded)] {
            let started = Instant::now();
            socket.send(&question("api.example.")).await.unwrap();
            receive(socket).await;
            times.push(started.elapsed());
        }
    }
    direct.sort_unstable();
    guarded.sort_unstable();
    let (direct, guarded) = (direct[500], guarded[500]);
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..32 {
        tasks.spawn(async move {
            let socket = client(at).await;
            let mut answered = 0;
            for _ in 0..100 {
                socket.send(&question("api.example.")).await.unwrap();
                answered += addresses(&receive(&socket).await).len();
            }
            answered
        });
    }
    let answered: usize = tasks.join_all().await.into_iter().sum();
    assert_eq!(answered, 3_200, "one address for each lookup");
    let rate = 3_200.0 / started.elapsed().as_secs_f64();
    let ratio = guarded.as_secs_f64() / direct.as_secs_f64();
    println!("direct {direct:?}, guarded {guarded:?}, ratio {ratio:.2}, {rate:.0} lookups/s");
}
