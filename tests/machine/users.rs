//! A user's login sessions and own units, behind the fence by a root that comes and goes with them.

use std::{fs, os::unix::fs::MetadataExt as _};

use anyhow::{Context as _, Result};

use super::{
    Step,
    agent::{COUNTS, Counts},
    ear,
    system::{
        PROGRAM, accounted, attempt, enforcing, fenced, in_scope_passes, property, register,
        settled, sh, silent, sum, unit,
    },
};
use crate::support::{claim, eventually, expect};

const USER: &str = "tester";
const UID: u32 = 1001;
/// What runs in a session.
const SESSION: &str = "session-agent";
/// What the user's own systemd runs.
const OWN: &str = "user-unit";
const SETTINGS: &str = "/etc/remit/remit.toml";

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case(
            "the_users_systemd_is_a_way_out_without_containment",
            way_out,
        ),
        Step::Case("a_users_sessions_and_units_are_fenced", sessions),
        Step::Case("a_login_without_a_daemon_is_fenced", without_daemon),
    ]
}

fn slice() -> String {
    format!("user-{UID}.slice")
}

fn place() -> String {
    format!("/user.slice/{}", slice())
}

/// The cgroup of the user's slice, by its number; none while there is none.
fn cgroup() -> Option<u64> {
    let found = fs::metadata(format!("/sys/fs/cgroup{}", place()));
    found.ok().map(|found| found.ino())
}

/// Logs the user in. The session lives as long as what runs in it.
fn log_in() -> Result<()> {
    // Its counts are of this login.
    drop(fs::remove_file(Counts::file(SESSION)));
    attempt("systemctl stop tester-login; systemctl reset-failed tester-login")?;
    sh(&format!(
        "systemd-run --quiet --collect --unit=tester-login \
         su -l {USER} -c 'exec {PROGRAM} machine-agent {SESSION}'"
    ))?;
    eventually(20, || Counts::read(SESSION).map(drop))
}

/// Ends the session, and waits until the user's slice has gone with it.
fn log_out() -> Result<()> {
    // The unit may have ended with what it ran.
    attempt(&format!(
        "loginctl terminate-user {USER}; systemctl stop tester-login"
    ))?;
    eventually(40, || {
        let state = property(&slice(), "ActiveState")?;
        expect("the user's slice", state.as_str(), "inactive")
    })
}

/// It runs as the user, in the user's slice, in a cgroup whose path has `part`.
fn runs_in(name: &str, part: &str) -> Result<String> {
    let pid = Counts::read(name)?.pid;
    let owner = fs::metadata(format!("/proc/{pid}"))?.uid();
    expect("whose process it is", owner, UID)?;
    let inside = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let inside = inside.trim().trim_start_matches("0::").to_owned();
    claim(
        inside.starts_with(&place()) && inside.contains(part),
        || format!("{name} runs in {inside}"),
    )?;
    Ok(inside)
}

/// A unit of the user's own systemd.
fn own_unit(unit: &str, name: &str) -> Result<()> {
    let home = format!("/home/{USER}/.config/systemd/user");
    sh(&format!("mkdir -p {home}/default.target.wants"))?;
    fs::write(
        format!("{home}/{unit}"),
        format!("[Service]\nExecStart={PROGRAM} machine-agent {name}\n"),
    )?;
    sh(&format!("chown -R {USER}: /home/{USER}")).map(drop)
}

/// An agent asks the systemd of its user to start what it may not do itself. Nothing but unix sockets
/// is used, which only containment will see.
fn way_out() -> Result<String> {
    const AGENT: &str = "asker";
    const STRAY: &str = "stray";
    sh(&format!("useradd --create-home --uid {UID} {USER}"))?;
    // The user's agents leave their counts there as well.
    sh(&format!("chmod 1777 {COUNTS}"))?;
    own_unit("stray.service", STRAY)?;
    sh(&format!("loginctl enable-linger {USER}"))?;
    eventually(10, || {
        let state = property(&format!("user@{UID}.service"), "ActiveState")?;
        expect("the user's systemd", state.as_str(), "active")
    })?;
    register(AGENT, &[])?;
    unit(
        &format!("{AGENT}.service"),
        &format!(
            "[Service]\nType=oneshot\nUser={USER}\nSlice=agents.slice\n\
             ExecStartPre=+remit guard --unit %n\n\
             Environment=XDG_RUNTIME_DIR=/run/user/{UID}\n\
             ExecStart=/bin/systemctl --user start stray.service\n"
        ),
    )?;
    sh(&format!(
        "systemctl daemon-reload && systemctl start {AGENT}"
    ))?;
    let counts = settled(STRAY, 3)?;
    runs_in(STRAY, &format!("/user@{UID}.service/"))?;
    let passed = sum(counts.side(true), |lane| lane.passed);
    sh(&format!(
        "loginctl disable-linger {USER} && systemctl stop user@{UID}.service"
    ))?;
    let heard = ear::forgive()?.of("out", STRAY);
    claim(passed > 0 && heard >= passed, || {
        format!("{passed} passed and {heard} were heard: closed, or not tested")
    })?;
    Ok(format!("{passed} attempts outside of every root"))
}

