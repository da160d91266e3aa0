//! nftables for the same policy: a chain on output, a match on the cgroup, a set of addresses.

use std::{
    fmt::Write as _,
    fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use super::{
    Shape,
    design::{TCP, UDP, destinations},
    net::Net,
};
use crate::support::cgroup;

/// Where nft looks for cgroups, wherever they are.
const LOOKED_AT: &str = "/sys/fs/cgroup";

/// Writes the rules to `file` and loads them into the lane's namespace. `path` is the cgroup.
pub fn load(file: &Path, path: &str, shape: &Shape, tracked: bool, net: &Net) -> Result<()> {
    let path = path.trim_start_matches('/');
    fs::write(file, rules(path, shape, tracked))
        .with_context(|| format!("cannot write {}", file.display()))?;
    let mounted = cgroup::mount()?;
    let namespace = net.namespace.try_clone()?;
    let elsewhere = mounted != Path::new(LOOKED_AT);
    let mut command = Command::new("nft");
    command
        .arg("-f")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let enter = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        if elsewhere {
            // On a hybrid host. Seen by this process alone.
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(
                Some(&mounted),
                LOOKED_AT,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
        }
        Ok(())
    };
    // SAFETY: system calls alone; nix keeps short paths on the stack, so nothing is allocated.
    unsafe { command.pre_exec(enter) };
    let output = match command.output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("there is no `nft`: install nftables")
        }
        Err(error) => return Err(error).context("cannot start nft"),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let first: String = said.chars().take(300).collect();
        bail!("nft: {}: {}", output.status, first.replace('\n', " "));
    }
    Ok(())
}

/// The set can hold networks, as a scope can; one of bare addresses would be a hash, and quicker.
fn rules(path: &str, shape: &Shape, tracked: bool) -> String {
    let level = path.split('/').count();
    let mut elements = String::new();
    for (addr, length) in destinations(shape) {
        // A String takes all that is written to it.
        let _ = if length < 32 {
            write!(elements, "{addr}/{length}, ")
        } else {
            write!(elements, "{addr}, ")
        };
    }
    let established = if tracked {
        "ct state established,related accept"
    } else {
        ""
    };
    format!(
        "table inet bench {{\n\
         set allowed {{ type ipv4_addr; flags interval; elements = {{ {} }} }}\n\
         chain agent {{\n\
         {established}\n\
         tcp dport {}-{} ip daddr @allowed accept\n\
         udp dport {} ip daddr @allowed accept\n\
         meta l4proto tcp reject with tcp reset\n\
         drop\n\
         }}\n\
         chain output {{\n\
         type filter hook output priority filter; policy accept;\n\
         socket cgroupv2 level {level} \"{path}\" jump agent\n\
         }}\n\
         }}\n",
        elements.trim_end_matches(", "),
        TCP.0,
        TCP.1,
        UDP.0,
    )
}
