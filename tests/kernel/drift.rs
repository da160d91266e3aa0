//! What a root user changes in the kernel's tables by hand: each change is found, named, and put
//! right, by the process that made the fence and by one that takes it over. The tables' content is
//! what counts: a restart that finds what it would write leaves every word alone.

use std::{fs, path::PathBuf, thread::sleep, time::Duration};

use agent_ebpf::abi::{
    ABI_VERSION, Addr, AgentRow, Class, Effect, Hook, Leaf, Loopback, Mode, NEVER, Question, Rule,
    RuleSet, ScopeKey, State,
};
use anyhow::{Context as _, Result, bail};
use remit::{
    kernel::{Capacity, Drift, EMBEDDED, Enforcer, Image, Tuning, pin_name},
    policy::{UNREGISTERED_ID, tables::Prefix},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    harness::{Case, Need},
    support::{
        Cgroup, Ctx,
        bpf::{Open, Pinned},
        claim, expect, scale,
    },
};

const TUNING: Tuning = Tuning {
    kernel_log: 0,
    events_per_second: 200,
    accounts: true,
};
/// What is retired is removed after this.
const GRACE: Duration = Duration::from_millis(1100);
/// In scope; its 443 is granted through the prefix.
const IN: [u8; 4] = [198, 51, 100, 10];
/// In scope by its exact address, on port 80.
const EXACT: [u8; 4] = [198, 51, 100, 77];
/// Denied, though its network is in scope.
const DENIED: [u8; 4] = [198, 51, 100, 200];
/// Out of scope.
const OUT: [u8; 4] = [203, 0, 113, 10];

/// A change by hand.
struct Change {
    name: &'static str,
    /// Makes it.
    make: fn(&World) -> Result<()>,
    /// Kind of a difference that must be found, and what it must name.
    finds: (&'static str, &'static str),
}

