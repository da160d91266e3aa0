//! Lookups as resolvers make them: unconnected (musl), connected (glibc, Go) and over TCP. The bytes
//! of questions and answers are written and read here by hand, as little as it takes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _},
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{Reply, socket::Socket};

/// How a question is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Manner {
    /// `sendto` on a UDP socket.
    Unconnected,
    /// `connect` and `send` on a UDP socket.
    Connected,
    /// TCP.
    Tcp,
}

/// A record type.
pub const A: u16 = 1;
/// A record type.
pub const AAAA: u16 = 28;
/// A record type.
pub const TXT: u16 = 16;
/// A record type.
pub const ANY: u16 = 255;

/// A question: id 0x1234, recursion wanted, EDNS with 1232 octets so that reasons come back.
pub fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 1];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&[0, 1]);
    // OPT (RFC 6891, section 6.1.2).
    bytes.extend_from_slice(&[0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// 0 no error, 3 no such name, 5 refused.
    pub code: u8,
    /// Whether it was cut.
    pub truncated: bool,
    /// Addresses, in order.
    pub addresses: Vec<IpAddr>,
    /// Text of the Extended DNS Error (RFC 8914).
    pub reason: String,
}

/// Reads an answer; None when it is none.
pub fn read(bytes: &[u8]) -> Option<Said> {
    let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let mut said = Said {
        code: bytes.get(3)? & 0x0f,
        truncated: bytes.get(2)? & 0x02 != 0,
        ..Said::default()
    };
    if word(0)? != 0x1234 || bytes.get(2)? & 0x80 == 0 {
        return None;
    }
    let records = usize::from(word(6)?) + usize::from(word(8)?) + usize::from(word(10)?);
    let mut at = 12;
    for _ in 0..word(4)? {
        at = skip_name(bytes, at)? + 4;
    }
    for _ in 0..records {
        at = skip_name(bytes, at)?;
        let (kind, length) = (word(at)?, usize::from(word(at + 8)?));
        let data = bytes.get(at + 10..at + 10 + length)?;
        match kind {
            A => said
                .addresses
                .push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            AAAA => said
                .addresses
                .push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            // One option is all that the guard puts there.
            41 if data.get(..2) == Some(&[0, 15]) => {
                said.reason = String::from_utf8_lossy(data.get(6..)?).into_owned();
            }
            _ => {}
        }
        at += 10 + length;
    }
    Some(said)
}

fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += usize::from(length) + 1,
        }
    }
}

/// Asks `via` and waits for the answer; its bytes, and the address that it came from.
pub fn ask(
    domain: i32,
    manner: Manner,
    via: SocketAddr,
    question: &[u8],
    timeout_ms: u64,
) -> nix::Result<(Vec<u8>, SocketAddr, SocketAddr)> {
    let kind = match manner {
        Manner::Tcp => libc::SOCK_STREAM,
        Manner::Unconnected | Manner::Connected => libc::SOCK_DGRAM,
    };
    let socket = Socket::open(domain, kind, 0)?;
    match manner {
        Manner::Unconnected => {
            socket.send_to(via, question, 0)?;
            let (bytes, from) = socket.recv_from(timeout_ms)?;
            Ok((bytes, from, from))
        }
        Manner::Connected => {
            socket.connect(via, timeout_ms)?;
            let peer = socket.peer_addr()?;
            socket.send(question)?;
            let (bytes, from) = socket.recv_from(timeout_ms)?;
            Ok((bytes, from, peer))
        }
        Manner::Tcp => {
            socket.connect(via, timeout_ms)?;
            let peer = socket.peer_addr()?;
            let length = u16::try_from(question.len()).map_err(|_| Errno::EMSGSIZE)?;
            let framed = [&length.to_be_bytes(), question].concat();
            socket.send(&framed)?;
            let mut bytes = Vec::new();
            loop {
                let more = socket.recv(timeout_ms)?;
                if more.is_empty() {
                    return Err(Errno::ECONNRESET);
                }
                bytes.extend(more);
                if let Some(head) = bytes.first_chunk::<2>() {
                    let length = usize::from(u16::from_be_bytes(*head));
                    if let Some(message) = bytes.get(2..2 + length) {
                        return Ok((message.to_vec(), peer, peer));
                    }
                }
            }
        }
    }
}

/// One lookup: the value is the answer's code, the data its bytes, the address where it came from.
pub fn one(
    domain: i32,
    manner: Manner,
    via: SocketAddr,
    question: &[u8],
    timeout_ms: u64,
) -> nix::Result<Reply> {
    let (data, from, peer) = ask(domain, manner, via, question, timeout_ms)?;
    if from != peer {
        return Err(Errno::EADDRNOTAVAIL);
    }
    let code = read(&data).ok_or(Errno::EBADMSG)?.code;
    Ok(Reply {
        value: i64::from(code),
        data,
        addr: Some(from),
        ..Reply::default()
    })
}

