//! `remit discover` and the traffic that the daemon's observer sees: on a cgroup that the case made,
//! with the root inside it, and names of a zone of its own. Whatever is observed must arrive.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    harness::Case,
    names::zone::{Spec, Zone},
    support::{
        Actor, Agent, Cgroup, Ctx, Daemon, Family, Way, api, claim,
        daemon::{Place, Settings},
        eventually, expect,
        fixture::arrives,
        programs::{held_by, infos},
        remit::Output,
        wire::Wire,
    },
};

const NAME: &str = "api.model.example";
const V4: &str = "198.51.100.40";
const V6: &str = "2001:db8:1::11";
/// In scope of the agent as well, and no model's.
const OTHER: &str = "198.51.100.41";
const PORT: u16 = 443;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("proof::discover_sees_what_strays_reach", strays),
        Case::new("proof::discover_says_what_it_did_not_see", unseen).once(),
    ]
}

/// A daemon whose root lies in the cgroup that it watches.
struct World {
    // Dropped in this order.
    inside: Cgroup,
    daemon: Daemon,
    watched: Cgroup,
    _zone: Zone,
}

impl World {
    fn start(ctx: &Ctx, more: &str) -> Result<Self> {
        let zone = Zone::start(&Spec::new().host(NAME, &[V4, V6]))?;
        let top = format!("/{}.watched", ctx.unique());
        let watched = Cgroup::create(&top)?;
        let inside = Cgroup::create(&format!("{top}/agents.slice/alpha.service"))?;
        let settings = Settings {
            dns: zone.settings(),
            more: format!("[discover]\napis = [\"{NAME}\"]\n{more}"),
            ..Settings::default()
        };
        let place = Place::lay_in(ctx.dir(), &format!("{top}/agents.slice"), &settings)?;
        place.write(&Agent::standard("alpha"))?;
        Ok(Self {
            inside,
            daemon: Daemon::start(&place)?,
            watched,
            _zone: zone,
        })
    }

    fn place(&self) -> &Place {
        self.daemon.place()
    }

    /// State and evidence of the observer. It must not change the posture.
    fn observer(&self) -> Result<(String, String)> {
        let status = self.place().remit(&["status", "--json"])?;
        expect("exit code of remit status", status.code, 0)
            .with_context(|| status.stdout.clone())?;
        let status: Value = serde_json::from_str(&status.stdout)?;
        expect("posture", status["posture"].as_str(), Some("enforcing"))?;
        let guards = status["guards"].as_array().context("no guards")?;
        let guard = guards.iter().find(|guard| guard["kind"] == "observer");
        let guard = guard.with_context(|| format!("no observer in {guards:?}"))?;
        let text = |key: &str| guard[key].as_str().unwrap_or_default().to_owned();
        Ok((text("state"), text("evidence")))
    }

    /// `remit discover`, which looks for no program.
    fn discover(&self, args: &[&str]) -> Result<Output> {
        let known = self.place().at("known.toml");
        fs::write(&known, "agent = []\n")?;
        let known = known.display().to_string();
        self.place()
            .remit(&[&["discover", "--known", &known], args].concat())
    }

    /// Whom it finds, and whether all was observed.
    fn strays(&self) -> Result<Vec<Value>> {
        let said = self.discover(&["--json"])?;
        expect("what discover says", said.stderr.as_str(), "")?;
        let found: Vec<Value> = serde_json::from_str(&said.stdout)
            .with_context(|| format!("exit {}: {}", said.code, said.stdout))?;
        expect("exit code", said.code, i32::from(!found.is_empty()))?;
        Ok(found)
    }

    /// The observer's programs that the daemon holds.
    fn programs(&self) -> Result<usize> {
        let held = infos(&held_by(self.daemon.pid()?)?);
        let names = held.iter().filter_map(|info| info.name_as_str());
        Ok(names.filter(|name| name.starts_with("seen_")).count())
    }
}

/// The programs at connect on a cgroup, as the kernel lists them.
fn attached(directory: &Path) -> Result<usize> {
    Ok(remit::kernel::programs_on(directory)?.len())
}

fn of_pid(found: &[Value], pid: u32) -> Option<&Value> {
    found
        .iter()
        .find(|one| one["pid"].as_u64() == Some(u64::from(pid)))
}

