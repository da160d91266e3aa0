//! Runs the measuring program of the suite, and reads what it says.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    talk::{self, Progress},
    workspace::Workspace,
};

const BPF_TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "agent-ebpf-bench";

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds with processes of their own.
    pub rounds: u32,
    /// Cycles of each.
    pub cycles: u32,
    /// Length of a slice.
    pub slice_us: u64,
    /// Whether it is only to see that everything works.
    pub quick: bool,
}

/// What measuring needs.
pub struct Bench<'w> {
    /// The checkout.
    pub workspace: &'w Workspace,
    /// The comparators' object.
    pub object: PathBuf,
    /// How long.
    pub effort: Effort,
}

/// Size of a policy; see tests/bench.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    /// Destinations in the scope.
    pub prefixes: u32,
    /// Single addresses instead of networks of 16.
    pub hosts: bool,
    /// Agents in all.
    pub agents: u32,
    /// Levels of cgroups below the agent's.
    pub depth: u32,
}

/// A design with a policy.
#[derive(Clone, Debug, Serialize)]
pub struct Lane {
    /// Its name in runs.
    pub name: String,
    /// Its name in tests/bench.
    pub design: &'static str,
    /// Its policy.
    pub shape: Shape,
}

/// A workload on lanes; the first is what the others are compared with.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Its name in tests/bench.
    pub workload: &'static str,
    /// Lanes by name.
    pub lanes: Vec<String>,
}

/// The machine.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Host {
    /// Release.
    pub kernel: String,
    /// Instruction set.
    pub arch: String,
    /// Model.
    pub cpu: String,
    /// Processors.
    pub cpus: usize,
    /// Load when it began.
    pub load: String,
}

/// A lane that is not here.
#[derive(Clone, Debug, Deserialize)]
pub struct Missing {
    /// Its name.
    #[serde(rename = "missing")]
    pub lane: String,
    /// What it lacks.
    pub why: String,
}

/// A lane's daemon that is ready.
#[derive(Clone, Debug, Deserialize)]
pub struct Ready {
    /// Its name.
    pub lane: String,
    /// From its start until it said so.
    pub ready_ms: u64,
    /// Its resident memory.
    pub resident_kib: u64,
}

/// A program's own time, by the kernel's statistics.
#[derive(Clone, Debug, Deserialize)]
pub struct Program {
    /// Its name.
    pub program: String,
    /// Whose it is.
    pub lane: String,
    /// What was done meanwhile.
    pub workload: String,
    /// How often it ran.
    pub runs: u64,
    /// Mean of a run in nanoseconds.
    pub ns: f64,
}

/// Costs of one run.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its workload.
    pub workload: String,
    /// What a cost is: nanoseconds of time or of processor time.
    pub unit: String,
    /// Its lanes.
    pub lanes: Vec<String>,
    /// Per cycle, the cost of one operation in each lane.
    pub cycles: Vec<Vec<f64>>,
}

/// All that was said.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// The machine.
    pub host: Host,
    /// Lanes that are not here.
    pub missing: Vec<Missing>,
    /// Daemons.
    pub ready: Vec<Ready>,
    /// Per run, in their order.
    pub series: Vec<Series>,
    /// Programs that ran while the kernel counted.
    pub programs: Vec<Program>,
}

/// Builds the comparators' object. The daemon's own build knows nothing of it.
pub fn object(workspace: &Workspace) -> Result<PathBuf> {
    talk::step("building the programs to compare with");
    // A folder of its own: `RUSTC_BOOTSTRAP` makes other builds of the same crates stale.
    let target = workspace.target.join("bench");
    let folder = target
        .to_str()
        .with_context(|| format!("{} is not UTF-8", target.display()))?;
    let arguments = [
        "build",
        "--locked",
        "--release",
        "-p",
        "agent-ebpf",
        "--bin",
        OBJECT,
        "--features",
        "bench",
        "--target",
        BPF_TARGET,
        "--target-dir",
        folder,
        "-Z",
        "build-std=core",
    ];
    // As aya-build has it for the daemon's object.
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
    ]
    .join("\u{1f}");
    workspace
        .cargo(&arguments)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        // As agent/build.rs has it.
        .env("CARGO_INCREMENTAL", "1")
        .run()?;
    Ok(target.join(BPF_TARGET).join("release").join(OBJECT))
}

// === impl Effort ===

impl Effort {
    /// Enough for the third digit on a quiet machine: 600 cycles of 10 ms slices.
    pub const FULL: Self = Self {
        rounds: 12,
        cycles: 50,
        slice_us: 10_000,
        quick: false,
    };
    /// Every path once or twice.
    pub const QUICK: Self = Self {
        rounds: 2,
        cycles: 4,
        slice_us: 2_000,
        quick: true,
    };
}

// === impl Bench ===

