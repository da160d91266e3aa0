//! Faults brought about by hand, each caught by `status`, `reconcile` and `probe` alike, with the
//! time that it took.

use std::{
    mem::offset_of,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{AgentRow, Mode, ROW_INDEX_BITS};
use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{probe_of, probed, reconciled};
use crate::{
    harness::Case,
    support::{
        Agent, Ctx, Fixture,
        bpf::{Open, Pinned},
        claim,
        daemon::Settings,
        eventually, expect, scale,
        tamper::{Pins, detach},
    },
};

/// A fault.
struct Fault {
    name: &'static str,
    make: fn(&Fixture, &Pins) -> Result<()>,
    /// What `reconcile` calls it.
    kind: &'static str,
    what: &'static str,
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "link detached",
        make: |_, pins| detach(&pins.link("remit_connect4")?),
        kind: "detached",
        what: "cgroup/connect4",
    },
    Fault {
        name: "program replaced by one that allows all",
        make: |_, pins| {
            let link = Pinned::open(&pins.link("remit_egress")?)?;
            Ok(link.replace(&Open::egress()?)?)
        },
        kind: "foreign_program",
        what: "cgroup_skb/egress",
    },
    Fault {
        name: "map row changed",
        make: |_, pins| {
            let word = pins.map("agents")?.get(&index(pins, "alpha")?)?;
            let word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
            let at = (word & ((1 << ROW_INDEX_BITS) - 1)) as u32;
            let rows = pins.map("rows")?;
            let mut row = rows.get(&at.to_ne_bytes())?;
            row[offset_of!(AgentRow, mode)] = Mode::Monitor as u8;
            rows.set(&at.to_ne_bytes(), &row)
        },
        kind: "changed",
        what: "rows [",
    },
    Fault {
        name: "epoch frozen",
        make: |_, pins| pins.map("epoch")?.set(&[0; 4], &[0; 8]),
        kind: "changed",
        what: "epoch [0]",
    },
    Fault {
        name: "cgroup moved to another agent",
        make: |fx, pins| {
            let cgroup = fx.cgroup("alpha")?.id()?.to_ne_bytes();
            let beta = index(pins, "beta")?;
            pins.map("claims")?.set(&cgroup, &beta)
        },
        kind: "changed",
        what: "claims cgroup",
    },
    Fault {
        name: "ring reader stuck",
        make: |_, pins| Ok(pins.ring()?.set_consumer(|produced| produced + (1 << 30))?),
        kind: "changed",
        what: "ring events",
    },
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("proof::each_fault_is_found_by_all_three", by_all_three),
        Case::new("proof::no_fault_stands_longer_than_an_interval", in_time),
        Case::new("proof::a_daemon_that_hangs_proves_nothing", hangs),
    ];
    for case in &mut cases {
        case.deadline = Duration::from_secs(90);
    }
    cases
}

/// An agent's index, by the names in the kernel.
fn index(pins: &Pins, id: &str) -> Result<[u8; 4]> {
    let names = pins.map("names")?;
    (0..64_u32)
        .map(u32::to_ne_bytes)
        .find(|at| {
            names
                .get(at)
                .is_ok_and(|name| name.split(|byte| *byte == 0).next() == Some(id.as_bytes()))
        })
        .with_context(|| format!("{id} has no index"))
}

fn agents() -> [Agent; 2] {
    [
        Agent::standard("alpha"),
        Agent::new("beta").allow("203.0.113.0/24", "\"any\""),
    ]
}

