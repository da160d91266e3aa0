//! Traffic without pause. A *generator* inside the fence tries one lane after the other, for as
//! long as its input is open; an *ear* outside counts what arrives. Both keep numbers only, so they
//! run for hours in the memory of a minute, and answer `report` on standard input with one JSON
//! line. They judge nothing.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::fd::AsFd as _,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};

pub mod ear;
pub mod generator;

/// How a lane sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// A TCP connection each time.
    Connect,
    /// One TCP connection, kept; a new one when it ends.
    Stream,
    /// UDP by sendto.
    SendTo,
    /// UDP on a connected socket.
    Connected,
    /// A new process each time: TCP.
    NewConnect,
    /// A new process each time: UDP by sendto.
    NewSend,
}

/// Somewhere to send to, again and again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lane {
    /// What is claimed of it: `in`, `out`, …; the payload says it as well.
    pub label: String,
    /// Destination.
    pub to: SocketAddr,
    /// Domain of the socket: AF_INET6 with an IPv4 destination is a mapped one.
    pub domain: i32,
    /// How.
    pub transport: Transport,
}

/// What a generator is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Tried in turn.
    pub lanes: Vec<Lane>,
    /// Rest after each turn, in microseconds; 0 for none.
    pub pause_us: u64,
    /// Rest after each turn for as long as it took.
    pub rest: bool,
}

/// What an ear listens to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Spot {
    /// The label that its payloads must carry.
    pub label: String,
    /// Address.
    pub at: SocketAddr,
    /// TCP, or else UDP.
    pub tcp: bool,
}

/// What came of a lane's attempts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// System calls that decide: connects, sends.
    pub attempts: u64,
    /// Those that succeeded.
    pub passed: u64,
    /// Those that failed, by error number.
    pub errors: BTreeMap<i32, u64>,
    /// Connections that needed a second SYN, so one was lost.
    pub repeated: u64,
    /// Wall clock in nanoseconds of the first and of the last attempt that failed.
    pub failed_ns: Option<(u64, u64)>,
}

/// What arrived at a spot.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Heard {
    /// Datagrams, connections and reads on these.
    pub arrivals: u64,
    /// Those that carried another label.
    pub strange: u64,
    /// The first one since the last report: monotonic clock in nanoseconds; 0 for none.
    pub first_mono_ns: u64,
    /// The last one: wall clock in nanoseconds.
    pub last_wall_ns: u64,
    /// The same by the monotonic clock.
    pub last_mono_ns: u64,
}

/// What an ear heard.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ears {
    /// By spot, in the order given.
    pub spots: Vec<Heard>,
    /// Packets to addresses out of scope that were seen on `lo`.
    pub wire: u64,
}

/// `remit` and the label; so many bytes.
pub const PAYLOAD_LENGTH: usize = 16;

/// The payload of a label.
pub fn payload(label: &str) -> [u8; PAYLOAD_LENGTH] {
    let mut bytes = *b"remit...........";
    for (to, from) in bytes.iter_mut().skip(5).zip(label.bytes()) {
        *to = from;
    }
    bytes
}

/// The wall clock, in nanoseconds since the epoch.
pub fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// The monotonic clock, which all processes share.
pub fn mono_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec().cast_unsigned() * 1_000_000_000 + time.tv_nsec().cast_unsigned()
    })
}

/// What the driver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Nothing yet.
    None,
    /// The numbers so far.
    Report,
    /// The end.
    End,
}

/// Looks for an order on standard input, waiting no longer than `timeout`.
fn wish(timeout: PollTimeout) -> Result<Wish> {
    let stdin = std::io::stdin();
    match poll(
        &mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)],
        timeout,
    ) {
        Ok(0) | Err(nix::Error::EINTR) => return Ok(Wish::None),
        Ok(_) => {}
        Err(errno) => return Err(errno).context("cannot wait for an order"),
    }
    // Orders are one byte long, so that none is ever half there.
    let mut order = [0];
    match stdin.lock().read(&mut order)? {
        0 => Ok(Wish::End),
        _ if order == [REPORT] => Ok(Wish::Report),
        _ => bail!("no such order: {order:?}"),
    }
}

/// The order to report.
pub const REPORT: u8 = b'r';

fn say<T: Serialize>(numbers: &T) -> Result<()> {
    let mut out = std::io::stdout();
    serde_json::to_writer(&mut out, numbers)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_tell_their_label() {
        assert_eq!(&payload("in"), b"remitin.........");
        assert_ne!(payload("in"), payload("out"));
        assert_eq!(&payload("much too long a label"), b"remitmuch too lo");
    }
}
