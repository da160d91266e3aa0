//! One verdict, two places: over generated registries, `decide` in memory says what it says in the
//! kernel. The judge program answers for the live maps, real sockets for the hooks (whose
//! connect programs the kernel will not test-run).
//!
//! `REMIT_PARITY_SEED` repeats a run; a failure names the seed.

mod ask;
mod policies;
mod sockets;

use std::{
    collections::{BTreeSet, HashSet},
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Class, Effect, RULES_PER_SET, Rule, State};
use anyhow::{Context as _, Result, bail};
use remit::{
    kernel::{ApplyError, Capacity, EMBEDDED, Enforcer, Image, Tuning},
    policy::AgentTables,
};

use self::{
    ask::{Tally, direct, index, memories, of_class},
    policies::Registry,
};
use crate::{
    harness::Case,
    support::{Cgroup, Ctx, claim, dice::Dice, expect},
};

const TUNING: Tuning = Tuning {
    kernel_log: 0,
    events_per_second: 200,
    accounts: true,
};
/// Agents of the first comparison, and questions about each.
const AGENTS: usize = 200;
const QUESTIONS: usize = 220;
/// What must have been compared on real hardware, and what an emulated machine must come to.
const ENOUGH: (usize, usize) = (30_000, 3_000);
/// Retired rows and blocks are free again after this.
const GRACE: Duration = Duration::from_millis(1100);

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("parity::memory_and_kernel_give_one_verdict", one_verdict),
        Case::new("parity::holds_over_reloads_and_reuse", over_reloads),
        Case::new("parity::holds_when_a_new_daemon_adopts", adopted),
        Case::new("parity::notices_each_flipped_rule", flipped_rules),
        Case::new("parity::sockets_fare_as_memory_decides", sockets::fare),
    ];
    for case in &mut cases {
        case.deadline = Duration::from_secs(90);
        // These link the library; the binary is not asked.
        case.needs
            .retain(|need| !matches!(need, crate::harness::Need::Remit));
    }
    cases
}

fn is_emulated() -> bool {
    std::env::var_os("REMIT_TEST_VM").is_some()
}

fn budget() -> Duration {
    Duration::from_secs(if is_emulated() { 60 } else { 30 })
}

/// An enforcer with a fence on the case's own root, so that its pins count as somebody's.
struct World {
    root: Cgroup,
    name: String,
    pins: PathBuf,
}

// === impl World ===

impl World {
    fn new(ctx: &Ctx) -> Result<Self> {
        Ok(Self {
            root: Cgroup::create(&ctx.root())?,
            name: ctx.root(),
            pins: ctx.dir().join("bpf"),
        })
    }

    fn open(&self, capacity: Capacity) -> Result<Enforcer> {
        let mut enforcer = Enforcer::open(EMBEDDED, &self.pins, capacity, &TUNING)
            .context("cannot load the object")?;
        enforcer.fence(&self.name, self.root.path())?;
        Ok(enforcer)
    }
}

/// Runs `body` with chance; its error names the seed, and its report goes to the output.
fn by_chance(body: impl FnOnce(&mut Dice) -> Result<String>) -> Result<()> {
    let (mut dice, seed) = Dice::new("REMIT_PARITY_SEED")?;
    let said = body(&mut dice).with_context(|| format!("REMIT_PARITY_SEED={seed}"))?;
    println!("{said}; seed {seed}");
    Ok(())
}

fn one_verdict(ctx: &mut Ctx) -> Result<()> {
    by_chance(|dice| {
        let started = Instant::now();
        let world = World::new(ctx)?;
        let registry = Registry::generate(dice, "a", AGENTS, &ctx.root())?;
        let images = registry.images();
        let mut enforcer = world.open(Capacity::for_images(&images))?;
        enforcer.apply(&images)?;
        let mut tally = Tally::new(budget());
        // A few questions to each agent first, so that a slow machine asks about all of them.
        let mut left = QUESTIONS;
        for count in [10, 30, QUESTIONS] {
            tally.compare(&mut enforcer, &registry, dice, count.min(left))?;
            left -= count.min(left);
        }
        let enough = if is_emulated() { ENOUGH.1 } else { ENOUGH.0 };
        claim(tally.compared >= enough, || {
            format!("only {} questions were compared", tally.compared)
        })?;
        tally.require_all_kinds()?;
        Ok(format!(
            "{} questions over {} agents, {} about chains, in {:.1} s: {:?}",
            tally.compared,
            registry.agents.len(),
            tally.chained,
            started.elapsed().as_secs_f64(),
            tally.answers,
        ))
    })
}