/// With nobody mending: what each command says of each fault, and that it is whole after the repair.
fn by_all_three(ctx: &mut Ctx) -> Result<()> {
    let settings = Settings {
        more: "[reconcile]\nevery = \"1h\"\n".to_owned(),
        ..Settings::default()
    };
    let fx = Fixture::start_with(ctx, &agents(), &settings)?;
    let pins = Pins::below(&fx.place().at("bpf"));
    for fault in FAULTS {
        let all = || -> Result<String> {
            probed(fx.place(), "alpha", 0).context("before")?;
            (fault.make)(&fx, &pins)?;
            let made = Instant::now();
            let said = probed(fx.place(), "alpha", 1)?;
            let probe = made.elapsed();
            let why = said["why"][0].as_str().unwrap_or("").to_owned();
            let made = Instant::now();
            let (code, said) = reconciled(fx.place(), false)?;
            let reconcile = made.elapsed();
            expect("exit code of remit reconcile", code, 1)?;
            named(&said, fault)?;
            let made = Instant::now();
            let status = fx.place().remit(&["status", "--require", "enforcing"])?;
            let shown = made.elapsed();
            expect("exit code of remit status", status.code, 1)?;
            let (code, said) = reconciled(fx.place(), true)?;
            expect("repaired", code, 0).with_context(|| said.to_string())?;
            probed(fx.place(), "alpha", 0).context("after the repair")?;
            let status = fx.place().remit(&["status", "--require", "enforcing"])?;
            expect("healthy again", status.code, 0).with_context(|| status.stderr)?;
            Ok(format!(
                "{}: probe {} ms, reconcile {} ms, status {} ms; {why}",
                fault.name,
                probe.as_millis(),
                reconcile.as_millis(),
                shown.as_millis()
            ))
        };
        println!("{}", all().context(fault.name)?);
    }
    Ok(())
}

fn named(said: &Value, fault: &Fault) -> Result<()> {
    let drift = said["drift"].as_array().context("no drift")?;
    claim(
        drift.iter().any(|one| {
            one["kind"] == fault.kind
                && one["what"].as_str().unwrap_or("").contains(fault.what)
                && one["remedy"].is_string()
                && one["since_ms"].is_i64()
        }),
        || said.to_string(),
    )
}

/// With the daemon comparing every second: how long until it is known and mended.
fn in_time(ctx: &mut Ctx) -> Result<()> {
    const EVERY: u64 = 1;
    let settings = Settings {
        more: format!("[reconcile]\nevery = \"{EVERY}s\"\n"),
        ..Settings::default()
    };
    let fx = Fixture::start_with(ctx, &agents(), &settings)?;
    let pins = Pins::below(&fx.place().at("bpf"));
    for fault in FAULTS {
        let told = || -> Result<usize> {
            let audit = fx.audit()?;
            let found = audit.iter().filter(|line| {
                line.text("/metadata/event_code") == "RM3002"
                    && line.text("/message").contains(fault.what)
            });
            Ok(found.count())
        };
        let before = told()?;
        (fault.make)(&fx, &pins)?;
        let made = Instant::now();
        eventually(scale::patience(EVERY + 2), || {
            claim(told()? > before, || "not told".to_owned())
        })
        .context(fault.name)?;
        println!(
            "{}: mended after {} ms",
            fault.name,
            made.elapsed().as_millis()
        );
    }
    let (code, said) = probe_of(fx.place(), "alpha")?;
    expect("exit code of remit probe", code, 0).with_context(|| said.to_string())
}

/// A daemon that does not answer is no proof: whoever requires one is told so, soon.
fn hangs(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &agents())?;
    fx.daemon.signal(Signal::SIGSTOP)?;
    let made = Instant::now();
    let status = fx.place().remit(&["status", "--require", "enforcing"])?;
    let took = made.elapsed();
    fx.daemon.signal(Signal::SIGCONT)?;
    expect("exit code of remit status", status.code, 3)?;
    claim(took < Duration::from_secs(scale::patience(7)), || {
        format!("told only after {} ms", took.as_millis())
    })?;
    println!("known after {} ms", took.as_millis());
    eventually(7, || {
        let status = fx.place().remit(&["status", "--require", "enforcing"])?;
        expect("healthy again", status.code, 0).with_context(|| status.stderr)
    })
}
