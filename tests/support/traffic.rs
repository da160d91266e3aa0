//! Drives generators inside the fence and the ear outside, and judges their numbers: nothing out of
//! scope arrives, nothing in scope is refused. See `crate::actor::traffic`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;

use super::{
    Cgroup, Family, claim, eventually,
    network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    scale,
};
pub use crate::actor::traffic::Lane;
use crate::actor::traffic::{Ears, Heard, Plan, REPORT, Spot, Tally, Transport, payload};

/// In scope at some times and not at others.
pub const FLIP_V4: &str = "192.0.2.10";
/// The same for IPv6.
pub const FLIP_V6: &str = "fd00:20::1";
/// Label of lanes that must always pass.
pub const IN: &str = "in";
/// Label of lanes that must never arrive.
pub const OUT: &str = "out";
/// Label of lanes of which nothing is claimed while they change.
pub const FLIP: &str = "flip";

/// A child that runs until its input ends, and reports when asked.
struct Reporter {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// Traffic from inside a cgroup. Dropping it ends it.
pub struct Generator {
    reporter: Reporter,
    lanes: Vec<Lane>,
}

/// The listener outside. Dropping it ends it.
pub struct Ear {
    reporter: Reporter,
    spots: Vec<Spot>,
}

/// What was counted, over all generators and spots of a case.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Attempts out of scope.
    pub out_attempts: u64,
    /// What of them arrived, at a listener or on the wire.
    pub out_arrivals: u64,
    /// What of them the system call let pass.
    pub out_passed: u64,
    /// Attempts in scope.
    pub in_attempts: u64,
    /// What of them was refused, by the error that the program saw.
    pub in_refused: BTreeMap<i32, u64>,
    /// Handshakes in scope that lost a SYN.
    pub in_lost: u64,
    /// What arrived of them.
    pub in_arrivals: u64,
    /// What failed for other reasons, such as a full buffer.
    pub other: BTreeMap<i32, u64>,
}

/// A port of `in`, `out` and, where wanted, `flip` in every transport and family.
pub fn lanes(port: u16, labels: &[&str]) -> Result<Vec<Lane>> {
    let mut lanes = Vec::new();
    for label in labels {
        let (v4, v6) = match *label {
            IN => (IN_V4, IN_V6),
            OUT => (OUT_V4, OUT_V6),
            FLIP => (FLIP_V4, FLIP_V6),
            other => bail!("no addresses for {other}"),
        };
        for family in Family::ALL {
            let to = family.pick(v4, v6, port)?;
            for transport in [
                Transport::Connect,
                Transport::SendTo,
                Transport::Connected,
                Transport::Stream,
                Transport::NewConnect,
                Transport::NewSend,
            ] {
                lanes.push(lane(label, family, to, transport));
            }
        }
    }
    Ok(lanes)
}

/// One lane.
pub fn lane(label: &str, family: Family, to: SocketAddr, transport: Transport) -> Lane {
    Lane {
        label: label.to_owned(),
        to,
        domain: family.domain(),
        transport,
    }
}

/// What must be listened to, for these lanes.
pub fn spots<'a>(lanes: impl IntoIterator<Item = &'a Lane>) -> Vec<Spot> {
    let spots: BTreeSet<Spot> = lanes
        .into_iter()
        .map(|lane| Spot {
            label: lane.label.clone(),
            at: lane.to,
            tcp: lane.is_tcp(),
        })
        .collect();
    spots.into_iter().collect()
}

// === impl Lane ===

impl Lane {
    /// TCP, or else UDP.
    pub fn is_tcp(&self) -> bool {
        matches!(
            self.transport,
            Transport::Connect | Transport::Stream | Transport::NewConnect
        )
    }
}

// === impl Reporter ===

