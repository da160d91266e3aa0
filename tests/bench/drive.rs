//! The measuring: each cycle gives every lane one slice, in a fresh random order, and only numbers
//! of one cycle are ever compared. What makes a machine faster or slower for a while then makes
//! all lanes so.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{
    Run, Spec, Workload,
    lane::{Lane, Worker},
    say,
    worker::{Done, Order},
};
use crate::support::programs::infos;

/// Slices of each worker before the first that counts.
const WARM_UP: u32 = 2;

/// Measures one workload.
pub fn run(spec: &Spec, run: &Run, lanes: &[Lane], cpu: usize) -> Result<()> {
    let chosen = chosen(run, lanes);
    let names: Vec<&str> = chosen.iter().map(|lane| lane.name.as_str()).collect();
    say(&json!({ "run": run.workload, "lanes": names, "unit": unit(run.workload) }));
    for round in 0..spec.rounds {
        let mut workers = Vec::new();
        for lane in &chosen {
            workers.push(ready(lane, run.workload, cpu, spec.slice_us)?);
        }
        for cycle in 0..spec.cycles {
            let mut order: Vec<usize> = (0..chosen.len()).collect();
            fastrand::shuffle(&mut order);
            let mut costs = vec![0.0; chosen.len()];
            for index in order {
                let (Some(lane), Some(worker)) = (chosen.get(index), workers.get_mut(index)) else {
                    continue;
                };
                let done = slice(lane, worker, spec.slice_us)?;
                if let Some(cost) = costs.get_mut(index) {
                    *cost = cost_of(run.workload, &done)?;
                }
            }
            say(&json!({ "round": round, "cycle": cycle, "costs": costs }));
        }
    }
    Ok(())
}

/// Lets each lane work for a while, and says how often its programs ran and how long that took by
/// the kernel's own count (which adds some 70 ns to each run, and is not in what it counts).
pub fn statistics(spec: &Spec, run: &Run, lanes: &[Lane], cpu: usize) -> Result<()> {
    for lane in chosen(run, lanes) {
        let ids = lane.fence.programs()?;
        let mut worker = ready(lane, run.workload, cpu, spec.slice_us)?;
        let before = infos(&ids);
        for _ in 0..spec.cycles {
            slice(lane, &mut worker, spec.slice_us)?;
        }
        for after in infos(&ids) {
            let Some(before) = before.iter().find(|info| info.id() == after.id()) else {
                continue;
            };
            let runs = after.run_count() - before.run_count();
            if runs == 0 {
                continue;
            }
            let time = after.run_time() - before.run_time();
            say(&json!({
                "program": after.name_as_str().unwrap_or_default(),
                "lane": lane.name,
                "workload": run.workload,
                "runs": runs,
                "ns": time.as_nanos() as f64 / runs as f64,
            }));
        }
    }
    Ok(())
}

/// Lanes of a run that are here, in its order.
fn chosen<'l>(run: &Run, lanes: &'l [Lane]) -> Vec<&'l Lane> {
    let names = run.lanes.iter();
    names
        .filter_map(|name| lanes.iter().find(|lane| lane.name == *name))
        .collect()
}

/// A worker that has proved its fence, and has its sockets and caches warm.
fn ready(lane: &Lane, workload: Workload, cpu: usize, slice_us: u64) -> Result<Worker> {
    let mut worker = lane.worker(cpu)?;
    lane.prove(&mut worker)?;
    let to = match workload {
        Workload::LiveSet => lane.shape.live(),
        Workload::ColdSet => lane.shape.cold(),
        _ => vec![lane.shape.hot()],
    };
    worker.ask(&Order::Prepare { workload, to })?;
    for _ in 0..WARM_UP {
        slice(lane, &mut worker, slice_us)?;
    }
    Ok(worker)
}

fn slice(lane: &Lane, worker: &mut Worker, micros: u64) -> Result<Done> {
    let done = worker
        .ask(&Order::Slice { micros })
        .with_context(|| format!("lane {}", lane.name))?;
    lane.net.drain();
    Ok(done)
}

/// Two ends take turns in these, so one's processor time is not what it takes.
fn by_wall(workload: Workload) -> bool {
    matches!(workload, Workload::RequestResponse | Workload::Bulk)
}

fn unit(workload: Workload) -> &'static str {
    if by_wall(workload) { "ns" } else { "CPU ns" }
}

fn cost_of(workload: Workload, done: &Done) -> Result<f64> {
    ensure!(done.ops > 0, "a slice without an operation");
    let ns = if by_wall(workload) {
        done.wall_ns
    } else {
        done.cpu_ns
    };
    Ok(ns as f64 / done.ops as f64)
}
