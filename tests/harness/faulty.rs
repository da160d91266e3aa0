//! Cases that go wrong on purpose, and the one that sees the runner notice. They are in the list
//! only when the environment asks for them.

use std::{process::Command, thread::sleep, time::Duration};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{Case, Outcome};
use crate::support::{Actor, Cgroup, claim, expect, remit};

const ASKED: &str = "REMIT_TEST_FAULTY";

/// Name, outcome, and a part of the reason.
const WANTED: &[(&str, &str, &str)] = &[
    ("faulty::hangs", "failed", "hung"),
    ("faulty::panics", "failed", "panicked"),
    ("faulty::fails", "failed", "on purpose"),
    ("faulty::skips", "not_tested", "no such thing"),
    ("faulty::leaves_a_process", "failed", "left behind: process"),
    ("faulty::leaves_a_cgroup", "failed", "left behind: cgroup"),
    ("faulty::passes", "passed", ""),
];

/// All cases here.
pub fn cases() -> Vec<Case> {
    if std::env::var_os(ASKED).is_some() {
        return faulty();
    }
    vec![
        Case::new("harness::notices_what_goes_wrong", |_| {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("faulty::").env(ASKED, "1");
            let said = remit::output(&mut command)?;
            expect("exit code", said.code, 1)?;
            for (name, outcome, why) in WANTED {
                let result = said
                    .stdout
                    .lines()
                    .filter_map(|line| line.strip_prefix("@@result "))
                    .filter_map(|json| serde_json::from_str::<Value>(json).ok())
                    .find(|result| result["test"] == *name)
                    .with_context(|| format!("no result of {name}"))?;
                expect(name, result["outcome"].as_str(), Some(*outcome))?;
                let found = result["why"].as_str().unwrap_or_default();
                claim(found.contains(why), || format!("{name}: {found}"))?;
            }
            expect(
                "the closing line",
                said.stdout.lines().last(),
                Some("1 passed, 5 failed, 1 skipped"),
            )
        })
        .without_remit(),
    ]
}

fn faulty() -> Vec<Case> {
    let mut hangs = Case::new("faulty::hangs", |_| {
        sleep(Duration::from_secs(3600));
        Ok(())
    });
    hangs.deadline = Duration::from_millis(500);
    let cases = vec![
        hangs,
        Case::new("faulty::panics", |_| {
            let numbers = [1, 2];
            // Out of bounds: a real panic, in the middle of the case.
            let index = std::env::args().count() + numbers.len();
            claim(numbers[index] > 0, String::new)
        }),
        Case::new("faulty::fails", |_| bail!("on purpose")),
        Case::with_outcome("faulty::skips", |_| {
            Ok(Outcome::NotTested("no such thing".to_owned()))
        }),
        Case::new("faulty::leaves_a_process", |_| {
            let actor = Actor::spawn(None)?;
            // Without its guard, and with its input kept open, it lives on.
            std::mem::forget(actor);
            Command::new("/proc/self/exe")
                .args(["probe", r#"[{"op":"daemonise"}]"#])
                .output()?;
            Ok(())
        }),
        Case::new("faulty::leaves_a_cgroup", |ctx| {
            std::mem::forget(Cgroup::create(&ctx.root())?);
            Ok(())
        }),
        Case::new("faulty::passes", |_| Ok(())),
    ];
    cases.into_iter().map(Case::without_remit).collect()
}