/// Looks each name up and connects to its address at once. The value is how often that went well;
/// the data says of the first that did not which it was and why.
pub fn many(via: SocketAddr, names: &[String], port: u16) -> Reply {
    let mut reply = Reply::default();
    for name in names {
        match resolve_and_connect(via, name, port) {
            Ok(()) => reply.value += 1,
            Err(why) if reply.data.is_empty() => reply.data = format!("{name}: {why}").into_bytes(),
            Err(_) => {}
        }
    }
    reply
}

fn resolve_and_connect(via: SocketAddr, name: &str, port: u16) -> Result<(), String> {
    let asked = question(name, A);
    let (bytes, ..) = ask(libc::AF_INET, Manner::Connected, via, &asked, 5000)
        .map_err(|errno| format!("lookup: {errno}"))?;
    let said = read(&bytes).ok_or("no answer")?;
    let addr = *said
        .addresses
        .first()
        .ok_or_else(|| format!("code {}: {}", said.code, said.reason))?;
    let socket = Socket::open(libc::AF_INET, libc::SOCK_STREAM, 0).map_err(|e| e.to_string())?;
    socket
        .connect(SocketAddr::new(addr, port), 5000)
        .map_err(|errno| format!("connect to {addr}: {errno}"))
}

/// Has so many `askers` at a time ask without pause for `time`; how many answers came, and the
/// median and 99th percentile of their times in microseconds.
pub fn rate(via: SocketAddr, name: &str, time: Duration, askers: usize) -> nix::Result<Reply> {
    let asked = question(name, A);
    let until = Instant::now() + time;
    let asker = || -> nix::Result<Vec<u128>> {
        let socket = Socket::open(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        socket.connect(via, 1000)?;
        let mut times = Vec::new();
        while Instant::now() < until {
            let began = Instant::now();
            socket.send(&asked)?;
            socket.recv(5000)?;
            times.push(began.elapsed().as_micros());
        }
        Ok(times)
    };
    let all: nix::Result<Vec<_>> = thread::scope(|scope| {
        let askers: Vec<_> = (0..askers).map(|_| scope.spawn(asker)).collect();
        let ended = askers.into_iter().map(|asker| asker.join());
        ended
            .map(|times| times.unwrap_or(Err(Errno::EIO)))
            .collect()
    });
    let mut times: Vec<u128> = all?.into_iter().flatten().collect();
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(0);
    Ok(Reply {
        value: i64::try_from(times.len()).unwrap_or(i64::MAX),
        data: format!("{} {}", at(50), at(99)).into_bytes(),
        ..Reply::default()
    })
}

/// As Go's resolver does (net/dnsclient_unix.go): both families at once, each on a connected UDP
/// socket of its own, EDNS with 1232 octets, and TCP where the answer was cut.
pub fn like_go(via: SocketAddr, name: &str, timeout_ms: u64) -> Reply {
    let domain = if via.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let one = |kind| -> nix::Result<Reply> {
        let asked = question(name, kind);
        let by = |manner, value| -> nix::Result<Reply> {
            let (data, from, peer) = ask(domain, manner, via, &asked, timeout_ms)?;
            let addr = (from == peer).then_some(from);
            Ok(Reply {
                value,
                data,
                addr,
                ..Reply::default()
            })
        };
        let over_udp = by(Manner::Connected, 0)?;
        let cut = read(&over_udp.data).is_some_and(|said| said.truncated);
        if cut {
            by(Manner::Tcp, 1)
        } else {
            Ok(over_udp)
        }
    };
    let failed = |errno: Errno| Reply {
        errno: errno as i32,
        ..Reply::default()
    };
    let replies = thread::scope(|scope| {
        let both = [A, AAAA].map(|kind| scope.spawn(move || one(kind)));
        let ended = both.map(|one| one.join().unwrap_or(Err(Errno::EIO)));
        ended.map(|reply| reply.unwrap_or_else(failed)).to_vec()
    });
    Reply {
        replies,
        ..Reply::default()
    }
}

/// The first address that the C library (musl, in this binary) finds for a host.
pub fn by_libc(host: &str) -> nix::Result<Reply> {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the resolver that is tested, in an agent's place"
    )]
    let found = (host, 0).to_socket_addrs();
    let first = found.ok().and_then(|mut found| found.next());
    Ok(Reply {
        addr: Some(first.ok_or(Errno::ENOENT)?),
        ..Reply::default()
    })
}
