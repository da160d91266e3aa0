//! The user side: how long the daemon takes for a large registry, what memory and processor it
//! takes, what it does under a flood of refusals, and what a lookup costs. `remit-tests bench-user
//! quick|full|lookups` prints one JSON line a figure.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, ExitCode, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{host, say};
use crate::{
    actor::{Op, traffic::mono_ns},
    names::many,
    never_open::latency,
    support::{
        Agent, Cgroup, Ctx, Daemon, Family, Fixture, Line, api,
        daemon::{Place, Settings},
        expect,
        network::{OUT_V4, OUT_V6},
        remit,
        way::PAYLOAD,
    },
};

/// How often and how long.
struct Effort {
    prefixes: u32,
    agents: u32,
    starts: usize,
    reloads: usize,
    rest: Duration,
    runs: usize,
    revoked: usize,
    flood: Duration,
    /// Rounds of lookups, and how long each takes on each side.
    lookups: (usize, u64),
}

const FULL: Effort = Effort {
    prefixes: 100_000,
    agents: 1_000,
    starts: 3,
    reloads: 5,
    rest: Duration::from_secs(15),
    runs: 20,
    revoked: 40,
    flood: Duration::from_secs(4),
    lookups: (30, 200),
};

const QUICK: Effort = Effort {
    prefixes: 2_000,
    agents: 20,
    starts: 1,
    reloads: 1,
    rest: Duration::from_secs(2),
    runs: 2,
    revoked: 2,
    flood: Duration::from_millis(500),
    lookups: (3, 100),
};

type Lay = Box<dyn Fn(&Place, bool) -> Result<()>>;

/// A registry of some size.
struct Large {
    name: String,
    /// Writes it, in one of two forms that differ by one grant.
    lay: Lay,
}

/// Measures everything.
pub fn run(effort: &str, unique: &str) -> Result<ExitCode> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if effort == "lookups" {
        let ctx = Ctx::enter(unique)?;
        say(&json!({ "host": host(0, 1)? }));
        lookups(&ctx, &FULL)?;
        return Ok(ExitCode::SUCCESS);
    }
    let effort = match effort {
        "full" => FULL,
        "quick" => QUICK,
        other => bail!("no effort `{other}`"),
    };
    let ctx = Ctx::enter(unique)?;
    say(&json!({ "host": host(0, 1)? }));
    for large in registries(&effort) {
        registry(&ctx, &effort, &large).with_context(|| large.name.clone())?;
    }
    revoke(&ctx, &effort).context("revoke")?;
    for (name, kinds, per_second, more) in [
        ("one kind, without pause", false, 0, ""),
        ("ever new kinds, without pause", true, 0, ""),
        (
            "ever new kinds, 100,000 a second, and lines for all of them",
            true,
            100_000,
            "[log]\nper_agent_rate = 1000000\nper_agent_daily = \"64GiB\"\n",
        ),
    ] {
        flood(&ctx, &effort, name, kinds, per_second, more).with_context(|| name.to_owned())?;
    }
    alone(&ctx, &effort).context("remit run --policy")?;
    lookups(&ctx, &effort).context("lookups")?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the time on the monotonic clock: how long it took until this was running.
pub fn now() -> Result<ExitCode> {
    println!("{}", mono_ns());
    Ok(ExitCode::SUCCESS)
}

/// The median of these, the least and the most.
fn figure(about: &str, what: &str, unit: &str, values: &[f64]) -> Result<()> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
        bail!("nothing was measured of {what}");
    };
    let middle = sorted.get(sorted.len() / 2).unwrap_or(most);
    say(&json!({
        "about": about, "figure": what, "unit": unit,
        "median": middle, "lo": least, "hi": most, "n": sorted.len(),
    }));
    Ok(())
}

