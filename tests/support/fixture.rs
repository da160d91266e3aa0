//! A daemon, its agents' cgroups, and the two questions that most cases ask: does this arrive,
//! and is this refused — with all the evidence that the design promises for either.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    Actor, Agent, Cgroup, Ctx, Daemon, Family, Line, Way, claim,
    daemon::{Place, Settings},
    eventually, expect,
    listener::Listener,
    way::{AT_ONCE_MS, Tried},
    wire::Wire,
};

/// A case's world.
pub struct Fixture {
    // Dropped in this order: actors before cgroups, the daemon last.
    outside: Actor,
    cgroups: BTreeMap<String, Cgroup>,
    /// The daemon.
    pub daemon: Daemon,
    /// The tap on `lo`.
    pub wire: Wire,
    _root: Cgroup,
}

/// How an attempt must be refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Agent that it is booked on.
    pub agent: String,
    /// `unmapped.reason` and `firewall_rule.category`.
    pub reason: &'static str,
    /// `firewall_rule.uid`; none: not looked at.
    pub rule: Option<String>,
    /// Another hook than the way's.
    pub hook: Option<&'static str>,
    /// Whether the same attempt from outside must arrive, as proof that only the fence stopped it.
    pub control: bool,
}

// === impl Refusal ===

impl Refusal {
    /// By no entry: default-deny.
    pub fn of(agent: &str, reason: &'static str) -> Self {
        Self {
            agent: agent.to_owned(),
            reason,
            rule: Some("default-deny".to_owned()),
            hook: None,
            control: true,
        }
    }

    /// By an entry whose id starts so.
    pub fn by(mut self, rule: &str) -> Self {
        self.rule = Some(rule.to_owned());
        self
    }

    /// By whatever entry.
    pub fn by_any(mut self) -> Self {
        self.rule = None;
        self
    }

    /// At another hook.
    pub fn at(mut self, hook: &'static str) -> Self {
        self.hook = Some(hook);
        self
    }

    /// Without the attempt from outside.
    pub fn without_control(mut self) -> Self {
        self.control = false;
        self
    }
}

// === impl Fixture ===

impl Fixture {
    /// Starts a daemon with these agents, whose cgroups are there before it.
    pub fn start(ctx: &Ctx, agents: &[Agent]) -> Result<Self> {
        Self::start_with(ctx, agents, &Settings::default())
    }

    /// The same with other settings.
    pub fn start_with(ctx: &Ctx, agents: &[Agent], settings: &Settings) -> Result<Self> {
        let ids: Vec<&str> = agents.iter().map(|agent| agent.id.as_str()).collect();
        Self::start_all(ctx, agents, &ids, settings)
    }

    /// The same, with the services of `ids` alone there.
    pub fn start_with_cgroups(ctx: &Ctx, agents: &[Agent], ids: &[&str]) -> Result<Self> {
        Self::start_all(ctx, agents, ids, &Settings::default())
    }

    fn start_all(ctx: &Ctx, agents: &[Agent], ids: &[&str], settings: &Settings) -> Result<Self> {
        let root = Cgroup::create(&ctx.root())?;
        let place = Place::lay(ctx, settings)?;
        for agent in agents {
            place.write(agent)?;
        }
        let mut cgroups = BTreeMap::new();
        for id in ids {
            cgroups.insert((*id).to_owned(), root.child(&format!("{id}.service"))?);
        }
        let fixture = Self {
            outside: Actor::spawn(None)?,
            cgroups,
            daemon: Daemon::start(&place)?,
            wire: Wire::tap()?,
            _root: root,
        };
        fixture.await_cgroups(ids)?;
        Ok(fixture)
    }

    /// Waits until the daemon knows the agent's cgroup.
    pub fn await_cgroup(&self, id: &str) -> Result<()> {
        self.await_cgroups(&[id])
    }

    /// The same for several agents.
    fn await_cgroups(&self, ids: &[&str]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        eventually(5, || {
            let status = self.place().status()?;
            for id in ids {
                let wanted = self.cgroup(id)?.id()?;
                let known = status.cgroups(id)?;
                claim(known.contains(&wanted), || {
                    format!("the daemon does not know cgroup {wanted} of {id}: {known:?}")
                })?;
            }
            Ok(())
        })
    }

