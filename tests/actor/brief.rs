//! Processes that do one thing and are gone.

use std::{
    ffi::CString,
    net::SocketAddr,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};

use super::{Reply, Socket};

/// Forks `count` of them, one after the other. Each names itself, connects, and ends with the error
/// number as its exit code.
pub fn live(addr: SocketAddr, count: u32) -> nix::Result<Reply> {
    let mut refused = 0;
    let mut replies = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        // SAFETY: an actor has one thread, so the child may do whatever the parent might.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let errno = connect(addr).err().map_or(0, |errno| errno as i32);
                // SAFETY: ends the child without running the parent's destructors a second time.
                unsafe { libc::_exit(errno) }
            }
            ForkResult::Parent { child } => {
                if waitpid(child, None)? == WaitStatus::Exited(child, libc::EPERM) {
                    refused += 1;
                }
                replies.push(Reply {
                    value: nanos(began.elapsed()),
                    ..Reply::default()
                });
            }
        }
    }
    Ok(Reply {
        value: refused,
        replies,
        ..Reply::default()
    })
}

fn connect(addr: SocketAddr) -> nix::Result<()> {
    let name = CString::new(format!("brief-{}", std::process::id())).map_err(|_| Errno::EINVAL)?;
    prctl::set_name(&name)?;
    let domain = if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    Socket::open(domain, libc::SOCK_STREAM, 0)?.connect(addr, 1000)
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
