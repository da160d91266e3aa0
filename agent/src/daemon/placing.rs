//! Where `remit run --agent` puts a command: a cgroup that a selector of the agent claims, and where
//! it can be one that systemd could have made, so that systemd can take it over as a scope.

/// The path that a selector leads to for the run with this number: a child of a plain path, or a glob
/// with its stars filled in. None for globs that ask for certain characters.
pub(super) fn place_by(selector: &str, serial: u64) -> Option<String> {
    if selector.contains(['?', '[', '{']) {
        return None;
    }
    let name = format!("run-{serial}");
    if !selector.contains('*') {
        return Some(format!("{selector}/{name}.scope"));
    }
    let glob = selector.replace("**", "*");
    Some(match glob.strip_suffix('*') {
        Some(stem) => {
            let between = if stem.ends_with(char::is_alphanumeric) {
                "-"
            } else {
                ""
            };
            format!("{}{between}{name}.scope", stem.replace('*', &name))
        }
        None => glob.replace('*', &name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_a_place_that_its_selector_claims() {
        let at = |selector| place_by(selector, 7);
        for (selector, place) in [
            (
                "/agents.slice/a.service",
                "/agents.slice/a.service/run-7.scope",
            ),
            (
                "/agents.slice/coder-*.scope",
                "/agents.slice/coder-run-7.scope",
            ),
            ("/agents.slice/coder*", "/agents.slice/coder-run-7.scope"),
            ("/agents.slice/coder-*", "/agents.slice/coder-run-7.scope"),
            ("/agents.slice/*/x", "/agents.slice/run-7/x"),
            ("/agents.slice/x/**", "/agents.slice/x/run-7.scope"),
        ] {
            assert_eq!(at(selector).as_deref(), Some(place), "{selector}");
        }
        assert_eq!(at("/agents.slice/a?"), None);
    }
}