const CHANGES: &[Change] = &[
    Change {
        name: "a_word_that_points_to_another_row",
        make: |world| {
            let beta = world.word(2)?;
            world.map("agents")?.update(&key(1), &beta.to_ne_bytes())?;
            Ok(())
        },
        finds: ("changed", "agents [1]"),
    },
    Change {
        name: "a_word_taken_away",
        make: |world| Ok(world.map("agents")?.update(&key(1), &[0; 8])?),
        finds: ("missing", "agents [1]"),
    },
    Change {
        name: "a_word_of_an_agent_that_is_none",
        make: |world| Ok(world.map("agents")?.update(&key(77), &[0xff; 8])?),
        finds: ("extra", "agents [77]"),
    },
    Change {
        name: "a_state",
        make: |world| world.change_row(1, |row| row.state = State::Revoked as u8),
        finds: ("changed", "rows ["),
    },
    Change {
        name: "a_deadline",
        make: |world| world.change_row(1, |row| row.deadline = NEVER),
        finds: ("changed", "rows ["),
    },
    Change {
        name: "the_policy_of_a_row",
        make: |world| {
            let other = world.row(2)?.policy;
            world.change_row(1, |row| row.policy = other)
        },
        finds: ("changed", "rows ["),
    },
    Change {
        name: "a_name",
        make: |world| Ok(world.map("names")?.update(&key(1), &[0xfe; 64])?),
        finds: ("changed", "names [1]"),
    },
    Change {
        name: "a_grant_by_hand",
        make: |world| {
            let leaf = world.leaf_of(1, Addr::v4(EXACT))?;
            let space = world.row(1)?.policy;
            let key = ScopeKey {
                space,
                addr: Addr::v4(OUT),
            };
            Ok(world
                .map("exacts")?
                .update(key.as_bytes(), leaf.as_bytes())?)
        },
        finds: ("extra", "exacts 203.0.113.10/32"),
    },
    Change {
        name: "a_prefix_by_hand",
        make: |world| {
            let leaf = world.leaf_of(1, Addr::v4(EXACT))?;
            let space = world.row(1)?.policy;
            let key = ScopeKey {
                space,
                addr: Addr::v4([203, 0, 113, 0]),
            };
            world.prefix(64 + 120, key, Some(leaf))
        },
        finds: ("extra", "prefixes 203.0.113.0/24"),
    },
    Change {
        name: "a_prefix_that_matches_every_scope",
        make: |world| {
            let leaf = world.leaf_of(1, Addr::v4(EXACT))?;
            let key = ScopeKey {
                space: 0,
                addr: Addr::UNKNOWN,
            };
            world.prefix(0, key, Some(leaf))
        },
        finds: ("extra", "0 bits"),
    },
    Change {
        name: "a_denial_taken_away",
        make: |world| {
            let space = world.row(1)?.policy;
            let addr = Addr::v4([198, 51, 100, 128]);
            world.prefix(64 + 121, ScopeKey { space, addr }, None)
        },
        finds: ("missing", "prefixes 198.51.100.128/25"),
    },
    Change {
        name: "a_key_that_points_elsewhere",
        make: |world| {
            let space = world.row(1)?.policy;
            let key = ScopeKey {
                space,
                addr: Addr::v4(EXACT),
            };
            Ok(world
                .map("exacts")?
                .update(key.as_bytes(), &u64::MAX.to_ne_bytes())?)
        },
        finds: ("changed", "exacts 198.51.100.77/32"),
    },
    Change {
        name: "a_wider_port_in_a_shared_rule_set",
        make: |world| {
            let set = world.leaf_of(1, Addr::v4(EXACT))?.set;
            world.change_set(set, |set| {
                (set.rules[0].low, set.rules[0].high) = (0, u16::MAX)
            })
        },
        finds: ("changed", "rulesets ["),
    },
    Change {
        name: "a_rule_hidden_behind_the_length",
        make: |world| {
            let set = world.leaf_of(1, Addr::v4(EXACT))?.set;
            world.change_set(set, |set| {
                set.rules[7] = Rule {
                    low: 0,
                    high: u16::MAX,
                    ..set.rules[0]
                };
            })
        },
        finds: ("changed", "rulesets ["),
    },
    Change {
        name: "a_chain_in_a_circle",
        make: |world| {
            let at = world.leaf_of(1, Addr::v4(EXACT))?.set;
            world.change_set(at, |set| set.next = at + 1)
        },
        finds: ("changed", "rulesets ["),
    },
    Change {
        name: "a_claim_for_another_agent",
        make: |world| {
            let cgroup = world.alpha.id()?.to_ne_bytes();
            Ok(world.map("claims")?.update(&cgroup, &2_u32.to_ne_bytes())?)
        },
        finds: ("changed", "claims cgroup"),
    },
    Change {
        name: "a_claim_by_hand",
        make: |world| {
            let cgroup = world.root.id()?.to_ne_bytes();
            Ok(world.map("claims")?.update(&cgroup, &1_u32.to_ne_bytes())?)
        },
        finds: ("extra", "claims cgroup"),
    },
    Change {
        name: "a_claim_taken_away",
        make: |world| {
            let cgroup = world.alpha.id()?.to_ne_bytes();
            Ok(world.map("claims")?.delete(&cgroup)?)
        },
        finds: ("missing", "claims cgroup"),
    },
    Change {
        name: "an_epoch_set_back",
        make: |world| Ok(world.map("epoch")?.update(&key(0), &0_u64.to_ne_bytes())?),
        finds: ("changed", "epoch [0]"),
    },
    Change {
        name: "a_pin_of_a_map_taken_away",
        make: |world| Ok(fs::remove_file(world.version().join("maps/rows"))?),
        finds: ("missing", "pin of map rows"),
    },
    Change {
        name: "a_pin_of_a_program_taken_away",
        make: |world| {
            Ok(fs::remove_file(
                world.version().join("programs/remit_egress"),
            )?)
        },
        finds: ("missing", "pin of program remit_egress"),
    },
    Change {
        name: "a_detached_link",
        make: |world| Ok(world.link("remit_egress")?.detach()?),
        finds: ("detached", "cgroup_skb/egress on "),
    },
    Change {
        name: "a_pin_of_a_link_taken_away",
        make: |world| Ok(fs::remove_file(world.link_pin("remit_connect4"))?),
        finds: ("missing", "pin of cgroup/connect4 on "),
    },
    Change {
        name: "pins_of_links_exchanged",
        make: |world| {
            let (four, six) = (world.link_pin("remit_bind4"), world.link_pin("remit_bind6"));
            let beside = world.link_pin("beside");
            fs::rename(&four, &beside)?;
            fs::rename(&six, &four)?;
            Ok(fs::rename(&beside, &six)?)
        },
        finds: ("missing", "pin of cgroup/post_bind4 on "),
    },
    Change {
        name: "a_foreign_program_under_a_link",
        make: |world| Ok(world.link("remit_egress")?.replace(&Open::egress()?)?),
        finds: ("foreign_program", "cgroup_skb/egress on "),
    },
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = CHANGES
        .iter()
        .map(|change| {
            Case::new(format!("drift::{}_is_mended", change.name), move |ctx| {
                mended(ctx, change)
            })
        })
        .collect();
    cases.extend([
        Case::new("drift::nothing_differs_by_itself", nothing_differs),
        Case::new("drift::a_restart_changes_no_word", restart_changes_nothing),
        Case::new("drift::a_restart_mends_each_change", restart_mends).once(),
        Case::new("drift::any_bytes_are_survived", any_bytes).once(),
    ]);
    for case in &mut cases {
        case.deadline = Duration::from_secs(90);
        // These link the library; the binary is not asked.
        case.needs.retain(|need| !matches!(need, Need::Remit));
    }
    cases
}

