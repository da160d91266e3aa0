//! Whether the DNS guard answers: the daemon asks it, once a second, at each endpoint in its own
//! network namespace. A socket that is open says nothing of whether anybody reads it.
//!
//! What is asked is no lookup (an operation that the guard does not have), so that it is answered at
//! once, and never taken for an agent's. UDP is asked, over IPv4 and IPv6; TCP and endpoints in other
//! namespaces are not.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    panic::resume_unwind,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    core::Core,
    differences::{Cure, Found},
};
use crate::dns::endpoint::{HEADER, STATUS};

/// How often each endpoint is asked.
const EVERY: Duration = Duration::from_secs(1);
/// How long an answer may take: longer than the daemon's task takes to come round.
const PATIENCE: Duration = Duration::from_millis(1_200);
/// An endpoint that was asked so often in vain does not answer.
const IN_VAIN: u32 = 2;
/// Endpoints asked at a time: their answers must fit into a socket's buffer.
const AT_ONCE: usize = 64;

/// Asks, and knows who did not answer.
#[derive(Debug, Default)]
pub struct SelfAsked {
    shared: Arc<Shared>,
    is_started: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// By the endpoint's number.
    doors: Mutex<BTreeMap<u64, Door>>,
    /// Questions that the guard has dropped because an agent had too many open: it was there.
    busy: AtomicU64,
    /// How often the daemon's task came round. While it is held up the guard is as well, and that is
    /// another matter.
    turns: AtomicU64,
}

/// An endpoint.
#[derive(Clone, Debug)]
struct Door {
    agent: u32,
    at: Vec<SocketAddr>,
    heard: Option<Instant>,
    in_vain: u32,
}

/// An endpoint that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silent {
    /// Whose.
    pub agent: u32,
    /// Where it is.
    pub at: Vec<SocketAddr>,
    /// How long ago it answered last.
    pub heard: Option<Duration>,
}

// === impl Silent ===

impl Silent {
    /// Where, and since when.
    pub fn said(&self) -> String {
        let at: Vec<String> = self.at.iter().map(ToString::to_string).collect();
        let since = match self.heard {
            Some(heard) => format!("for {} s", heard.as_secs()),
            None => "yet".to_owned(),
        };
        format!(
            "no answer at {} {since}, though the daemon itself asked",
            at.join(" and ")
        )
    }
}

// === impl SelfAsked ===

impl SelfAsked {
    /// An endpoint was opened.
    pub fn add(&mut self, endpoint: u64, agent: u32, at: Vec<SocketAddr>) {
        let door = Door {
            agent,
            at,
            heard: None,
            in_vain: 0,
        };
        self.shared.doors().insert(endpoint, door);
        if !self.is_started {
            let shared = Arc::downgrade(&self.shared);
            let started = thread::Builder::new()
                .name("self-asked".to_owned())
                .spawn(move || go_on(&shared));
            match started {
                Ok(_) => self.is_started = true,
                Err(error) => warn!(message = "The DNS guard is not asked.", %error),
            }
        }
    }

    /// It was closed.
    pub fn remove(&self, endpoint: u64) {
        self.shared.doors().remove(&endpoint);
    }

    /// Where an agent's endpoint is.
    pub fn at(&self, agent: u32) -> Vec<SocketAddr> {
        let doors = self.shared.doors();
        let of_agent = doors.values().filter(|door| door.agent == agent);
        of_agent.flat_map(|door| door.at.clone()).collect()
    }

    /// Once a second: how many questions the guard has dropped, as of now.
    pub fn note_busy(&self, busy: u64) {
        self.shared.busy.store(busy, Ordering::Relaxed);
        self.shared.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// Those that do not answer.
    pub fn silent(&self) -> Vec<Silent> {
        let doors = self.shared.doors();
        let silent = doors.values().filter(|door| door.in_vain >= IN_VAIN);
        silent
            .map(|door| Silent {
                agent: door.agent,
                at: door.at.clone(),
                heard: door.heard.map(|heard| heard.elapsed()),
            })
            .collect()
    }

    /// Age of the oldest of the last answers; none where an endpoint has not been asked yet.
    pub fn oldest(&self) -> Option<Duration> {
        let doors = self.shared.doors();
        let ages: Option<Vec<Duration>> = doors
            .values()
            .map(|door| door.heard.map(|heard| heard.elapsed()))
            .collect();
        ages?.into_iter().max()
    }
}

// === impl Shared ===

impl Shared {
    fn doors(&self) -> MutexGuard<'_, BTreeMap<u64, Door>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks each once.
    fn round(&self) {
        let doors: Vec<(u64, Vec<SocketAddr>)> = self
            .doors()
            .iter()
            .map(|(endpoint, door)| (*endpoint, door.at.clone()))
            .collect();
        let all: Vec<SocketAddr> = doors.iter().flat_map(|(_, at)| at.clone()).collect();
        let counts = || [&self.busy, &self.turns].map(|count| count.load(Ordering::Relaxed));
        let before = counts();
        let silent: HashSet<SocketAddr> = match silent(&all, PATIENCE) {
            Ok(silent) => silent.into_iter().collect(),
            Err(error) => {
                // Who cannot ask knows nothing, which is not the same as silence; but it is no
                // answer either.
                warn!(message = "The DNS guard cannot be asked.", %error);
                all.into_iter().collect()
            }
        };
        let [busy, turns] = counts();
        let excused = busy != before[0] || turns == before[1];
        let mut known = self.doors();
        for (endpoint, at) in doors {
            let Some(door) = known.get_mut(&endpoint) else {
                continue;
            };
            if !at.iter().any(|at| silent.contains(at)) {
                door.heard = Some(Instant::now());
                door.in_vain = 0;
            } else if !excused {
                door.in_vain += 1;
            }
        }
    }
}

fn go_on(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        shared.round();
        drop(shared);
        thread::sleep(EVERY);
    }
}

