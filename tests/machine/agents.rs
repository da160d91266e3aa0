//! Agents in the forms that systemd and containers give them: a unit with the two lines, a scope, a
//! container's nested cgroup.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    Step,
    agent::{COUNTS, Counts},
    system::{
        Beside, PROGRAM, SLICE, Setup, accounted, agent_unit, attempt, fenced, in_scope_passes,
        logged, property, register, sh, silent, sum,
    },
};
use crate::support::{Agent, claim, eventually, expect};

/// Sixty-four digits, as Docker names a container.
const CONTAINER: &str = "5d2b3ee7a0c14f6aa1d0d2f1c7b8e9f00123456789abcdef0123456789abcdef";

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case("a_unit_with_two_lines_is_fenced_and_passes", a_unit),
        Step::Case(
            "guard_keeps_a_unit_from_starting_that_nobody_registered",
            unguarded,
        ),
        Step::Case("a_scope_is_fenced_and_passes", a_scope),
        Step::Case(
            "a_container_below_its_scope_is_fenced_and_passes",
            a_container,
        ),
        Step::Case("a_container_of_podman_is_fenced_and_passes", a_podman),
        Step::Case("remit_run_makes_a_scope_that_systemd_knows", a_run),
        Step::Case("remit_run_of_a_policy_makes_one_too", a_run_alone),
        Step::Case("a_killed_remit_run_leaves_its_scope_fenced", a_run_killed),
    ]
}

fn a_unit() -> Result<String> {
    register("unit-agent", &[])?;
    let setup = Setup {
        sliced: true,
        guarded: true,
        early: false,
    };
    agent_unit("unit-agent", setup)?;
    sh("systemctl daemon-reload && systemctl start unit-agent.service")?;
    let invocation = property("unit-agent.service", "InvocationID")?;
    in_scope_passes("unit-agent")?;
    let counts = fenced("unit-agent")?;
    // The guard had waited for the daemon to know the unit, so it was never a stranger.
    for lane in counts.side(false) {
        claim(lane.refused == 0 && lane.other == 0, || {
            format!("in scope, behind the guard: {lane:?}")
        })?;
    }
    sh("systemctl stop unit-agent.service")?;
    let counts = Counts::read("unit-agent")?;
    silent("unit-agent")?;
    let refused = sum(counts.side(true), |lane| lane.refused);
    let lines = accounted("unit-agent", refused)?;
    for hook in ["cgroup/connect4", "cgroup/connect6", "cgroup_skb/egress"] {
        claim(
            lines.iter().any(|line| line.text("/unmapped/hook") == hook),
            || format!("no line of {hook}"),
        )?;
    }
    let line = lines.last().context("no line")?;
    let path = format!("{SLICE}/unit-agent.service");
    expect("its cgroup", line.text("/unmapped/cgroup"), path.as_str())?;
    expect(
        "its program",
        line.text("/actor/process/file/path"),
        PROGRAM,
    )?;
    // Only a daemon with more capabilities can read it.
    let told = line.text("/unmapped/invocation_id");
    claim(told.is_empty() || told == invocation, || {
        format!("the start {invocation} of the unit is told as {told}")
    })?;
    Ok(format!(
        "{refused} attempts out of scope, all refused, all in the log"
    ))
}

fn unguarded() -> Result<String> {
    let setup = Setup {
        sliced: true,
        guarded: true,
        early: false,
    };
    agent_unit("nobodys", setup)?;
    sh("systemctl daemon-reload")?;
    let said = attempt("systemctl start nobodys.service")?;
    claim(said.code != 0, || {
        "a unit that no agent claims was started".to_owned()
    })?;
    claim(Counts::read("nobodys").is_err(), || {
        "its program ran".to_owned()
    })?;
    Ok(String::new())
}