/// The maps are made too small for two registries beside a third, so that each reload lives on
/// what the one before the last has given back.
fn over_reloads(ctx: &mut Ctx) -> Result<()> {
    by_chance(|dice| {
        let world = World::new(ctx)?;
        let registries: Vec<Registry> = (0..4)
            .map(|_| Registry::generate(dice, "r", 60, &ctx.root()))
            .collect::<Result<_>>()?;
        let sizes: Vec<Vec<Image>> = registries.iter().map(Registry::images).collect();
        let capacity = for_two(&sizes);
        let mut enforcer = world.open(capacity)?;
        let mut tally = Tally::new(budget());
        let mut before: Option<&Registry> = None;
        let mut reloads = 0;
        for registry in registries.iter().cycle().take(9) {
            let changed = enforcer.apply(&registry.images())?;
            claim(!changed.is_empty(), || "nothing changed".to_owned())?;
            tally.compare(&mut enforcer, registry, dice, 12)?;
            let gone = gone(before, registry);
            tally.compare_gone(&mut enforcer, &gone)?;
            sleep(GRACE);
            enforcer.sweep();
            tally.compare(&mut enforcer, registry, dice, 12)?;

            // One that does not fit is refused whole, and nothing of it is in force.
            let mut many = Registry::generate(dice, "r", 60, &ctx.root())?;
            let more = Registry::generate(dice, "x", 160, &ctx.root())?;
            many.agents.pop();
            let mut images = many.images();
            images.extend(more.images());
            match enforcer.apply(&images) {
                Err(ApplyError::Full { .. }) => {}
                other => bail!("three times what fits: {other:?}"),
            }
            tally.compare(&mut enforcer, registry, dice, 6)?;
            before = Some(registry);
            reloads += 1;
            if tally.is_over() {
                break;
            }
        }
        claim(reloads >= 3, || format!("only {reloads} reloads"))?;
        Ok(format!(
            "{} questions over {reloads} reloads in {capacity:?}",
            tally.compared
        ))
    })
}

/// Room for the largest two of these registries side by side.
fn for_two(sizes: &[Vec<Image>]) -> Capacity {
    let most = |of: &dyn Fn(&[Image]) -> usize| {
        let most = sizes.iter().map(|images| of(images)).max().unwrap_or(1);
        u32::try_from(most).unwrap_or(u32::MAX)
    };
    let lengths = |images: &[Image], exact: bool| {
        let placed = images
            .iter()
            .flat_map(|image| image.reach.iter().chain(&image.serve));
        placed
            .filter(|(prefix, _)| (prefix.len == 128) == exact)
            .count()
    };
    let exact = most(&|images| lengths(images, true));
    let other = most(&|images| lengths(images, false));
    // The same rules at several prefixes share their blocks.
    let blocks = most(&|images| {
        let placed = images
            .iter()
            .flat_map(|image| image.reach.iter().chain(&image.serve));
        let distinct: HashSet<&Vec<Rule>> = placed.map(|(_, rules)| rules).collect();
        distinct
            .iter()
            .map(|rules| rules.len().div_ceil(RULES_PER_SET).max(1))
            .sum()
    });
    let agents = most(&|images| images.len());
    Capacity {
        agents: 256,
        rows: 2 * agents + 1,
        claims: 64,
        addresses: 2 * exact,
        prefixes: 2 * other,
        rule_sets: 2 * blocks,
    }
}

/// The agents of `before` that are not in `now`.
fn gone(before: Option<&Registry>, now: &Registry) -> Vec<String> {
    let here: BTreeSet<&str> = now.agents.iter().map(|tables| tables.id.as_str()).collect();
    before
        .iter()
        .flat_map(|before| &before.agents)
        .filter(|tables| !here.contains(tables.id.as_str()))
        .map(|tables| tables.id.clone())
        .collect()
}

