//! Whether "it is enforced" can be believed: `status`, `reconcile`, `probe`, `explain` and `guard`
//! against faults that somebody with root brings about, and against a host that merely does not
//! work.

mod dns;
mod faults;
mod guard;
mod host;
mod outside;
mod probe;
mod questions;
mod scale;
mod traffic;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    harness::Case,
    support::{daemon::Place, expect},
};

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = probe::cases();
    cases.extend(questions::cases());
    cases.extend(traffic::cases());
    for more in [
        dns::cases(),
        faults::cases(),
        guard::cases(),
        host::cases(),
        outside::cases(),
        scale::cases(),
    ] {
        cases.extend(more.into_iter().map(Case::once));
    }
    cases
}

/// `remit probe ID --json`: exit code and what it says.
fn probe_of(place: &Place, id: &str) -> Result<(i32, Value)> {
    let said = place.remit(&["probe", id, "--json"])?;
    let mut all: Value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("exit {}: {}{}", said.code, said.stdout, said.stderr))?;
    Ok((said.code, all[0].take()))
}

/// It must come out so; the whole of it is in the error if not.
fn probed(place: &Place, id: &str, code: i32) -> Result<Value> {
    let (found, said) = probe_of(place, id)?;
    expect("exit code of remit probe", found, code).with_context(|| said.to_string())?;
    let verdict = ["pass", "fail", "", "unknown"][code as usize];
    expect("its verdict", said["verdict"].as_str(), Some(verdict))?;
    Ok(said)
}

/// `remit reconcile --json`: exit code and what it says.
fn reconciled(place: &Place, repair: bool) -> Result<(i32, Value)> {
    let mut args = vec!["reconcile", "--json"];
    args.extend(repair.then_some("--repair"));
    let said = place.remit(&args)?;
    let value = serde_json::from_str(&said.stdout)
        .with_context(|| format!("exit {}: {}{}", said.code, said.stdout, said.stderr))?;
    Ok((said.code, value))
}