impl Reporter {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a reporter")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("no output")?;
        Ok(Self {
            child,
            orders,
            answers: BufReader::new(answers),
        })
    }

    fn ask<T: DeserializeOwned>(&mut self) -> Result<T> {
        let orders = self.orders.as_mut().context("it has ended")?;
        orders.write_all(&[REPORT])?;
        orders.flush()?;
        self.hear()
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("it has ended without a report");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.orders = None;
        // It may have been killed with its cgroup.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

// === impl Generator ===

impl Generator {
    /// Starts in `cgroup`, joined before exec, without a pause between turns. (Emulated processors
    /// have to leave some time to the daemon, unless the long form was asked for.)
    pub fn start(cgroup: &Cgroup, lanes: Vec<Lane>) -> Result<Self> {
        let rest = scale::emulated() && !scale::full();
        Self::planned(
            cgroup,
            Plan {
                lanes,
                pause_us: 0,
                rest,
            },
        )
    }

    /// The same, with a rest after each turn.
    pub fn paced(cgroup: &Cgroup, lanes: Vec<Lane>, pause_us: u64) -> Result<Self> {
        Self::planned(
            cgroup,
            Plan {
                lanes,
                pause_us,
                rest: false,
            },
        )
    }

    fn planned(cgroup: &Cgroup, plan: Plan) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["generate", &serde_json::to_string(&plan)?]);
        let procs = cgroup.path().join("cgroup.procs");
        let join = move || std::fs::write(&procs, "0");
        // SAFETY: the case's process has one thread, so the child may allocate.
        unsafe { command.pre_exec(join) };
        Ok(Self {
            reporter: Reporter::start(command).context("generator")?,
            lanes: plan.lanes,
        })
    }

    /// The numbers so far, lane by lane.
    pub fn report(&mut self) -> Result<Vec<(Lane, Tally)>> {
        let tallies: Vec<Tally> = self.reporter.ask().context("generator")?;
        Ok(self.lanes.iter().cloned().zip(tallies).collect())
    }

    /// Waits until every lane of `label` has passed at least once.
    pub fn await_passing(&mut self, label: &str) -> Result<()> {
        self.await_all(label, |_, before, now| now.passed > before.passed)
    }

    /// Waits until every lane of `label` is refused, as seen from now. An open connection may take
    /// bytes for a while that nobody gets, so those are left out.
    pub fn await_refused(&mut self, label: &str) -> Result<()> {
        self.await_all(label, |lane, before, now| {
            let errors = |tally: &Tally| tally.errors.values().sum::<u64>();
            lane.transport == Transport::Stream || errors(now) > errors(before)
        })
    }

    fn await_all(
        &mut self,
        label: &str,
        fits: impl Fn(&Lane, &Tally, &Tally) -> bool,
    ) -> Result<()> {
        let before = self.report()?;
        eventually(5, || {
            let now = self.report()?;
            for ((lane, old), (_, new)) in before.iter().zip(&now) {
                claim(lane.label != label || fits(lane, old, new), || {
                    format!("not yet: {lane:?}: {new:?}")
                })?;
            }
            Ok(())
        })
    }

    /// Ends it; its last numbers.
    pub fn stop(mut self) -> Result<Vec<(Lane, Tally)>> {
        self.reporter.orders = None;
        let tallies: Vec<Tally> = self.reporter.hear().context("generator")?;
        Ok(self.lanes.iter().cloned().zip(tallies).collect())
    }
}

// === impl Ear ===

impl Ear {
    /// Listens to all that these lanes go to; returns when it does.
    pub fn start(lanes: &[Lane]) -> Result<Self> {
        let spots = spots(lanes);
        let mut command = Command::new("/proc/self/exe");
        command.args(["listen", &serde_json::to_string(&spots)?]);
        let mut reporter = Reporter::start(command)?;
        let _ready: Vec<u8> = reporter.hear().context("ear")?;
        Ok(Self { reporter, spots })
    }

    /// What was heard so far.
    pub fn report(&mut self) -> Result<(Vec<(Spot, Heard)>, u64)> {
        let ears: Ears = self.reporter.ask().context("ear")?;
        let spots = self.spots.iter().cloned().zip(ears.spots).collect();
        Ok((spots, ears.wire))
    }

    /// The proof that silence means something: what goes to the spots of `label` from outside the
    /// fence arrives at each, and the wire sees it.
    pub fn control(&mut self, label: &str) -> Result<()> {
        let (before, wire) = self.report()?;
        for spot in self.spots.iter().filter(|spot| spot.label == label) {
            if spot.tcp {
                let mut stream = TcpStream::connect_timeout(&spot.at, Duration::from_secs(3))?;
                stream.write_all(&payload(label))?;
            } else {
                let any: SocketAddr = if spot.at.is_ipv4() {
                    "0.0.0.0:0".parse()?
                } else {
                    "[::]:0".parse()?
                };
                UdpSocket::bind(any)?.send_to(&payload(label), spot.at)?;
            }
        }
        eventually(3, || {
            let (now, wire_now) = self.report()?;
            for ((spot, old), (_, new)) in before.iter().zip(&now) {
                claim(spot.label != label || new.arrivals > old.arrivals, || {
                    format!("the control did not arrive at {spot:?}")
                })?;
            }
            claim(label != OUT || wire_now > wire, || {
                "the wire did not see the control".to_owned()
            })
        })
    }
}

