//! Real listeners outside the fence: what they have is what arrived.

use std::{
    io::{ErrorKind, Read as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::way::{PAYLOAD, Way};

/// A listener of one kind.
pub enum Listener {
    /// Accepts and reads.
    Tcp(TcpListener),
    /// Receives.
    Udp(UdpSocket),
    /// None needed: the kernel itself answers, and the wire is the witness.
    Kernel,
}

impl Listener {
    /// Starts what `way` needs at `to`.
    pub fn start(way: Way, to: SocketAddr) -> Result<Self> {
        let started = if way.is_tcp() {
            let listener =
                TcpListener::bind(to).with_context(|| format!("cannot listen on {to}"))?;
            listener.set_nonblocking(true)?;
            Self::Tcp(listener)
        } else if way.is_udp() {
            let socket = UdpSocket::bind(to).with_context(|| format!("cannot bind {to}"))?;
            socket.set_nonblocking(true)?;
            Self::Udp(socket)
        } else {
            Self::Kernel
        };
        Ok(started)
    }

    /// Waits for the payload to arrive.
    pub fn expect_payload(&self) -> Result<()> {
        match self {
            Self::Tcp(listener) => {
                let mut stream = accept(listener, 5000)?;
                expect_bytes(&mut stream, PAYLOAD)
            }
            Self::Udp(socket) => {
                let mut buffer = [0; 2048];
                let length = within(5000, || socket.recv(&mut buffer).map(Some))
                    .context("no datagram arrived")?;
                match buffer.get(..length) {
                    Some(bytes) if bytes == PAYLOAD => Ok(()),
                    other => bail!("other bytes arrived: {other:?}"),
                }
            }
            Self::Kernel => Ok(()),
        }
    }

    /// An error if anything has arrived.
    pub fn expect_nothing(&self) -> Result<()> {
        let arrived = match self {
            Self::Tcp(listener) => listener.accept().map(|(_, from)| from),
            Self::Udp(socket) => socket.recv_from(&mut [0; 2048]).map(|(_, from)| from),
            Self::Kernel => return Ok(()),
        };
        match arrived {
            Ok(from) => bail!("the listener heard {from}"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error).context("the listener failed"),
        }
    }
}

/// Takes a connection within a deadline.
pub fn accept(listener: &TcpListener, timeout_ms: u64) -> Result<TcpStream> {
    let stream = within(timeout_ms, || {
        listener.accept().map(|(stream, _)| Some(stream))
    })
    .context("no connection arrived")?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(stream)
}

/// Reads exactly `wanted`.
pub fn expect_bytes(stream: &mut TcpStream, wanted: &[u8]) -> Result<()> {
    let mut bytes = vec![0; wanted.len()];
    stream
        .read_exact(&mut bytes)
        .context("the bytes did not arrive")?;
    if bytes != wanted {
        bail!("other bytes arrived: {bytes:?}");
    }
    Ok(())
}

/// An error if bytes arrive within the time.
pub fn expect_silence(stream: &mut TcpStream, timeout_ms: u64) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(timeout_ms)))?;
    match stream.read(&mut [0; 512]) {
        // Closed or reset: nothing arrived either.
        Ok(0) => Ok(()),
        Ok(length) => bail!("{length} bytes arrived after the change"),
        Err(_) => Ok(()),
    }
}

fn within<T>(
    timeout_ms: u64,
    mut f: impl FnMut() -> std::io::Result<Option<T>>,
) -> std::io::Result<T> {
    let until = Instant::now() + Duration::from_millis(timeout_ms);
    loop {
        match f() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if Instant::now() > until {
            return Err(ErrorKind::TimedOut.into());
        }
        sleep(Duration::from_millis(2));
    }
}
