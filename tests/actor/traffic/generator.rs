//! The sender: see the module above.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{errno::Errno, poll::PollTimeout};

use super::{Lane, PAYLOAD_LENGTH, Plan, Tally, Transport, Wish, payload, say, wall_ns, wish};
use crate::actor::socket::Socket;

/// A handshake on `lo` is done within the call. A SYN that was dropped is sent again after a second;
/// that would hide the drop, so it is looked for.
const CONNECT_MS: u64 = 5000;
/// A new process so often at most: forks are dear, and the point is that they are new.
const FORK_EVERY: Duration = Duration::from_millis(20);
/// `tcpi_total_retrans` in `struct tcp_info` (include/uapi/linux/tcp.h).
const TOTAL_RETRANS: usize = 100;

/// `remit-tests generate PLAN`.
pub fn serve(plan: &str) -> Result<ExitCode> {
    let plan: Plan = serde_json::from_str(plan).context("cannot read the plan")?;
    let mut lanes: Vec<Running<'_>> = plan.lanes.iter().map(Running::new).collect();
    let pause = Duration::from_micros(plan.pause_us);
    loop {
        match wish(PollTimeout::ZERO)? {
            Wish::None => {}
            Wish::Report => report(&lanes)?,
            // Nothing is sent after the last numbers.
            Wish::End => return report(&lanes).map(|()| ExitCode::SUCCESS),
        }
        let began = Instant::now();
        for lane in &mut lanes {
            lane.turn();
        }
        let pause = if plan.rest { began.elapsed() } else { pause };
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

fn report(lanes: &[Running<'_>]) -> Result<()> {
    say(&lanes.iter().map(|lane| &lane.tally).collect::<Vec<_>>())
}

struct Running<'a> {
    lane: &'a Lane,
    payload: [u8; PAYLOAD_LENGTH],
    socket: Option<Socket>,
    forked: Option<Instant>,
    tally: Tally,
}

impl<'a> Running<'a> {
    fn new(lane: &'a Lane) -> Self {
        Self {
            lane,
            payload: payload(&lane.label),
            socket: None,
            forked: None,
            tally: Tally::default(),
        }
    }

    /// One attempt, unless it is too early for the next process.
    fn turn(&mut self) {
        let result = match self.lane.transport {
            Transport::Connect => connect_once(self.lane, &self.payload, &mut self.tally.repeated),
            Transport::SendTo => self.send_to(),
            Transport::Connected | Transport::Stream => self.send_on(),
            Transport::NewConnect | Transport::NewSend => {
                if self.forked.is_some_and(|at| at.elapsed() < FORK_EVERY) {
                    return;
                }
                self.forked = Some(Instant::now());
                in_a_new_process(self.lane, &self.payload)
            }
        };
        self.tally.attempts += 1;
        match result {
            Ok(()) => self.tally.passed += 1,
            Err(errno) => {
                *self.tally.errors.entry(errno as i32).or_default() += 1;
                let now = wall_ns();
                let (first, _) = self.tally.failed_ns.unwrap_or((now, now));
                self.tally.failed_ns = Some((first, now));
            }
        }
    }

    fn send_to(&mut self) -> nix::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => self.socket.insert(open(self.lane, libc::SOCK_DGRAM)?),
        };
        socket.send_to(self.lane.to, &self.payload, 0).map(drop)
    }

    /// Connects first where there is no socket.
    fn send_on(&mut self) -> nix::Result<()> {
        let stream = self.lane.transport == Transport::Stream;
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                let kind = if stream {
                    libc::SOCK_STREAM
                } else {
                    libc::SOCK_DGRAM
                };
                let socket = open(self.lane, kind)?;
                if stream {
                    connect(&socket, self.lane, &mut self.tally.repeated)?;
                } else {
                    socket.connect(self.lane.to, CONNECT_MS)?;
                }
                self.socket.insert(socket)
            }
        };
        let sent = socket.send(&self.payload);
        // A connection that has ended is no use. One whose buffer is full may yet move, and so may
        // a connected UDP socket that was refused.
        if stream && !matches!(sent, Ok(_) | Err(Errno::EAGAIN)) {
            self.socket = None;
        }
        sent.map(drop)
    }
}

fn open(lane: &Lane, kind: i32) -> nix::Result<Socket> {
    Socket::open(lane.domain, kind, 0)
}

/// Connects, sends, and closes by a reset: ports in TIME-WAIT would run out.
fn connect_once(lane: &Lane, payload: &[u8], repeated: &mut u64) -> nix::Result<()> {
    let socket = open(lane, libc::SOCK_STREAM)?;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: a struct of two integers without padding, read as the bytes that it is.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const linger).cast::<u8>(), size_of::<libc::linger>())
    };
    socket.set_option(libc::SOL_SOCKET, libc::SO_LINGER, bytes)?;
    connect(&socket, lane, repeated)?;
    socket.send(payload).map(drop)
}

/// Connects by TCP, and counts it when a SYN was lost on the way.
fn connect(socket: &Socket, lane: &Lane, repeated: &mut u64) -> nix::Result<()> {
    socket.connect(lane.to, CONNECT_MS)?;
    if retransmitted(socket)? > 0 {
        *repeated += 1;
    }
    Ok(())
}

/// Segments that a connection has sent more than once.
fn retransmitted(socket: &Socket) -> nix::Result<u32> {
    let mut info = [0_u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the pointers describe `info` and `length`, which outlive the call.
    Errno::result(unsafe {
        libc::getsockopt(
            socket.fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    info.get(TOTAL_RETRANS..TOTAL_RETRANS + 4)
        .filter(|_| length as usize >= TOTAL_RETRANS + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or(Errno::ENODATA)
}

/// Forks; the child makes a socket, tries once and ends with the error number.
fn in_a_new_process(lane: &Lane, payload: &[u8]) -> nix::Result<()> {
    // SAFETY: a generator has one thread, so the child may do whatever the parent might.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            let result = if lane.transport == Transport::NewConnect {
                let mut repeated = 0;
                let result = connect_once(lane, payload, &mut repeated);
                // An exit code is all that there is to tell it by.
                result.and(if repeated > 0 {
                    Err(Errno::ETIMEDOUT)
                } else {
                    Ok(())
                })
            } else {
                open(lane, libc::SOCK_DGRAM)
                    .and_then(|socket| socket.send_to(lane.to, payload, 0).map(drop))
            };
            let code = result.err().map_or(0, |errno| errno as i32);
            // SAFETY: ends the child without running the parent's destructors a second time.
            unsafe { libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => match nix::sys::wait::waitpid(child, None)? {
            nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
            nix::sys::wait::WaitStatus::Exited(_, code) => Err(Errno::from_raw(code)),
            _ => Err(Errno::ECHILD),
        },
    }
}