    /// The daemon's place.
    pub fn place(&self) -> &Place {
        self.daemon.place()
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> Result<u32> {
        self.daemon.pid()
    }

    /// An agent's cgroup.
    pub fn cgroup(&self, id: &str) -> Result<&Cgroup> {
        self.cgroups
            .get(id)
            .with_context(|| format!("no cgroup of {id}"))
    }

    /// A process of an agent.
    pub fn actor(&self, id: &str) -> Result<Actor> {
        Actor::spawn(Some(self.cgroup(id)?))
    }

    /// A process outside of any fence.
    pub fn outside(&mut self) -> &mut Actor {
        &mut self.outside
    }

    /// Violation lines so far.
    pub fn violations(&self) -> Result<Vec<Line>> {
        Line::read_all(&self.place().at("log/violations.jsonl"))
    }

    /// Audit lines so far.
    pub fn audit(&self) -> Result<Vec<Line>> {
        Line::read_all(&self.place().at("log/audit.jsonl"))
    }

    /// Writes an agent's entry anew and reloads.
    pub fn change(&self, agent: &Agent) -> Result<()> {
        self.place().write(agent)?;
        let said = self.place().remit(&["reload"])?;
        expect("exit code of remit reload", said.code, 0)
            .with_context(|| format!("{}{}", said.stdout, said.stderr))
    }

    /// Waits for a violation line of `agent` after the first `before` lines that fits.
    pub fn await_line(
        &self,
        before: usize,
        agent: &str,
        fits: impl Fn(&Line) -> bool,
    ) -> Result<Line> {
        eventually(7, || {
            let lines = self.violations()?;
            let new = lines.get(before..).unwrap_or_default();
            new.iter()
                .find(|line| line.agent() == agent && fits(line))
                .cloned()
                .with_context(|| format!("no such line of {agent} in {new:?}"))
        })
    }

    /// What has left for `ip` since the wire was last drained.
    pub fn seen_at(&mut self, ip: IpAddr) -> Result<usize> {
        let seen = self.wire.drain()?;
        Ok(seen.iter().filter(|packet| packet.ip == ip).count())
    }

    /// The attempt must arrive, whole.
    pub fn arrives(
        &mut self,
        actor: &mut Actor,
        way: Way,
        family: Family,
        to: SocketAddr,
    ) -> Result<Tried> {
        arrives(&mut self.wire, actor, way, family, to)
    }

    /// The attempt must be refused, at once and on all records: the error, the listener, the wire,
    /// the kernel's counter, and one line of the log.
    pub fn refused(
        &mut self,
        actor: &mut Actor,
        way: Way,
        family: Family,
        to: SocketAddr,
        how: &Refusal,
    ) -> Result<()> {
        self.refused_inner(actor, way, family, to, how)
            .with_context(|| format!("{} to {to} ({})", way.name(), family.name()))
    }

    fn refused_inner(
        &mut self,
        actor: &mut Actor,
        way: Way,
        family: Family,
        to: SocketAddr,
        how: &Refusal,
    ) -> Result<()> {
        let status = self.place().status()?;
        let before = (
            status.denied(&how.agent, None)?,
            status.denied(&how.agent, Some(how.reason))?,
        );
        let lines_before = self.violations()?.len();
        let listener = Listener::start(way, to)?;
        self.wire.drain()?;

        let tried = way.perform(actor, family, to)?;
        expect(
            &format!("errno of {}", tried.step),
            tried.errno,
            way.refusal(family),
        )?;
        claim(tried.ms < AT_ONCE_MS, || {
            format!("refused only after {:.0} ms", tried.ms)
        })?;
        listener.expect_nothing()?;
        let protocol = way.protocol(family);
        let leaked: Vec<_> = self
            .wire
            .drain()?
            .into_iter()
            .filter(|seen| seen.ip == to.ip() && seen.protocol == protocol)
            .collect();
        claim(leaked.is_empty(), || {
            format!("on the wire, though refused: {leaked:?}")
        })?;

        let status = self.place().status()?;
        let after = (
            status.denied(&how.agent, None)?,
            status.denied(&how.agent, Some(how.reason))?,
        );
        expect(
            "kernel counters (all, this reason)",
            after,
            (before.0 + 1, before.1 + 1),
        )?;
        self.expect_line(lines_before, actor.pid(), way, family, to, how)?;

        if let Some(id) = tried.id {
            actor.must(&crate::actor::Op::Close { id })?;
        }
        drop(listener);
        if how.control {
            arrives(&mut self.wire, &mut self.outside, way, family, to)
                .context("control: the same from outside the fence")?;
        }
        Ok(())
    }

    /// Exactly one new line, and that one says it all.
    fn expect_line(
        &self,
        lines_before: usize,
        pid: u32,
        way: Way,
        family: Family,
        to: SocketAddr,
        how: &Refusal,
    ) -> Result<()> {
        let hook = how.hook.unwrap_or(way.hook(family));
        let at_creation = hook == "cgroup/sock_create";
        let new = || -> Result<Vec<Line>> {
            let mut lines = self.violations()?;
            let new = lines.split_off(lines_before.min(lines.len()));
            Ok(new
                .into_iter()
                .filter(|line| line.agent() == how.agent && line.is_denial())
                .collect())
        };
        eventually(7, || {
            claim(!new()?.is_empty(), || "no line in the log".to_owned())
        })?;
        // A second line would follow on the heels of the first.
        sleep(Duration::from_millis(50));
        let lines = new()?;
        let [line] = lines.as_slice() else {
            bail!("{} lines instead of one: {lines:?}", lines.len());
        };
        let exe = std::fs::read_link("/proc/self/exe")?;
        let checks: &[(&str, String, String)] = &[
            ("count", line.count().to_string(), "1".to_owned()),
            (
                "actor.process.pid",
                format!("{:?}", line.number("/actor/process/pid")),
                format!("{:?}", Some(u64::from(pid))),
            ),
            (
                "actor.process.file.path",
                line.text("/actor/process/file/path").to_owned(),
                exe.display().to_string(),
            ),
            (
                "firewall_rule.category",
                line.text("/firewall_rule/category").to_owned(),
                how.reason.to_owned(),
            ),
            (
                "unmapped.reason",
                line.text("/unmapped/reason").to_owned(),
                how.reason.to_owned(),
            ),
            (
                "unmapped.hook",
                line.text("/unmapped/hook").to_owned(),
                hook.to_owned(),
            ),
            (
                "action, disposition",
                format!("{}, {}", line.0["action_id"], line.0["disposition_id"]),
                "2, 2".to_owned(),
            ),
        ];
        for (what, found, wanted) in checks {
            expect(what, found, wanted).with_context(|| line.0.to_string())?;
        }
        if !at_creation {
            expect(
                "dst_endpoint.ip",
                line.text("/dst_endpoint/ip"),
                to.ip().to_string().as_str(),
            )
            .with_context(|| line.0.to_string())?;
            if way.is_tcp() || way.is_udp() {
                expect(
                    "dst_endpoint.port",
                    line.number("/dst_endpoint/port"),
                    Some(u64::from(to.port())),
                )
                .with_context(|| line.0.to_string())?;
            }
        }
        if let Some(rule) = &how.rule {
            let found = line.text("/firewall_rule/uid");
            claim(found.starts_with(rule.as_str()), || {
                format!(
                    "firewall_rule.uid: found {found}, wanted {rule}: {}",
                    line.0
                )
            })?;
        }
        Ok(())
    }

    /// The same over all files of the log, whoever rotated them.
    pub fn reconcile_all(&self, id: &str, name: &str) -> Result<()> {
        eventually(8, || {
            let denied = self.place().status()?.denied(id, None)?;
            let mut told = 0;
            for line in crate::evidence::reader::all_lines(&self.place().at("log"), name)? {
                let line = Line(serde_json::from_str(&line).context("not JSON")?);
                if line.agent() == id && line.is_denial() {
                    told += line.count();
                }
            }
            expect(
                &format!("sum over all lines of {id} against the kernel's counter"),
                told,
                denied,
            )
        })
    }

    /// The sum over an agent's denial lines is the kernel's counter, exactly.
    pub fn reconcile(&self, id: &str) -> Result<()> {
        eventually(8, || {
            let denied = self.place().status()?.denied(id, None)?;
            let told: u64 = self
                .violations()?
                .iter()
                .filter(|line| line.agent() == id && line.is_denial())
                .map(Line::count)
                .sum();
            expect(
                &format!("sum over the lines of {id} against the kernel's counter"),
                told,
                denied,
            )
        })
    }
}

/// Performs an attempt and insists on its arrival.
pub fn arrives(
    wire: &mut Wire,
    actor: &mut Actor,
    way: Way,
    family: Family,
    to: SocketAddr,
) -> Result<Tried> {
    let mut inner = || -> Result<Tried> {
        let listener = Listener::start(way, to)?;
        wire.drain()?;
        let tried = way.perform(actor, family, to)?;
        expect(&format!("errno of {}", tried.step), tried.errno, 0)?;
        listener.expect_payload()?;
        let protocol = way.protocol(family);
        claim(
            wire.drain()?
                .iter()
                .any(|seen| seen.ip == to.ip() && seen.protocol == protocol),
            || "it was not seen on the wire".to_owned(),
        )?;
        if let Some(id) = tried.id {
            actor.must(&crate::actor::Op::Close { id })?;
        }
        Ok(tried)
    };
    inner().with_context(|| format!("{} to {to} ({}) must arrive", way.name(), family.name()))
}
