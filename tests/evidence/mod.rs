//! What the logs promise, under load and to those who read them.

use crate::harness::Case;

mod access;
mod brief;
mod flood;
mod follow;
mod journal;
mod left;
pub mod metrics;
pub mod reader;

/// All cases here.
pub fn cases() -> Vec<Case> {
    [
        metrics::cases(),
        access::cases(),
        follow::cases(),
        journal::cases(),
        left::cases(),
        flood::cases(),
        brief::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
