//! What is packed is there and says the same everywhere. The package itself is made and checked by
//! `cargo xtask dist`.

#![allow(
    clippy::unwrap_used,
    reason = "a failed expectation is how a test fails"
)]

use std::{fs, path::Path};

const MANIFEST: &str = include_str!("../Cargo.toml");
const README: &str = include_str!("../../README.md");
const UNIT: &str = include_str!("../package/systemd/agent-unit.conf");
const FENCE: &str = include_str!("../package/systemd/remit-fence.service");
const FENCE_OF: &str = include_str!("../package/systemd/remit-fence@.service");
const OF_SLICE: &str = include_str!("../package/systemd/slice.conf");
const DAEMON: &str = include_str!("../package/systemd/remit.service");
const SLICE: &str = include_str!("../package/systemd/agents.slice");

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim)
}

#[test]
fn the_changelog_is_of_this_version() {
    let changelog = include_str!("../package/debian/changelog");
    let version = env!("CARGO_PKG_VERSION");
    let first = format!("remit ({version}-1) ");
    assert!(changelog.starts_with(&first), "{changelog}");
}

#[test]
fn all_that_is_packed_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest: toml::Table = MANIFEST.parse().unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    let mut files = 0;
    for asset in deb["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        if source.starts_with("target/") {
            continue;
        }
        files += 1;
        let path = root.join(source);
        let found = if let Some(folder) = source.strip_suffix("*.toml") {
            fs::read_dir(root.join(folder)).unwrap().count() > 0
        } else {
            path.is_file()
        };
        assert!(found, "{source}");
    }
    assert!(files > 10, "{files}");
    for file in deb["conf-files"].as_array().unwrap() {
        let file = file.as_str().unwrap().trim_start_matches('/');
        let packed = deb["assets"].as_array().unwrap().iter();
        let mut destinations = packed.map(|asset| asset[1].as_str().unwrap());
        assert!(destinations.any(|to| to == file), "{file}");
    }
}

#[test]
fn an_agents_unit_is_the_same_in_the_readme_and_the_template() {
    assert!(lines(UNIT).any(|line| line == "Slice=agents.slice"));
    assert!(lines(README).any(|line| line == "Slice=agents.slice"));
    let guard = |text| lines(text).any(|line| line == "ExecStartPre=+remit guard --unit %n");
    assert!(guard(README));
    assert!(guard(&UNIT.replace("/usr/bin/remit", "remit")));
}

#[test]
fn the_fence_of_a_slice_is_raised_as_that_of_the_boot() {
    let service = |text: &str| -> Vec<String> {
        let all = lines(text).skip_while(|line| *line != "[Service]");
        let of = all.take_while(|line| *line != "[Install]");
        let of = of.filter(|line| !line.is_empty() && !line.starts_with('#'));
        of.map(str::to_owned).collect()
    };
    assert!(service(FENCE).len() > 20);
    assert_eq!(service(FENCE_OF), service(FENCE));
    for needs in ["Requires", "After", "PropagatesStopTo"] {
        let line = format!("{needs}=remit-fence@%n.service");
        assert!(lines(OF_SLICE).any(|other| other == line), "{line}");
    }
}

#[test]
fn nothing_in_the_slice_starts_without_the_fence() {
    for line in ["Requires=remit-fence.service", "After=remit-fence.service"] {
        assert!(lines(SLICE).any(|other| other == line), "{line}");
    }
    for line in [
        "Type=oneshot",
        "RemainAfterExit=yes",
        "DefaultDependencies=no",
    ] {
        assert!(lines(FENCE).any(|other| other == line), "{line}");
    }
    // The daemon may come and go: nothing requires it, and nothing limits its restarts.
    assert!(!SLICE.contains("Requires=remit.service"));
    for line in ["Restart=always", "StartLimitIntervalSec=0", "Type=notify"] {
        assert!(lines(DAEMON).any(|other| other == line), "{line}");
    }
}

#[test]
fn the_readmes_install_commands_can_be_taken_out() {
    let mut blocks = 0;
    let mut inside = false;
    for line in README.lines() {
        match line {
            "```sh install" => {
                inside = true;
                blocks += 1;
            }
            "```" => inside = false,
            _ => {}
        }
    }
    assert!(!inside);
    assert!(blocks >= 4, "{blocks}");
}