/// What was reached: protocol, address, how often. The name and the port are the same each time.
fn reached(stray: &Value) -> Result<Vec<(u64, String, u64)>> {
    let all = stray["reached"].as_array().context("no list")?;
    let mut found = Vec::new();
    for one in all {
        expect("names", &one["names"], &serde_json::json!([NAME]))?;
        expect("port", one["port"].as_u64(), Some(u64::from(PORT)))?;
        let ordered = one["first_ms"].as_i64() <= one["last_ms"].as_i64();
        claim(ordered, || format!("times of {one}"))?;
        found.push((
            one["protocol"].as_u64().unwrap_or_default(),
            one["addr"].as_str().unwrap_or_default().to_owned(),
            one["count"].as_u64().unwrap_or_default(),
        ));
    }
    found.sort();
    Ok(found)
}

fn strays(ctx: &mut Ctx) -> Result<()> {
    let top = format!("/{}.watched", ctx.unique());
    let world = World::start(ctx, &format!("traffic = true\ncgroup = \"{top}\"\n"))?;
    let mut wire = Wire::tap()?;
    eventually(10, || {
        let (state, evidence) = world.observer()?;
        claim(state == "live" && evidence.contains("watch 2 addr"), || {
            format!("{state}: {evidence}")
        })
    })?;
    expect("programs of the observer", world.programs()?, 4)?;

    // Every way, family by family. All of it arrives.
    let place = world.watched.child("stray.service")?;
    let mut stray = Actor::spawn(Some(&place))?;
    for way in Way::MAIN {
        for family in Family::ALL {
            let to = family.pick(V4, V6, PORT)?;
            arrives(&mut wire, &mut stray, way, family, to)?;
        }
    }
    // The same address from inside the root; another one from outside; a process that ends.
    let mut agent = Actor::spawn(Some(&world.inside))?;
    let elsewhere = world.watched.child("other.service")?;
    let mut bystander = Actor::spawn(Some(&elsewhere))?;
    let brief = world.watched.child("brief.scope")?;
    let mut gone = Actor::spawn(Some(&brief))?;
    let v4 = SocketAddr::new(V4.parse::<IpAddr>()?, PORT);
    let other = SocketAddr::new(OTHER.parse::<IpAddr>()?, PORT);
    for family in Family::ALL {
        let to = family.pick(V4, V6, PORT)?;
        arrives(&mut wire, &mut agent, Way::Tcp, family, to)?;
        arrives(&mut wire, &mut agent, Way::UdpSendTo, family, to)?;
    }
    arrives(&mut wire, &mut bystander, Way::Tcp, Family::V4, other)?;
    arrives(&mut wire, &mut gone, Way::Tcp, Family::Mapped, v4)?;
    let gone_pid = gone.pid();
    expect("the brief process", gone.finish()?, 0)?;

    let found = world.strays()?;
    let listed = of_pid(&found, stray.pid()).with_context(|| format!("no stray: {found:?}"))?;
    let said = listed.to_string();
    let checks = [
        ("looks_like", "client of api.model.example".to_owned()),
        ("cgroup", format!("{top}/stray.service")),
    ];
    for (key, wanted) in checks {
        expect(key, listed[key].as_str(), Some(wanted.as_str())).with_context(|| said.clone())?;
    }
    expect("ended", listed["ended"].as_bool(), Some(false))?;
    // Mapped destinations are IPv4's: TCP by connect; UDP by connect and by sendto, and mapped once
    // more, for the kernel sends on a connected socket as by sendto there (`udpv6_sendmsg`).
    let wanted = vec![
        (6, V4.to_owned(), 2),
        (6, V6.to_owned(), 1),
        (17, V4.to_owned(), 5),
        (17, V6.to_owned(), 2),
    ];
    expect("what it reached", reached(listed)?, wanted).with_context(|| said.clone())?;
    registers(&world, listed, &format!("{top}/agents.slice/stray.service"))?;

    let ended = of_pid(&found, gone_pid).with_context(|| format!("not told: {found:?}"))?;
    expect("ended", ended["ended"].as_bool(), Some(true))?;
    expect(
        "its cgroup",
        ended["cgroup"].as_str(),
        Some(&*format!("{top}/brief.scope")),
    )?;
    expect(
        "what it reached",
        reached(ended)?,
        vec![(6, V4.to_owned(), 1)],
    )?;

    for (who, pid) in [("agent", agent.pid()), ("bystander", bystander.pid())] {
        claim(of_pid(&found, pid).is_none(), || {
            format!("the {who} is listed: {found:?}")
        })?;
    }
    // The kernel did not even note it: else agents would push strays out.
    let notes = api::ask(world.place(), "GET", "/traffic", None)?;
    expect("HTTP status", notes.status, 200)?;
    let noted = notes.body["notes"].as_array().context("no notes")?;
    claim(of_pid(noted, agent.pid()).is_none(), || {
        format!("noted though inside: {noted:?}")
    })?;

    let text = world.discover(&[])?;
    expect("exit code", text.code, 1)?;
    let line = format!("  reached {NAME} ({V4}:{PORT}), 2 times, last ");
    claim(text.stdout.contains(&line), || text.stdout.clone())?;

    // What has moved into a root since is somebody's.
    world.inside.enter(stray.pid())?;
    let found = world.strays()?;
    claim(of_pid(&found, stray.pid()).is_none(), || {
        format!("listed though inside: {found:?}")
    })?;
    claim(of_pid(&found, gone_pid).is_some(), || {
        format!("forgotten: {found:?}")
    })
}

