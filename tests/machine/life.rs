//! A daemon that restarts, crashes, is upgraded and downgraded under a running agent, which goes on
//! as if nothing had happened; and the logs, as they are documented.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{
    Step,
    agent::{Counts, PORT},
    system::{
        Beside, SLICE, Setup, Steady, accounted, agent_unit, attempt, daemon, enforcing, entry,
        fenced, in_scope_passes, property, register, remit, settled, sh, sum,
    },
};
use crate::support::{Agent, claim, eventually, expect, network::IN_V4};

/// Kills of a daemon that is ready, and of one that has just begun.
const KILLS: (usize, usize) = (2, 3);
const NEXT: &str = "/payload/next/remit.deb";
const STEADY: &str = "steady";

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case("a_restart_disturbs_no_agent", restart),
        Step::Case("a_reload_takes_and_gives_a_grant", reload),
        Step::Case(
            "a_unit_started_with_the_daemon_is_fenced_from_the_first",
            race,
        ),
        Step::Case(
            "a_crash_loop_disturbs_no_agent_and_ends_in_a_daemon",
            crashes,
        ),
        Step::Case("an_upgrade_disturbs_no_agent", upgrade),
        Step::Case("a_downgrade_disturbs_no_agent", downgrade),
        Step::Case("logs_and_journal_are_as_documented", logs),
    ]
}

fn restart() -> Result<String> {
    register(STEADY, &[])?;
    let setup = Setup {
        sliced: true,
        guarded: true,
        early: false,
    };
    agent_unit(STEADY, setup)?;
    sh(&format!(
        "systemctl daemon-reload && systemctl start {STEADY}.service"
    ))?;
    in_scope_passes(STEADY)?;
    let steady = Steady::note(STEADY)?;
    let before = daemon()?;
    sh("systemctl restart remit.service")?;
    claim(daemon()? != before, || {
        "the daemon did not restart".to_owned()
    })?;
    enforcing()?;
    steady.held()
}

fn reload() -> Result<String> {
    let before = daemon()?;
    let lane_of = |counts: &Counts| -> Result<(u64, u64)> {
        let lane = counts.lanes.iter().find(|lane| lane.name == "in tcp v4");
        let lane = lane.context("no such lane")?;
        Ok((lane.passed, lane.refused))
    };
    let standard = Agent::standard(STEADY);
    entry(&standard.clone().deny(&format!("{IN_V4}/32")))?;
    sh("systemctl reload remit.service")?;
    eventually(8, || {
        let old = lane_of(&settled(STEADY, 1)?)?;
        let new = lane_of(&settled(STEADY, 2)?)?;
        claim(new.0 == old.0 && new.1 > old.1, || {
            format!("still passes to {IN_V4}:{PORT}: {old:?}, then {new:?}")
        })
    })?;
    entry(&standard)?;
    sh("systemctl reload remit.service")?;
    in_scope_passes(STEADY)?;
    fenced(STEADY)?;
    expect("the daemon's process", daemon()?, before)?;
    Ok(String::new())
}

/// A daemon that is away, and a unit that starts at the same moment as it comes back.
fn race() -> Result<String> {
    register("racer", &[])?;
    let setup = Setup {
        sliced: true,
        ..Setup::default()
    };
    agent_unit("racer", setup)?;
    sh("systemctl daemon-reload && systemctl stop remit.service")?;
    let running = Beside::start("systemctl start remit.service racer.service")?;
    expect("the start of both", running.end(60)?, 0)?;
    daemon()?;
    let counts = Counts::read("racer")?;
    let ready = super::system::moment_us("remit.service", "ActiveEnterTimestamp")?;
    claim(counts.began_ns / 1000 < ready, || {
        format!(
            "the unit began at {} ns, after the daemon at {ready} us",
            counts.began_ns
        )
    })?;
    in_scope_passes("racer")?;
    fenced("racer")?;
    sh("systemctl stop racer.service")?;
    Ok(format!(
        "its first attempt came {} ms before the daemon was ready",
        ready.saturating_sub(counts.began_ns / 1000) / 1000
    ))
}

fn crashes() -> Result<String> {
    let steady = Steady::note(STEADY)?;
    for _ in 0..KILLS.0 {
        let pid = daemon()?;
        kill(pid)?;
    }
    for _ in 0..KILLS.1 {
        let pid: u32 = eventually(10, || {
            let pid = property("remit.service", "MainPID")?.parse()?;
            claim(pid != 0, || "there is no daemon".to_owned())?;
            Ok(pid)
        })?;
        sleep(Duration::from_millis(150));
        kill(pid)?;
    }
    daemon()?;
    enforcing()?;
    let restarts: u64 = property("remit.service", "NRestarts")?.parse()?;
    claim(restarts >= (KILLS.0 + KILLS.1) as u64, || {
        format!("{restarts} restarts")
    })?;
    let held = steady.held()?;
    Ok(format!("{restarts} restarts by systemd; {held}"))
}

