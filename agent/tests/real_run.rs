//! Events that a real run wrote, against the schemas. The kernel tests leave some of each code in the
//! folder that `REMIT_SAMPLES` names; `cargo xtask test` runs this behind them.

#![allow(
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

mod schemas;

use std::{collections::BTreeMap, env, fs, path::PathBuf};

use remit::audit::encode::ocsf18;
use schemas::Schemas;
use serde_json::Value;

/// Every line in the folder, with the number of lines by event code.
fn samples() -> (Vec<Value>, BTreeMap<String, u64>) {
    let dir = env::var_os("REMIT_SAMPLES").map(PathBuf::from);
    let dir = dir.unwrap_or_else(|| panic!("no lines of a real run: set REMIT_SAMPLES"));
    let (mut events, mut codes) = (Vec::new(), BTreeMap::new());
    for entry in fs::read_dir(&dir).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let code = event["metadata"]["event_code"].as_str().unwrap().to_owned();
            *codes.entry(code).or_default() += 1;
            events.push(event);
        }
    }
    assert!(
        codes.contains_key("RM1001") && codes.contains_key("RM9001"),
        "no denial and no start of a daemon in {}: {codes:?}",
        dir.display()
    );
    (events, codes)
}

#[test]
fn lines_of_a_real_run_are_valid_in_1_9() {
    let schemas = Schemas::of_1_9();
    let (events, codes) = samples();
    events.iter().for_each(|event| schemas.check(event));
    println!("{} lines are valid OCSF 1.9.0: {codes:?}", events.len());
}

#[test]
fn lines_of_a_real_run_have_valid_forms_in_1_8() {
    let schemas = Schemas::of_1_8();
    let (events, codes) = samples();
    for event in &events {
        schemas.check(&ocsf18::encode(event));
    }
    println!("{} lines are valid OCSF 1.8.0: {codes:?}", events.len());
}
