//! What the kernel does with an agent's traffic: one file per part of the verdict.

use crate::harness::Case;

mod change;
mod control;
mod deny;
mod drift;
mod floor;
mod icmp;
mod lifecycle;
mod loopback;
mod membership;
mod monitor;
mod open_tcp;
mod parity;
mod ports;
mod reach;
mod serve;

/// All cases here.
pub fn cases() -> Vec<Case> {
    [
        control::cases(),
        reach::cases(),
        ports::cases(),
        deny::cases(),
        floor::cases(),
        lifecycle::cases(),
        monitor::cases(),
        loopback::cases(),
        serve::cases(),
        icmp::cases(),
        membership::cases(),
        change::cases(),
        open_tcp::cases(),
        parity::cases(),
        drift::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