/// Runs `PROGRAM FORM NAME` in a scope of the slice until it has shown itself, then ends the scope.
fn in_scope_unit(name: &str, scope: &str, options: &str, form: &str) -> Result<Counts> {
    let running = Beside::start(&format!(
        "systemd-run --quiet --scope --slice=agents.slice --unit={scope} {options} \
         {PROGRAM} {form} {name}"
    ))?;
    eventually(10, || Counts::read(name).map(drop))?;
    in_scope_passes(name)?;
    let pid = fenced(name)?.pid;
    let inside = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    claim(inside.contains(&format!("{SLICE}/{scope}")), || {
        format!("{name} runs in {inside}")
    })?;
    sh(&format!("systemctl stop {scope}"))?;
    running.end(10)?;
    silent(name)?;
    Counts::read(name)
}

fn a_scope() -> Result<String> {
    register("scope-agent", &["/agents.slice/scope-agent.scope"])?;
    let counts = in_scope_unit("scope-agent", "scope-agent.scope", "", "machine-agent")?;
    // Before the daemon knew the scope it was nobody's, and refused as well.
    let refused = sum(counts.side(true), |lane| lane.refused);
    let (before, _) = logged("unregistered")?;
    accounted("scope-agent", refused.saturating_sub(before))?;
    Ok(format!("{refused} attempts out of scope, all refused"))
}

fn a_container() -> Result<String> {
    register("container-agent", &["/agents.slice/docker-*.scope"])?;
    let scope = format!("docker-{CONTAINER}.scope");
    in_scope_unit(
        "container-agent",
        &scope,
        "-p Delegate=yes",
        "machine-container",
    )?;
    let lines = accounted("container-agent", 1)?;
    let line = lines.last().context("no line")?;
    let path = format!("{SLICE}/{scope}/container");
    expect("its cgroup", line.text("/unmapped/cgroup"), path.as_str())?;
    expect(
        "its container",
        line.text("/unmapped/container_id"),
        CONTAINER,
    )?;
    // Its cgroups are systemd's again.
    sleep(Duration::from_millis(200));
    let left = fs::metadata(format!("/sys/fs/cgroup{SLICE}/{scope}")).is_ok();
    expect("its cgroup, after its end", left, false)?;
    Ok(String::new())
}

fn a_run() -> Result<String> {
    register("runner", &["/agents.slice/runner-*.scope"])?;
    let running = Beside::start(&format!(
        "/usr/bin/remit run --agent runner -- {PROGRAM} machine-agent runner"
    ))?;
    eventually(10, || Counts::read("runner").map(drop))?;
    in_scope_passes("runner")?;
    let pid = fenced("runner")?.pid;
    let inside = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let scope = inside.trim().rsplit('/').next().unwrap_or_default();
    claim(inside.contains(SLICE) && scope.ends_with(".scope"), || {
        format!("it runs in {inside}")
    })?;
    expect(
        "the scope",
        property(scope, "ActiveState")?.as_str(),
        "active",
    )?;
    let began = Instant::now();
    sh(&format!("systemctl stop {scope}"))?;
    // A scope that systemd does not see empty takes the ninety seconds that it has to stop.
    claim(began.elapsed() < Duration::from_secs(45), || {
        format!("{scope} took {} s to stop", began.elapsed().as_secs())
    })?;
    running.end(10)?;
    silent("runner")?;
    // One that ends by itself leaves no scope behind either.
    let ended = attempt("timeout 60 /usr/bin/remit run --agent runner -- /bin/true")?;
    expect("the exit code of a command that ends", ended.code, 0)?;
    eventually(10, || {
        let left = sh("systemctl list-units --all --plain --no-legend 'runner-*.scope'")?;
        claim(left.is_empty(), || format!("left: {left}"))
    })?;
    Ok(format!("systemd knows it as {scope}"))
}

