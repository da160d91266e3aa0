//! What is left when the package goes.

use std::{fs, path::Path};

use anyhow::Result;
use aya::programs::loaded_programs;

use super::{
    Step,
    agent::Counts,
    ear,
    system::{
        PROGRAM, Setup, agent_unit, enforcing, fenced, in_scope_passes, register, settled, sh, sum,
        unit,
    },
};
use crate::support::{claim, eventually, expect};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case("the_fence_is_pinned_where_the_settings_say", elsewhere),
        Step::Case("a_removal_lifts_the_fence_where_that_is_the_answer", lift),
        Step::Case("a_removed_package_leaves_the_fence_up", remove),
        Step::Case("a_purged_package_leaves_nothing", purge),
    ]
}

/// Where the settings have the pins from here on.
const PINS: &str = "/sys/fs/bpf/elsewhere";

fn elsewhere() -> Result<String> {
    sh("systemctl stop agents.slice remit.service")?;
    sh(&format!(
        "sed -i 's|^#bpffs = .*|bpffs = \"{PINS}\"|' /etc/remit/remit.toml && \
         grep -q {PINS} /etc/remit/remit.toml"
    ))?;
    for name in ["remit.service", "remit-fence.service"] {
        unit(
            &format!("{name}.d/pins.conf"),
            &format!("[Service]\nReadWritePaths=-{PINS}\n"),
        )?;
    }
    sh("systemctl daemon-reload && systemctl start hasty.service")?;
    enforcing()?;
    fenced("hasty")?;
    in_scope_passes("hasty")?;
    let pinned = sh(&format!("find {PINS} -type f | wc -l"))?;
    claim(pinned.parse::<u64>()? > 10, || {
        format!("{pinned} pins in {PINS}")
    })?;
    expect(
        "what `remit fence --pins` says",
        sh("remit fence --pins")?.as_str(),
        PINS,
    )?;
    Ok(format!("{pinned} pins"))
}

/// Debconf's answer that an administrator may give, and then the package comes back.
fn lift() -> Result<String> {
    const NAME: &str = "loose";
    let out = |counts: &Counts| sum(counts.side(true), |lane| lane.passed);
    let setup = Setup {
        sliced: true,
        ..Setup::default()
    };
    agent_unit(NAME, setup)?;
    register(NAME, &[])?;
    sh("systemctl stop hasty.service && systemctl daemon-reload")?;
    sh(&format!("systemctl start {NAME}.service"))?;
    in_scope_passes(NAME)?;
    let pid = fenced(NAME)?.pid;
    sh("echo remit remit/lift-fence boolean true | debconf-set-selections")?;
    sh("apt-get remove -y remit")?;
    let counts = settled(NAME, 3)?;
    let before = out(&counts);
    let passed = out(&settled(NAME, 3)?) - before;
    claim(before > 0 && passed > 0, || {
        format!("the fence was lifted, and out of scope {before} passed, then {passed}")
    })?;
    let pinned = sh(&format!("find {PINS} -type f"))?;
    expect("pins, after the fence was lifted", pinned.as_str(), "")?;
    let told = sh("grep -c RM9003 /var/log/remit/audit.jsonl")?;
    expect("records of it", told.as_str(), "1")?;
    // The agent ran on; what comes back fences it as it is.
    sh("cd /root/downloads && apt-get install -y ./remit_*_amd64.deb")?;
    enforcing()?;
    in_scope_passes(NAME)?;
    let before = settled(NAME, 1)?;
    let after = settled(NAME, 3)?;
    expect("its process", after.pid, pid)?;
    expect("what passed out of scope since", out(&after), out(&before))?;
    let heard = ear::forgive()?.of("out", NAME);
    claim(heard >= passed, || format!("the ear heard {heard}"))?;
    sh(&format!("systemctl stop {NAME}.service"))?;
    Ok(format!("{} passed meanwhile", out(&after)))
}

/// The daemon is gone, and the decision about the fence has not been made: it holds.
fn remove() -> Result<String> {
    sh("systemctl start hasty.service")?;
    let before = settled("hasty", 3)?;
    sh("apt-get remove -y remit")?;
    claim(!Path::new("/usr/bin/remit").exists(), || {
        "the program is still there".to_owned()
    })?;
    let after = settled("hasty", 3)?;
    let out = |counts: &Counts| sum(counts.side(true), |lane| lane.passed);
    claim(out(&after) == out(&before), || {
        format!("out of scope passed: {after:?}")
    })?;
    claim(ear::listen()?.of("out", "hasty") == 0, || {
        "the ear heard it out of scope".to_owned()
    })?;
    Ok(String::new())
}

fn purge() -> Result<String> {
    sh("apt-get purge -y remit")?;
    for path in [
        "/sys/fs/bpf/remit",
        PINS,
        "/etc/remit",
        "/var/lib/remit",
        "/run/remit",
        "/usr/bin/remit",
        "/usr/lib/systemd/system/remit.service",
        "/lib/systemd/system/remit.service",
        "/etc/logrotate.d/remit",
    ] {
        claim(!Path::new(path).exists(), || format!("{path} is left"))?;
    }
    // Programs end a moment after their last link.
    eventually(5, || {
        let left: Vec<_> = loaded_programs()
            .filter_map(Result::ok)
            .filter_map(|info| info.name_as_str().map(str::to_owned))
            .filter(|name| name.starts_with("remit_"))
            .collect();
        claim(left.is_empty(), || {
            format!("loaded programs are left: {left:?}")
        })
    })?;
    // And what the fence refused, passes.
    agent_unit(
        "late",
        Setup {
            sliced: true,
            ..Setup::default()
        },
    )?;
    sh("systemctl daemon-reload && systemctl start late.service")?;
    let counts = settled("late", 3)?;
    sh("systemctl stop late.service")?;
    for lane in &counts.lanes {
        claim(lane.passed > 0 && lane.refused == 0, || {
            format!("{PROGRAM}: {lane:?}")
        })?;
    }
    let logs = fs::read_dir("/var/log/remit").map_or(0, Iterator::count);
    let units =
        sh("systemctl list-unit-files --no-legend 'remit*' | grep -v check | grep -v ear | cat")?;
    claim(units.is_empty(), || format!("units are left: {units}"))?;
    Ok(format!("{logs} files in /var/log/remit"))
}