// === impl Numbers ===

/// What the fence does to a connection or a packet, as a program sees it.
const REFUSALS: [i32; 5] = [
    libc::EPERM,
    libc::EACCES,
    libc::ETIMEDOUT,
    libc::ECONNABORTED,
    libc::EPIPE,
];

impl Numbers {
    /// Adds up what generators and an ear report.
    pub fn sum(reports: &[Vec<(Lane, Tally)>], ear: &mut Ear) -> Result<Self> {
        let mut numbers = Self::default();
        for (lane, tally) in reports.iter().flatten() {
            match lane.label.as_str() {
                IN => {
                    numbers.in_attempts += tally.attempts;
                    numbers.in_lost += tally.repeated;
                    for (errno, count) in &tally.errors {
                        let into = if REFUSALS.contains(errno) {
                            &mut numbers.in_refused
                        } else {
                            &mut numbers.other
                        };
                        *into.entry(*errno).or_default() += count;
                    }
                }
                OUT => {
                    numbers.out_attempts += tally.attempts;
                    numbers.out_passed += tally.passed;
                    for (errno, count) in &tally.errors {
                        if *errno != libc::EPERM {
                            *numbers.other.entry(*errno).or_default() += count;
                        }
                    }
                }
                _ => {}
            }
        }
        let (spots, wire) = ear.report()?;
        numbers.out_arrivals = wire;
        for (spot, heard) in spots {
            match spot.label.as_str() {
                IN => numbers.in_arrivals += heard.arrivals,
                OUT => numbers.out_arrivals += heard.arrivals,
                _ => {}
            }
            claim(heard.strange == 0, || {
                format!("bytes of another lane arrived at {spot:?}: {heard:?}")
            })?;
        }
        Ok(numbers)
    }

    /// The two claims: nothing out of scope arrives or passes, nothing in scope is refused. What
    /// was not tried proves nothing, so there must have been attempts on every lane.
    pub fn judge(&self, reports: &[Vec<(Lane, Tally)>]) -> Result<()> {
        for (lane, tally) in reports.iter().flatten() {
            claim(tally.attempts > 0, || format!("never tried: {lane:?}"))?;
            claim(lane.label != IN || tally.passed > 0, || {
                format!("never passed: {lane:?}: {tally:?}")
            })?;
        }
        claim(self.out_arrivals == 0 && self.out_passed == 0, || {
            format!("out of scope got through: {self}")
        })?;
        claim(self.in_refused.is_empty() && self.in_lost == 0, || {
            let of: Vec<_> = reports
                .iter()
                .flatten()
                .filter(|(lane, tally)| {
                    lane.label == IN && (!tally.errors.is_empty() || tally.repeated > 0)
                })
                .collect();
            format!("in scope was refused: {self}: {of:?}")
        })
    }

    /// Stops the generators, and has the ear prove that it heard all along: their sum, judged.
    pub fn settle(generators: Vec<Generator>, ear: &mut Ear) -> Result<Self> {
        let reports = generators
            .into_iter()
            .map(Generator::stop)
            .collect::<Result<Vec<_>>>()?;
        let numbers = Self::sum(&reports, ear)?;
        numbers.judge(&reports)?;
        ear.control(OUT)?;
        Ok(numbers)
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refused: u64 = self.in_refused.values().sum();
        write!(
            f,
            "out of scope {} attempts, {} arrivals; in scope {} attempts, {} refusals, {} lost, \
             {} arrivals; other errors",
            self.out_attempts,
            self.out_arrivals + self.out_passed,
            self.in_attempts,
            refused,
            self.in_lost,
            self.in_arrivals,
        )?;
        for (errno, count) in self.in_refused.iter().chain(&self.other) {
            write!(f, " {:?}={count}", nix::errno::Errno::from_raw(*errno))?;
        }
        if self.in_refused.is_empty() && self.other.is_empty() {
            f.write_str(" none")?;
        }
        Ok(())
    }
}
