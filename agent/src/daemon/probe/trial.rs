//! One probe of one agent: its helper, and what is asked of it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use tokio::sync::mpsc as channel;

use super::{
    ears::Ear,
    helper::PATIENCE,
    judge::{Counted, Evidence, Wanted},
    order::{Family, Order, Task, Tried, Way},
    places::{candidates, has_loopback, localhost},
    plan::{self, Registry},
    steps::{Ground, LEND_FOR, Sight, Step},
    trace::{Mark, Trace},
    worker::{Unclear, ask},
};
use crate::{
    control::protocol::{ProbeAttempt, ProbeVerdict},
    kernel::boot_nanos,
    launch::{Child, Launch, Streams},
};

/// How long the log may take to tell of a refusal.
pub(super) const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// How long a listener is given for what must not arrive: on this very host it would be there by
/// the time the helper answers.
const SILENCE: Duration = Duration::from_millis(20);

/// A helper at work.
pub(super) struct Trial<'a> {
    pub(super) ground: &'a Ground,
    pub(super) steps: &'a channel::Sender<Step>,
    registry: Registry<'a>,
    child: Child,
    orders: File,
    answers: BufReader<File>,
    pub(super) trace: Trace,
    pub(super) attempts: Vec<ProbeAttempt>,
}

impl<'a> Trial<'a> {
    /// Tries everything; what was tried goes to `attempts`, also where the rest could not be.
    pub(super) fn run(
        ground: &'a Ground,
        steps: &'a channel::Sender<Step>,
        attempts: &mut Vec<ProbeAttempt>,
    ) -> Result<(), Unclear> {
        let mut trial = Self::start(ground, steps)?;
        trial.tables();
        let tried = trial.names().and_then(|()| trial.everything());
        *attempts = std::mem::take(&mut trial.attempts);
        trial.end();
        tried
    }