fn sessions() -> Result<String> {
    let (slice, place) = (slice(), place());
    sh(&format!(
        "mkdir -p /etc/systemd/system/{slice}.d && \
         cp /usr/share/remit/slice.conf /etc/systemd/system/{slice}.d/remit.conf && \
         cp {SETTINGS} /root/remit.toml.before && \
         sed -i 's|^#roots = .*|roots = [\"/agents.slice\", \"{place}\"]|' {SETTINGS} && \
         grep -q {slice} {SETTINGS} && systemctl daemon-reload && systemctl restart remit.service"
    ))?;
    enforcing()?;
    register(SESSION, &[&format!("{place}/session-*.scope")])?;
    register(OWN, &[&format!("{place}/user@{UID}.service")])?;

    // The user's own systemd, and a unit that starts with it.
    own_unit("agent.service", OWN)?;
    sh(&format!(
        "ln -s ../agent.service /home/{USER}/.config/systemd/user/default.target.wants/ && \
         loginctl enable-linger {USER}"
    ))?;
    eventually(10, || Counts::read(OWN).map(drop))?;
    let own = runs_in(OWN, &format!("/user@{UID}.service/"))?;
    in_scope_passes(OWN)?;
    fenced(OWN)?;

    log_in()?;
    let session = runs_in(SESSION, "/session-")?;
    in_scope_passes(SESSION)?;
    fenced(SESSION)?;

    sh(&format!("loginctl disable-linger {USER}"))?;
    log_out()?;
    let mut refused = 0;
    for name in [SESSION, OWN] {
        silent(name)?;
        let tried = sum(Counts::read(name)?.side(true), |lane| lane.refused);
        // Before the daemon knew the cgroup it was nobody's.
        accounted(name, 1)?;
        refused += tried;
    }
    Ok(format!(
        "{session} and {own}: {refused} attempts out of scope, all refused"
    ))
}

/// The daemon is away, the slice begins anew with another cgroup, and what runs in it is fenced from its
/// first instruction on.
fn without_daemon() -> Result<String> {
    let of_slice = format!("remit-fence@{}.service", slice());
    log_in()?;
    let first = cgroup().context("the user has no slice")?;
    // While it runs it makes a root again, and fences it, as soon as that is gone.
    sh("systemctl stop remit.service")?;
    log_out()?;
    expect("the slice's cgroup, after it", cgroup(), None)?;
    let state = property(&of_slice, "ActiveState")?;
    expect("the slice's fence, after it", state.as_str(), "inactive")?;
    log_in()?;
    let second = cgroup().context("the user has no slice")?;
    claim(first != second, || {
        "the slice has its old cgroup".to_owned()
    })?;
    runs_in(SESSION, "/session-")?;
    let counts = fenced(SESSION)?;
    let state = property(&of_slice, "ActiveState")?;
    expect("the slice's fence", state.as_str(), "active")?;
    let fence = sh("remit fence --json")?;
    sh("systemctl start remit.service")?;
    enforcing()?;
    in_scope_passes(SESSION)?;
    fenced(SESSION)?;
    log_out()?;
    silent(SESSION)?;

    // As it was, for what follows.
    let slice = slice();
    sh(&format!(
        "rm -r /etc/systemd/system/{slice}.d && cp /root/remit.toml.before {SETTINGS} && \
         rm /etc/remit/agents.d/{SESSION}.toml /etc/remit/agents.d/{OWN}.toml && \
         systemctl daemon-reload && systemctl restart remit.service && userdel --remove {USER}"
    ))?;
    enforcing()?;
    let refused = sum(counts.side(true), |lane| lane.refused);
    Ok(format!(
        "{refused} attempts without a daemon, all refused; {fence}"
    ))
}
