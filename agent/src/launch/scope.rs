//! Hands the cgroup that a command runs in to systemd, where that is process 1, so that cgroups are
//! systemd's to show and to clear away: `systemctl status`, `systemd-cgls`.
//!
//! A scope is made of processes that are there already (systemd.scope(5)), and its cgroup is found by
//! its name. So the command is born where the fence has it, at once, and systemd takes over the very
//! directory: id, attribution and fence stay. `busctl` makes the calls, since a D-Bus library
//! would be fifty crates for it.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use super::Error;
use crate::cgroup::CgroupPath;

/// There where systemd is process 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Of the package that systemd is in. PATH is not to be trusted under sudo.
const BUSCTL: [&str; 2] = ["/usr/bin/busctl", "/bin/busctl"];
/// Seconds that systemd may take to answer.
const TIMEOUT: &str = "--timeout=5";

/// A scope by its cgroup's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Its name: `coder-run-7.scope`.
    pub name: String,
    /// The slice that it is in: `agents.slice`.
    pub slice: String,
}

/// Whether systemd is process 1 here.
pub fn is_managed() -> bool {
    Path::new(BOOTED).is_dir()
}

impl Scope {
    /// The scope whose cgroup systemd would put at `path`; none where it would put none there: below
    /// a service, or in slices that are not named as they nest.
    pub fn at(path: &CgroupPath) -> Option<Self> {
        let mut names: Vec<&str> = path
            .names()
            .map(|name| name.to_str().filter(|name| is_unit(name)))
            .collect::<Option<_>>()?;
        let name = names.pop().filter(|name| name.ends_with(".scope"))?;
        let mut above = String::new();
        for slice in &names {
            // `a-b.slice` is in `a.slice`, and nowhere else (systemd.slice(5)).
            let stem = slice.strip_suffix(".slice")?;
            let own = match above.as_str() {
                "" => stem,
                above => stem.strip_prefix(above)?.strip_prefix('-')?,
            };
            if own.is_empty() || own.contains('-') {
                return None;
            }
            stem.clone_into(&mut above);
        }
        Some(Self {
            name: name.to_owned(),
            slice: (*names.last()?).to_owned(),
        })
    }

    /// Has systemd make the scope out of a process in its cgroup.
    ///
    /// # Errors
    /// When systemd cannot be asked or refuses. The process goes on where it is.
    pub fn adopt(&self, pid: u32, description: &str) -> Result<(), Error> {
        let pid = pid.to_string();
        let mut arguments = vec!["ssa(sv)a(sa(sv))", &self.name, "fail", "4"];
        arguments.extend(["Description", "s", description]);
        arguments.extend(["Slice", "s", &self.slice]);
        arguments.extend(["PIDs", "au", "1", &pid]);
        // A command that fails leaves nothing behind to be reset by hand.
        arguments.extend(["CollectMode", "s", "inactive-or-failed", "0"]);
        let what = "have systemd take over the command's cgroup";
        call(what, "StartTransientUnit", &arguments)
    }

    /// Has systemd end the scope, and whatever is left in it. One whose last process was gone before
    /// systemd looked stays for ever else: systemd waits for its cgroup to become empty.
    ///
    /// # Errors
    /// When systemd cannot be asked or refuses, also where it has ended the scope by itself.
    pub fn end(&self) -> Result<(), Error> {
        stop(&self.name)
    }
}

/// Has systemd stop a unit of its own: a scope, or a slice with all that is in it. The cgroup goes with
/// it, a moment later.
///
/// # Errors
/// When systemd cannot be asked, refuses, or knows no such unit.
pub fn stop(unit: &str) -> Result<(), Error> {
    let what = "have systemd end the command's cgroup";
    call(what, "StopUnit", &["ss", unit, "replace"])
}

/// Calls a method of systemd's manager.
fn call(what: &'static str, method: &str, arguments: &[&str]) -> Result<(), Error> {
    let failed = |why: String| Error::system(what, std::io::Error::other(why));
    let busctl = BUSCTL.iter().find(|path| Path::new(path).is_file());
    let busctl = busctl.ok_or_else(|| failed("there is no busctl".to_owned()))?;
    let asked = Command::new(busctl)
        .args([TIMEOUT, "call"])
        .args(["org.freedesktop.systemd1", "/org/freedesktop/systemd1"])
        .args(["org.freedesktop.systemd1.Manager", method])
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|error| Error::system(what, error))?;
    if asked.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&asked.stderr);
    Err(failed(said.trim().to_owned()))
}

/// Whether a name can be a unit's (systemd.unit(5)).
fn is_unit(name: &str) -> bool {
    name.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Option<(String, String)> {
        let scope = Scope::at(&path.parse().unwrap())?;
        Some((scope.slice, scope.name))
    }

    #[test]
    fn a_scope_is_what_systemd_would_put_there() {
        let found = |slice: &str, name: &str| Some((slice.to_owned(), name.to_owned()));
        assert_eq!(
            at("/agents.slice/coder-run-7.scope"),
            found("agents.slice", "coder-run-7.scope")
        );
        assert_eq!(
            at("/agents.slice/agents-coder.slice/run-7.scope"),
            found("agents-coder.slice", "run-7.scope")
        );
        for other in [
            "/agents.slice/coder.service/run-7.scope",
            "/agents.slice/coder.slice/run-7.scope",
            "/agents.slice/agents-a-b.slice/run-7.scope",
            "/agents-a.slice/run-7.scope",
            "/agents.slice/coder.service",
            "/agents.slice/run 7.scope",
            "/agents/run-7.scope",
            "/run-7.scope",
            "/.slice/run-7.scope",
        ] {
            assert_eq!(at(other), None, "{other}");
        }
    }
}
