//! What is left when the package goes.

use std::{fs, path::Path};

use anyhow::Result;
use aya::programs::loaded_programs;

use super::{
    Step,
    agent::Counts,
    ear,
    system::{PROGRAM, Setup, agent_unit, settled, sh, sum},
};
use crate::support::{claim, eventually};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case("a_removed_package_leaves_the_fence_up", remove),
        Step::Case("a_purged_package_leaves_nothing", purge),
    ]
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