fn registries(effort: &Effort) -> [Large; 3] {
    let (prefixes, agents) = (effort.prefixes, effort.agents);
    let network = |number: u32| {
        let [_, b, c, d] = (number << 4).to_be_bytes();
        format!("11.{b}.{c}.{d}/28")
    };
    let of_set = move |place: &Place, wide: bool| {
        place.write(&Agent::new("large").allow("@wide", "443"))?;
        let mut text = "schema = 1\n[set]\nname = \"wide\"\n".to_owned();
        for number in 0..prefixes {
            text += &format!("[[allow]]\nto = \"{}\"\nports = [443]\n", network(number));
        }
        if wide {
            text += "[[allow]]\nto = \"192.0.2.1\"\nports = [443]\n";
        }
        Ok(fs::write(place.at("sets.d/wide.toml"), text)?)
    };
    let of_one = move |place: &Place, wide: bool| {
        let all = (0..prefixes).map(network);
        let all = all.chain(wide.then(|| "192.0.2.1".to_owned()));
        place.write(&all.fold(Agent::new("large"), |agent, to| agent.allow(&to, "443")))
    };
    let of_many = move |place: &Place, wide: bool| {
        for number in 0..agents {
            let id = format!("agent-{number:04}");
            let mut agent = Agent::standard(&id);
            for host in 1..=5 {
                let [_, _, b, c] = number.to_be_bytes();
                agent = agent.allow(&format!("10.{b}.{c}.{host}"), "443");
            }
            if number == 7 && wide {
                agent = agent.allow("192.0.2.1", "443");
            }
            // A file that is as it was is left alone, as an editor would.
            let text = agent.toml(place.root());
            let path = place.at("agents.d").join(format!("{id}.toml"));
            if fs::read_to_string(path).ok().as_deref() != Some(text.as_str()) {
                place.write_raw(&id, &text)?;
            }
        }
        Ok(())
    };
    [
        Large {
            name: format!("one agent, a set of {prefixes} networks"),
            lay: Box::new(of_set),
        },
        Large {
            name: format!("one agent, {prefixes} grants"),
            lay: Box::new(of_one),
        },
        Large {
            name: format!("{agents} agents"),
            lay: Box::new(of_many),
        },
    ]
}

const EVERYTHING: [&str; 4] = ["agents.d", "sets.d", "state", "log"];

/// Empties these folders of the last measurement, and what its daemon said.
fn forget(ctx: &Ctx, folders: &[&str]) -> Result<()> {
    for name in folders {
        drop(fs::remove_dir_all(ctx.dir().join(name)));
        fs::create_dir_all(ctx.dir().join(name))?;
    }
    drop(fs::remove_file(ctx.dir().join("daemon.err")));
    Ok(())
}

/// Starts, reloads and rest with one registry.
fn registry(ctx: &Ctx, effort: &Effort, large: &Large) -> Result<()> {
    let about = large.name.as_str();
    let patience = Duration::from_secs(180);
    let _root = Cgroup::create(&ctx.root())?;
    forget(ctx, &EVERYTHING)?;
    let place = Place::lay(ctx, &Settings::default())?;
    (large.lay)(&place, false)?;
    let (mut cold, mut adopting) = (Vec::new(), Vec::new());
    let mut daemon = None;
    let mut starts = Vec::new();
    for _ in 0..effort.starts {
        drop(daemon.take());
        forget(ctx, &["state", "log"])?;
        let began = Instant::now();
        let mut started = Daemon::start_within(&place, patience)?;
        cold.push(began.elapsed().as_secs_f64() * 1e3);
        started.kill()?;
        let began = Instant::now();
        started.restart()?;
        adopting.push(began.elapsed().as_secs_f64() * 1e3);
        let log = fs::read_to_string(place.at("daemon.err"))?;
        starts.extend(laps(&log, "Started."));
        daemon = Some(started);
    }
    let daemon = daemon.context("no start was asked for")?;
    figure(about, "READY, cold", "ms", &cold)?;
    figure(about, "READY, adopting", "ms", &adopting)?;
    for (stage, what) in [
        ("tables", "tables filled"),
        ("compile", "registry compiled"),
    ] {
        // The first of two is the cold one.
        let cold = starts.iter().step_by(2).filter_map(|laps| lap(laps, stage));
        figure(
            about,
            &format!("start: {what}"),
            "ms",
            &cold.collect::<Vec<_>>(),
        )?;
    }
    let taken = memory(daemon.pid()?)?;
    figure(about, "resident", "MiB", &[taken.resident])?;
    figure(about, "of it the daemon's own", "MiB", &[taken.own])?;
    figure(about, "maps in the kernel", "MiB", &[taken.maps])?;

    let mut changes = Vec::new();
    for number in 0..effort.reloads {
        (large.lay)(&place, number % 2 == 0)?;
        let began = Instant::now();
        reload(&place)?;
        changes.push(began.elapsed().as_secs_f64() * 1e3);
        // What it retired is removed a second later.
        sleep(Duration::from_millis(2_200));
    }
    figure(
        about,
        "reload of one grant, asked to answered",
        "ms",
        &changes,
    )?;
    let log = fs::read_to_string(place.at("daemon.err"))?;
    // The file's change may have been seen before: then the reload that was asked for is idle.
    let reloads = laps(&log, "Reloaded. changed=1");
    for (stage, what) in [
        ("tables", "tables written"),
        ("compile", "registry compiled"),
    ] {
        let all: Vec<f64> = reloads.iter().filter_map(|laps| lap(laps, stage)).collect();
        figure(about, &format!("reload: {what}"), "ms", &all)?;
    }
    let taken = memory(daemon.pid()?)?;
    figure(about, "the daemon's own after reloads", "MiB", &[taken.own])?;

    let mut compared = Vec::new();
    for _ in 0..effort.starts {
        let said = place.remit(&["reconcile", "--json"])?;
        let said: serde_json::Value = serde_json::from_str(&said.stdout)
            .with_context(|| format!("remit reconcile says {}", said.stderr))?;
        expect(
            "differences",
            said["drift"].as_array().map(Vec::len),
            Some(0),
        )?;
        compared.extend(said["took_ms"].as_f64());
    }
    figure(about, "registry and kernel compared", "ms", &compared)?;
    let share = busy(daemon.pid()?, || {
        sleep(effort.rest);
        Ok(())
    })?;
    figure(about, "processor at rest", "%", &[share])
}