/// The proposed entry compiles, as a draft, and selects that cgroup.
fn registers(world: &World, stray: &Value, selector: &str) -> Result<()> {
    let toml = stray["toml"].as_str().context("no entry")?;
    claim(
        toml.contains(&format!("cgroup = [\"{selector}\"]"))
            && toml.contains("state = \"draft\"")
            && toml.contains(&format!(
                "# to = \"{NAME}\"\n# ports = [\"443/udp\", 443]\n"
            )),
        || toml.to_owned(),
    )?;
    let id = toml
        .lines()
        .find_map(|line| line.strip_prefix("id = \""))
        .context("no id")?
        .trim_end_matches('"');
    let file = world.place().at(&format!("{id}.toml"));
    fs::write(&file, toml)?;
    let checked = world
        .place()
        .remit(&["check", &file.display().to_string()])?;
    expect("remit check", checked.code, 0).with_context(|| checked.stdout + &checked.stderr)
}

/// Off, impossible, or without a daemon: said each time, and nothing is attached.
fn unseen(ctx: &mut Ctx) -> Result<()> {
    let says = |world: &World, what: &str| -> Result<()> {
        let said = world.discover(&[])?;
        let told = said
            .stderr
            .lines()
            .filter(|line| line.contains(what))
            .count();
        expect("lines that say so", told, 1).with_context(|| said.stderr)
    };
    let top = format!("/{}.watched", ctx.unique());
    {
        let mut world = World::start(ctx, &format!("cgroup = \"{top}\"\n"))?;
        expect("state", world.observer()?.0.as_str(), "off")?;
        expect(
            "programs",
            (world.programs()?, attached(world.watched.path())?),
            (0, 0),
        )?;
        says(&world, "traffic to model APIs is not observed")?;
        expect("exit code of the daemon", world.daemon.terminate()?, 0)?;
        says(&world, "traffic to model APIs is not observed")?;
    }
    {
        let late = format!("/{}.late", ctx.unique());
        let world = World::start(ctx, &format!("traffic = true\ncgroup = \"{late}\"\n"))?;
        let (state, evidence) = world.observer()?;
        expect("state", state.as_str(), "absent")?;
        claim(evidence.starts_with("cannot open cgroup"), || evidence)?;
        says(&world, "traffic was not observed: cannot open cgroup")?;
        let _late = Cgroup::create(&late)?;
        eventually(8, || {
            let (state, evidence) = world.observer()?;
            claim(state == "live", || format!("{state}: {evidence}"))
        })?;
    }
    let mut world = World::start(ctx, &format!("traffic = true\ncgroup = \"{top}\"\n"))?;
    expect(
        "state",
        world.observer().map(|(state, _)| state != "absent")?,
        true,
    )?;
    // Of the four those at connect are asked for.
    expect("attached", attached(world.watched.path())?, 2)?;
    world.daemon.kill()?;
    // Nothing is pinned, so nothing is left; the kernel takes it down in its own time.
    eventually(5, || expect("attached", attached(world.watched.path())?, 0))?;
    says(&world, "traffic was not observed: no daemon")
}
