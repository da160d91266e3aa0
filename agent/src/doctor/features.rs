//! What the kernel has to have. Where it can be tried it is tried: the real programs are loaded and
//! attached to an empty cgroup of doctor's own.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{getsockopt, sockopt},
        utsname::uname,
    },
    unistd::geteuid,
};

use super::{Check, State};
use crate::{
    daemon::{self, settings::Settings, standalone},
    kernel::HOOKS,
    sockets::{Ended, Namespaces},
};

/// The oldest kernel that is tested.
const OLDEST: (u32, u32) = (6, 1);

/// Everything that is needed or wished for.
pub fn features(settings: &Settings) -> Vec<Check> {
    let mut all = vec![kernel(), cgroup(settings), bpffs(settings)];
    all.extend(hooks(settings));
    all.extend([
        endings(),
        peers(),
        lsm(),
        file(
            "BTF of the kernel",
            "/sys/kernel/btf/vmlinux",
            "containment guards cannot be loaded",
        ),
        jit(),
    ]);
    all
}

fn kernel() -> Check {
    let name = "kernel";
    let Ok(system) = uname() else {
        return Check::new(name, State::Unknown, "uname failed", "").needed();
    };
    let release = system.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    let state = match version {
        Some(version) if version >= OLDEST => State::Ok,
        Some(_) => State::Missing,
        None => State::Unknown,
    };
    let lost = "older kernels than 6.1 are not tested: nothing is promised on them";
    Check::new(name, state, release, lost)
}

fn cgroup(settings: &Settings) -> Check {
    let name = "cgroup v2";
    let lost = "agents cannot be told apart, so nothing is enforced";
    match daemon::hierarchy(settings) {
        Ok(found) if found.is_writable() => {
            let at = format!("mounted at {}", found.mount().display());
            Check::new(name, State::Ok, at, lost).needed()
        }
        Ok(found) => {
            let at = format!("mounted read-only at {}", found.mount().display());
            let lost = "roots cannot be made, agents not frozen, killed or probed";
            Check::new(name, State::Missing, at, lost).needed()
        }
        Err(error) => Check::new(name, State::Missing, error.to_string(), lost).needed(),
    }
}

fn bpffs(settings: &Settings) -> Check {
    let name = "bpf file system";
    let lost = "links cannot be pinned, so the fence would fall with the daemon; the daemon mounts \
                one where it may";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let path = &settings.paths.bpffs;
    let over = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
            path.starts_with(at)
                .then(|| (at.len(), at.to_owned(), kind.to_owned()))
        })
        .max();
    match over {
        Some((_, at, kind)) if kind == "bpf" => {
            Check::new(name, State::Ok, format!("mounted at {at}"), lost)
        }
        _ if Path::new("/sys/fs/bpf").is_dir() => {
            let found = format!("none is mounted above {}", path.display());
            Check::new(name, State::Watch, found, lost)
        }
        _ => Check::new(name, State::Missing, "the kernel offers none", lost).needed(),
    }
}

/// Loads the real object and attaches it where nothing runs.
fn hooks(settings: &Settings) -> Vec<Check> {
    let lost = |hook: &str| match hook {
        "cgroup/connect4" | "cgroup/connect6" => {
            "refusals would not come at once: a TCP connection would hang"
        }
        "cgroup_skb/egress" => "what was not connected, and what changes later, would pass",
        "cgroup/sock_create" => "raw and other socket types would pass",
        _ => "agents could not reach services of their own on loopback",
    };
    let check =
        |hook: &str, state, found: &str| Check::new(hook, state, found, lost(hook)).needed();
    if !geteuid().is_root() {
        let found = "not tried: only root may load programs";
        return HOOKS
            .iter()
            .map(|expected| check(expected.hook, State::Unknown, found))
            .collect();
    }
    match standalone::try_fence(settings) {
        Ok(found) => found
            .into_iter()
            .map(|(hook, listed)| {
                if listed {
                    let found = "loads, attaches, and the kernel lists it";
                    check(hook, State::Ok, found)
                } else {
                    check(hook, State::Missing, "the kernel does not list it")
                }
            })
            .collect(),
        Err(error) => {
            let why = short(&format!("{:#}", anyhow::Error::from(error)));
            HOOKS
                .iter()
                .map(|expected| check(expected.hook, State::Missing, &why))
                .collect()
        }
    }
}

