//! What happens between clone and exec.
//!
//! The child is a copy of one thread of a process that may have many: any lock may be held for
//! ever, the allocator's among them. So everything it needs lies in [`Plan`] beforehand, and
//! [`Plan::child`] and all it calls make system calls and compare bytes, no more: no allocation,
//! no formatting, no panic, no drop. Ids are set by raw system calls, since the C library's
//! wrappers signal all threads that it believes to exist and would wait for them here.

use std::{
    fmt, io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

use super::{Streams, program::Images, terminal, user::Ids};

/// Enough of `/proc/self/cgroup`: v2's line comes last on hybrid hosts, after at most 14 others.
const MEMBERSHIP_BYTES: usize = 16 * 1024;
/// `_LINUX_CAPABILITY_VERSION_3` of include/uapi/linux/capability.h.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// Signals go from 1 to here.
const LAST_SIGNAL: i32 = 64;

/// How the child gets into the cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joining {
    /// It is born there.
    Birth,
    /// It moves itself there first.
    Move,
}

/// Where the child gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Moving into the cgroup.
    Join,
    /// Reading in which cgroup it is.
    Membership,
    /// It is in another cgroup.
    Elsewhere,
    /// Marking the inherited descriptors to be closed.
    Descriptors,
    /// Setting the groups.
    Groups,
    /// Setting the group id.
    GroupId,
    /// Setting the user id.
    UserId,
    /// Giving up the capabilities.
    Capabilities,
    /// Setting `no_new_privs`.
    Privileges,
    /// Keeping it from typing into the terminal.
    Terminal,
    /// Putting the signals in order.
    Signals,
    /// Executing the command.
    Exec,
}

/// All that the child needs, laid out beforehand.
pub(super) struct Plan {
    /// The cgroup's directory.
    pub(super) directory: OwnedFd,
    /// Its `cgroup.procs`, open for writing.
    pub(super) procs: OwnedFd,
    /// The line that `/proc/self/cgroup` must have.
    pub(super) membership: Vec<u8>,
    /// Whom to become.
    pub(super) account: Option<Ids>,
    /// Whether to set `no_new_privs`.
    pub(super) no_new_privs: bool,
    /// Whether to keep it from typing into the terminal.
    pub(super) terminal: bool,
    /// What to execute.
    pub(super) images: Images,
    /// Standard streams in place of the parent's.
    pub(super) streams: Option<Streams>,
    /// Where to report a failure. Closed by exec.
    pub(super) report: OwnedFd,
}

/// A failure on its way to the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) step: Step,
    pub(super) errno: i32,
}

type Errno = i32;

// === impl Step ===

impl Step {
    const ALL: [Self; 12] = [
        Self::Join,
        Self::Membership,
        Self::Elsewhere,
        Self::Descriptors,
        Self::Groups,
        Self::GroupId,
        Self::UserId,
        Self::Capabilities,
        Self::Privileges,
        Self::Terminal,
        Self::Signals,
        Self::Exec,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Join => "moving into the cgroup",
            Self::Membership => "reading /proc/self/cgroup",
            Self::Elsewhere => "joining the cgroup (the process found itself in another one)",
            Self::Descriptors => "closing inherited descriptors",
            Self::Groups => "setting the groups",
            Self::GroupId => "setting the group id",
            Self::UserId => "setting the user id",
            Self::Capabilities => "giving up capabilities",
            Self::Privileges => "setting no_new_privs",
            Self::Terminal => "keeping it from typing into the terminal (seccomp)",
            Self::Signals => "resetting signals",
            Self::Exec => "executing it",
        })
    }
}

// === impl Report ===

impl Report {
    fn encode(self) -> [u8; 5] {
        let [a, b, c, d] = self.errno.to_ne_bytes();
        [self.step as u8, a, b, c, d]
    }

    /// None when the child said nothing: it has executed the command.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let [step, a, b, c, d] = *bytes.first_chunk::<5>()?;
        Some(Self {
            step: *Step::ALL.get(usize::from(step))?,
            errno: i32::from_ne_bytes([a, b, c, d]),
        })
    }
}

// === impl Plan ===

impl Plan {
    /// Makes the child and returns its pid and pidfd. It runs on its own from there.
    pub(super) fn start(&self, joining: Joining) -> io::Result<(u32, OwnedFd)> {
        // No handler of the parent's may run in the child: it would act for the parent.
        let mask = block_signals()?;
        let born = match joining {
            Joining::Birth => self.clone_into(),
            Joining::Move => self.fork(),
        };
        restore_signals(&mask);
        born
    }