fn key(index: u32) -> [u8; 4] {
    index.to_ne_bytes()
}

/// A root with the cgroups of two agents, and where the pins are.
struct World {
    alpha: Cgroup,
    beta: Cgroup,
    root: Cgroup,
    name: String,
    pins: PathBuf,
}

fn rule(port: u16, effect: Effect, deadline: u64) -> Rule {
    Rule {
        low: port,
        high: port,
        class: Class::Tcp as u8,
        effect: effect as u8,
        deadline,
        ..Rule::zeroed()
    }
}

/// Two agents that say the same of one address, and the pseudo-agent.
fn images() -> Vec<Image> {
    let image = |id: &str, state: State, reach| Image {
        id: id.to_owned(),
        row: AgentRow {
            state: state as u8,
            mode: Mode::Enforce as u8,
            loopback: Loopback::Own as u8,
            deadline: NEVER - 1,
            ..AgentRow::zeroed()
        },
        reach,
        serve: Vec::new(),
        leases: Vec::new(),
        fresh: false,
    };
    let at = |octets, len| Prefix {
        addr: Addr::v4(octets),
        len,
    };
    let deny = |class| Rule {
        low: 0,
        high: u16::MAX,
        class,
        ..rule(0, Effect::Deny, NEVER)
    };
    let scope = || {
        vec![
            (
                at([198, 51, 100, 0], 120),
                vec![rule(443, Effect::Allow, NEVER)],
            ),
            (at([198, 51, 100, 128], 121), vec![deny(0)]),
            (at(EXACT, 128), vec![rule(80, Effect::Allow, NEVER - 5)]),
        ]
    };
    let mut alpha = scope();
    // More than a block holds.
    let many = (1..=20).map(|port| rule(port * 10, Effect::Allow, NEVER));
    alpha.push((at([198, 51, 100, 78], 128), many.collect()));
    let mut other = image("alpha", State::Active, alpha);
    other.serve = vec![(
        at([10, 0, 0, 0], 104),
        vec![rule(8080, Effect::Allow, NEVER)],
    )];
    vec![
        image(UNREGISTERED_ID, State::Unregistered, Vec::new()),
        other,
        image("beta", State::Active, scope()),
    ]
}

// === impl World ===