fn reload(place: &Place) -> Result<()> {
    let answer = api::ask(place, "POST", "/reload", None)?;
    expect("HTTP status of reload", answer.status, 200).with_context(|| answer.body.to_string())?;
    expect("reload", answer.body["ok"].as_bool(), Some(true))
        .with_context(|| answer.body.to_string())
}

/// What the daemon says that the steps of its starts or reloads took, in order.
fn laps(log: &str, what: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains(what))
        .filter_map(|line| line.split_once("took=").map(|(_, laps)| laps.to_owned()))
        .collect()
}

/// Milliseconds of one step.
fn lap(laps: &str, step: &str) -> Option<f64> {
    laps.split(", ")
        .find_map(|lap| lap.strip_prefix(step)?.trim().parse().ok())
}

/// What a process takes, in MiB.
struct Memory {
    /// Resident, with the ring, which is mapped twice, and the program's own text.
    resident: f64,
    /// Of it what is the process's alone.
    own: f64,
    /// Of the kernel, by the maps that it holds.
    maps: f64,
}

fn memory(pid: u32) -> Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mib = |name: &str| -> Result<f64> {
        let mut lines = status.lines();
        let kib = lines.find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        Ok(kib.with_context(|| format!("no {name}"))?.parse::<f64>()? / 1024.0)
    };
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.filter_map(Result::ok) {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(Memory {
        resident: mib("VmRSS:")?,
        own: mib("RssAnon:")?,
        maps: maps.values().sum::<u64>() as f64 / f64::from(1 << 20),
    })
}

/// The share of one processor that a process takes while something is done, in percent.
fn busy(pid: u32, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let ticks = || -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
        let mut fields = rest.split_whitespace().skip(11);
        let mut next = || fields.next().and_then(|field| field.parse::<f64>().ok());
        Ok(next().context("no utime")? + next().context("no stime")?)
    };
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?;
    let per_second = per_second.context("no clock tick")? as f64;
    let (began, before) = (Instant::now(), ticks()?);
    work()?;
    let spent = (ticks()? - before) / per_second;
    Ok(spent / began.elapsed().as_secs_f64() * 100.0)
}

/// Revocations while the agent's traffic runs, among many agents.
fn revoke(ctx: &Ctx, effort: &Effort) -> Result<()> {
    forget(ctx, &EVERYTHING)?;
    let names: Vec<String> = (0..effort.agents)
        .map(|at| format!("agent-{at:04}"))
        .collect();
    let agents: Vec<Agent> = names.iter().map(|id| Agent::standard(id)).collect();
    let fx = Fixture::start_with(ctx, &agents, &Settings::default())?;
    let took = latency::revoke(&fx, names.get(..effort.revoked).unwrap_or(&names))?;
    let about = format!("revoke, {} agents", effort.agents);
    let millis = |nanos: &[u64]| {
        nanos
            .iter()
            .map(|each| *each as f64 / 1e6)
            .collect::<Vec<_>>()
    };
    figure(&about, "to the last packet, TCP", "ms", &millis(&took.tcp))?;
    figure(&about, "to the last packet, UDP", "ms", &millis(&took.udp))?;
    figure(&about, "to the answer", "ms", &millis(&took.answers))
}