    fn clone_into(&self) -> io::Result<(u32, OwnedFd)> {
        let mut pidfd: i32 = -1;
        // SAFETY: the type is plain integers; all zero means no flags.
        let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
        arguments.flags = (libc::CLONE_PIDFD as u64) | CLONE_INTO_CGROUP;
        arguments.pidfd = (&raw mut pidfd) as u64;
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.cgroup = self.directory.as_raw_fd() as u64;
        // SAFETY: without CLONE_VM this is fork: the child gets a copy of all memory and goes on
        // with this stack. `arguments` is as large as said, and `pidfd` outlives the call. The
        // child calls nothing but `child`, which never returns.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut arguments,
                size_of::<libc::clone_args>(),
            )
        };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => self.child(false),
            pid => {
                // SAFETY: the kernel has just returned this descriptor; nothing else owns it.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok((u32::try_from(pid).unwrap_or_default(), pidfd))
            }
        }
    }

    fn fork(&self) -> io::Result<(u32, OwnedFd)> {
        // SAFETY: the child calls nothing but `child`, which keeps to async-signal-safe calls and
        // never returns.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => return Err(io::Error::last_os_error()),
            0 => self.child(true),
            _ => {}
        }
        // The child is not reaped yet, so the pid is still its own.
        // SAFETY: plain numbers; the call touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            // SAFETY: plain numbers. The child is ours and unreaped; nobody could wait for it
            // without a descriptor.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            return Err(error);
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) };
        Ok((u32::try_from(pid).unwrap_or_default(), pidfd))
    }

    /// The child's life. It ends in the command, or in a report and exit.
    fn child(&self, join: bool) -> ! {
        let report = match self.run(join) {
            Ok(never) => match never {},
            Err(report) => report.encode(),
        };
        // SAFETY: `report` is five bytes. When nobody listens any more there is nobody to tell.
        unsafe {
            libc::write(
                self.report.as_raw_fd(),
                report.as_ptr().cast(),
                report.len(),
            )
        };
        // SAFETY: ends the process at once, without the parent's exit handlers.
        unsafe { libc::_exit(127) }
    }

    fn run(&self, join: bool) -> Result<std::convert::Infallible, Report> {
        let at = |step| move |errno| Report { step, errno };
        if join {
            self.join().map_err(at(Step::Join))?;
        }
        if !self.is_member().map_err(at(Step::Membership))? {
            return Err(Report {
                step: Step::Elsewhere,
                errno: libc::EXDEV,
            });
        }
        if let Some(streams) = &self.streams {
            place_streams(streams).map_err(at(Step::Descriptors))?;
        }
        mark_descriptors().map_err(at(Step::Descriptors))?;
        if self.no_new_privs {
            no_new_privs().map_err(at(Step::Privileges))?;
        }
        // Needs no_new_privs or CAP_SYS_ADMIN: after the former, before the latter goes.
        if self.terminal {
            restrict_terminal().map_err(at(Step::Terminal))?;
        }
        if let Some(account) = &self.account {
            set_groups(&account.groups).map_err(at(Step::Groups))?;
            set_gid(account.gid).map_err(at(Step::GroupId))?;
            set_uid(account.uid).map_err(at(Step::UserId))?;
            if account.uid != 0 {
                drop_capabilities().map_err(at(Step::Capabilities))?;
            }
        }
        default_signals().map_err(at(Step::Signals))?;
        Err(at(Step::Exec)(self.exec()))
    }

    fn join(&self) -> Result<(), Errno> {
        // "0" is the writer itself (cgroup-v2.rst, "cgroup.procs").
        // SAFETY: one byte of a literal.
        let result = unsafe { libc::write(self.procs.as_raw_fd(), c"0".as_ptr().cast(), 1) };
        check(result as libc::c_long)
    }

    fn is_member(&self) -> Result<bool, Errno> {
        let mut buffer = [0_u8; MEMBERSHIP_BYTES];
        // SAFETY: a literal, and no variable arguments are read without O_CREAT.
        let fd = unsafe {
            libc::open(
                c"/proc/self/cgroup".as_ptr(),
                libc::O_RDONLY | libc::O_CLOEXEC,
            )
        };
        check(fd.into())?;
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            // SAFETY: `rest` is writable memory of that length.
            let read = unsafe { libc::read(fd, rest.as_mut_ptr().cast(), rest.len()) };
            check(read as libc::c_long)?;
            match usize::try_from(read) {
                Ok(0) | Err(_) => break,
                Ok(read) => filled += read,
            }
        }
        Ok(has_line(
            buffer.get(..filled).unwrap_or_default(),
            &self.membership,
        ))
    }

    /// Tries each file. Returns only when none would do: why not.
    fn exec(&self) -> Errno {
        let mut verdict = libc::ENOENT;
        for image in &self.images.images {
            let environment = self.images.environment.as_ptr();
            // SAFETY: `file` is a C string, and both lists are null-terminated lists of C strings
            // that `images` owns.
            unsafe { libc::execve(image.file.as_ptr(), image.argv.as_ptr(), environment) };
            match errno() {
                // The next directory of PATH may have one that this user may execute.
                libc::ENOENT | libc::ENOTDIR if verdict != libc::EACCES => verdict = libc::ENOENT,
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => verdict = libc::EACCES,
                libc::ENOEXEC => {
                    // SAFETY: as above.
                    unsafe {
                        libc::execve(image.shell.as_ptr(), image.shell_argv.as_ptr(), environment)
                    };
                    return errno();
                }
                other => return other,
            }
        }
        verdict
    }
}

