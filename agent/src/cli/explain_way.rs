//! The way to an answer of `remit explain`, in lines.

use super::format;
use crate::policy::Looked;

/// A prefix that was looked at, and each of its rules.
pub(super) fn looked(looked: &Looked) -> Vec<String> {
    let inside = if looked.embedded {
        " (inside the address)"
    } else {
        ""
    };
    let prefix = &looked.prefix;
    if !looked.asked {
        return vec![format!(
            "{prefix}{inside}: not asked, there is a longer one"
        )];
    }
    let rules = looked.rules.iter().map(|rule| {
        let fits = if rule.matches {
            "fits"
        } else {
            "another port or protocol"
        };
        format!(
            "{prefix}{inside}: {} {} by {} ({}): {fits}",
            rule.effect,
            rule.ports,
            rule.entry,
            format::place(&rule.file, rule.line)
        )
    });
    rules.collect()
}
