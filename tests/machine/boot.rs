//! New boots: agents that start with the machine, as early as a unit can, while all is well, after
//! the power went, and with the fence or the daemon broken. None of them ever runs unfenced.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    Step,
    agent::Counts,
    ear,
    system::{
        PROGRAM, Setup, agent_unit, attempt, enforcing, entry, fenced, in_scope_passes, moment_us,
        property, register, remit, settled, sh, silent, sum,
    },
};
use crate::support::{Agent, claim, eventually, expect};

/// As early as can be, without the guard.
const EARLY: &str = "early";
/// Without the guard.
const HASTY: &str = "hasty";
/// As the README has it.
const GUARDED: &str = "guarded";
/// As early, and outside the slice: what an agent without a fence would be.
const TWIN: &str = "early-twin";
/// Started where nothing can be pinned.
const PINLESS: &str = "pinless";
/// Changed while the power goes.
const CHANGED: &str = "changed";

const BREAK: &str = "mv /usr/bin/remit /usr/bin/remit.good && cp -L /bin/false /usr/bin/remit";
const MEND: &str = "mv -f /usr/bin/remit.good /usr/bin/remit";

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::Case("agents_for_the_boot_are_registered", prepare),
        Step::Reboot(|| Ok(())),
        Step::Case("agents_of_a_boot_are_fenced_from_the_first", booted),
        Step::Cut(busy),
        Step::Case("after_a_power_cut_all_is_fenced_and_whole", cut),
        Step::Reboot(|| sh(BREAK).map(drop)),
        Step::Case("with_a_broken_fence_no_agent_runs", broken_fence),
        Step::Case("where_nothing_can_be_pinned_no_agent_runs", no_pins),
        Step::Reboot(break_daemon),
        Step::Case("with_a_broken_daemon_agents_are_fenced", broken_daemon),
    ]
}

fn prepare() -> Result<String> {
    let sliced = Setup {
        sliced: true,
        ..Setup::default()
    };
    for (name, setup) in [
        (HASTY, sliced),
        (
            GUARDED,
            Setup {
                guarded: true,
                ..sliced
            },
        ),
        (
            EARLY,
            Setup {
                early: true,
                ..sliced
            },
        ),
        (
            TWIN,
            Setup {
                early: true,
                ..Setup::default()
            },
        ),
    ] {
        agent_unit(name, setup)?;
        if name != TWIN {
            register(name, &[])?;
        }
    }
    register(CHANGED, &[])?;
    sh("systemctl daemon-reload")?;
    sh(&format!(
        "systemctl enable -q {HASTY} {GUARDED} {EARLY} {TWIN}"
    ))?;
    Ok(String::new())
}

fn booted() -> Result<String> {
    enforcing()?;
    let fence = moment_us("remit-fence.service", "ExecMainExitTimestamp")?;
    let ready = moment_us("remit.service", "ActiveEnterTimestamp")?;
    let basic = moment_us("sysinit.target", "ActiveEnterTimestamp")?;
    twin_was_heard()?;
    let mut said = vec![format!(
        "fence {} ms, daemon ready {} ms",
        fence / 1000,
        ready / 1000
    )];
    for name in [EARLY, HASTY, GUARDED] {
        let counts = fenced(name)?;
        let began = counts.began_ns / 1000;
        claim(began > fence, || {
            format!("{name} began at {began} us, and the fence stood at {fence} us")
        })?;
        in_scope_passes(name)?;
        said.push(format!("{name} {} ms", began / 1000));
    }
    let counts = fenced(GUARDED)?;
    let turned_away = sum(counts.side(false), |lane| lane.refused);
    expect("in scope and refused, behind the guard", turned_away, 0)?;
    let began = moment_us(&format!("{EARLY}.service"), "ExecMainStartTimestamp")?;
    claim(began < basic, || {
        format!("{EARLY} began at {began} us, after the system was initialised at {basic} us")
    })?;
    Ok(said.join(", "))
}

/// The twin ran from as early on, and all that it sent arrived: an agent without a fence would have
/// been heard. It is ended here.
fn twin_was_heard() -> Result<()> {
    let counts = settled(TWIN, 1)?;
    sh(&format!("systemctl stop {TWIN}"))?;
    let heard = ear::forgive()?.of("out", TWIN);
    let sent = sum(counts.side(true), |lane| lane.passed);
    claim(heard >= sent && sent > 0, || {
        format!("of {sent} of {TWIN} the ear heard {heard}")
    })
}

/// Changes that are under way when the power goes.
fn busy() -> Result<()> {
    for round in 0..6 {
        let agent = Agent::standard(CHANGED);
        entry(&match round % 2 {
            0 => agent.allow(&format!("192.0.2.{round}/32"), "443"),
            _ => agent,
        })?;
        sh("systemctl reload remit.service")?;
        sleep(Duration::from_millis(120));
    }
    sh("systemctl --no-block restart remit.service")?;
    sleep(Duration::from_millis(700));
    Ok(())
}

