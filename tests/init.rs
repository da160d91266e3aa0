//! PID 1 of the test VM: mounts what Remit needs, loads the modules that came along, runs the suite
//! on the console, powers off. It knows nothing of the tests; `remit.filter=A,B` and `remit.full`
//! on the kernel command line are handed on.

use std::{
    fs,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout},
};

#[path = "support/netlink.rs"]
#[allow(dead_code, reason = "the suite uses the rest of it")]
mod netlink;

/// Source, target, type, options.
const MOUNTS: &[(&str, &str, &str, &str)] = &[
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", ""),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ("bpf", "/sys/fs/bpf", "bpf", "mode=700"),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
    ("tmpfs", "/var", "tmpfs", "mode=755"),
];

fn main() -> ExitCode {
    if let Err(error) = boot() {
        println!("init: {error:#}");
    }
    // Whatever happened, the machine must end: a VM that stays up is a hang for its host.
    nix::unistd::sync();
    for mode in [RebootMode::RB_POWER_OFF, RebootMode::RB_AUTOBOOT] {
        let Err(error) = reboot(mode);
        println!("init: cannot reboot: {error}");
    }
    ExitCode::FAILURE
}

fn boot() -> Result<()> {
    for (source, target, kind, options) in MOUNTS {
        mount_one(source, target, kind, options)
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    // The kernel gives PID 1 a console only if the initramfs had the device node.
    let console = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    // Without a console from the kernel this may itself be one of the three: keep it open.
    std::mem::forget(console);
    fs::write("/proc/sys/kernel/hostname", "remit-vm")?;
    load_modules()?;
    netlink::link_up(netlink::LO).context("cannot bring lo up")?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let full = cmdline
        .split_ascii_whitespace()
        .any(|word| word == "remit.full");
    let child = Command::new("/bin/remit-tests")
        .args(filters(&cmdline))
        .env_clear()
        .env("PATH", "/bin:/sbin:/usr/bin")
        .env("REMIT_BIN", "/bin/remit")
        .env("REMIT_NEXT_BIN", "/bin/remit-next")
        .env("REMIT_TEST_VM", "1")
        .env("REMIT_TEST_FULL", if full { "1" } else { "0" })
        .spawn()
        .context("cannot start /bin/remit-tests")?;
    let suite = Pid::from_raw(i32::try_from(child.id())?);
    reap_until(suite)
}

/// Loads what lies in `/modules`. Which needs which is found by trying: as long as one more could be
/// loaded, others may follow. What stays behind is said; the tests that need it find out.
fn load_modules() -> Result<()> {
    let Ok(entries) = fs::read_dir("/modules") else {
        return Ok(());
    };
    let mut waiting: Vec<_> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    loop {
        let mut failed = Vec::new();
        for path in &waiting {
            let module = fs::File::open(path)?;
            match finit_module(&module, c"", ModuleInitFlags::empty()) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(error) => failed.push((path.clone(), error)),
            }
        }
        if failed.len() == waiting.len() {
            for (path, error) in failed {
                println!("init: cannot load {}: {error}", path.display());
            }
            return Ok(());
        }
        waiting = failed.into_iter().map(|(path, _)| path).collect();
    }
}

fn mount_one(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    match mount(
        Some(source),
        target,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    ) {
        // devtmpfs may be there already (CONFIG_DEVTMPFS_MOUNT).
        Err(nix::Error::EBUSY) => Ok(()),
        other => Ok(other?),
    }
}

/// The filters on the command line, separated by commas.
fn filters(cmdline: &str) -> Vec<String> {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("remit.filter="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Orphans come to PID 1: reap them all, until the suite itself ends.
fn reap_until(suite: Pid) -> Result<()> {
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == suite => {
                return Ok(());
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_split_at_commas() {
        assert_eq!(
            filters("console=ttyS0 remit.filter=kernel::,run:: quiet\n"),
            ["kernel::", "run::"]
        );
        assert!(filters("quiet remit.filter=").is_empty());
    }
}
