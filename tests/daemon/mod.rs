//! The daemon and the commands, black box.

use crate::harness::Case;

/// All cases here.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