/// Which of these do not answer within `patience`.
///
/// # Errors
/// When there is no socket to ask by.
pub fn silent(at: &[SocketAddr], patience: Duration) -> io::Result<Vec<SocketAddr>> {
    let families = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    // Both at once: else whoever is silent on both would be waited for twice.
    thread::scope(|scope| {
        let asking = families.map(|local| scope.spawn(move || silent_on(local, at, patience)));
        let mut silent = Vec::new();
        for asking in asking {
            silent.extend(asking.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        Ok(silent)
    })
}

fn silent_on(local: IpAddr, at: &[SocketAddr], patience: Duration) -> io::Result<Vec<SocketAddr>> {
    let theirs: Vec<SocketAddr> = at
        .iter()
        .filter(|at| at.is_ipv4() == local.is_ipv4())
        .copied()
        .collect();
    let mut silent = Vec::new();
    for some in theirs.chunks(AT_ONCE) {
        silent.extend(silent_of(local, some, patience)?);
    }
    Ok(silent)
}

fn silent_of(
    local: IpAddr,
    at: &[SocketAddr],
    patience: Duration,
) -> io::Result<HashSet<SocketAddr>> {
    let socket = UdpSocket::bind((local, 0))?;
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    let mut question = [0; HEADER];
    question[..2].copy_from_slice(&id);
    question[2] = STATUS;
    for at in at {
        // What cannot be sent is not answered.
        drop(socket.send_to(&question, at));
    }
    let until = Instant::now() + patience;
    let mut waiting: HashSet<SocketAddr> = at.iter().copied().collect();
    let mut answer = [0; 512];
    while !waiting.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left))?;
        if let Ok((length, from)) = socket.recv_from(&mut answer) {
            let is_answer = length >= HEADER && answer[..2] == id && answer[2] & 0x80 != 0;
            if is_answer {
                waiting.remove(&from);
            }
        }
    }
    Ok(waiting)
}

impl Core {
    /// Endpoints that do not answer, as differences.
    pub(super) fn guard_differences(&self, all: &mut Vec<(Found, Cure)>) {
        for silent in self.names.asked.silent() {
            let id = self.enforcer.id_of(silent.agent).map(str::to_owned);
            let difference = Found {
                kind: "missing",
                what: format!(
                    "DNS guard of {}",
                    id.as_deref().unwrap_or("an unknown agent")
                ),
                agent: id,
                root: None,
                found: silent.said(),
                wanted: "an answer, whatever it says".to_owned(),
                remedy: "closes its endpoint and opens another, which is asked in its turn"
                    .to_owned(),
            };
            all.push((difference, Cure::Endpoint(silent.agent)));
        }
    }

    /// Opens an agent's endpoint anew.
    pub(super) fn reopen_endpoint(&mut self, agent: u32) -> Result<(), String> {
        self.names.close_own(&mut self.enforcer, agent);
        self.tend_endpoints(None);
        if self.names.asked.at(agent).is_empty() {
            let why = self.problems.get("endpoints").cloned();
            return Err(why.unwrap_or_else(|| "no endpoint could be opened".to_owned()));
        }
        // Whether that answers is asked within the second: the guard runs on this very thread.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers `count` questions.
    fn guard(count: usize) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        thread::spawn(move || {
            let mut bytes = [0; 64];
            for _ in 0..count {
                let (length, from) = socket.recv_from(&mut bytes).unwrap();
                bytes[2] |= 0x80;
                socket.send_to(&bytes[..length], from).unwrap();
            }
            thread::sleep(Duration::from_secs(60));
        });
        at
    }

    #[test]
    fn who_does_not_answer_is_told_after_two_questions() {
        let (alive, deaf) = (guard(4), guard(0));
        let short = Duration::from_millis(200);
        assert_eq!(silent(&[alive, deaf], short).unwrap(), [deaf]);

        let shared = Shared::default();
        for (endpoint, at) in [(1, alive), (2, deaf)] {
            let door = Door {
                agent: endpoint as u32,
                at: vec![at],
                heard: None,
                in_vain: 0,
            };
            shared.doors().insert(endpoint, door);
        }
        let asked = SelfAsked {
            shared: Arc::new(shared),
            is_started: true,
        };
        assert_eq!(asked.at(2), [deaf]);
        // The daemon's task is held up: that is not the guard's silence.
        asked.shared.round();
        let round = || {
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(Duration::from_millis(100));
                    asked.note_busy(0);
                });
                asked.shared.round();
            });
        };
        round();
        assert!(asked.silent().is_empty());
        round();
        let silent = asked.silent();
        assert_eq!(silent.len(), 1);
        assert_eq!((silent[0].agent, silent[0].heard), (2, None));
        assert!(asked.shared.doors()[&1].heard.is_some());
        asked.remove(2);
        assert!(asked.silent().is_empty());
        assert!(asked.oldest().is_some());
    }
}
