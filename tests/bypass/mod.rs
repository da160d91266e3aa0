//! Each known way around the fence, and what becomes of it. Those that stand open without
//! containment are asserted open, so that the day they close, or one opens, is noticed; the
//! document of bypasses says the same.

use crate::harness::Case;

mod open;
mod routes;
mod ways;

/// All cases here.
pub fn cases() -> Vec<Case> {
    [ways::cases(), routes::cases(), open::cases()]
        .into_iter()
        .flatten()
        .collect()
}
