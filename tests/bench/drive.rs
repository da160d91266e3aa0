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

/// Slices of each worker before the first that counts.
const WARM_UP: u32 = 2;

/// Measures one workload.
pub fn run(spec: &Spec, run: &Run, lanes: &mut [Lane], cpu: usize) -> Result<()> {
    let chosen: Vec<&Lane> = run
        .lanes
        .iter()
        .filter_map(|name| lanes.iter().find(|lane| lane.name == *name))
        .collect();
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
