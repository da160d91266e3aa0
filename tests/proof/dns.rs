//! The DNS guard made deaf by hand: its sockets stay open and bound, as they do when whatever reads
//! them hangs, and nobody hears what is asked there.

use std::{
    fs, io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike as _, getsockopt, sockopt};

use super::{probed, reconciled};
use crate::{
    harness::Case,
    names::zone::{Spec, Zone},
    support::{Agent, Ctx, Fixture, claim, daemon::Settings, eventually, expect, scale},
};

const NAME: &str = "api.names.example";

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "proof::a_deaf_dns_guard_is_found_by_all_three",
        deaf,
    )]
}

fn deaf(ctx: &mut Ctx) -> Result<()> {
    let zone = Zone::start(&Spec::new().host(NAME, &["198.51.100.30"]))?;
    let settings = Settings {
        dns: zone.settings(),
        more: "[reconcile]\nevery = \"1h\"\n".to_owned(),
        ..Settings::default()
    };
    let agents = [
        Agent::standard("alpha").allow(NAME, "443"),
        Agent::standard("beta"),
    ];
    let fx = Fixture::start_with(ctx, &agents, &settings)?;
    let healthy = || -> Result<()> {
        let said = probed(fx.place(), "alpha", 0)?;
        let attempts = said["attempts"].as_array().context("no attempts")?;
        for name in ["DNS guard", "IPv4 lookup", "IPv6 lookup"] {
            let tried = attempts.iter().any(|one| one["name"] == name);
            claim(tried, || format!("no {name}: {said}"))?;
        }
        eventually(5, || {
            let status = fx.place().remit(&["status", "--require", "enforcing"])?;
            expect("remit status", status.code, 0).with_context(|| status.stderr)
        })
    };
    healthy().context("before")?;

    let deafened = deafen(fx.daemon_pid()?)?;
    claim(deafened >= 1, || "the daemon has no such socket".to_owned())?;
    let made = Instant::now();
    eventually(6, || {
        let status = fx.place().remit(&["status", "--require", "enforcing"])?;
        expect("remit status", status.code, 1)?;
        claim(
            status.stderr.contains("dns: of agent `alpha`: no answer"),
            || status.stderr.clone(),
        )
    })?;
    let status = made.elapsed();
    claim(status < Duration::from_secs(scale::patience(5)), || {
        format!("told only after {} ms", status.as_millis())
    })?;
    let (code, said) = reconciled(fx.place(), false)?;
    expect("remit reconcile", code, 1)?;
    let drift = said["drift"].as_array().context("no drift")?;
    claim(
        drift.iter().any(|one| {
            one["kind"] == "missing"
                && one["what"] == "DNS guard of alpha"
                && one["remedy"].is_string()
        }),
        || said.to_string(),
    )?;
    let began = Instant::now();
    let said = probed(fx.place(), "alpha", 1)?;
    let why = said["why"][0].as_str().unwrap_or_default().to_owned();
    claim(why.starts_with("DNS guard: no answer"), || why.clone())?;
    let probe = began.elapsed();
    // Whoever uses no names has lost nothing.
    probed(fx.place(), "beta", 0)?;

    let (code, said) = reconciled(fx.place(), true)?;
    expect("repaired", code, 0).with_context(|| said.to_string())?;
    healthy().context("after the repair")?;
    println!(
        "status knew after {} ms; the probe took {} ms: {why}",
        status.as_millis(),
        probe.as_millis()
    );
    Ok(())
}

/// Has the daemon's UDP sockets on loopback hear nobody but a port where nobody is; how many.
fn deafen(daemon: u32) -> Result<usize> {
    let process = pidfd(daemon).context("no pidfd of the daemon")?;
    let mut deafened = 0;
    for entry in fs::read_dir(format!("/proc/{daemon}/fd"))? {
        let entry = entry?;
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_string_lossy().parse::<i32>()?;
        if !is_socket {
            continue;
        }
        let Ok(socket) = copy(&process, number) else {
            continue;
        };
        if getsockopt(&socket, sockopt::SockType) != Ok(SockType::Datagram) {
            continue;
        }
        let name =
            nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd())?;
        if !matches!(
            name.family(),
            Some(AddressFamily::Inet | AddressFamily::Inet6)
        ) {
            continue;
        }
        let socket = UdpSocket::from(socket);
        let at = socket.local_addr()?;
        // A socket that is connected asks upstream.
        if at.ip().is_loopback() && socket.peer_addr().is_err() {
            socket.connect(SocketAddr::new(at.ip(), 9))?;
            deafened += 1;
        }
    }
    Ok(deafened)
}

fn pidfd(process: u32) -> io::Result<OwnedFd> {
    // SAFETY: numbers in, a number out.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    descriptor(result)
}

/// A descriptor of another process, here too.
fn copy(process: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers in, a number out.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    descriptor(result)
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given out this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
