//! The daemon and the commands, black box.

use crate::harness::Case;

mod bad_registry;
mod commands;
pub mod faults;
mod flood;
mod life;
mod run;
mod succession;

/// All cases here.
pub fn cases() -> Vec<Case> {
    [
        life::cases(),
        commands::cases(),
        faults::cases(),
        bad_registry::cases(),
        flood::cases(),
        run::cases(),
        succession::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