/// Whether one of the lines of `text` is `line`.
fn has_line(text: &[u8], line: &[u8]) -> bool {
    text.split(|byte| *byte == b'\n').any(|other| other == line)
}

// === the system calls, one each ===

/// `CLONE_INTO_CGROUP` of include/uapi/linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn errno() -> Errno {
    // Reads the thread's errno; no allocation, no formatting.
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result < 0 { Err(errno()) } else { Ok(()) }
}

/// Descriptors from 3 on are closed by exec; until then the report's is needed.
fn mark_descriptors() -> Result<(), Errno> {
    // SAFETY: plain numbers; no memory is touched.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
}

/// Puts the standard streams where a command looks for them. None of those handed in is one of
/// these numbers: the daemon has all three open.
fn place_streams(streams: &Streams) -> Result<(), Errno> {
    let each = [&streams.stdin, &streams.stdout, &streams.stderr];
    for (number, stream) in (0..).zip(each) {
        // SAFETY: plain numbers; no memory is touched.
        check(unsafe { libc::dup2(stream.as_raw_fd(), number) }.into())?;
    }
    Ok(())
}

fn set_groups(groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: `groups` is that many ids; `gid_t` is 32 bits wide in this call on 64-bit kernels.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })
}

fn set_gid(gid: u32) -> Result<(), Errno> {
    // SAFETY: plain numbers; no memory is touched.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })
}

fn set_uid(uid: u32) -> Result<(), Errno> {
    // SAFETY: plain numbers; no memory is touched.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// Leaving uid 0 clears them unless securebits say otherwise, and remit may have been started
/// with any securebits.
fn drop_capabilities() -> Result<(), Errno> {
    let header = [CAPABILITY_VERSION, 0];
    let none = [0_u32; 6];
    // SAFETY: the header is version and pid, the data two times three words, as version 3 has it.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) })
}

fn no_new_privs() -> Result<(), Errno> {
    // SAFETY: plain numbers; no memory is touched.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

fn restrict_terminal() -> Result<(), Errno> {
    let filter = terminal::FILTER;
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to that many instructions, which the kernel copies and checks.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    })
}

/// Handlers become the default now rather than at exec, so that a signal which comes between
/// is the command's. What was ignored stays ignored (nohup), but SIGPIPE, which Rust's start-up
/// ignores for its own ends.
fn default_signals() -> Result<(), Errno> {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the type is plain data for which all zero is valid: SIG_DFL, no flags.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: nothing is set, and `action` is writable.
        let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
        let ignored = action.sa_sigaction == libc::SIG_IGN && signal != libc::SIGPIPE;
        // The C library keeps two for itself and refuses to tell.
        if asked != 0 || ignored || action.sa_sigaction == libc::SIG_DFL {
            continue;
        }
        // SAFETY: as above.
        let default: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: `default` is a valid action, and the old one is not asked for.
        let set = unsafe { libc::sigaction(signal, &raw const default, ptr::null_mut()) };
        check(set.into())?;
    }
    // SAFETY: the type is plain data.
    let mut none: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `none` is writable.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: `none` is a valid set. The child has one thread.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) }.into())
}

fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: the type is plain data.
    let mut all: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `all` is writable.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: the type is plain data.
    let mut before: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: both sets are valid and outlive the call.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    if result == 0 {
        Ok(before)
    } else {
        Err(io::Error::from_raw_os_error(result))
    }
}

fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: `mask` is what this thread had before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_arrive_as_they_were_sent() {
        for step in Step::ALL {
            let report = Report {
                step,
                errno: libc::EACCES,
            };
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        assert_eq!(Report::decode(&[]), None);
        assert_eq!(Report::decode(&[99, 0, 0, 0, 0]), None);
    }

    #[test]
    fn membership_is_the_whole_line() {
        let hybrid = b"4:memory:/a\n1:cpu:/0::/a\n0::/a/b\n";
        assert!(has_line(hybrid, b"0::/a/b"));
        for other in ["0::/a", "0::/a/b/c", "0::/", "", ":/a/b"] {
            let found = has_line(hybrid, other.as_bytes());
            assert_eq!(found, other.is_empty(), "{other}");
        }
    }
}