impl World {
    fn new(ctx: &Ctx) -> Result<Self> {
        let root = Cgroup::create(&ctx.root())?;
        Ok(Self {
            alpha: root.child("alpha.service")?,
            beta: root.child("beta.service")?,
            root,
            name: ctx.root(),
            pins: ctx.dir().join("bpf"),
        })
    }

    /// As the daemon starts.
    fn start(&self) -> Result<Enforcer> {
        let images = images();
        let capacity = Capacity::for_images(&images);
        let mut enforcer = Enforcer::open(EMBEDDED, &self.pins, capacity, &TUNING)?;
        enforcer.apply(&images)?;
        let claims = [(self.alpha.id()?, "alpha"), (self.beta.id()?, "beta")];
        enforcer.attribute(&claims)?;
        enforcer.fence(&self.name, self.root.path())?;
        enforcer.settle_in()?;
        Ok(enforcer)
    }

    /// The folder of the version's pins.
    fn version(&self) -> PathBuf {
        self.pins.join(format!("v{ABI_VERSION}"))
    }

    fn map(&self, name: &str) -> Result<Pinned> {
        let path = self.version().join("maps").join(name);
        Pinned::open(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    fn link_pin(&self, program: &str) -> PathBuf {
        let links = self.version().join("links").join(pin_name(&self.name));
        links.join(program)
    }

    fn link(&self, program: &str) -> Result<Pinned> {
        Ok(Pinned::open(&self.link_pin(program))?)
    }

    fn word(&self, agent: u32) -> Result<u64> {
        let mut bytes = [0; 8];
        self.map("agents")?.lookup(&key(agent), &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn row_index(&self, agent: u32) -> Result<u32> {
        Ok((self.word(agent)? & 0xff_ffff) as u32)
    }

    fn row(&self, agent: u32) -> Result<AgentRow> {
        let mut row = AgentRow::zeroed();
        let at = key(self.row_index(agent)?);
        self.map("rows")?.lookup(&at, row.as_mut_bytes())?;
        Ok(row)
    }

    fn change_row(&self, agent: u32, change: impl FnOnce(&mut AgentRow)) -> Result<()> {
        let mut row = self.row(agent)?;
        change(&mut row);
        let at = key(self.row_index(agent)?);
        Ok(self.map("rows")?.update(&at, row.as_bytes())?)
    }

    /// What an exact address of an agent points to.
    fn leaf_of(&self, agent: u32, addr: Addr) -> Result<Leaf> {
        let space = self.row(agent)?.policy;
        let mut leaf = Leaf::zeroed();
        let key = ScopeKey { space, addr };
        self.map("exacts")?
            .lookup(key.as_bytes(), leaf.as_mut_bytes())?;
        Ok(leaf)
    }

    fn change_set(&self, index: u32, change: impl FnOnce(&mut RuleSet)) -> Result<()> {
        let mut set = RuleSet::EMPTY;
        let map = self.map("rulesets")?;
        map.lookup(&key(index), set.as_mut_bytes())?;
        change(&mut set);
        Ok(map.update(&key(index), set.as_bytes())?)
    }

    /// Writes a prefix key, or deletes it.
    fn prefix(&self, bits: u32, key: ScopeKey, leaf: Option<Leaf>) -> Result<()> {
        let mut bytes = bits.to_ne_bytes().to_vec();
        bytes.extend(key.as_bytes());
        let map = self.map("prefixes")?;
        match leaf {
            Some(leaf) => map.update(&bytes, leaf.as_bytes())?,
            None => map.delete(&bytes)?,
        }
        Ok(())
    }
}

/// The kernel's verdict on TCP to an address.
fn allows(enforcer: &mut Enforcer, agent: &str, to: [u8; 4], port: u16) -> Result<bool> {
    let question = Question {
        agent: enforcer.index_of(agent).context("no such agent")?,
        addr: Addr::v4(to),
        port,
        protocol: 6,
        hook: Hook::Connect4 as u8,
        ..Question::zeroed()
    };
    Ok(enforcer.judge(question)?.verdict == 1)
}

/// Both agents get what their images say, and nothing differs.
fn sound(enforcer: &mut Enforcer) -> Result<()> {
    for agent in ["alpha", "beta"] {
        for (to, port, wanted) in [
            (IN, 443, true),
            (IN, 444, false),
            (EXACT, 80, true),
            (EXACT, 443, false),
            (DENIED, 443, false),
            (OUT, 80, false),
            (OUT, 443, false),
        ] {
            let said = allows(enforcer, agent, to, port)?;
            expect(&format!("{agent} to {to:?}:{port}"), said, wanted)?;
        }
    }
    clean(enforcer)
}

fn clean(enforcer: &mut Enforcer) -> Result<()> {
    let drifts = enforcer.inspect();
    claim(drifts.is_empty(), || list(&drifts))
}

fn list(drifts: &[Drift]) -> String {
    let all: Vec<String> = drifts.iter().map(ToString::to_string).collect();
    all.join("; ")
}

fn mend(enforcer: &mut Enforcer, drifts: &[Drift]) -> Result<()> {
    let repairs = enforcer.repair(drifts);
    expect("repairs", repairs.len(), drifts.len())?;
    for repair in repairs {
        if let Some(why) = repair.failed {
            bail!("{} could not be mended: {why}", repair.drift);
        }
    }
    Ok(())
}

fn mended(ctx: &mut Ctx, change: &Change) -> Result<()> {
    let world = World::new(ctx)?;
    let mut enforcer = world.start()?;
    sound(&mut enforcer)?;
    (change.make)(&world)?;
    let drifts = enforcer.inspect();
    let (kind, what) = change.finds;
    let found = drifts
        .iter()
        .any(|drift| drift.kind.name() == kind && drift.what.contains(what));
    claim(found, || {
        format!("no {kind} of {what} in: {}", list(&drifts))
    })?;
    println!("{}", list(&drifts));
    mend(&mut enforcer, &drifts)?;
    sound(&mut enforcer)?;
    // What the repair has put out of force goes in time, and nothing of use with it.
    sleep(GRACE);
    enforcer.sweep();
    sound(&mut enforcer)?;
    enforcer.detach_all()?;
    Ok(())
}

fn nothing_differs(ctx: &mut Ctx) -> Result<()> {
    let world = World::new(ctx)?;
    let mut enforcer = world.start()?;
    sound(&mut enforcer)?;
    // During a change, when old and new are there, and after it.
    let mut other = images();
    other[1].reach.pop();
    expect("changed", enforcer.apply(&other)?, vec!["alpha".to_owned()])?;
    clean(&mut enforcer)?;
    enforcer.apply(&images())?;
    sound(&mut enforcer)?;
    sleep(GRACE);
    enforcer.sweep();
    sound(&mut enforcer)?;
    // One agent less.
    enforcer.apply(&images().into_iter().take(2).collect::<Vec<_>>())?;
    enforcer.attribute(&[(world.alpha.id()?, "alpha")])?;
    clean(&mut enforcer)?;
    drop(enforcer);
    sound(&mut world.start()?)
}

fn restart_changes_nothing(ctx: &mut Ctx) -> Result<()> {
    let world = World::new(ctx)?;
    drop(world.start()?);
    let before = [world.word(0)?, world.word(1)?, world.word(2)?];
    for round in 0..3 {
        let mut enforcer = world.start()?;
        let differences = enforcer.take_differences();
        claim(differences.is_empty(), || format!("{differences:?}"))?;
        let now = [world.word(0)?, world.word(1)?, world.word(2)?];
        expect(&format!("words in round {round}"), now, before)?;
        sound(&mut enforcer)?;
        // Another start relates the clocks anew: deadlines a little off are the same.
        let mut near = images();
        for image in &mut near {
            image.row.deadline -= 100_000_000;
        }
        expect("changed", enforcer.apply(&near)?, Vec::<String>::new())?;
        // Of what an earlier one wrote, what changes goes, and what is shared with it stays.
        if round == 1 {
            let mut other = images();
            other[1].reach.remove(2);
            expect("changed", enforcer.apply(&other)?, vec!["alpha".to_owned()])?;
            sleep(GRACE);
            enforcer.sweep();
            expect("beta's", allows(&mut enforcer, "beta", EXACT, 80)?, true)?;
            expect("alpha's", allows(&mut enforcer, "alpha", EXACT, 80)?, false)?;
            return clean(&mut enforcer);
        }
    }
    Ok(())
}

fn restart_mends(ctx: &mut Ctx) -> Result<()> {
    let world = World::new(ctx)?;
    drop(world.start()?);
    for change in CHANGES {
        // Of these the maps say nothing to the next daemon.
        (change.make)(&world).with_context(|| change.name)?;
        let mut enforcer = world.start().with_context(|| change.name)?;
        sound(&mut enforcer).with_context(|| change.name)?;
        let told = enforcer.take_differences();
        let in_rules = ["rows [", "exacts 198", "prefixes 198", "rulesets ["]
            .iter()
            .any(|map| change.finds.1.starts_with(map));
        claim(
            !in_rules || told.iter().any(|one| one.agent == "alpha"),
            || format!("{}: nothing told: {told:?}", change.name),
        )?;
        if change.finds.0 == "foreign_program" {
            let found: usize = enforcer
                .fences()
                .map(|(_, fence)| fence.found_foreign().len())
                .sum();
            expect("foreign programs", found, 1)?;
        }
        drop(enforcer);
        back_to_one_set(&world)?;
    }
    Ok(())
}

/// A start that had to build a set left one; the cases here look for it by its first name.
fn back_to_one_set(world: &World) -> Result<()> {
    let version = world.version();
    for stem in ["maps", "programs"] {
        let mut found: Vec<PathBuf> = fs::read_dir(&version)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(stem))
            })
            .collect();
        let (Some(one), true) = (found.pop(), found.is_empty()) else {
            bail!("several sets of {stem}: {found:?}");
        };
        let first = version.join(stem);
        if one != first {
            fs::rename(one, first)?;
        }
    }
    Ok(())
}

/// Writes what chance wants all over the tables, again and again.
fn any_bytes(ctx: &mut Ctx) -> Result<()> {
    let world = World::new(ctx)?;
    let mut enforcer = world.start()?;
    let seed = std::process::id();
    let mut chance = u64::from(seed) << 20 | 1;
    let mut roll = move || {
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        chance
    };
    let mut found = 0;
    for round in 0..scale::third_of(60) {
        for _ in 0..1 + roll() % 12 {
            let bytes: Vec<u8> = (0..34).flat_map(|_| roll().to_ne_bytes()).collect();
            let (name, size, keys) = [
                ("agents", 8, 256),
                ("rows", size_of::<AgentRow>(), 32),
                ("names", 64, 8),
                ("rulesets", size_of::<RuleSet>(), 16),
                ("epoch", 8, 1),
            ][(roll() % 5) as usize];
            let at = (roll() % keys) as u32;
            world.map(name)?.update(&key(at), &bytes[..size])?;
            let mut place = ScopeKey::read_from_bytes(&bytes[..24]).unwrap_or(ScopeKey {
                space: 0,
                addr: Addr::UNKNOWN,
            });
            if roll() % 2 == 0 {
                place.space = roll() % 40;
            }
            let (set, entry) = ((roll() % 40) as u32, (roll() % 5) as u32);
            let leaf = Leaf { set, entry };
            world.prefix((roll() % 193) as u32, place, Some(leaf))?;
            world
                .map("exacts")?
                .update(place.as_bytes(), leaf.as_bytes())?;
            world.map("claims")?.update(&bytes[..8], &key(set))?;
        }
        if round % 2 == 0 {
            let drifts = enforcer.inspect();
            found += drifts.len();
            mend(&mut enforcer, &drifts).with_context(|| format!("seed {seed}"))?;
        } else {
            drop(enforcer);
            enforcer = world.start().with_context(|| format!("seed {seed}"))?;
        }
        sound(&mut enforcer).with_context(|| format!("seed {seed}, round {round}"))?;
    }
    println!("{found} differences mended; seed {seed}");
    Ok(())
}
