//! Packages of the machine itself. Asks before it uses sudo; installs nothing that is there.

use anyhow::{Result, bail};
use nix::unistd::geteuid;
use xshell::{Shell, cmd};

use crate::talk;

/// Makes sure that `program` can be run, from the Debian or Ubuntu `packages` if it is missing.
/// `why` completes the sentence "… is needed".
pub fn ensure(shell: &Shell, program: &str, packages: &[&str], why: &str) -> Result<()> {
    if on_path(shell, program) {
        return Ok(());
    }
    talk::step(&format!("`{program}` is missing; it is needed {why}"));
    install(shell, packages)?;
    if !on_path(shell, program) {
        bail!(
            "`{program}` is still missing after installing {}",
            packages.join(" ")
        );
    }
    Ok(())
}

/// Whether `program` is found along PATH.
pub fn on_path(shell: &Shell, program: &str) -> bool {
    let path = shell.var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Installs `packages` with apt-get.
pub fn install(shell: &Shell, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !on_path(shell, "apt-get") {
        bail!("this is no Debian or Ubuntu; install the equivalent of: {list}");
    }
    let (runner, apt): (&str, &[&str]) = if geteuid().is_root() {
        ("env", &["DEBIAN_FRONTEND=noninteractive", "apt-get"])
    } else if !on_path(shell, "sudo") {
        bail!("cannot install as an ordinary user without sudo; as root: apt-get install {list}");
    } else if talk::ask(&format!("Run `sudo apt-get install {list}`?")) {
        ("sudo", &["DEBIAN_FRONTEND=noninteractive", "apt-get"])
    } else {
        bail!("not installed; run this yourself: sudo apt-get install {list}");
    };
    // Lists may be absent (a fresh container) or old: then a package's file is gone from the
    // mirror. A mirror that fails in part still serves the rest, so install decides.
    if let Err(error) = cmd!(shell, "{runner} {apt...} update -q").run() {
        talk::note(&format!("{error}; trying with the lists that are there"));
    }
    cmd!(
        shell,
        "{runner} {apt...} install -qy --no-install-recommends {packages...}"
    )
    .run()?;
    Ok(())
}
