//! Processes that connect and are gone within a millisecond.

use std::{collections::HashSet, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::reader::all_lines;
use crate::{
    actor::{Op, Reply},
    harness::Case,
    support::{
        Actor, Agent, Family, Fixture, claim,
        daemon::Settings,
        eventually, expect,
        network::{OUT_V4, OUT_V6},
        scale,
    },
};

const PROCESSES: u32 = 10_000;

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![gone_at_once(), backlog()]
}

/// A daemon that was held up finds more in the ring than it can write in one go.
fn backlog() -> Case {
    const PROCESSES: u32 = 3_000;
    let name = "evidence::a_backlog_is_written_before_it_is_summed_up";
    let case = Case::new(name, |ctx| {
        let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &roomy())?;
        let mut actor = fx.actor("alpha")?;
        fx.daemon.signal(Signal::SIGSTOP)?;
        let reply = refused(&mut actor, PROCESSES);
        // Longer than settling is put off.
        sleep(Duration::from_secs(4));
        fx.daemon.signal(Signal::SIGCONT)?;
        expect(
            "processes that were refused",
            reply?.value,
            PROCESSES.into(),
        )?;
        eventually(12, || {
            expect("attempts in the log", told(&fx)?.attempts, PROCESSES.into())
        })?;
        let told = told(&fx)?;
        expect("processes named", told.named, PROCESSES.into())
            .with_context(|| format!("{} summed up: {}", told.nameless, told.why))
    });
    case.once()
}

/// Whatever is refused may have a line.
fn roomy() -> Settings {
    Settings {
        more: "[log]\nper_agent_rate = 1000000\nper_agent_daily = \"1GiB\"\n".to_owned(),
        ..Settings::default()
    }
}

fn refused(actor: &mut Actor, count: u32) -> Result<Reply> {
    actor.ask(&Op::Brief {
        addr: Family::V4.pick(OUT_V4, OUT_V6, 443)?,
        count,
    })
}

fn gone_at_once() -> Case {
    Case::new("evidence::a_process_that_is_gone_at_once_is_named", |ctx| {
        let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &roomy())?;
        let mut actor = fx.actor("alpha")?;
        let count = if scale::emulated() && !scale::full() {
            PROCESSES / 50
        } else {
            PROCESSES
        };
        let reply = refused(&mut actor, count)?;
        expect("processes that were refused", reply.value, i64::from(count))?;
        let mut lives: Vec<u64> = reply
            .replies
            .iter()
            .map(|life| u64::try_from(life.value).unwrap_or_default())
            .collect();
        let brief = lives.iter().filter(|nanos| **nanos < 1_000_000).count();
        let text = scale::percentiles(&mut lives);
        eventually(12, || {
            expect("attempts in the log", told(&fx)?.attempts, u64::from(count))
        })?;
        let told = told(&fx)?;
        let all = told.named + told.nameless;
        expect("processes named or summed up", all, u64::from(count))?;
        // What is only summed up says where its details were lost.
        claim(told.unexplained == 0, || {
            format!(
                "{} attempts without a process or a reason",
                told.unexplained
            )
        })?;
        claim(told.named * 20 >= u64::from(count) * 19, || {
            format!(
                "{} of {count} are only summed up: {}",
                told.nameless, told.why
            )
        })?;
        println!(
            "{} of {count} processes that lived {text} ({brief} under 1 ms) named by the kernel: \
             number, name, user; {} summed up ({}); path of the program for {} of them, for that is \
             read in /proc while the process lives",
            told.named, told.nameless, told.why, told.with_path
        );
        Ok(())
    })
}

/// What the log says of them.
#[derive(Default)]
struct Told {
    attempts: u64,
    named: u64,
    nameless: u64,
    /// Of those, the ones whose line does not say why.
    unexplained: u64,
    /// What the lines of the others say, the last one.
    why: String,
    with_path: u64,
}

fn told(fx: &Fixture) -> Result<Told> {
    let mut told = Told::default();
    let mut seen = HashSet::new();
    for line in all_lines(&fx.place().at("log"), "violations.jsonl")? {
        let event: serde_json::Value = serde_json::from_str(&line)?;
        let process = &event["actor"]["process"];
        let count = event["count"].as_u64().unwrap_or(1);
        told.attempts += count;
        let pid = process["pid"].as_u64().unwrap_or_default();
        let name = process["name"].as_str().unwrap_or_default();
        // Each gave itself a name that says its number, so that a name cannot be another's.
        if pid != 0 && name == format!("brief-{pid}") {
            if seen.insert(pid) {
                told.named += 1;
                told.with_path += u64::from(process["file"]["path"].is_string());
            }
        } else {
            told.nameless += count;
            let message = event["message"].as_str().unwrap_or_default();
            match message.split_once("details lost: ") {
                Some((_, why)) => told.why = format!("{why} {}", event["unmapped"]["lost"]),
                None => told.unexplained += count,
            }
        }
    }
    Ok(told)
}
