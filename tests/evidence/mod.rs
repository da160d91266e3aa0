//! What the logs promise, under load and to those who read them.

use crate::harness::Case;

mod brief;
mod flood;
mod follow;
mod metrics;
pub mod reader;

/// All cases here.
pub fn cases() -> Vec<Case> {
    [
        metrics::cases(),
        follow::cases(),
        flood::cases(),
        brief::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
