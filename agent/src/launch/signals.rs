//! Signals sent to remit reach the command as if it had been started without.
//!
//! The command shares remit's process group, so what the terminal sends (Ctrl-C, hang-up, a new
//! size) goes to both; such signals carry `SI_KERNEL` and are not sent a second time. What
//! `kill(1)` or a service manager sends to remit alone is passed on. Who signals the whole group
//! by hand makes the command see it twice; that can't be told from the former.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd},
    ptr,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
};

use super::{Child, Error};

/// What is passed on.
const FORWARDED: [i32; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// The command's pidfd, or -1. A handler has nothing but statics.
static TARGET: AtomicI32 = AtomicI32::new(-1);
/// Signals that came while there was no command, by number.
static PENDING: AtomicU32 = AtomicU32::new(0);
static CAUGHT: AtomicBool = AtomicBool::new(false);

/// Catches the signals from its making to its end; one at a time. Made before the command starts,
/// it leaves no moment in which a signal ends remit alone.
pub struct Signals {
    before: Vec<(i32, libc::sigaction)>,
    /// Keeps the descriptor in [`TARGET`] open.
    target: Option<OwnedFd>,
}

// === impl Signals ===

impl Signals {
    /// Starts catching. Signals that are ignored stay so.
    ///
    /// # Errors
    /// When somebody in this process catches them so already.
    pub fn catch() -> Result<Self, Error> {
        if CAUGHT.swap(true, Ordering::SeqCst) {
            let source = io::Error::from_raw_os_error(libc::EBUSY);
            return Err(Error::system("catch signals", source));
        }
        PENDING.store(0, Ordering::SeqCst);
        let mut signals = Self {
            before: Vec::new(),
            target: None,
        };
        for signal in FORWARDED {
            signals.install(signal)?;
        }
        Ok(signals)
    }

    /// The first of INT, TERM, HUP and QUIT that came while there was no command: remit was asked
    /// to stop before it started one.
    pub fn interrupted(&self) -> Option<i32> {
        let pending = PENDING.load(Ordering::SeqCst);
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
            .into_iter()
            .find(|signal| pending & (1 << signal) != 0)
    }

    /// Passes signals on to `child` from now on, those first that came before.
    ///
    /// # Errors
    /// When its descriptor can't be duplicated.
    pub fn forward_to(&mut self, child: &Child) -> Result<(), Error> {
        let target = child
            .pidfd
            .try_clone()
            .map_err(|error| Error::system("duplicate a pidfd", error))?;
        let fd = target.as_raw_fd();
        TARGET.store(fd, Ordering::SeqCst);
        self.target = Some(target);
        let pending = PENDING.swap(0, Ordering::SeqCst);
        for signal in FORWARDED {
            if pending & (1 << signal) != 0 {
                send(fd, signal);
            }
        }
        Ok(())
    }

    fn install(&mut self, signal: i32) -> Result<(), Error> {
        let before = exchange(signal, None)?;
        if before.sa_sigaction == libc::SIG_IGN {
            return Ok(());
        }
        // SAFETY: the type is plain data for which all zero is valid.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        exchange(signal, Some(&action))?;
        self.before.push((signal, before));
        Ok(())
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, action) in self.before.drain(..) {
            // The action came from the kernel, so it takes it back.
            drop(exchange(signal, Some(&action)));
        }
        TARGET.store(-1, Ordering::SeqCst);
        self.target = None;
        CAUGHT.store(false, Ordering::SeqCst);
    }
}

/// Sets an action, if one is given, and returns what was set before.
fn exchange(signal: i32, action: Option<&libc::sigaction>) -> Result<libc::sigaction, Error> {
    let new = action.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the type is plain data for which all zero is valid.
    let mut before: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: `new` is null or a valid action, and `before` is writable. The only handler ever
    // given is `handle`, or one that was in place.
    let result = unsafe { libc::sigaction(signal, new, &raw mut before) };
    if result == 0 {
        Ok(before)
    } else {
        let source = io::Error::last_os_error();
        Err(Error::system("catch signals", source))
    }
}

/// Runs on any thread at any moment: atomics and one system call only, and errno as it was.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the thread's own errno, which is always there.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: with SA_SIGINFO the kernel passes a valid record; null is checked all the same.
    let code = unsafe { info.as_ref() }.map(|info| info.si_code);
    let from_terminal = code == Some(libc::SI_KERNEL);
    let target = TARGET.load(Ordering::SeqCst);
    if target < 0 {
        PENDING.fetch_or(1 << signal, Ordering::SeqCst);
        // The command may have started between the two: then this is on us, or `forward_to` has
        // seen the bit; whoever takes it away sends.
        let target = TARGET.load(Ordering::SeqCst);
        if target >= 0 && PENDING.fetch_and(!(1 << signal), Ordering::SeqCst) & (1 << signal) != 0 {
            send(target, signal);
        }
    } else if !from_terminal {
        send(target, signal);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// A command that has ended is no error: there is nobody left to tell.
fn send(pidfd: i32, signal: i32) {
    // SAFETY: no siginfo is passed; the descriptor is a pidfd that `Signals` holds open.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd,
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}
