//! The daemon's own listeners, on addresses of this host: what is sent there never leaves it. They
//! answer nothing, and what is not the probe's is closed.

use std::{
    io::{self, ErrorKind, Read as _},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    thread::sleep,
    time::{Duration, Instant},
};

/// How long a stranger at a listener may keep it busy.
const STRANGER: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(2);

/// A listener for one attempt.
#[derive(Debug)]
pub struct Ear {
    socket: Socket,
    /// Where it is.
    pub at: SocketAddr,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

// === impl Ear ===

impl Ear {
    /// Opens one at a port that the kernel chooses.
    pub fn open(at: IpAddr, protocol: u8) -> io::Result<Self> {
        let (socket, at) = if protocol == 6 {
            let listener = TcpListener::bind((at, 0))?;
            listener.set_nonblocking(true)?;
            let at = listener.local_addr()?;
            (Socket::Tcp(listener), at)
        } else {
            let socket = UdpSocket::bind((at, 0))?;
            socket.set_nonblocking(true)?;
            let at = socket.local_addr()?;
            (Socket::Udp(socket), at)
        };
        Ok(Self { socket, at })
    }

    /// Whether `nonce` arrives within `patience`.
    pub fn hears(&self, nonce: &str, patience: Duration) -> io::Result<bool> {
        let until = Instant::now() + patience;
        loop {
            match self.next(nonce) {
                Ok(true) => return Ok(true),
                Ok(false) => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            sleep(PAUSE);
        }
    }

    /// Whether the next that has arrived is `nonce`.
    fn next(&self, nonce: &str) -> io::Result<bool> {
        let mut bytes = [0; 64];
        match &self.socket {
            Socket::Tcp(listener) => {
                let (mut stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(STRANGER))?;
                let mut got = 0;
                while got < nonce.len() {
                    let rest = bytes.get_mut(got..nonce.len()).unwrap_or_default();
                    match stream.read(rest) {
                        Ok(0) | Err(_) => break,
                        Ok(read) => got += read,
                    }
                }
                Ok(bytes.get(..got) == Some(nonce.as_bytes()))
            }
            Socket::Udp(socket) => {
                let (length, _) = socket.recv_from(&mut bytes)?;
                Ok(bytes.get(..length) == Some(nonce.as_bytes()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, net::TcpStream};

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(5);

    #[test]
    fn only_the_nonce_counts() {
        let nonce = "0123456789abcdef";
        let ear = Ear::open("127.0.0.1".parse().unwrap(), 6).unwrap();
        assert!(!ear.hears(nonce, SHORT).unwrap());
        TcpStream::connect(ear.at)
            .unwrap()
            .write_all(b"GET /")
            .unwrap();
        assert!(!ear.hears(nonce, SHORT).unwrap());
        let mut ours = TcpStream::connect(ear.at).unwrap();
        ours.write_all(nonce.as_bytes()).unwrap();
        assert!(ear.hears(nonce, LONG).unwrap());

        let ear = Ear::open("127.0.0.1".parse().unwrap(), 17).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"0123456789abcdeg", ear.at).unwrap();
        assert!(!ear.hears(nonce, SHORT).unwrap());
        sender.send_to(nonce.as_bytes(), ear.at).unwrap();
        assert!(ear.hears(nonce, LONG).unwrap());
    }
}
