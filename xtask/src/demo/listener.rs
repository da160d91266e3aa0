//! The services of the demo: they echo, and count what reaches them, so that "refused" can be
//! shown from the other side too.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};

use super::agent::{Destination, Protocol};

/// An echo service on an address of its own. Its threads end with the demo's process.
pub struct Listener {
    pub destination: Destination,
    /// Why it is refused; none if the demo's registry entry grants it.
    pub refused: Option<&'static str>,
    bytes: Arc<AtomicU64>,
}

impl Listener {
    /// Listens at `address`.
    pub fn start(
        protocol: Protocol,
        address: SocketAddr,
        refused: Option<&'static str>,
    ) -> Result<Self> {
        let bytes = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&bytes);
        let destination = Destination { protocol, address };
        let failed = || format!("cannot listen at {destination}");
        match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(address).with_context(failed)?;
                thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        let count = Arc::clone(&count);
                        // A connection is contact, also when nothing is sent over it.
                        count.fetch_add(1, Ordering::Relaxed);
                        thread::spawn(move || echo(stream, &count));
                    }
                });
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(address).with_context(failed)?;
                thread::spawn(move || {
                    let mut buffer = [0; 2048];
                    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                        count.fetch_add(1 + length as u64, Ordering::Relaxed);
                        // The peer may be gone; the agent's side tells what it missed.
                        let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), peer);
                    }
                });
            }
        }
        Ok(Self {
            destination,
            refused,
            bytes,
        })
    }

    /// Grows with each connection and each byte that arrives.
    pub fn seen(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn echo(mut stream: TcpStream, count: &AtomicU64) {
    let mut buffer = [0; 2048];
    while let Ok(length) = stream.read(&mut buffer) {
        count.fetch_add(length as u64, Ordering::Relaxed);
        let sent = stream.write_all(buffer.get(..length).unwrap_or_default());
        if length == 0 || sent.is_err() {
            return;
        }
    }
}
