//! Asking a resolver: UDP first, TCP where that is not enough or not to be trusted.
//!
//! Against answers that somebody else sends: a socket of its own for each question (so the port is
//! the kernel's random choice), connected (so only the resolver's address is heard), a random id,
//! letters of random case. What does not fit is not taken; when too much does not fit, the question
//! goes over TCP, where nobody can guess. Nothing is cached: that is the resolver's business, and a
//! cache would tell one agent what another has asked.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout, timeout_at},
};

use super::message::{self, Mismatch, UPSTREAM_UDP};

/// How long an answer may take in all. Resolvers on the agent's side give up after five seconds.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// How long the first resolver is waited for before the next is asked too; doubles.
const FIRST_WAIT: Duration = Duration::from_millis(800);
/// Rounds over all resolvers.
const ROUNDS: u32 = 3;
/// Answers that do not fit, after which the question goes over TCP.
const MAX_STRAYS: usize = 8;

/// Asks `servers` in turn for records of `kind` of `name`.
///
/// # Errors
/// Why there is no answer, in words.
pub async fn ask(servers: &[SocketAddr], name: &Name, kind: RecordType) -> Result<Message, String> {
    let deadline = Instant::now() + PATIENCE;
    let mut wait = FIRST_WAIT;
    let mut last = "no resolver is configured".to_owned();
    for _ in 0..ROUNDS {
        for server in servers {
            let until = (Instant::now() + wait).min(deadline);
            match one(*server, name, kind, until, deadline).await {
                Ok(message) => {
                    let code = message.metadata.response_code;
                    if matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
                        return Ok(message);
                    }
                    // The next may know better.
                    last = format!("{server} says {}", code.to_str());
                }
                Err(why) => last = format!("{server}: {why}"),
            }
            if Instant::now() >= deadline {
                return Err(last);
            }
        }
        wait = wait.saturating_mul(2);
    }
    Err(last)
}

/// Asks one resolver. UDP has until `until`, TCP until `deadline`.
async fn one(
    server: SocketAddr,
    name: &Name,
    kind: RecordType,
    until: Instant,
    deadline: Instant,
) -> Result<Message, String> {
    let mut spelled = name.clone();
    spelled.randomize_label_case();
    // The parser's own random number: there is no other source of them here.
    let id = Message::query().metadata.id;
    let question = message::question(id, &spelled, kind).map_err(|error| error.to_string())?;
    let by_udp = timeout_at(until, udp(server, &question, id, &spelled, kind)).await;
    match by_udp {
        Err(_elapsed) => Err("no answer in time".into()),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => {
            match timeout_at(deadline, tcp(server, &question, id, &spelled, kind)).await {
                Err(_elapsed) => Err("no answer over TCP in time".into()),
                Ok(Err(error)) => Err(format!("over TCP: {error}")),
                Ok(Ok(message)) => Ok(message),
            }
        }
    }
}

/// None when TCP has to be asked: the answer was cut, or what came back can't be trusted.
async fn udp(
    server: SocketAddr,
    question: &[u8],
    id: u16,
    name: &Name,
    kind: RecordType,
) -> io::Result<Option<Message>> {
    let local: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    // One octet more than was offered: what fills it was cut.
    let mut buffer = [0; UPSTREAM_UDP as usize + 1];
    for _ in 0..MAX_STRAYS {
        let length = socket.recv(&mut buffer).await?;
        if length == buffer.len() {
            return Ok(None);
        }
        let bytes = buffer.get(..length).unwrap_or_default();
        match message::answer(bytes, id, name, kind, true) {
            Ok(message) if message.metadata.truncation => return Ok(None),
            Ok(message) => return Ok(Some(message)),
            Err(Mismatch::Case) => return Ok(None),
            // A guess, or a late answer to another question: the right one may still come.
            Err(Mismatch::Other | Mismatch::Malformed) => {}
        }
    }
    Ok(None)
}

async fn tcp(
    server: SocketAddr,
    question: &[u8],
    id: u16,
    name: &Name,
    kind: RecordType,
) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    write(&mut stream, question).await?;
    let bytes = read(&mut stream).await?;
    message::answer(&bytes, id, name, kind, false)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Writes a message with its length before it (RFC 1035, section 4.2.2), in one piece.
///
/// # Errors
/// When the other end takes it not, or not in time.
pub(super) async fn write(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len())
        .map_err(|_too_long| io::Error::from(io::ErrorKind::InvalidInput))?;
    let framed = [&length.to_be_bytes(), bytes].concat();
    timeout(PATIENCE, stream.write_all(&framed))
        .await
        .map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Reads a message with its length before it.
///
/// # Errors
/// When the other end closes before, or fails.
pub(super) async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}
