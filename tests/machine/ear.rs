//! What listens outside the fence at all destinations of the agents, from before the first of them
//! runs until the machine ends, and counts by name what arrives.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::net::UnixDatagram,
    path::PathBuf,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::agent::{COUNTS, PORT, write};
use crate::support::{
    eventually,
    netlink::{LO, add_address, link_up},
    network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
};

/// What is heard by the destination and who said so: `out tcp4 NAME`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Heard(BTreeMap<String, u64>);

/// Who says nothing.
const NOBODY: &str = "?";
const IDLE: Duration = Duration::from_millis(3);
/// A connection that says nothing for so long is counted as nobody's.
const NAMELESS: Duration = Duration::from_secs(2);

// === impl Heard ===

impl Heard {
    /// So far.
    pub fn read() -> Result<Self> {
        let text = fs::read_to_string(file()).context("the ear left no counts")?;
        serde_json::from_str(&text).context("the ear's counts")
    }

    /// Arrivals of `name` in scope or out of it.
    pub fn of(&self, side: &str, name: &str) -> u64 {
        self.0
            .iter()
            .filter(|(key, _)| {
                let mut words = key.split(' ');
                words.next() == Some(side) && words.nth(1) == Some(name)
            })
            .map(|(_, count)| count)
            .sum()
    }

    /// All that has arrived out of scope.
    pub fn out(&self) -> Vec<(&str, u64)> {
        self.0
            .iter()
            .filter(|(key, _)| key.starts_with("out "))
            .map(|(key, count)| (key.as_str(), *count))
            .collect()
    }
}

/// What has arrived up to now, read after a sign of our own was heard at every destination: so the
/// ear hears, and what it has not told is not there.
pub fn listen() -> Result<Heard> {
    let name = format!("driver-{}", crate::actor::traffic::mono_ns());
    for (_, ip) in spots()? {
        let to = SocketAddr::new(ip, PORT);
        let from: IpAddr = match to {
            SocketAddr::V4(_) => [0, 0, 0, 0].into(),
            SocketAddr::V6(_) => [0_u16; 8].into(),
        };
        UdpSocket::bind((from, 0))?.send_to(format!("{name}\n").as_bytes(), to)?;
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))
            .with_context(|| format!("the ear does not answer at {to}"))?;
        std::io::Write::write_all(&mut stream, format!("{name}\n").as_bytes())?;
    }
    eventually(5, || {
        let heard = Heard::read()?;
        if heard.of("in", &name) != 4 || heard.of("out", &name) != 4 {
            bail!("the ear has not heard {name} everywhere: {heard:?}");
        }
        Ok(heard)
    })
}

/// Forgives what has arrived so far and did not say whose it is: a twin without a fence was ended,
/// perhaps between connecting and saying its name. Returns what was heard.
pub fn forgive() -> Result<Heard> {
    let heard = listen()?;
    fs::write(forgiven(), heard.of("out", NOBODY).to_string())?;
    Ok(heard)
}

/// What has arrived out of scope, did not say whose it is, and was not forgiven.
pub fn nameless(heard: &Heard) -> u64 {
    let forgiven = fs::read_to_string(forgiven()).unwrap_or_default();
    let forgiven = forgiven.parse().unwrap_or(0);
    heard.of("out", NOBODY).saturating_sub(forgiven)
}

/// `remit-tests machine-ear`: until it is ended. Tells systemd when it listens.
pub fn serve() -> Result<ExitCode> {
    link_up(LO).context("cannot bring lo up")?;
    let mut places = Vec::new();
    for (side, ip) in spots()? {
        let prefix = if ip.is_ipv4() { 24 } else { 128 };
        add_address(LO, ip, prefix).with_context(|| format!("cannot add {ip} to lo"))?;
        let to = SocketAddr::new(ip, PORT);
        let family = if ip.is_ipv4() { '4' } else { '6' };
        let tcp = TcpListener::bind(to).with_context(|| format!("cannot listen on {to}"))?;
        let udp = UdpSocket::bind(to).with_context(|| format!("cannot bind {to}"))?;
        tcp.set_nonblocking(true)?;
        udp.set_nonblocking(true)?;
        places.push((
            format!("{side} tcp{family}"),
            tcp,
            format!("{side} udp{family}"),
            udp,
        ));
    }
    fs::create_dir_all(COUNTS).with_context(|| format!("cannot make {COUNTS}"))?;
    let mut heard = Heard::default();
    write(&file(), &heard)?;
    // Of another boot.
    drop(fs::remove_file(forgiven()));
    if let Some(manager) = env::var_os("NOTIFY_SOCKET") {
        UnixDatagram::unbound()?.send_to(b"READY=1", PathBuf::from(manager))?;
    }
    let mut open: Vec<(String, TcpStream, Instant, Vec<u8>)> = Vec::new();
    loop {
        let mut news = Vec::new();
        for (tcp_name, tcp, udp_name, udp) in &places {
            while let Ok((stream, _)) = tcp.accept() {
                stream.set_nonblocking(true)?;
                open.push((tcp_name.clone(), stream, Instant::now(), Vec::new()));
            }
            let mut bytes = [0; 256];
            while let Ok((length, _)) = udp.recv_from(&mut bytes) {
                news.push(key(udp_name, bytes.get(..length).unwrap_or_default()));
            }
        }
        open.retain_mut(|(place, stream, since, said)| {
            let mut bytes = [0; 256];
            let ended = match stream.read(&mut bytes) {
                Ok(0) => true,
                Ok(length) => {
                    said.extend(bytes.get(..length).unwrap_or_default());
                    said.contains(&b'\n')
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    since.elapsed() > NAMELESS
                }
                Err(_) => true,
            };
            if ended {
                news.push(key(place, said));
            }
            !ended
        });
        if news.is_empty() {
            sleep(IDLE);
            continue;
        }
        for key in news {
            *heard.0.entry(key).or_default() += 1;
        }
        write(&file(), &heard)?;
    }
}

fn file() -> PathBuf {
    PathBuf::from(COUNTS).join("ear.json")
}

fn forgiven() -> PathBuf {
    PathBuf::from(COUNTS).join("forgiven")
}

fn spots() -> Result<Vec<(&'static str, IpAddr)>> {
    [
        ("in", IN_V4),
        ("in", IN_V6),
        ("out", OUT_V4),
        ("out", OUT_V6),
    ]
    .into_iter()
    .map(|(side, ip)| Ok((side, ip.parse()?)))
    .collect()
}

/// What an arrival is counted under.
fn key(place: &str, said: &[u8]) -> String {
    let name = String::from_utf8_lossy(said);
    match name.lines().next().unwrap_or_default() {
        "" => format!("{place} {NOBODY}"),
        name => format!("{place} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_told_apart_by_side_and_name() {
        let mut heard = Heard::default();
        for (place, said) in [
            ("out tcp4", "a\n"),
            ("out udp6", "a\n"),
            ("in tcp4", "a\n"),
            ("out tcp4", "ab\n"),
            ("out tcp4", ""),
        ] {
            *heard.0.entry(key(place, said.as_bytes())).or_default() += 1;
        }
        assert_eq!(heard.of("out", "a"), 2);
        assert_eq!(heard.of("in", "a"), 1);
        assert_eq!(heard.of("out", "?"), 1);
        assert_eq!(heard.out().iter().map(|(_, count)| count).sum::<u64>(), 4);
    }
}
