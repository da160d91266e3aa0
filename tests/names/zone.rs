//! The upstream of a test: a resolver for a few made-up zones, in a process of its own, which says
//! what it was asked.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::actor::lookup::{A, AAAA};

const CNAME: u16 = 5;

/// What the zone knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Spec {
    /// Addresses of names.
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    /// Names that are aliases.
    pub aliases: BTreeMap<String, String>,
    /// Below each of these, host `hN` has the Nth address of a network.
    pub numbered: BTreeMap<String, Ipv4Addr>,
    /// Names whose answer over UDP is cut.
    pub cut: Vec<String>,
    /// A port at which every connection is taken, on all addresses.
    pub accept: Option<u16>,
    /// Time to live of all of it, in seconds.
    pub ttl: u32,
}

/// A running zone. Dropping it ends it.
pub struct Zone {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Where it answers.
    pub at: SocketAddr,
}

impl Spec {
    /// Nothing but a time to live of a minute.
    pub fn new() -> Self {
        Self {
            ttl: 60,
            ..Self::default()
        }
    }

    /// One more name.
    pub fn host(mut self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses.iter().filter_map(|text| text.parse().ok());
        self.hosts.insert(name.to_owned(), addresses.collect());
        self
    }

    /// One more alias.
    pub fn alias(mut self, name: &str, to: &str) -> Self {
        self.aliases.insert(name.to_owned(), to.to_owned());
        self
    }

    /// Numbered hosts below `base`.
    pub fn numbered(mut self, base: &str, from: [u8; 4]) -> Self {
        self.numbered.insert(base.to_owned(), from.into());
        self
    }

    /// A name whose answer is cut over UDP.
    pub fn cut(mut self, name: &str) -> Self {
        self.cut.push(name.to_owned());
        self
    }

    /// A port at which every connection is taken.
    pub fn accept(mut self, port: u16) -> Self {
        self.accept = Some(port);
        self
    }

    /// Another time to live.
    pub fn ttl(mut self, seconds: u32) -> Self {
        self.ttl = seconds;
        self
    }

    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        if let Some(addresses) = self.hosts.get(name) {
            return Some(addresses.clone());
        }
        let (host, base) = name.split_once('.')?;
        let first = *self.numbered.get(base)?;
        let number: u32 = host.strip_prefix('h')?.parse().ok()?;
        Some(vec![Ipv4Addr::from(u32::from(first) + number).into()])
    }

    /// The answer to a question; none to what is none.
    fn answer(&self, asked: &[u8], by_udp: bool) -> Option<(String, u16, Vec<u8>)> {
        let mut labels = Vec::new();
        let mut at = 12;
        loop {
            let length = usize::from(*asked.get(at)?);
            if length == 0 {
                break;
            }
            labels.push(String::from_utf8_lossy(asked.get(at + 1..at + 1 + length)?).into_owned());
            at += 1 + length;
        }
        let name = labels.join(".").to_ascii_lowercase();
        let kind = u16::from_be_bytes([*asked.get(at + 1)?, *asked.get(at + 2)?]);
        let question = asked.get(12..at + 5)?;
        let cut = by_udp && self.cut.contains(&name);
        let mut answers = Vec::new();
        // The owner of each record is a pointer to where it was written before.
        let (mut owner, mut last) = (vec![0xc0, 12], name.clone());
        while let Some(to) = self.aliases.get(&last).filter(|_| answers.len() < 4000) {
            let data = spelled(to);
            answers.push((owner, CNAME, data.clone()));
            (owner, last) = (data, to.clone());
        }
        let addresses = self.addresses(&last);
        let exists = addresses.is_some() || last != name;
        for ip in addresses.unwrap_or_default() {
            match ip {
                IpAddr::V4(v4) if kind == A => {
                    answers.push((owner.clone(), A, v4.octets().to_vec()));
                }
                IpAddr::V6(v6) if kind == AAAA => {
                    answers.push((owner.clone(), AAAA, v6.octets().to_vec()));
                }
                IpAddr::V4(_) | IpAddr::V6(_) => {}
            }
        }
        if cut {
            answers.clear();
        }
        let count = u16::try_from(answers.len()).ok()?;
        let mut bytes = asked.get(..2)?.to_vec();
        bytes.extend([
            0x81 | if cut { 0x02 } else { 0 },
            if exists { 0x80 } else { 0x83 },
        ]);
        bytes.extend([0, 1]);
        bytes.extend(count.to_be_bytes());
        bytes.extend([0, 0, 0, 0]);
        bytes.extend(question);
        for (owner, kind, data) in answers {
            bytes.extend(owner);
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0, 1]);
            bytes.extend(self.ttl.to_be_bytes());
            bytes.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
            bytes.extend(data);
        }
        Some((name, kind, bytes))
    }
}

fn spelled(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

impl Zone {
    /// Starts one at a free port of 127.0.0.1.
    pub fn start(spec: &Spec) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .args(["zone", &serde_json::to_string(spec)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the zone")?;
        let orders = child.stdin.take().context("no input")?;
        let mut answers = BufReader::new(child.stdout.take().context("no output")?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let at = line.trim().parse().context("the zone did not start")?;
        Ok(Self {
            child,
            orders,
            answers,
            at,
        })
    }

    /// The inside of `[dns]` for a daemon that asks it.
    pub fn settings(&self) -> String {
        format!("upstream = [\"{}\"]\n", self.at)
    }

    /// What it was asked so far: names and types, each question once for each time.
    pub fn asked(&mut self) -> Result<Vec<(String, u16)>> {
        self.orders.write_all(b"\n")?;
        self.orders.flush()?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Zone {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// `remit-tests zone SPEC`.
pub fn serve(spec: &str) -> Result<ExitCode> {
    let spec: Arc<Spec> = Arc::new(serde_json::from_str(spec)?);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = udp.local_addr()?;
    let tcp = TcpListener::bind(at)?;
    let (known, log) = (Arc::clone(&spec), Arc::clone(&heard));
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let asked = buffer.get(..length).unwrap_or_default();
            if let Some((name, kind, answer)) = known.answer(asked, true) {
                log.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((name, kind));
                drop(udp.send_to(&answer, from));
            }
        }
    });
    if let Some(port) = spec.accept {
        let sink = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        thread::spawn(move || sink.incoming().for_each(drop));
    }
    let (known, log) = (spec, Arc::clone(&heard));
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let (known, log) = (Arc::clone(&known), Arc::clone(&log));
            thread::spawn(move || converse(&known, &log, stream));
        }
    });
    println!("{at}");
    for line in std::io::stdin().lines() {
        line?;
        let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        println!("{}", serde_json::to_string(&*heard)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn converse(spec: &Spec, log: &Mutex<Vec<(String, u16)>>, mut stream: TcpStream) -> Option<()> {
    loop {
        let mut head = [0; 2];
        stream.read_exact(&mut head).ok()?;
        let mut asked = vec![0; usize::from(u16::from_be_bytes(head))];
        stream.read_exact(&mut asked).ok()?;
        let (name, kind, answer) = spec.answer(&asked, false)?;
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((name, kind));
        let length = u16::try_from(answer.len()).ok()?;
        stream.write_all(&length.to_be_bytes()).ok()?;
        stream.write_all(&answer).ok()?;
    }
}
