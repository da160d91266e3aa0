//! The daemon and the commands, black box.

use crate::harness::Case;

mod bad_registry;
mod commands;
pub mod faults;
mod fence;
mod flood;
mod life;
pub mod run;
mod succession;

/// All cases here.
pub fn cases() -> Vec<Case> {
    // What the daemon reads and says is the same on every kernel.
    let once = [commands::cases(), faults::cases(), bad_registry::cases()];
    let everywhere = [
        life::cases(),
        flood::cases(),
        run::cases(),
        succession::cases(),
        fence::cases(),
    ];
    let once = once.into_iter().flatten().map(Case::once);
    let everywhere = everywhere.into_iter().flatten();
    once.chain(everywhere).collect()
}
