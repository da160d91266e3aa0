//! Whole Debian machines: systemd as the first process, a disk, the kernel of the suite. The package
//! is installed as the README says, and what must hold over boots, upgrades and power cuts is tried
//! by `remit-tests machine`, which asks for each new start itself.

mod payload;
mod rootfs;

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    apt,
    report::{Findings, Outcome, Place, State, Verdict},
    talk,
    vm::{self, Accelerator},
    watch::{self, Limits, Show},
    workspace::Workspace,
};

pub use rootfs::SUITES;

/// The longest pause is that of a unit which is given up by systemd, on emulated processors.
const LIMITS: Limits = Limits {
    silence: Duration::from_secs(240),
    whole: Duration::from_secs(20 * 60),
};
/// More starts than the tests ask for.
const STARTS: usize = 12;
const MEM: u32 = 1024;
/// A root that the initramfs of Debian mounts, and a console for the report alone.
const CMDLINE: &str = "root=/dev/vda rw console=ttyS0 panic=-1 quiet loglevel=3 \
                       systemd.show_status=no rd.udev.log_level=3";

/// Tests the package in a machine of each chosen suite. The static programs must have been built.
/// Whatever keeps a machine from running is that place's state, not an error of the whole.
pub fn run(workspace: &Workspace, suites: &[String], verbose: bool) -> Result<Vec<Place>> {
    let folder = workspace.vm().join("machine");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let chosen = chosen(suites)?;
    let ready = apt::ensure(
        &workspace.shell,
        vm::QEMU,
        &["qemu-system-x86"],
        "to boot machines for the tests",
    );
    let payload = ready.and_then(|()| payload::build(workspace, &folder));
    let mut places = Vec::new();
    for suite in chosen {
        let began = Instant::now();
        let mut kernel = "-".to_owned();
        let state = match &payload {
            Err(error) => State::Ran(Findings::broken(
                &anyhow::anyhow!("{error:#}").context("there is no package to test"),
            )),
            Ok(payload) => match rootfs::ensure(workspace, &folder, suite) {
                Err(error) => State::NotTested(format!("no root file system: {error:#}")),
                Ok(root) => {
                    kernel.clone_from(&root.kernel.release);
                    let found = boot(&folder, &root, payload, verbose);
                    let mut findings = found.unwrap_or_else(|error| Findings::broken(&error));
                    add(&mut findings, payload.lint.clone());
                    State::Ran(findings)
                }
            },
        };
        let place = Place {
            name: name(suite),
            kernel,
            state,
            took: began.elapsed(),
        };
        talk::note(&place.closing());
        places.push(place);
    }
    Ok(places)
}

/// The places for machines that are not booted at all, so that the table still names them.
pub fn not_tested(suites: &[&str], why: &str) -> Vec<Place> {
    suites
        .iter()
        .map(|suite| Place {
            name: name(suite),
            kernel: "-".to_owned(),
            state: State::NotTested(why.to_owned()),
            took: Duration::ZERO,
        })
        .collect()
}

fn name(suite: &str) -> String {
    format!("systemd {suite}")
}

fn chosen(names: &[String]) -> Result<Vec<&'static str>> {
    for name in names {
        ensure!(
            SUITES.contains(&name.as_str()),
            "there is no machine of `{name}`: there are {}",
            SUITES.join(", ")
        );
    }
    Ok(SUITES
        .into_iter()
        .filter(|suite| names.is_empty() || names.iter().any(|name| name == suite))
        .collect())
}

fn add(findings: &mut Findings, verdict: Verdict) {
    findings.sum.count(verdict.outcome);
    findings.verdicts.push(verdict);
}

/// Boots a fresh copy of `root` until its tests are done.
fn boot(
    folder: &Path,
    root: &rootfs::Root,
    payload: &payload::Payload,
    verbose: bool,
) -> Result<Findings> {
    let accelerator = Accelerator::find(folder, &root.kernel)?;
    let suite = root.suite;
    let disk = folder.join(format!("{suite}.disk"));
    let log = folder.join(format!("{suite}.log"));
    let show = Show {
        name: &name(suite),
        log: &log,
        verbose,
    };
    for retry in 0..=vm::RETRIES {
        // Kept over the starts of one run, also those that cut the power.
        copy(&root.image, &disk)?;
        let start = || {
            let mut qemu = vm::emulator(&root.kernel, accelerator, MEM);
            qemu.arg("-initrd").arg(&root.initrd);
            for (file, access) in [(&disk, "off"), (&payload.disk, "on")] {
                // What the guest has written is in this machine's memory, and outlives QEMU. It
                // need not outlive this machine.
                let drive = format!(
                    "file={},format=raw,if=virtio,cache=unsafe,readonly={access}",
                    file.display()
                );
                qemu.args(["-drive", &drive]);
            }
            qemu.args(["-append", CMDLINE]);
            qemu
        };
        let findings = watch::series(start, STARTS, &LIMITS, &show)?;
        let again = accelerator == Accelerator::Tcg && vm::emulator_failed(&log);
        if !again || retry == vm::RETRIES {
            drop(fs::remove_file(&disk));
            return Ok(findings);
        }
        talk::note(&format!(
            "{suite}: the emulator ran a breakpoint that the kernel had taken away; beginning anew"
        ));
    }
    bail!("no boot of {suite} was tried")
}

/// Copies a file with holes as one with holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status()
        .context("cannot start cp")?;
    ensure!(status.success(), "cannot copy {}", from.display());
    Ok(())
}

/// A verdict that was reached outside the machine.
fn verdict(test: &str, outcome: Outcome, why: String, began: Instant) -> Verdict {
    Verdict {
        test: test.to_owned(),
        outcome,
        why,
        ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
