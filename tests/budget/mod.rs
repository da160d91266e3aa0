//! A guard against slow growth that needs no clock: how many instructions the verifier follows in
//! each program, and how often a reload writes to the kernel's maps. The limits are data, in
//! tests/budget.toml; a case that passes says what it found.

use std::{collections::BTreeMap, thread::sleep, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::{
    harness::{Case, Outcome},
    support::{
        Agent, Cgroup, Ctx, Daemon,
        daemon::{Place, Settings},
        eventually, expect,
        programs::{held_by, infos},
        scale,
    },
};

mod tally;

use tally::Tally;

/// Agents of the registries that are reloaded: what one agent's change costs is the same in each.
const AGENTS: [u32; 2] = [10, 100];
/// Programs of the observer.
const OBSERVER: usize = 4;
/// What a reload retires is kept for a second; then it is removed.
const RETIRED: Duration = Duration::from_millis(2500);

/// tests/budget.toml.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    /// By kernel, then by program.
    verified: BTreeMap<String, BTreeMap<String, u32>>,
    /// By case.
    reload: BTreeMap<String, u32>,
}

impl Budget {
    fn read() -> Result<Self> {
        toml::from_str(include_str!("../budget.toml")).context("tests/budget.toml")
    }
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::with_outcome("budget::verified_instructions", verified),
        reload("budget::reload_of_the_same", "same", |_| Ok(())),
        reload(
            "budget::reload_of_one_more_grant",
            "one_more_grant",
            |place| place.write(&agent(7).allow("192.0.2.1", "443")),
        ),
        reload(
            "budget::reload_of_one_grant_less",
            "one_grant_less",
            |place| place.write(&Agent::new("agent7").allow("198.51.100.0/24", "443")),
        ),
        reload(
            "budget::reload_of_a_thousand_more_grants",
            "a_thousand_more_grants",
            |place| {
                let more = (0..1000).fold(agent(7), |agent, number| {
                    agent.allow(
                        &format!("10.0.{}.{}", number / 250, number % 250 + 1),
                        "443",
                    )
                });
                place.write(&more)
            },
        ),
    ]
}

/// Compares each program of a running daemon with the limit for this kernel.
fn verified(ctx: &mut Ctx) -> Result<Outcome> {
    let names = nix::sys::utsname::uname()?;
    let release = names.release().to_string_lossy().into_owned();
    let version = release.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    // With the observer, which is an object of its own and watches what is outside of the root.
    let top = format!("/{}.watched", ctx.unique());
    let _watched = Cgroup::create(&top)?;
    let settings = Settings {
        // Nobody answers there: what the observer would look up is looked up nowhere else.
        dns: "upstream = [\"127.0.0.1:9\"]\n".to_owned(),
        more: format!("[discover]\ntraffic = true\napis = [\"api.test\"]\ncgroup = \"{top}\"\n"),
        ..Settings::default()
    };
    let place = Place::lay_in(ctx.dir(), &format!("{top}/agents.slice"), &settings)?;
    place.write(&agent(1))?;
    let daemon = Daemon::start(&place)?;
    // The observer comes after the fence.
    let found = eventually(5, || {
        let found = programs(daemon.pid()?)?;
        let seen = found.keys().filter(|name| name.starts_with("seen_"));
        expect("programs of the observer", seen.count(), OBSERVER)?;
        Ok(found)
    })?;
    let said: Vec<String> = found
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let said = said.join(", ");
    println!("{said}");
    let mut budget = Budget::read()?;
    let Some(limits) = budget.verified.remove(&version) else {
        return Ok(Outcome::NotTested(format!(
            "tests/budget.toml has no limits for kernel {version}; found: {said}"
        )));
    };
    expect(
        "programs with a limit",
        found.keys().collect::<Vec<_>>(),
        limits.keys().collect(),
    )?;
    let mut wrong = Vec::new();
    for (name, count) in &found {
        let limit = limits.get(name).copied().unwrap_or_default();
        wrong.extend(judge(name, *count, limit));
    }
    verdict(&wrong)
}

