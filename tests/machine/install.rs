//! From a bare machine to one that enforces, as the README says.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{
    Step,
    agent::COUNTS,
    ear,
    system::{
        Setup, agent_unit, attempt, daemon, enforcing, fenced, property, settled, sh, sum, unit,
    },
};
use crate::support::{claim, expect};

/// Where the disk with the package is mounted.
const PAYLOAD: &str = "/payload";
/// Where somebody who downloaded the package would be.
const DOWNLOADS: &str = "/root/downloads";
/// `systemd-analyze security` at most.
const EXPOSURE: f64 = 2.5;

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Foundation("systemd_boots_and_the_ear_hears", boots),
        Step::Foundation("the_readme_installs_it", readme),
        Step::Case("units_expose_little", exposure),
    ]
}

fn boots() -> Result<String> {
    let first = fs::read_to_string("/proc/1/comm")?;
    expect("the first process", first.trim(), "systemd")?;
    expect(
        "a package before the installation",
        Path::new("/usr/bin/remit").exists(),
        false,
    )?;
    // Where the earliest units of later boots find it.
    fs::create_dir_all("/usr/local/bin")?;
    fs::copy(format!("{PAYLOAD}/remit-tests"), super::system::PROGRAM)?;
    unit(
        "remit-ear.service",
        &format!(
            "[Unit]\nDescription=What arrives\nDefaultDependencies=no\n\
             Before=sysinit.target remit-fence.service\n\
             Conflicts=shutdown.target\nBefore=shutdown.target\n\
             [Service]\nType=notify\nExecStart={} machine-ear\nTimeoutStopSec=5\n\
             [Install]\nWantedBy=sysinit.target\n",
            super::system::PROGRAM
        ),
    )?;
    agent_unit("outsider", Setup::default())?;
    sh("systemctl daemon-reload && systemctl enable -q --now remit-ear.service")?;
    sh("systemctl start outsider.service")?;
    // The twin of every agent: the same program, and nothing stops it.
    let counts = settled("outsider", 5)?;
    for lane in &counts.lanes {
        claim(
            lane.passed > 0 && lane.refused == 0 && lane.other == 0,
            || format!("without a fence: {lane:?}"),
        )?;
    }
    sh("systemctl stop outsider.service")?;
    let heard = ear::forgive()?;
    let sent = sum(counts.side(true), |lane| lane.passed);
    claim(heard.of("out", "outsider") >= sent, || {
        format!("of {sent} the ear heard {:?}", heard.out())
    })?;
    fs::remove_file(format!("{COUNTS}/outsider.json"))?;
    let version = sh("systemctl --version | head -n 1")?;
    Ok(format!("{version}; kernel {}", sh("uname -r")?))
}

fn readme() -> Result<String> {
    fs::create_dir_all(DOWNLOADS)?;
    sh(&format!("cp {PAYLOAD}/*.deb {DOWNLOADS}/"))?;
    sh(&format!(
        "cd {DOWNLOADS} && sh -eux {PAYLOAD}/install.sh </dev/null"
    ))?;
    enforcing()?;
    for (unit, state) in [
        ("remit.service", "running"),
        ("remit-fence.service", "exited"),
    ] {
        expect(
            &format!("{unit} is"),
            property(unit, "SubState")?.as_str(),
            state,
        )?;
        let enabled = sh(&format!("systemctl is-enabled {unit}"))?;
        expect(
            &format!("{unit}, for the next boot"),
            enabled.as_str(),
            "enabled",
        )?;
    }
    daemon()?;
    let failed = sh("systemctl list-units --failed --plain --no-legend")?;
    claim(!failed.contains("remit"), || {
        format!("failed units: {failed}")
    })?;
    for file in ["/usr/share/man/man1/remit.1.gz", "/sys/fs/bpf/remit"] {
        claim(Path::new(file).exists(), || format!("there is no {file}"))?;
    }
    // What was installed is what the package says, but for settings that the README changes.
    let changed = sh("dpkg --verify remit | grep -v ' c /etc/' | cat")?;
    claim(changed.is_empty(), || format!("dpkg --verify: {changed}"))?;
    // Unregistered is denied at once: nothing has been registered by this driver.
    agent_unit(
        "stranger",
        Setup {
            sliced: true,
            ..Setup::default()
        },
    )?;
    sh("systemctl daemon-reload && systemctl start stranger.service")?;
    let counts = fenced("stranger")?;
    sh("systemctl stop stranger.service")?;
    let passed = sum(counts.lanes.iter(), |lane| lane.passed);
    expect("what a stranger in the slice got through", passed, 0)?;
    let commands = fs::read_to_string(format!("{PAYLOAD}/install.sh"))?;
    let commands: Vec<_> = commands.lines().filter(|line| !line.is_empty()).collect();
    Ok(format!(
        "{} commands: {}",
        commands.len(),
        commands.join(" ; ")
    ))
}

fn exposure() -> Result<String> {
    let mut said = Vec::new();
    for unit in ["remit.service", "remit-fence.service"] {
        // Exits 1 above its own threshold; the figure is what counts.
        let output = attempt(&format!("systemd-analyze security --no-pager {unit}"))?;
        let last = output
            .stdout
            .lines()
            .rev()
            .find_map(|line| line.split_once("exposure level for "))
            .with_context(|| format!("no figure: {} {}", output.stdout, output.stderr))?
            .1;
        let figure: f64 = last
            .split_whitespace()
            .nth(1)
            .context("no figure")?
            .parse()
            .with_context(|| format!("`{last}` has no figure"))?;
        claim(figure <= EXPOSURE, || {
            let open: Vec<_> = output
                .stdout
                .lines()
                .filter(|line| line.contains('✗'))
                .collect();
            format!("{unit}: {figure}, wanted {EXPOSURE} at most: {open:#?}")
        })?;
        said.push(format!("{unit} {figure}"));
    }
    Ok(said.join(", "))
}