fn adopted(ctx: &mut Ctx) -> Result<()> {
    by_chance(|dice| {
        let world = World::new(ctx)?;
        let first = Registry::generate(dice, "a", 40, &ctx.root())?;
        let second = Registry::generate(dice, "a", 30, &ctx.root())?;
        let capacity = Capacity::for_images(&first.images());
        let mut tally = Tally::new(budget());

        let mut enforcer = world.open(capacity)?;
        expect("adopted at first", enforcer.born_before_us(), false)?;
        enforcer.apply(&first.images())?;
        tally.compare(&mut enforcer, &first, dice, 20)?;
        drop(enforcer);

        let mut enforcer = world.open(capacity)?;
        expect("adopted", enforcer.born_before_us(), true)?;
        tally.compare(&mut enforcer, &first, dice, 60)?;
        // The same again, beside what was adopted; then without it.
        enforcer.apply(&first.images())?;
        tally.compare(&mut enforcer, &first, dice, 20)?;
        sleep(GRACE);
        enforcer.sweep();
        tally.compare(&mut enforcer, &first, dice, 20)?;
        drop(enforcer);

        // Adopted by one whose registry is another, and killed in the middle of it.
        let mut enforcer = world.open(capacity)?;
        enforcer.apply(&second.images())?;
        tally.compare(&mut enforcer, &second, dice, 20)?;
        tally.compare_gone(&mut enforcer, &gone(Some(&first), &second))?;
        drop(enforcer);
        let mut enforcer = world.open(capacity)?;
        tally.compare(&mut enforcer, &second, dice, 60)?;
        tally.compare_gone(&mut enforcer, &gone(Some(&first), &second))?;
        enforcer.apply(&first.images())?;
        tally.compare(&mut enforcer, &first, dice, 20)?;
        claim(!tally.is_over(), || {
            format!("only {} questions in time", tally.compared)
        })?;
        Ok(format!("{} questions over four owners", tally.compared))
    })
}

/// Proof that the comparison can fail: memory is told otherwise about one rule at a time.
fn flipped_rules(ctx: &mut Ctx) -> Result<()> {
    by_chance(|dice| {
        let world = World::new(ctx)?;
        let registry = Registry::generate(dice, "a", 60, &ctx.root())?;
        let images = registry.images();
        let mut enforcer = world.open(Capacity::for_images(&images))?;
        enforcer.apply(&images)?;
        let mut tally = Tally::new(budget());
        let now = registry.clock.wall_now_ms;
        let valid = |tables: &&AgentTables| {
            tables.state == State::Active
                && tables.not_before.is_none_or(|from| from < now)
                && tables.expires.is_none_or(|ends| ends > now + 30_000)
        };
        let mut flipped = 0;
        for tables in registry.agents.iter().filter(valid).take(40) {
            let agent = index(&enforcer, &tables.id)?;
            for at in 0..tables.scope.reach.len().min(12) {
                let placed = &tables.scope.reach[at];
                let Some(rule) = placed.rules.first().filter(|_| {
                    placed.prefix.len == 128
                        && placed.prefix.addr.embedded_v4().is_none()
                        && placed.prefix.addr.effective() == placed.prefix.addr
                }) else {
                    continue;
                };
                let protocol = of_class(rule.class.unwrap_or(Class::Tcp));
                let question = direct(agent, placed.prefix, rule.low, protocol);
                let (said, wanted) =
                    tally.ask(&mut enforcer, &memories(tables, &registry.clock), question)?;
                expect("before the flip", said, wanted)?;
                let mut other = tables.clone();
                let rule = &mut other.scope.reach[at].rules[0];
                rule.effect = match rule.effect {
                    Effect::Allow => Effect::Deny,
                    Effect::Deny | Effect::Floor => Effect::Allow,
                };
                let (said, wanted) =
                    tally.ask(&mut enforcer, &memories(&other, &registry.clock), question)?;
                claim(said != wanted, || {
                    format!("a flipped rule went unnoticed: {}, {question:?}", tables.id)
                })?;
                flipped += 1;
            }
        }
        claim(flipped >= 20, || {
            format!("only {flipped} rules were flipped")
        })?;
        Ok(format!("{flipped} flipped rules, each noticed"))
    })
}