/// Starts a daemon, changes its registry, reloads, and compares the writes with the limit.
fn reload(
    name: &'static str,
    key: &'static str,
    change: impl Fn(&Place) -> Result<()> + 'static,
) -> Case {
    Case::with_outcome(name, move |ctx| {
        if scale::emulated() && !scale::full() {
            let why = "what a reload writes does not depend on the kernel, and takes minutes here";
            return Ok(Outcome::NotTested(why.to_owned()));
        }
        let tally = match Tally::start() {
            Ok(tally) => tally,
            Err(error) => {
                return Ok(Outcome::NotTested(format!(
                    "system calls can't be counted here: {error:#}"
                )));
            }
        };
        let mut counts = Vec::new();
        for agents in AGENTS {
            let daemon = start(ctx, agents)?;
            if tally.writes() == 0 {
                bail!("the daemon started without a write: the count is broken");
            }
            // The daemon may see the new file before it is told.
            let before = tally.writes();
            change(daemon.place())?;
            let said = daemon.place().remit(&["reload"])?;
            expect("exit code of remit reload", said.code, 0)
                .with_context(|| format!("{}{}", said.stdout, said.stderr))?;
            sleep(RETIRED);
            counts.push(u32::try_from(tally.writes() - before)?);
        }
        println!("writes to maps with {AGENTS:?} agents: {counts:?}");
        let [few, many] = counts.as_slice() else {
            bail!("not counted: {counts:?}");
        };
        // An agent that did not change may not cost a write; the margin is for what has a clock.
        if *many > few + 4 {
            bail!(
                "{few} writes with {} agents, {many} with {}",
                AGENTS[0],
                AGENTS[1]
            );
        }
        let budget = Budget::read()?;
        let limit = *budget
            .reload
            .get(key)
            .with_context(|| format!("tests/budget.toml has no reload.{key}"))?;
        let wrong = judge(key, *few.max(many), limit);
        verdict(&wrong.into_iter().collect::<Vec<_>>())
    })
}

/// What is wrong with a count: too many, or so few that the limit guards nothing any more.
fn judge(what: &str, count: u32, limit: u32) -> Option<String> {
    if count > limit {
        return Some(format!("{what}: {count}, and at most {limit} are allowed"));
    }
    if limit > 2 * count + 10 {
        return Some(format!(
            "{what}: {count}, less than half the limit of {limit}: lower it in tests/budget.toml"
        ));
    }
    None
}

fn verdict(wrong: &[String]) -> Result<Outcome> {
    if wrong.is_empty() {
        return Ok(Outcome::Passed);
    }
    bail!("{}", wrong.join("; "))
}

fn agent(number: u32) -> Agent {
    Agent::standard(&format!("agent{number}"))
}

fn start(ctx: &Ctx, agents: u32) -> Result<Guarded> {
    let root = Cgroup::create(&ctx.root())?;
    let place = Place::lay(ctx, &Settings::default())?;
    for number in 1..=agents {
        place.write(&agent(number))?;
    }
    Ok(Guarded {
        daemon: Daemon::start(&place)?,
        _root: root,
    })
}

/// A daemon and its root, dropped in this order.
struct Guarded {
    daemon: Daemon,
    _root: Cgroup,
}

impl std::ops::Deref for Guarded {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

/// The programs that a process holds, by name, with the instructions that the verifier followed.
fn programs(pid: u32) -> Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    for info in infos(&held_by(pid)?) {
        let name = info.name_as_str().context("a program without a name")?;
        let count = info
            .verified_instruction_count()
            .context("this kernel does not tell how many instructions were followed")?;
        found.insert(name.to_owned(), count);
    }
    if found.is_empty() {
        bail!("process {pid} holds no program");
    }
    Ok(found)
}