    pub(super) fn start(
        ground: &'a Ground,
        steps: &'a channel::Sender<Step>,
    ) -> Result<Self, Unclear> {
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|error| format!("no pipe: {error}"));
        let ((stdin, orders), (answers, stdout)) = (pipe()?, pipe()?);
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .map_err(|error| format!("cannot open /dev/null: {error}"))?;
        let shared = |fd: OwnedFd| Arc::new(fd);
        let streams = Streams {
            stdin: shared(stdin),
            stdout: shared(stdout),
            stderr: shared(null.into()),
        };
        let command = ["/proc/self/exe", "probe-helper"].map(Into::into).to_vec();
        let child = Launch::own(command, streams)
            .and_then(|launch| launch.spawn(&ground.hierarchy, &ground.cgroup))
            .map_err(|error| {
                format!(
                    "the helper does not start: {:#}",
                    anyhow::Error::from(error)
                )
            })?;
        let trace = Trace::open(&ground.log)
            .map_err(|error| format!("the violation log cannot be read: {error}"))?;
        Ok(Self {
            registry: Registry::new(&ground.tables, ground.clock),
            ground,
            steps,
            child,
            orders: File::from(orders),
            answers: BufReader::new(File::from(answers)),
            trace,
            attempts: Vec::new(),
        })
    }

    pub(super) fn end(self) {
        let Self {
            orders, mut child, ..
        } = self;
        drop(orders);
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            match child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        if self.ground.hierarchy.kill(&self.ground.cgroup).is_ok() {
            drop(child.wait());
        }
    }

    /// What the attempts below hang on, read back before any of them.
    fn tables(&mut self) {
        let wrong = &self.ground.wrong;
        let (verdict, evidence) = if wrong.is_empty() {
            (ProbeVerdict::Pass, "as it was put there".to_owned())
        } else {
            (ProbeVerdict::Fail, wrong.join("; "))
        };
        self.attempts.push(ProbeAttempt {
            name: "tables".to_owned(),
            hook: "map".to_owned(),
            to: None,
            wanted: "the agent's word, row and claim, and the epoch, must be as written".to_owned(),
            verdict,
            evidence,
        });
    }

    fn everything(&mut self) -> Result<(), Unclear> {
        for family in Family::ALL {
            for way in [Way::Tcp, Way::UdpConnected, Way::Udp] {
                self.refusal(family, way)?;
            }
        }
        for family in [Family::V4, Family::V6] {
            if let Some(wanted) = self.registry.wanted_of_raw(family) {
                let to = SocketAddr::new(localhost(family), 0);
                self.attempt(self.order(family, Way::Raw, to)?, Some(wanted), None)?;
            }
            if has_loopback(family) {
                for way in [Way::OwnTcp, Way::OwnUdp] {
                    let to = SocketAddr::new(localhost(family), 0);
                    self.attempt(self.order(family, way, to)?, None, None)?;
                }
            }
        }
        self.grants()
    }

    /// Something that must be refused, on an address of this host.
    fn refusal(&mut self, family: Family, way: Way) -> Result<(), Unclear> {
        let mut tried = 0;
        for ip in candidates(family) {
            let Ok(ear) = Ear::open(ip, way.protocol(family)) else {
                continue;
            };
            tried += 1;
            if self.is_leased(ip)? {
                continue;
            }
            let wanted = match self.registry.wanted(ear.at, family, way) {
                Some(wanted @ (Wanted::Refused(_) | Wanted::Monitored(_))) => wanted,
                Some(Wanted::Through) | None => continue,
            };
            let order = self.order(family, way, ear.at)?;
            return self.attempt(order, Some(wanted), Some(&ear));
        }
        if tried == 0 && family == Family::V6 {
            // A host without IPv6 has no such way to try.
            return Ok(());
        }
        self.attempts.push(ProbeAttempt {
            name: format!("{} {}", family.name(), way.name()),
            hook: way.hook(family).name().to_owned(),
            to: None,
            wanted: "refused".to_owned(),
            verdict: ProbeVerdict::Unknown,
            evidence: "no address of this host is outside the agent's scope".to_owned(),
        });
        Ok(())
    }

    fn is_leased(&self, ip: IpAddr) -> Result<bool, Unclear> {
        ask(self.steps, |reply| Step::Leased(ip, reply))
    }

    /// What is granted to the probe alone must arrive; but nothing of an agent that may reach
    /// nothing.
    fn grants(&mut self) -> Result<(), Unclear> {
        let lifeless = self.registry.lifeless();
        let mut plan = Vec::new();
        for family in Family::ALL {
            if self.is_leased(localhost(family))? {
                self.attempts.push(ProbeAttempt {
                    name: format!("{} grant", family.name()),
                    hook: "map".to_owned(),
                    to: None,
                    wanted: "must arrive".to_owned(),
                    verdict: ProbeVerdict::Unknown,
                    evidence: format!("a name has led the agent to {}", localhost(family)),
                });
                continue;
            }
            for way in [Way::Tcp, Way::UdpConnected, Way::Udp] {
                if let Ok(ear) = Ear::open(localhost(family), way.protocol(family)) {
                    plan.push((family, way, ear));
                }
            }
        }
        let deadline = boot_nanos() + u64::try_from(LEND_FOR.as_nanos()).unwrap_or(0);
        let mut rules = Vec::new();
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let ports: Vec<_> = plan
                .iter()
                .filter(|(_, _, ear)| ear.at.ip() == ip)
                .filter_map(|(family, way, ear)| plan::port(way.protocol(*family), ear.at.port()))
                .collect();
            if !ports.is_empty() {
                let granted = self.registry.granted(ip, &ports, deadline);
                rules.push((ip, granted.map_err(|error| error.to_string())?));
            }
        }
        ask(self.steps, |reply| Step::Lend(rules, reply))?
            .map_err(|why| format!("nothing can be granted to the probe: {why}"))?;
        let wanted = lifeless.map_or(Wanted::Through, Wanted::Refused);
        for (family, way, ear) in &plan {
            let order = self.order(*family, *way, ear.at)?;
            self.attempt(order, Some(wanted), Some(ear))?;
        }
        ask(self.steps, Step::TakeBack)?
            .map_err(|why| format!("the grant to the probe could not be taken back: {why}"))
    }

    fn order(&self, family: Family, way: Way, to: SocketAddr) -> Result<Order, Unclear> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).map_err(|error| format!("no random bytes: {error}"))?;
        Ok(Order {
            family,
            way,
            to,
            nonce: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// Tries one thing and notes what it proves.
    fn attempt(
        &mut self,
        order: Order,
        wanted: Option<Wanted>,
        ear: Option<&Ear>,
    ) -> Result<(), Unclear> {
        let begun = self.trace.begin();
        let before = ask(self.steps, Step::Look)?;
        let tried = self.tell(&Task::Try(order.clone()))?;
        let mut to = order.to;
        let chosen = tried.as_ref().map_or(0, |tried| tried.port);
        if ear.is_none() && chosen != 0 {
            to.set_port(chosen);
        }
        let of_own = || self.registry.wanted_of_own(to, order.family, order.way);
        let wanted = wanted.or_else(of_own);
        let Some(wanted) = wanted else {
            return Err(format!("{}: the registry has no answer", order.name()));
        };
        let heard = match ear {
            Some(ear) => {
                let patience = match wanted {
                    Wanted::Refused(_) => SILENCE,
                    Wanted::Through | Wanted::Monitored(_) => PATIENCE,
                };
                let failed = tried.as_ref().is_none_or(|tried| tried.errno != 0);
                let patience = if failed { SILENCE } else { patience };
                ear.hears(&order.nonce, patience)
                    .map_err(|error| format!("a listener of the daemon's broke: {error}"))?
            }
            None => tried.as_ref().is_some_and(|tried| tried.heard),
        };
        let mark = Mark {
            run: &self.ground.run,
            to: (order.way != Way::Raw).then(|| order.family.written(to)),
            protocol: order.way.protocol(order.family),
        };
        let hook = order.way.hook(order.family);
        let until = Instant::now() + TOLD_WITHIN;
        let (after, evidence) = loop {
            let after: Sight = ask(self.steps, Step::Look)?;
            let read = self.trace.read();
            let evidence = Evidence {
                tried: tried.clone(),
                heard,
                counted: Counted::between(&before.counters, &after.counters, wanted),
                line: self.trace.find(mark, hook.name()),
                unwritten: after.unwritten.clone().or_else(|| {
                    let error = read.as_ref().err().or(begun.as_ref().err())?;
                    Some(format!("it cannot be read back: {error}"))
                }),
                ring: after.ring.clone(),
            };
            // A line that is due may take a moment; one that is not is not waited for.
            let due = evidence.counted.any > 0 && evidence.line.is_none();
            let due = due && !matches!(wanted, Wanted::Through);
            let broken = evidence.unwritten.is_some() || evidence.ring.is_some();
            if !due || broken || Instant::now() >= until {
                break (after, evidence);
            }
            thread::sleep(Duration::from_millis(10));
        };
        if after.changed {
            return Err("the registry changed while it was tried".to_owned());
        }
        let (mut verdict, mut why) = evidence.judge(wanted, hook);
        if verdict == ProbeVerdict::Fail && ear.is_some() && self.is_leased(order.to.ip())? {
            verdict = ProbeVerdict::Unknown;
            why = format!("a name led the agent there meanwhile ({why})");
        }
        self.attempts.push(ProbeAttempt {
            name: order.name(),
            hook: hook.name().to_owned(),
            to: (order.way != Way::Raw).then(|| order.family.written(to).to_string()),
            wanted: match wanted {
                Wanted::Through => "must arrive".to_owned(),
                Wanted::Refused(reason) => format!("must be refused as {}", reason.name()),
                Wanted::Monitored(reason) => format!("must arrive, told as {}", reason.name()),
            },
            verdict,
            evidence: why,
        });
        Ok(())
    }

    /// The helper's answer; none when it gives none in time.
    pub(super) fn tell(&mut self, task: &Task) -> Result<Option<Tried>, Unclear> {
        let mut line = serde_json::to_vec(task).map_err(|error| error.to_string())?;
        line.push(b'\n');
        if let Err(error) = self.orders.write_all(&line) {
            return Err(format!("the helper is gone: {error}"));
        }
        let file = self.answers.get_ref().as_fd();
        let mut fds = [PollFd::new(file, PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(PATIENCE * 3).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, patience) {
            Ok(0) => return Err("the helper gave no answer in time".to_owned()),
            Ok(_) => {}
            Err(error) => return Err(format!("the helper cannot be heard: {error}")),
        }
        let mut text = String::new();
        match self.answers.read_line(&mut text) {
            Ok(0) => Err("the helper ended".to_owned()),
            Ok(_) => serde_json::from_str(&text)
                .map(Some)
                .map_err(|error| format!("the helper makes no sense: {error}")),
            Err(error) => Err(format!("the helper cannot be heard: {error}")),
        }
    }
}
