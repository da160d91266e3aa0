//! The events in a real journal, read by `journalctl`: a journald of the case's own, in its mount
//! namespace, that neither reads the kernel's messages nor touches auditing.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use serde_json::Value;

use crate::{
    actor::Op,
    harness::{Case, Outcome},
    support::{
        Agent, Ctx, Family, Fixture, claim,
        daemon::Settings,
        eventually, expect,
        network::{OUT_V4, OUT_V6},
        remit,
    },
};

const JOURNALD: [&str; 2] = [
    "/usr/lib/systemd/systemd-journald",
    "/lib/systemd/systemd-journald",
];
const JOURNALCTL: &str = "/usr/bin/journalctl";
const CONFIG: &str = "/etc/systemd/journald.conf";

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::with_outcome(
        "evidence::journalctl_finds_events",
        journal,
    )]
}

fn journal(ctx: &mut Ctx) -> Result<Outcome> {
    let Some(journald) = JOURNALD.iter().map(Path::new).find(|path| path.is_file()) else {
        return Ok(Outcome::NotTested("no systemd-journald here".to_owned()));
    };
    for needed in [JOURNALCTL, CONFIG, "/etc/machine-id"] {
        if !Path::new(needed).is_file() {
            return Ok(Outcome::NotTested(format!("no {needed} here")));
        }
    }
    let mut journald = Journald::start(ctx, journald)?;
    let settings = Settings {
        more: "[log]\njournal = true\n".to_owned(),
        ..Settings::default()
    };
    let fx = Fixture::start_with(ctx, &[Agent::standard("alpha")], &settings)?;
    let mut actor = fx.actor("alpha")?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let reply = actor.ask(&Op::Connect {
        id,
        addr: Family::V4.pick(OUT_V4, OUT_V6, 4443)?,
        timeout_ms: 1000,
    })?;
    expect("errno", reply.errno, libc::EPERM)?;
    let denial = eventually(10, || {
        let entries = journalctl(&["REMIT_AGENT=alpha", "REMIT_EVENT_CODE=RM1001"])?;
        entries.first().cloned().context("no entry in the journal")
    })?;
    let pid = actor.pid().to_string();
    for (field, wanted) in [
        ("REMIT_REASON", "out_of_scope"),
        ("REMIT_DESTINATION_IP", OUT_V4),
        ("REMIT_DESTINATION_PORT", "4443"),
        ("OBJECT_PID", pid.as_str()),
        ("SYSLOG_IDENTIFIER", "remit"),
        ("PRIORITY", "4"),
    ] {
        expect(field, denial[field].as_str(), Some(wanted))?;
    }
    let message = denial["MESSAGE"].as_str().unwrap_or_default();
    claim(message.starts_with("DENIED alpha tcp"), || {
        message.to_owned()
    })?;
    // The kind of event is found by its id alone, and the daemon's start is another kind.
    let kind = denial["MESSAGE_ID"].as_str().context("no MESSAGE_ID")?;
    let same = journalctl(&[&format!("MESSAGE_ID={kind}")])?;
    expect("entries of this MESSAGE_ID", same.len(), 1)?;
    let started = journalctl(&["REMIT_EVENT_CODE=RM9001"])?;
    expect("starts of the daemon", started.len(), 1)?;
    drop(fx);
    journald.stop()?;
    println!("journalctl finds the denial by agent, code and MESSAGE_ID: {message}");
    Ok(Outcome::Passed)
}

fn journalctl(matches: &[&str]) -> Result<Vec<Value>> {
    let said = remit::output(
        Command::new(JOURNALCTL)
            .args([
                "--directory=/run/log/journal",
                "--output=json",
                "--quiet",
                "--no-pager",
            ])
            .args(matches),
    )?;
    said.stdout
        .lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

/// A journal of the case's own. Dropping it ends it.
struct Journald(Child);

impl Journald {
    fn start(ctx: &Ctx, program: &Path) -> Result<Self> {
        // The namespace is the case's own, and goes with it.
        let tmpfs = Some("tmpfs");
        mount(tmpfs, "/run", tmpfs, MsFlags::empty(), None::<&str>).context("cannot cover /run")?;
        let config = ctx.dir().join("journald.conf");
        fs::write(
            &config,
            "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=off\nForwardToSyslog=no\n\
             ForwardToWall=no\nRateLimitIntervalSec=0\n",
        )?;
        let none = None::<&str>;
        mount(Some(&config), CONFIG, none, MsFlags::MS_BIND, none)
            .context("cannot cover the settings of journald")?;
        fs::create_dir_all("/run/systemd/journal")?;
        fs::create_dir_all("/run/log/journal")?;
        let err = File::create(ctx.dir().join("journald.err"))?;
        let child = Command::new(program)
            .stdin(Stdio::null())
            .stdout(err.try_clone()?)
            .stderr(err)
            .spawn()
            .context("cannot start journald")?;
        let mut journald = Self(child);
        eventually(10, || {
            if let Some(status) = journald.0.try_wait()? {
                let said = fs::read_to_string(ctx.dir().join("journald.err"))?;
                anyhow::bail!("journald ended: {status}: {said}");
            }
            claim(Path::new("/run/systemd/journal/socket").exists(), || {
                "journald does not listen".to_owned()
            })
        })?;
        Ok(journald)
    }

    fn stop(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Journald {
    fn drop(&mut self) {
        drop(self.stop());
    }
}
