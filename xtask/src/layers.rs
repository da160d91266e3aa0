//! The layering of the daemon, as a table that is checked: which modules a module may name, and
//! which must stay pure. It reads source text, not types; that is enough to notice a wrong arrow
//! on the day it is drawn.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::lint::sources;

/// A module of `agent/src`, and the modules that it may name through `crate::`.
type Layer = (&'static str, &'static [&'static str]);

/// In dependency order; the table in `agent/src/lib.rs` says the same in words.
const LAYERS: [Layer; 14] = [
    ("policy", &[]),
    ("netlink", &[]),
    ("cgroup", &[]),
    ("launch", &["cgroup"]),
    ("kernel", &["policy"]),
    ("audit", &["policy"]),
    ("control", &["netlink"]),
    ("state", &["policy"]),
    ("sockets", &["netlink"]),
    ("dns", &["policy"]),
    (
        "daemon",
        &[
            "policy", "cgroup", "launch", "kernel", "audit", "control", "state", "sockets", "dns",
        ],
    ),
    (
        "doctor",
        &["policy", "cgroup", "kernel", "audit", "sockets", "daemon"],
    ),
    (
        "cli",
        &[
            "policy", "cgroup", "launch", "kernel", "audit", "control", "state", "sockets", "dns",
            "daemon", "doctor",
        ],
    ),
    (
        "main",
        &[
            "policy", "cgroup", "launch", "kernel", "audit", "control", "state", "sockets", "dns",
            "daemon", "doctor", "cli",
        ],
    ),
];

/// Files and folders that take the clock, the network and the disk only as arguments.
const PURE: [&str; 11] = [
    "agent/src/policy",
    "agent/src/dns/name.rs",
    "agent/src/dns/message.rs",
    "agent/src/dns/budget.rs",
    "agent/src/dns/lease.rs",
    "agent/src/dns/guard",
    "agent/src/audit/record",
    "agent/src/audit/decided",
    "agent/src/control/protocol",
    "agent-ebpf/src/abi",
    "agent-ebpf/src/decide",
];

/// What a pure file may not name.
const IMPURE: [&str; 10] = [
    "std::fs",
    "std::process",
    "std::net::Tcp",
    "std::net::Udp",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::os::unix::net",
    "tokio::",
    "aya::",
    "tracing::",
];

/// The kernel interface proves to aya that its types are plain data; nothing else of aya.
const GRANTED: [(&str, &str); 1] = [("agent-ebpf/src/abi", "aya::Pod")];

/// Looks at the checkout below `root` and says every wrong arrow.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    let agent = root.join("agent/src");
    for file in sources(&agent)? {
        let inside = file.strip_prefix(&agent).unwrap_or(&file);
        let module = inside
            .components()
            .next()
            .map(|first| {
                first
                    .as_os_str()
                    .to_string_lossy()
                    .trim_end_matches(".rs")
                    .to_owned()
            })
            .unwrap_or_default();
        if module == "lib" {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            findings.push(format!(
                "{}: `{module}` is in no layer: see xtask/src/layers.rs",
                file.display()
            ));
            continue;
        };
        let text = read(&file)?;
        for (line, path) in paths(&text) {
            let Some(rest) = path.strip_prefix("crate::") else {
                continue;
            };
            let named = rest.split("::").next().unwrap_or_default();
            if named != module && !allowed.contains(&named) {
                findings.push(format!(
                    "{}:{line}: `{module}` may not know `{named}` (it names `{path}`)",
                    file.display()
                ));
            }
        }
    }
    for place in PURE {
        let path = root.join(place);
        let files = match (path.is_file(), path.is_dir()) {
            (true, _) => vec![path],
            (_, true) => sources(&path)?,
            (false, false) => continue,
        };
        for file in files {
            let text = read(&file)?;
            // Its tests may read files.
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (line, path) in paths(text) {
                let impure = IMPURE.iter().any(|word| path.starts_with(word));
                if impure && !GRANTED.contains(&(place, path.as_str())) {
                    findings.push(format!(
                        "{}:{line}: pure, yet it names `{path}`",
                        file.display()
                    ));
                }
            }
        }
    }
    Ok(findings)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Every path in `text` that has a `::` in it, with its line; groups in braces are taken apart.
/// Comments are left out.
fn paths(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // Prefixes of the groups that are open, and where other braces are, `None`.
    let mut groups: Vec<Option<String>> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        let mut word = String::new();
        for character in code.chars().chain(['\n']) {
            if character.is_alphanumeric() || matches!(character, '_' | ':' | '*') {
                word.push(character);
                continue;
            }
            let prefix = groups.last().cloned().flatten();
            if character == '{' {
                groups.push(
                    word.ends_with("::")
                        .then(|| format!("{}{word}", prefix.unwrap_or_default())),
                );
                word.clear();
                continue;
            }
            if !word.is_empty() {
                let path = format!("{}{word}", prefix.unwrap_or_default());
                let path = path.trim_start_matches(['*', ':']);
                if path.contains("::") {
                    found.push((number, path.to_owned()));
                }
                word.clear();
            }
            if character == '}' {
                groups.pop();
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_taken_apart_over_lines() {
        let text = "use crate::{\n    policy::{self, tables},\n    kernel,\n};\n\
                    // crate::cli\nfn f() { let x = crate::audit::g(); }\n";
        let paths: Vec<_> = paths(text).into_iter().map(|(_, path)| path).collect();
        assert_eq!(
            paths,
            [
                "crate::policy::self",
                "crate::policy::tables",
                "crate::kernel",
                "crate::audit::g",
            ]
        );
    }

    #[test]
    fn a_wrong_arrow_and_an_impure_file_are_found() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("agent/src/lib.rs", "pub mod policy;");
        write(
            "agent/src/kernel/mod.rs",
            "use crate::policy;\nuse crate::{audit::Record};\n",
        );
        write(
            "agent/src/policy/mod.rs",
            "use std::{fmt, fs};\n#[cfg(test)]\nuse std::process;\n",
        );
        write("agent/src/util.rs", "");
        write(
            "agent-ebpf/src/abi/key.rs",
            "unsafe impl aya::Pod for K {}\nuse aya::Ebpf;\n",
        );
        let findings = check(root.path()).unwrap();
        assert_eq!(findings.len(), 4, "{findings:?}");
        assert!(findings[0].contains("mod.rs:2: `kernel` may not know `audit`"));
        assert!(findings[1].contains("`util` is in no layer"));
        assert!(findings[2].contains("mod.rs:1: pure, yet it names `std::fs`"));
        assert!(findings[3].contains("key.rs:2: pure, yet it names `aya::Ebpf`"));
    }
}