fn cut() -> Result<String> {
    enforcing()?;
    let clean = sh("journalctl -q -o cat -b -1 -n 1 | cat")?;
    twin_was_heard()?;
    for name in [EARLY, HASTY, GUARDED] {
        fenced(name)?;
        in_scope_passes(name)?;
    }
    let damaged = sh("find /var/lib/remit -name '*.damaged*'")?;
    expect("damaged files", damaged.as_str(), "")?;
    // Counters and logs are read one after the other: nothing may be refused meanwhile.
    sh(&format!("systemctl stop {EARLY} {HASTY} {GUARDED}"))?;
    let verified = eventually(8, || remit(&["log", "verify"]))?;
    let entries = remit(&["check"])?;
    let line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    Ok(format!(
        "{}; {}; the journal's last line before: {}",
        line(&verified),
        line(&entries),
        line(&clean)
    ))
}

fn broken_fence() -> Result<String> {
    let state = property("remit-fence.service", "ActiveState")?;
    // A daemon that is started again and again tries the fence again as well.
    claim(state != "active", || format!("the broken fence is {state}"))?;
    twin_was_heard()?;
    for name in [EARLY, HASTY, GUARDED] {
        never_ran(name)?;
        let said = attempt(&format!("systemctl start {name}.service"))?;
        claim(said.code != 0, || format!("{name} was started by hand"))?;
        never_ran(name)?;
    }
    // Not as a scope, not in a slice below, not as a unit that is not on disk.
    for (name, options) in [
        ("by-scope", "--scope --slice=agents.slice"),
        ("by-slice", "--scope --slice=agents-below.slice"),
        ("by-unit", "--slice=agents.slice"),
    ] {
        let said = attempt(&format!(
            "timeout 20 systemd-run --quiet {options} --unit={name} {PROGRAM} machine-agent {name}"
        ))?;
        // A unit may be accepted, and never started.
        sleep(Duration::from_millis(500));
        never_ran(name).with_context(|| format!("systemd-run {options} exits {}", said.code))?;
    }
    sh(MEND)?;
    sh(&format!("systemctl start {EARLY}.service remit.service"))?;
    enforcing()?;
    fenced(EARLY)?;
    in_scope_passes(EARLY)?;
    Ok(String::new())
}

/// It left no counts, is not running, and nothing of it was heard.
fn never_ran(name: &str) -> Result<()> {
    claim(Counts::read(name).is_err(), || format!("{name} ran"))?;
    for kind in ["service", "scope"] {
        let state = property(&format!("{name}.{kind}"), "ActiveState")?;
        claim(state != "active", || format!("{name} is {state}"))?;
    }
    let heard = ear::listen()?;
    expect(
        "heard of it",
        heard.of("out", name) + heard.of("in", name),
        0,
    )
}

fn no_pins() -> Result<String> {
    let sliced = Setup {
        sliced: true,
        ..Setup::default()
    };
    agent_unit(PINLESS, sliced)?;
    register(PINLESS, &[])?;
    sh("systemctl daemon-reload")?;
    sh("systemctl stop agents.slice remit.service remit-fence.service")?;
    // Any file system but the one of pins.
    sh("mount -t tmpfs none /sys/fs/bpf")?;
    let said = attempt(&format!("systemctl start {PINLESS}.service"));
    let ran = never_ran(PINLESS);
    sh("systemctl stop agents.slice remit.service; umount /sys/fs/bpf")?;
    ran?;
    claim(said?.code != 0, || "its start succeeded".to_owned())?;
    sh(&format!("systemctl start {PINLESS}.service remit.service"))?;
    enforcing()?;
    fenced(PINLESS)?;
    in_scope_passes(PINLESS)?;
    Ok(String::new())
}

fn break_daemon() -> Result<()> {
    super::system::unit(
        "remit.service.d/broken.conf",
        "[Service]\nExecStart=\nExecStart=/bin/false\n",
    )
}

fn broken_daemon() -> Result<String> {
    let state = property("remit.service", "ActiveState")?;
    claim(state != "active", || {
        format!("the broken daemon is {state}")
    })?;
    let state = property("remit-fence.service", "ActiveState")?;
    expect("the fence", state.as_str(), "active")?;
    twin_was_heard()?;
    let mut passed = 0;
    for name in [EARLY, HASTY] {
        let counts = fenced(name)?;
        passed += sum(counts.side(false), |lane| lane.passed);
    }
    never_ran(GUARDED)?;
    fs::remove_dir_all("/etc/systemd/system/remit.service.d")?;
    sh("systemctl daemon-reload && systemctl restart remit.service")?;
    enforcing()?;
    for name in [EARLY, HASTY] {
        in_scope_passes(name)?;
        silent(name)?;
    }
    sh(&format!("systemctl start {GUARDED}.service"))?;
    fenced(GUARDED)?;
    Ok(format!(
        "while no daemon knew them, {passed} attempts in scope passed and none out of it"
    ))
}