/// The beginning and the end of a text: between them may lie all that the verifier has to say.
fn short(text: &str) -> String {
    const SIDE: usize = 200;
    let count = text.chars().count();
    if count <= 2 * SIDE {
        return text.to_owned();
    }
    let start: String = text.chars().take(SIDE).collect();
    let end: String = text.chars().skip(count - SIDE).collect();
    format!("{start} … {end}")
}

/// Ends a connection of doctor's own on loopback.
fn endings() -> Check {
    let name = "ending connections";
    let lost = "after a change that narrows, open TCP connections hang instead of ending with an \
                error; nothing passes either way";
    let tried = || -> Result<bool, String> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(|error| error.to_string())?;
        let at = listener.local_addr().map_err(|error| error.to_string())?;
        let client = TcpStream::connect(at).map_err(|error| error.to_string())?;
        let from = client.local_addr().map_err(|error| error.to_string())?;
        let mut here = Namespaces::of([])
            .next()
            .ok_or("no network namespace")?
            .map_err(|error| error.to_string())?;
        let all = here.connections().map_err(|error| error.to_string())?;
        let ours = all
            .iter()
            .find(|connection| connection.local == from && connection.remote == at)
            .ok_or("the kernel does not list a connection of ours")?;
        match here.destroy(ours) {
            Ok(Ended::Now) => Ok(true),
            Ok(Ended::Before) => Err("it was gone before".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    match tried() {
        Ok(_) => Check::new(name, State::Ok, "a connection of doctor's own ended", lost),
        Err(_) if !geteuid().is_root() => {
            Check::new(name, State::Unknown, "not tried: only root may", lost)
        }
        Err(why) => Check::new(name, State::Missing, why, lost),
    }
}

fn peers() -> Check {
    let name = "SO_PEERPIDFD";
    let lost = "who is at the control socket is told by pid and descriptors; what is unclear counts \
                as governed";
    let Ok((ours, _theirs)) = UnixStream::pair() else {
        return Check::new(name, State::Unknown, "no socket pair", lost);
    };
    match getsockopt(&ours.as_fd(), sockopt::PeerPidfd) {
        Ok(_) => Check::new(name, State::Ok, "there", lost),
        Err(Errno::ENOPROTOOPT) => Check::new(name, State::Missing, "comes with Linux 6.5", lost),
        Err(error) => Check::new(name, State::Unknown, error.to_string(), lost),
    }
}

fn lsm() -> Check {
    let name = "BPF LSM";
    let lost = "no containment: see docs/bypasses.md for the ways out that it would close \
                (mend: `lsm=…,bpf` on the kernel's command line)";
    match fs::read_to_string("/sys/kernel/security/lsm") {
        Ok(list) if list.trim().split(',').any(|module| module == "bpf") => {
            Check::new(name, State::Ok, list.trim(), lost)
        }
        Ok(list) => Check::new(name, State::Missing, list.trim(), lost),
        Err(error) => Check::new(
            name,
            State::Unknown,
            format!("/sys/kernel/security/lsm: {error}"),
            lost,
        ),
    }
}

fn jit() -> Check {
    let path = "/proc/sys/net/core/bpf_jit_enable";
    let lost = "every hook takes many times longer (mend: `sysctl net.core.bpf_jit_enable=1`)";
    let (state, found) = match fs::read_to_string(path) {
        Ok(text) if text.trim() == "0" => (State::Missing, "off".to_owned()),
        Ok(text) => (State::Ok, format!("on ({})", text.trim())),
        Err(error) => (State::Unknown, error.to_string()),
    };
    Check::new("BPF JIT", state, found, lost)
}

fn file(name: &str, path: &str, lost: &str) -> Check {
    if Path::new(path).exists() {
        Check::new(name, State::Ok, path, lost)
    } else {
        Check::new(name, State::Missing, format!("no {path}"), lost)
    }
}
