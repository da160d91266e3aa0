//! Counts the bpf() calls of what this process starts, from outside: a seccomp filter reports each
//! to a listener, which lets it go on. The daemon need not be asked, and can't miscount.

use std::{
    collections::BTreeMap,
    mem::zeroed,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;

/// `enum bpf_cmd`: those that write to a map.
const WRITES: [u64; 4] = [
    2,  // BPF_MAP_UPDATE_ELEM
    3,  // BPF_MAP_DELETE_ELEM
    26, // BPF_MAP_UPDATE_BATCH
    27, // BPF_MAP_DELETE_BATCH
];

/// Calls by `bpf_cmd`, of all processes that the calling thread starts from now on.
pub struct Tally(Arc<Mutex<BTreeMap<u64, u64>>>);

impl Tally {
    /// Starts counting. The filter stays on this thread for good: it suits a case's own process.
    pub fn start() -> Result<Self> {
        let listener = listen().context("seccomp gives no listener")?;
        let counts = Arc::new(Mutex::new(BTreeMap::new()));
        let theirs = Arc::clone(&counts);
        thread::spawn(move || {
            while let Ok(call) = receive(&listener) {
                *lock(&theirs).entry(call.data.args[0]).or_default() += 1;
                if go_on(&listener, call.id).is_err() {
                    break;
                }
            }
        });
        Ok(Self(counts))
    }

    /// Writes to maps so far; a batch counts as one.
    pub fn writes(&self) -> u64 {
        let counts = lock(&self.0);
        WRITES
            .iter()
            .filter_map(|command| counts.get(command))
            .sum()
    }
}

fn lock(counts: &Mutex<BTreeMap<u64, u64>>) -> MutexGuard<'_, BTreeMap<u64, u64>> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts the filter on the calling thread.
fn listen() -> nix::Result<OwnedFd> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut steps = [
        // The number of the call is the first word that the filter sees.
        step(LOAD, 0, 0, 0),
        step(EQUAL, 0, 1, libc::SYS_bpf as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program and its steps outlive the call, which copies them.
    let fd = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    })?;
    // SAFETY: the kernel has just given out the descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn receive(listener: &OwnedFd) -> nix::Result<libc::seccomp_notif> {
    loop {
        // SAFETY: plain data; the kernel insists on zeros.
        let mut call: libc::seccomp_notif = unsafe { zeroed() };
        // SAFETY: a listener, and a buffer of the size that is part of the request's number.
        let done = Errno::result(unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV,
                &raw mut call,
            )
        });
        match done {
            Ok(_) => return Ok(call),
            // The caller was killed meanwhile, or we were interrupted.
            Err(Errno::ENOENT | Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn go_on(listener: &OwnedFd, id: u64) -> nix::Result<()> {
    let mut answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: a listener, and an answer of the size that is part of the request's number.
    let done = Errno::result(unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw mut answer,
        )
    });
    match done {
        // The caller was killed meanwhile.
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error),
    }
}