/// Ends a process as a crash does, and waits until it is gone.
fn kill(pid: u32) -> Result<()> {
    // It may have ended a moment ago.
    attempt(&format!("kill -9 {pid}"))?;
    eventually(5, || {
        let now: u32 = property("remit.service", "MainPID")?.parse()?;
        claim(now != pid, || format!("{pid} lives on"))
    })
}

fn upgrade() -> Result<String> {
    change(&format!("apt-get install -y {NEXT}"), true)
}

fn downgrade() -> Result<String> {
    change(
        "apt-get install -y --allow-downgrades /root/downloads/remit*.deb",
        false,
    )
}

/// Installs another version under a running agent.
fn change(command: &str, next: bool) -> Result<String> {
    let steady = Steady::note(STEADY)?;
    let (old, before) = (version()?, daemon()?);
    sh(command)?;
    let new = version()?;
    claim(new != old && new.contains("+next") == next, || {
        format!("{old} was replaced by {new}")
    })?;
    let after = daemon()?;
    claim(after != before, || "the old daemon runs on".to_owned())?;
    let running = fs::read_link(format!("/proc/{after}/exe"))?;
    expect("what runs", running.as_path(), Path::new("/usr/bin/remit"))?;
    enforcing()?;
    for unit in ["remit-fence.service", "agents.slice"] {
        expect(unit, property(unit, "ActiveState")?.as_str(), "active")?;
    }
    let held = steady.held()?;
    let sets: Vec<String> = fs::read_dir("/sys/fs/bpf/remit")?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    Ok(format!("{old} to {new}, pins {}; {held}", sets.join(" ")))
}

fn version() -> Result<String> {
    sh("dpkg-query -W -f '${Version}' remit")
}

fn logs() -> Result<String> {
    let folder = Path::new("/var/log/remit");
    let about = fs::metadata(folder)?;
    expect(
        "other users' rights to the logs",
        about.permissions().mode() & 0o007,
        0,
    )?;
    let group = sh(&format!("getent group {} | cut -d: -f1", about.gid()))?;
    expect("the group of the logs", group.as_str(), "adm")?;
    let violations = folder.join("violations.jsonl");
    let about = fs::metadata(&violations)?;
    expect(
        "rights to violations.jsonl",
        about.permissions().mode() & 0o777,
        0o640,
    )?;
    let group = sh(&format!("getent group {} | cut -d: -f1", about.gid()))?;
    expect("the group of violations.jsonl", group.as_str(), "adm")?;
    // The package's own rule, by rename: the daemon goes on in a new file.
    let inode = about.ino();
    sh("logrotate --force /etc/logrotate.d/remit")?;
    eventually(10, || {
        let now = fs::metadata(&violations).context("no new violations.jsonl")?;
        claim(now.ino() != inode && now.len() > 0, || {
            "nothing new".to_owned()
        })
    })?;
    let first = fs::read_to_string(&violations)?;
    let first: serde_json::Value = serde_json::from_str(first.lines().next().context("a line")?)?;
    expect(
        "the first number in it",
        first["metadata"]["sequence"].as_u64(),
        Some(1),
    )?;
    sh(&format!("systemctl stop {STEADY}.service"))?;
    let counts = Counts::read(STEADY)?;
    let refused = sum(counts.lanes.iter(), |lane| lane.refused);
    accounted(STEADY, refused)?;
    let verified = remit(&["log", "verify"])?;
    // The journal has what the daemon says of itself, for both units.
    for unit in ["remit.service", "remit-fence.service"] {
        let said = sh(&format!("journalctl -q -b -o cat -u {unit} | head -n 5"))?;
        claim(!said.is_empty(), || {
            format!("the journal has nothing of {unit}")
        })?;
    }
    let told = sh(&format!("remit tail -n 1 --agent {STEADY}"))?;
    claim(told.contains("DENIED") && told.contains(STEADY), || {
        told.clone()
    })?;
    let path = format!("{SLICE}/{STEADY}.service");
    Ok(format!(
        "{refused} refusals of {path} over restarts, crashes, an upgrade and a downgrade: as many in \
         the log; {}",
        verified.lines().next().unwrap_or_default()
    ))
}
