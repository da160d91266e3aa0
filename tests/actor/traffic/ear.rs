//! The listener: see the module above. It also taps `lo` for packets to addresses out of scope, by
//! a filter in the kernel, so that a flood of others cannot push one out.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
        sockopt::RcvBufForce,
    },
};

use super::{Ears, Heard, PAYLOAD_LENGTH, Spot, Wish, mono_ns, payload, say, wall_ns, wish};

/// Connections kept at a time; the oldest goes first.
const CONNECTIONS: usize = 4096;
/// So that a burst of connects waits for us and not for a second SYN.
const BACKLOG: i32 = 4096;
const PACKET_OUTGOING: u8 = 4;

/// `remit-tests listen SPOTS`. Says `[]` once all are open.
pub fn serve(spots: &str) -> Result<ExitCode> {
    let spots: Vec<Spot> = serde_json::from_str(spots).context("cannot read the spots")?;
    let mut ear = Ear::open(&spots)?;
    say(&Vec::<u8>::new())?;
    loop {
        ear.wait()?;
        match wish(PollTimeout::ZERO)? {
            Wish::None => {}
            Wish::Report => {
                // What was sent before the question is in the answer.
                ear.hear()?;
                say(&ear.heard)?;
                for heard in &mut ear.heard.spots {
                    heard.first_mono_ns = 0;
                }
            }
            Wish::End => return Ok(ExitCode::SUCCESS),
        }
        ear.hear()?;
    }
}

enum Open {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

struct Ear {
    spots: Vec<(Open, [u8; PAYLOAD_LENGTH])>,
    streams: BTreeMap<u64, (usize, TcpStream)>,
    accepted: u64,
    tap: OwnedFd,
    heard: Ears,
}

impl Ear {
    fn open(spots: &[Spot]) -> Result<Self> {
        let opened = spots.iter().map(|spot| {
            let open = if spot.tcp {
                let listener = TcpListener::bind(spot.at)?;
                listener.set_nonblocking(true)?;
                // SAFETY: two numbers. A second listen(2) only changes the backlog.
                Errno::result(unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) })?;
                Open::Tcp(listener)
            } else {
                let socket = UdpSocket::bind(spot.at)?;
                socket.set_nonblocking(true)?;
                setsockopt(&socket, RcvBufForce, &(4 << 20))?;
                Open::Udp(socket)
            };
            Ok((open, payload(&spot.label)))
        });
        let opened: Result<Vec<_>> = opened.collect();
        Ok(Self {
            heard: Ears {
                spots: vec![Heard::default(); spots.len()],
                wire: 0,
            },
            spots: opened.context("cannot listen")?,
            streams: BTreeMap::new(),
            accepted: 0,
            tap: tap().context("cannot tap lo")?,
        })
    }

    /// Until there is something to do.
    fn wait(&self) -> Result<()> {
        let stdin = std::io::stdin();
        let mut fds: Vec<BorrowedFd<'_>> = vec![stdin.as_fd(), self.tap.as_fd()];
        fds.extend(self.spots.iter().map(|(open, _)| match open {
            Open::Tcp(listener) => listener.as_fd(),
            Open::Udp(socket) => socket.as_fd(),
        }));
        fds.extend(self.streams.values().map(|(_, stream)| stream.as_fd()));
        let mut fds: Vec<PollFd<'_>> = fds
            .into_iter()
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("cannot wait for traffic"),
        }
    }

    /// Takes in all that is there, but no more than a bound from each, so that orders are heard.
    fn hear(&mut self) -> Result<()> {
        for (index, (open, wanted)) in self.spots.iter().enumerate() {
            let Some(heard) = self.heard.spots.get_mut(index) else {
                continue;
            };
            match open {
                Open::Udp(socket) => {
                    let mut buffer = [0; 64];
                    for _ in 0..1024 {
                        match socket.recv(&mut buffer) {
                            Ok(length) => note(heard, buffer.get(..length) == Some(wanted)),
                            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                            Err(error) => return Err(error).context("cannot receive"),
                        }
                    }
                }
                Open::Tcp(listener) => {
                    for _ in 0..1024 {
                        match listener.accept() {
                            Ok((stream, _)) => {
                                note(heard, true);
                                stream.set_nonblocking(true)?;
                                self.accepted += 1;
                                self.streams.insert(self.accepted, (index, stream));
                            }
                            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                            // Reset while it waited: it had arrived all the same.
                            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {
                                note(heard, true);
                            }
                            Err(error) => return Err(error).context("cannot accept"),
                        }
                    }
                }
            }
        }
        let (spots, all) = (&self.spots, &mut self.heard.spots);
        self.streams.retain(|_, (index, stream)| {
            let (Some((_, wanted)), Some(heard)) = (spots.get(*index), all.get_mut(*index)) else {
                return false;
            };
            read(stream, wanted, heard)
        });
        while self.streams.len() > CONNECTIONS {
            self.streams.pop_first();
        }
        self.tapped()
    }

    fn tapped(&mut self) -> Result<()> {
        loop {
            match recvfrom::<LinkAddr>(self.tap.as_raw_fd(), &mut [0; 64]) {
                Ok((_, from)) => {
                    if from.is_none_or(|from| from.pkttype() == PACKET_OUTGOING) {
                        self.heard.wire += 1;
                    }
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno).context("cannot read the tap"),
            }
        }
    }
}

fn note(heard: &mut Heard, as_wanted: bool) {
    heard.arrivals += 1;
    heard.strange += u64::from(!as_wanted);
    heard.last_wall_ns = wall_ns();
    heard.last_mono_ns = mono_ns();
    if heard.first_mono_ns == 0 {
        heard.first_mono_ns = heard.last_mono_ns;
    }
}

/// Reads what is there; false when the connection has ended.
fn read(stream: &mut TcpStream, wanted: &[u8; PAYLOAD_LENGTH], heard: &mut Heard) -> bool {
    let mut buffer = [0; 64 * PAYLOAD_LENGTH];
    for _ in 0..64 {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            // The boundaries of a stream are arbitrary, its bytes are not.
            Ok(length) => note(
                heard,
                buffer
                    .get(..length)
                    .is_some_and(|read| read.iter().all(|byte| wanted.contains(byte))),
            ),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
    true
}

/// A packet socket that lets through only 203.0.113.0/24 and 2001:db8:2::/64 as destinations: what
/// is out of scope in every case (see `support::network`).
fn tap() -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Packet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::EthAll,
    )?;
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let program = [
        step(LOAD_BYTE, 0, 0, 0),
        step(AND, 0, 0, 0xf0),
        step(EQUAL, 0, 3, 0x40),
        step(LOAD_WORD, 0, 0, 16),
        step(AND, 0, 0, 0xffff_ff00),
        step(EQUAL, 4, 5, 0xcb00_7100),
        step(LOAD_WORD, 0, 0, 24),
        step(EQUAL, 0, 3, 0x2001_0db8),
        step(LOAD_WORD, 0, 0, 28),
        step(EQUAL, 0, 1, 0x0002_0000),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: pointer and length describe `filter`, which points to `program`; the kernel copies
    // both during the call.
    Errno::result(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })?;
    // What came before the filter stood is none of ours.
    while recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut [0; 64]).is_ok() {}
    Ok(fd)
}
