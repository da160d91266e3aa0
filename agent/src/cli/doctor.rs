//! `remit doctor`: can this host enforce, what is lost where it cannot, and how could an agent get
//! out. 1 when something is missing without which nothing is enforced, or a way out stands open; 3
//! when what is needed could not be told.

use serde::Serialize;

use super::{
    Global,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain},
};
use crate::doctor::{self, Check, State};

#[derive(Serialize)]
struct Told {
    features: Vec<Check>,
    ways_out: Vec<Check>,
}

pub(super) fn run(global: &Global, output: &Output) -> Result {
    let settings = global.settings()?;
    let told = Told {
        features: doctor::features(&settings),
        ways_out: doctor::ways(&settings),
    };
    if output.wants_json() {
        output.json(&told)?;
    } else {
        print("Features", "without it", &told.features, output)?;
        output.line("")?;
        print("Ways out", "mend", &told.ways_out, output)?;
    }
    let needed = |state: State| {
        let mut needed = told.features.iter().filter(|check| check.needed);
        needed.any(|check| check.state == state)
    };
    let open = told.ways_out.iter().any(|check| check.state == State::Open);
    Ok(if needed(State::Missing) || open {
        Outcome::No
    } else if needed(State::Unknown) {
        Outcome::Unknown
    } else {
        Outcome::Yes
    })
}

fn print(title: &str, what: &str, checks: &[Check], output: &Output) -> Result<()> {
    output.line(output.paint(Tone::Strong, title))?;
    for check in checks {
        let tone = match check.state {
            State::Ok => Tone::Good,
            State::Watch | State::Unknown => Tone::Doubtful,
            State::Missing | State::Open => Tone::Bad,
        };
        output.line(format_args!(
            "  {:<8} {}: {}",
            output.paint(tone, check.state.name()),
            plain(&check.name),
            plain(&check.found)
        ))?;
        if check.state != State::Ok && !check.mend.is_empty() {
            output.line(format_args!("           {what}: {}", plain(&check.mend)))?;
        }
    }
    Ok(())
}
