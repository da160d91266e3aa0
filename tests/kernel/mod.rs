//! What the kernel does with an agent's traffic: one file per part of the verdict.

use crate::harness::Case;

mod control;
mod reach;

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = control::cases();
    cases.extend(reach::cases());
    cases
}
