//! The demo's agent: what runs inside the fence. It tries each destination it is told and says
//! what came of it, or holds one connection open and sends for as long as it can.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    process::ExitCode,
    str::FromStr,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use nix::errno::Errno;

/// What is sent and must come back.
const PAYLOAD: &[u8] = b"hello from the agent";
/// Far above what loopback takes; a refusal does not come near it.
const PATIENCE: Duration = Duration::from_secs(3);
/// The pause between two sends over the connection that is held.
const BEAT: Duration = Duration::from_millis(50);

/// What `xtask demo-agent` takes.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Try each destination once, for example tcp:127.0.0.1:80, then wait for standard input to close
    Try { destinations: Vec<Destination> },
    /// Connect, then send until that fails or standard input closes
    Hold { destination: Destination },
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// Its name as the registry writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// An address and how it is reached, written `tcp:ADDRESS:PORT`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Destination {
    pub protocol: Protocol,
    pub address: SocketAddr,
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.protocol.word(), self.address)
    }
}

impl FromStr for Destination {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (protocol, address) = text
            .split_once(':')
            .with_context(|| format!("`{text}` has no protocol before a `:`"))?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            other => bail!("`{other}` is neither tcp nor udp"),
        };
        let address = address
            .parse()
            .with_context(|| format!("`{address}` is no address"))?;
        Ok(Self { protocol, address })
    }
}

impl Destination {
    /// As the log writes it for people.
    pub fn words(&self) -> String {
        format!("{} {}", self.protocol.word(), self.address)
    }
}

/// The word for an attempt that got its answer.
pub const ECHOED: &str = "answered";
/// The word for a connection that stands.
pub const HOLDING: &str = "holding";

/// `xtask demo-agent`.
pub fn command(options: &Options) -> Result<ExitCode> {
    match &options.what {
        What::Try { destinations } => {
            for destination in destinations {
                let said = match attempt(*destination) {
                    Ok(()) => ECHOED.to_owned(),
                    Err(error) => word(&error),
                };
                say(&format!("{destination} {said}"))?;
            }
            // Whoever reports a refusal can still look at this process.
            let _ = io::stdin().read_to_end(&mut Vec::new());
        }
        What::Hold { destination } => hold(*destination)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn attempt(destination: Destination) -> io::Result<()> {
    let address = destination.address;
    let mut answer = [0; PAYLOAD.len()];
    match destination.protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(PAYLOAD)?;
            stream.read_exact(&mut answer)?;
        }
        Protocol::Udp => {
            let any: IpAddr = match address {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(PAYLOAD, address)?;
            socket.recv(&mut answer)?;
        }
    }
    if answer == PAYLOAD {
        Ok(())
    } else {
        Err(io::Error::other("another answer"))
    }
}

fn hold(destination: Destination) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&destination.address, PATIENCE)
        .with_context(|| format!("cannot connect to {destination}"))?;
    say(HOLDING)?;
    let (closed, stop) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || {
        // Returns when the demo closes the other end, or is gone.
        let _ = io::stdin().read_to_end(&mut Vec::new());
        drop(closed);
    });
    loop {
        if let Err(error) = stream.write_all(PAYLOAD) {
            return say(&format!("connection ended: {}", word(&error)));
        }
        match stop.recv_timeout(BEAT) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// The errno's name, as a program's author would look it up.
fn word(error: &io::Error) -> String {
    match error.raw_os_error() {
        // A receive timeout reports EAGAIN; `connect_timeout` has no errno at all.
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None => format!("{:?}", error.kind()),
    }
}

fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("cannot write to stdout")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_read_as_it_is_written() {
        for text in ["tcp:127.0.0.10:80", "udp:[::1]:53"] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        for text in ["127.0.0.1:80", "sctp:127.0.0.1:80", "tcp:localhost:80"] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
    }

    #[test]
    fn refusals_have_their_errno_name() {
        assert_eq!(word(&io::Error::from_raw_os_error(1)), "EPERM");
        assert_eq!(word(&io::Error::from_raw_os_error(103)), "ECONNABORTED");
    }
}