/// A flood of refusals. The sum over the lines must be the kernel's counter.
fn flood(
    ctx: &Ctx,
    effort: &Effort,
    name: &str,
    kinds: bool,
    per_second: u32,
    more: &str,
) -> Result<()> {
    let settings = Settings {
        more: more.to_owned(),
        ..Settings::default()
    };
    forget(ctx, &EVERYTHING)?;
    let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &settings)?;
    let mut actor = fx.actor("alpha")?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let addr = Family::V4.pick(OUT_V4, OUT_V6, 9)?;
    let (data, millis) = (PAYLOAD.to_vec(), effort.flood.as_millis() as u64);
    let op = if kinds {
        Op::Scatter {
            id,
            addr,
            data,
            millis,
            per_second,
        }
    } else {
        Op::Flood {
            id,
            addr,
            data,
            millis,
        }
    };
    let pid = fx.daemon_pid()?;
    let mut made = 0;
    let share = busy(pid, || {
        made = actor.ask(&op)?.value;
        Ok(())
    })?;
    let taken = memory(pid)?;
    fx.reconcile("alpha")?;
    expect(
        "the kernel's counter",
        fx.place().status()?.denied("alpha", None)?,
        u64::try_from(made)?,
    )?;
    let lines = fx.violations()?;
    let told: u64 = lines
        .iter()
        .filter(|line| line.agent() == "alpha" && line.is_denial())
        .map(Line::count)
        .sum();
    let lines = lines.len();
    let about = format!("flood: {name}");
    let seconds = effort.flood.as_secs_f64();
    figure(&about, "attempts a second", "", &[made as f64 / seconds])?;
    figure(&about, "lines a second", "", &[lines as f64 / seconds])?;
    let untold = made as f64 - told as f64;
    figure(&about, "attempts in no line's count", "", &[untold])?;
    figure(&about, "processor", "%", &[share])?;
    figure(&about, "the daemon's own memory", "MiB", &[taken.own])
}

/// Lookups through the DNS guard beside asking its upstream directly, in turns.
fn lookups(ctx: &Ctx, effort: &Effort) -> Result<()> {
    forget(ctx, &EVERYTHING)?;
    let (rounds, millis) = effort.lookups;
    for (askers, cost) in many::measure(ctx, rounds, millis, &[1, 32])? {
        let about = format!("lookups, {askers} at a time");
        let all = |of: fn(&(f64, f64, f64)) -> f64| cost.rounds.iter().map(of).collect::<Vec<_>>();
        figure(
            &about,
            "median through the guard",
            "us",
            &all(|each| each.0),
        )?;
        figure(&about, "median directly", "us", &all(|each| each.1))?;
        figure(&about, "ratio of the two", "", &all(|each| each.2))?;
        figure(
            &about,
            "99th percentile through the guard",
            "us",
            &cost.late,
        )?;
        figure(&about, "a second through the guard", "", &[cost.held.0])?;
        figure(&about, "a second directly", "", &[cost.held.1])?;
    }
    Ok(())
}

/// `remit run --policy` beside no fence: to the command's own first instruction, and to the end.
fn alone(ctx: &Ctx, effort: &Effort) -> Result<()> {
    let place = Place::lay(ctx, &Settings::default())?;
    let policy = place.at("hello.toml");
    fs::write(&policy, Agent::standard("hello").toml("/agents.slice"))?;
    let policy = policy.to_str().context("a path that is not UTF-8")?;
    let exe = std::env::current_exe()?;
    let exe = exe.to_str().context("a path that is not UTF-8")?;
    let fenced = ["run", "--as-root", "--policy", policy, "--", exe, "now"];
    let [mut bare, mut to_command, mut in_all] = [const { Vec::new() }; 3];
    let timed = |command: &mut Command| -> Result<(f64, f64)> {
        let began = mono_ns();
        let said = command
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()?;
        let ended = mono_ns();
        expect("exit code", remit::code(said.status), 0)?;
        let said: u64 = String::from_utf8_lossy(&said.stdout).trim().parse()?;
        let millis = |nanos: u64| nanos as f64 / 1e6;
        Ok((millis(said.saturating_sub(began)), millis(ended - began)))
    };
    for _ in 0..effort.runs {
        bare.push(timed(Command::new(exe).arg("now"))?.0);
        let (first, all) = timed(&mut place.command(&fenced)?)?;
        to_command.push(first);
        in_all.push(all);
    }
    let about = "remit run --policy";
    figure(about, "to the command, without a fence", "ms", &bare)?;
    figure(about, "to the command", "ms", &to_command)?;
    figure(about, "in all", "ms", &in_all)
}