impl Bench<'_> {
    /// Measures `runs` on `lanes`, and after that `statistics` with the kernel's own.
    pub fn measure(
        &self,
        what: &str,
        lanes: &[Lane],
        runs: &[Run],
        statistics: &[Run],
    ) -> Result<Heard> {
        #[derive(Serialize)]
        struct Spec<'s> {
            object: &'s PathBuf,
            lanes: &'s [Lane],
            runs: &'s [Run],
            statistics: &'s [Run],
            rounds: u32,
            cycles: u32,
            slice_us: u64,
        }
        let spec = Spec {
            object: &self.object,
            lanes,
            runs,
            statistics,
            rounds: self.effort.rounds,
            cycles: self.effort.cycles,
            slice_us: self.effort.slice_us,
        };
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let file = folder.path().join("spec.json");
        fs::write(&file, serde_json::to_string(&spec)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let programs = self.workspace.static_release();
        let mut child = Command::new(programs.join("remit-tests"))
            .arg("bench")
            .arg(&file)
            .env("REMIT_BIN", programs.join("remit"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start remit-tests")?;
        let stream = child.stdout.take().context("remit-tests has no output")?;
        let progress = Progress::start(what);
        let mut heard = Heard::default();
        for line in BufReader::new(stream).lines() {
            let line = line.context("cannot read what remit-tests says")?;
            heard
                .line(&line)
                .with_context(|| format!("remit-tests said: {line}"))?;
            progress.update(heard.progress(what, runs, &self.effort));
        }
        let status = child.wait().context("cannot wait for remit-tests")?;
        drop(progress);
        if !status.success() {
            bail!("measuring failed: remit-tests ended with {status}; its reason is above");
        }
        let wanted = (self.effort.rounds * self.effort.cycles) as usize;
        if heard.series.len() != runs.len()
            || heard
                .series
                .iter()
                .any(|series| series.cycles.len() != wanted)
        {
            bail!("remit-tests left cycles out, though it ended as if all were well");
        }
        Ok(heard)
    }
}

// === impl Heard ===

impl Heard {
    fn line(&mut self, line: &str) -> Result<()> {
        #[derive(Deserialize)]
        struct Head {
            run: String,
            lanes: Vec<String>,
            unit: String,
        }
        #[derive(Deserialize)]
        struct Cycle {
            costs: Vec<f64>,
        }
        let value: Value = serde_json::from_str(line)?;
        if let Some(host) = value.get("host") {
            self.host = Host::deserialize(host)?;
        } else if value.get("missing").is_some() {
            self.missing.push(serde_json::from_value(value)?);
        } else if value.get("ready_ms").is_some() {
            self.ready.push(serde_json::from_value(value)?);
        } else if value.get("program").is_some() {
            self.programs.push(serde_json::from_value(value)?);
        } else if value.get("run").is_some() {
            let head: Head = serde_json::from_value(value)?;
            self.series.push(Series {
                workload: head.run,
                unit: head.unit,
                lanes: head.lanes,
                cycles: Vec::new(),
            });
        } else {
            let cycle: Cycle = serde_json::from_value(value)?;
            let series = self.series.last_mut().context("a cycle of no run")?;
            if cycle.costs.len() != series.lanes.len() {
                bail!(
                    "{} costs of {} lanes",
                    cycle.costs.len(),
                    series.lanes.len()
                );
            }
            series.cycles.push(cycle.costs);
        }
        Ok(())
    }

    fn progress(&self, what: &str, runs: &[Run], effort: &Effort) -> String {
        match self.series.last() {
            None => format!("{what}: setting up"),
            Some(series) => format!(
                "{what}: {} ({} of {}), cycle {} of {}",
                series.workload,
                self.series.len(),
                runs.len(),
                series.cycles.len(),
                effort.rounds * effort.cycles,
            ),
        }
    }
}

// === impl Series ===

impl Series {
    /// Costs of a lane over the cycles; none if it is not here.
    pub fn costs(&self, lane: &str) -> Option<Vec<f64>> {
        let index = self.lanes.iter().position(|name| name == lane)?;
        let costs = self.cycles.iter();
        Some(
            costs
                .filter_map(|cycle| cycle.get(index).copied())
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_series() {
        let mut heard = Heard::default();
        for line in [
            r#"{"host":{"kernel":"6.1","arch":"x86_64","cpu":"X","cpus":2,"load":"0.1"}}"#,
            r#"{"lane":"remit","ready_ms":3,"resident_kib":9000}"#,
            r#"{"missing":"nft","why":"there is no `nft`"}"#,
            r#"{"run":"connect","lanes":["nothing","remit"],"unit":"CPU ns"}"#,
            r#"{"round":0,"cycle":0,"costs":[10.0,11.0]}"#,
            r#"{"round":0,"cycle":1,"costs":[20.0,23.0]}"#,
        ] {
            heard.line(line).unwrap();
        }
        assert_eq!(heard.host.kernel, "6.1");
        assert_eq!(heard.missing[0].lane, "nft");
        assert_eq!(heard.series[0].costs("remit"), Some(vec![11.0, 23.0]));
        assert_eq!(heard.series[0].costs("nft"), None);
        let short = heard.line(r#"{"round":0,"cycle":2,"costs":[20.0]}"#);
        assert!(short.is_err());
    }
}