/// A root file system of one program, run as the README says.
fn a_podman() -> Result<String> {
    const ROOT: &str = "/var/lib/remit-check/container";
    register("podman-agent", &["/agents.slice/libpod-*.scope"])?;
    sh(&format!("mkdir -p {ROOT} && cp {PROGRAM} {ROOT}/agent"))?;
    // The driver that needs nothing of the kernel.
    fs::create_dir_all("/etc/containers")?;
    fs::write(
        "/etc/containers/storage.conf",
        "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers/storage\"\n\
         graphroot = \"/var/lib/containers/storage\"\n",
    )?;
    let running = Beside::start(&format!(
        "podman run --rm --name podman-agent --cgroup-parent=agents.slice --network=host \
         --log-driver=none --volume {COUNTS}:{COUNTS} --rootfs {ROOT} /agent machine-agent podman-agent"
    ))?;
    eventually(20, || Counts::read("podman-agent").map(drop))?;
    in_scope_passes("podman-agent")?;
    fenced("podman-agent")?;
    let id = sh("podman ps --no-trunc --quiet")?;
    sh("podman stop --time 2 podman-agent")?;
    running.end(30)?;
    silent("podman-agent")?;
    let lines = accounted("podman-agent", 1)?;
    let line = lines.last().context("no line")?;
    expect(
        "its container",
        line.text("/unmapped/container_id"),
        id.as_str(),
    )?;
    let inside = line.text("/unmapped/cgroup");
    claim(
        inside.starts_with(&format!("{SLICE}/libpod-{id}.scope")),
        || format!("its cgroup is {inside}"),
    )?;
    sh("podman --version")
}

/// A policy without a daemon, which goes on meanwhile. Returns the run, and its scope's name.
fn start_alone(name: &str) -> Result<(Beside, String)> {
    const FOLDER: &str = "/root/policies";
    let entry = Agent::standard(name).toml("/nowhere");
    fs::create_dir_all(FOLDER)?;
    fs::write(format!("{FOLDER}/{name}.toml"), entry)?;
    let running = Beside::start(&format!(
        "/usr/bin/remit run --policy {FOLDER}/{name}.toml -- {PROGRAM} machine-agent {name}"
    ))?;
    eventually(15, || Counts::read(name).map(drop))?;
    in_scope_passes(name)?;
    let pid = fenced(name)?.pid;
    let inside = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let (slice, scope) = inside
        .trim()
        .strip_prefix("0::/remit.slice/")
        .and_then(|below| below.split_once('/'))
        .with_context(|| format!("it runs in {inside}"))?;
    for unit in [slice, scope] {
        let state = property(unit, "ActiveState")?;
        expect(unit, state.as_str(), "active")?;
    }
    Ok((running, scope.to_owned()))
}

/// Neither a cgroup, nor a unit, nor a pin of runs without a daemon is left.
fn nothing_is_left() -> Result<()> {
    eventually(10, || {
        let left = sh(
            "ls -d /sys/fs/cgroup/remit.slice/*/ /sys/fs/bpf/remit/run/* 2>/dev/null; \
             systemctl list-units --all --plain --no-legend 'remit-*.slice' '*lone*.scope'",
        )?;
        claim(left.is_empty(), || format!("left: {left}"))
    })
}

fn a_run_alone() -> Result<String> {
    let (running, scope) = start_alone("alone")?;
    let began = Instant::now();
    sh(&format!("systemctl stop {scope}"))?;
    claim(began.elapsed() < Duration::from_secs(45), || {
        format!("{scope} took {} s to stop", began.elapsed().as_secs())
    })?;
    running.end(20)?;
    silent("alone")?;
    nothing_is_left()?;
    // One that ends by itself.
    let ended = attempt("remit run --policy /root/policies/alone.toml -- /bin/true")?;
    expect("the exit code", ended.code, 0)?;
    expect("what is said", ended.stderr.trim(), "")?;
    nothing_is_left()?;
    Ok(format!("systemd knows it as {scope}"))
}

fn a_run_killed() -> Result<String> {
    let (running, scope) = start_alone("lonely")?;
    // Its guard kills it.
    drop(running);
    fenced("lonely")?;
    sh("remit status >/dev/null; true")?;
    fenced("lonely")?;
    sh(&format!("systemctl stop {scope}"))?;
    silent("lonely")?;
    let swept = attempt("remit status")?;
    claim(swept.stderr.contains("swept the fence"), || {
        format!("said: {}", swept.stderr)
    })?;
    nothing_is_left()?;
    Ok(String::new())
}
