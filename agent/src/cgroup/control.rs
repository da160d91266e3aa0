//! What can be done to all processes of a cgroup at once: kill, freeze, wait until there are
//! none. Waiting sleeps in poll(2) on `cgroup.events`, which the kernel signals with POLLPRI at
//! each change (cgroup-v2.rst, "cgroup.events").

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    process, thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{CgroupPath, Error, Hierarchy};

/// Between two passes of the fallback that kills one process at a time.
const PASS: Duration = Duration::from_millis(2);
/// Passes of that fallback. The cgroup is frozen meanwhile, so one is enough unless a process
/// was forking at that moment.
const PASSES: u32 = 500;
/// How long freezing and thawing may take. A process in an uninterruptible system call holds it.
const FREEZE: Duration = Duration::from_secs(5);

/// Whether live processes are in a cgroup or below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Populated {
    /// At least one.
    Yes,
    /// None.
    No,
    /// There is no such cgroup, so none either.
    Gone,
}

impl Hierarchy {
    /// Whether live processes are in the cgroup or below it. Zombies don't count.
    ///
    /// # Errors
    /// When `cgroup.events` can't be read. The mount's root has no such file.
    pub fn populated(&self, path: &CgroupPath) -> Result<Populated, Error> {
        match self.events(path) {
            Ok(mut events) => events.populated(),
            Err(error) if error.is_missing() && !self.exists(path) => Ok(Populated::Gone),
            Err(error) => Err(error),
        }
    }

    /// Waits until no live process is in the cgroup or below it, at most until `deadline`;
    /// returns whether that came to pass. Processes may still move in afterwards.
    ///
    /// # Errors
    /// When `cgroup.events` can't be read.
    pub fn wait_empty(&self, path: &CgroupPath, deadline: Instant) -> Result<bool, Error> {
        match self.events(path) {
            Ok(mut events) => {
                events.wait(deadline, |events| Ok(events.populated()? != Populated::Yes))
            }
            Err(error) if error.is_missing() && !self.exists(path) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Sends SIGKILL to every process in the cgroup and below it, those forked meanwhile
    /// included. It does not wait until they have ended; a cgroup that is gone is no error.
    ///
    /// # Errors
    /// When this process is inside, or the kernel refuses.
    pub fn kill(&self, path: &CgroupPath) -> Result<(), Error> {
        self.not_inside("kill", path)?;
        let file = self.directory(path).join("cgroup.kill");
        match fs::write(&file, "1") {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                _ if !self.exists(path) => Ok(()),
                // Before 5.14 there is no such file, and a threaded cgroup refuses it.
                Some(libc::ENOENT | libc::EOPNOTSUPP) => self.kill_each(path),
                _ => Err(Error::io("write", file, error)),
            },
        }
    }

    /// The slow way: hold them still, kill each, look again until nobody is left.
    fn kill_each(&self, path: &CgroupPath) -> Result<(), Error> {
        // A frozen process still dies of SIGKILL, and forks no more. Not being able to freeze
        // only costs further passes.
        let frozen = self.set_frozen(path, true).is_ok();
        let killed = self.kill_passes(path);
        if frozen {
            match self.set_frozen(path, false) {
                Err(error) if !error.is_missing() => return killed.and(Err(error)),
                _ => {}
            }
        }
        killed
    }

    fn kill_passes(&self, path: &CgroupPath) -> Result<(), Error> {
        for _ in 0..PASSES {
            let pids = match self.processes(path, true) {
                Ok(pids) => pids,
                Err(error) if error.is_missing() => return Ok(()),
                Err(error) => return Err(error),
            };
            if self.populated(path)? != Populated::Yes {
                return Ok(());
            }
            for pid in pids {
                self.kill_one(path, pid)?;
            }
            thread::sleep(PASS);
        }
        Err(Error::Late {
            path: path.clone(),
            state: "empty",
        })
    }

    /// Kills a process unless it has left the cgroup. The pidfd is taken before its cgroup is
    /// read, so a pid that went to somebody else meanwhile is never hit.
    fn kill_one(&self, path: &CgroupPath, pid: u32) -> Result<(), Error> {
        let Some(pidfd) = open_pidfd(pid) else {
            return Ok(());
        };
        if !self.cgroup_of(pid).is_ok_and(|at| at.is_within(path)) {
            return Ok(());
        }
        // SAFETY: the descriptor is open, and no siginfo is passed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(()),
            _ => Err(Error::io("kill", format!("/proc/{pid}"), error)),
        }
    }

    /// Stops every process in the cgroup and below it, and waits until they stand still.
    ///
    /// # Errors
    /// When this process is inside, the kernel refuses, or one does not stop within 5 s.
    pub fn freeze(&self, path: &CgroupPath) -> Result<(), Error> {
        self.not_inside("freeze", path)?;
        self.set_frozen(path, true)?;
        self.wait_frozen(path, true, "frozen")
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// When the kernel refuses, or a cgroup above is frozen too.
    pub fn thaw(&self, path: &CgroupPath) -> Result<(), Error> {
        self.set_frozen(path, false)?;
        self.wait_frozen(path, false, "thawed")
    }

    fn wait_frozen(
        &self,
        path: &CgroupPath,
        frozen: bool,
        state: &'static str,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + FREEZE;
        let mut events = self.events(path)?;
        if events.wait(
            deadline,
            |events| Ok(events.flag("frozen")? == Some(frozen)),
        )? {
            return Ok(());
        }
        Err(Error::Late {
            path: path.clone(),
            state,
        })
    }

    fn set_frozen(&self, path: &CgroupPath, frozen: bool) -> Result<(), Error> {
        let file = self.directory(path).join("cgroup.freeze");
        fs::write(&file, if frozen { "1" } else { "0" })
            .map_err(|error| Error::io("write", file, error))
    }

    fn not_inside(&self, operation: &'static str, path: &CgroupPath) -> Result<(), Error> {
        // The mount's own processes are the whole machine's, whoever asks.
        if path.is_root() {
            return Err(Error::SelfInside {
                operation,
                path: path.clone(),
            });
        }
        match self.cgroup_of(process::id()) {
            Ok(own) if own.is_within(path) => Err(Error::SelfInside {
                operation,
                path: path.clone(),
            }),
            // Outside of what the mount shows is outside of `path` as well.
            Ok(_) | Err(Error::NotShown { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn events(&self, path: &CgroupPath) -> Result<Events, Error> {
        let name = self.directory(path).join("cgroup.events");
        let file = File::open(&name).map_err(|error| Error::io("read", &name, error))?;
        Ok(Events { name, file })
    }
}

/// An open `cgroup.events`.
struct Events {
    name: std::path::PathBuf,
    file: File,
}

impl Events {
    fn populated(&mut self) -> Result<Populated, Error> {
        match self.flag("populated") {
            Ok(Some(true)) => Ok(Populated::Yes),
            Ok(_) => Ok(Populated::No),
            Err(error) if error.is_missing() => Ok(Populated::Gone),
            Err(error) => Err(error),
        }
    }

    /// The value of a key; none when the kernel does not write it.
    fn flag(&mut self, key: &str) -> Result<Option<bool>, Error> {
        let mut text = String::new();
        self.file
            .rewind()
            .and_then(|()| self.file.read_to_string(&mut text))
            .map_err(|error| Error::io("read", &self.name, error))?;
        Ok(flag(&text, key))
    }

    /// Waits until `done` says so; returns whether it did before `deadline`.
    fn wait(
        &mut self,
        deadline: Instant,
        mut done: impl FnMut(&mut Self) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        loop {
            // Reading first also arms the notification: poll tells of changes since the last read.
            if done(self)? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // One millisecond more, so that the last wait does not end just before the deadline.
            let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(Error::io("wait for", &self.name, error)),
            }
        }
    }
}

/// The value of `key` in flat keyed text: `populated 1`.
fn flag(text: &str, key: &str) -> Option<bool> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then_some(value == "1")
    })
}

fn open_pidfd(pid: u32) -> Option<OwnedFd> {
    // SAFETY: plain numbers; the call touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::cgroup::testing::Sandbox;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    /// A shell in the cgroup that leaves a daemonised grandchild behind.
    fn busy(sandbox: &Sandbox, path: &CgroupPath) -> Child {
        let procs = sandbox.hierarchy.directory(path).join("cgroup.procs");
        let script = format!(
            "echo 0 > '{}' && (setsid sleep 60 & setsid sleep 60 &) && exec sleep 60",
            procs.display()
        );
        let child = Command::new("sh").arg("-c").arg(script).spawn().unwrap();
        let deadline = soon();
        while sandbox.hierarchy.processes(path, true).unwrap().len() < 3 {
            assert!(Instant::now() < deadline, "the children did not come up");
            thread::sleep(Duration::from_millis(1));
        }
        child
    }

    #[test]
    fn keys_are_whole_words() {
        let text = "populated 1\nfrozen 0\n";
        assert_eq!(flag(text, "populated"), Some(true));
        assert_eq!(flag(text, "frozen"), Some(false));
        assert_eq!(flag(text, "froze"), None);
        assert_eq!(flag("", "populated"), None);
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn kill_reaches_daemonised_children_and_wait_sees_the_end() {
        let sandbox = Sandbox::new("kill");
        let (hierarchy, path) = (&sandbox.hierarchy, &sandbox.path);
        assert_eq!(hierarchy.populated(path).unwrap(), Populated::No);
        let mut child = busy(&sandbox, path);
        assert_eq!(hierarchy.populated(path).unwrap(), Populated::Yes);
        let short = Instant::now() + Duration::from_millis(30);
        assert!(!hierarchy.wait_empty(path, short).unwrap());
        assert!(Instant::now() >= short);

        hierarchy.kill(path).unwrap();
        assert!(hierarchy.wait_empty(path, soon()).unwrap());
        assert_eq!(hierarchy.populated(path).unwrap(), Populated::No);
        child.wait().unwrap();
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn without_cgroup_kill_each_process_is_killed() {
        let sandbox = Sandbox::new("each");
        let leaf = sandbox.child("leaf");
        sandbox.hierarchy.create(&leaf).unwrap();
        let mut child = busy(&sandbox, &leaf);
        sandbox.hierarchy.kill_each(&sandbox.path).unwrap();
        let empty = sandbox.hierarchy.wait_empty(&sandbox.path, soon()).unwrap();
        assert!(empty);
        child.wait().unwrap();
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn waiting_sleeps_until_the_last_process_ends() {
        let sandbox = Sandbox::new("wait");
        let procs = sandbox
            .hierarchy
            .directory(&sandbox.path)
            .join("cgroup.procs");
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(format!("echo 0 > '{}'; exec sleep 0.2", procs.display()))
            .spawn()
            .unwrap();
        let deadline = soon();
        while sandbox.hierarchy.populated(&sandbox.path).unwrap() != Populated::Yes {
            assert!(Instant::now() < deadline);
        }
        assert!(sandbox.hierarchy.wait_empty(&sandbox.path, soon()).unwrap());
        child.wait().unwrap();
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn frozen_processes_stand_still_until_thawed() {
        let sandbox = Sandbox::new("freeze");
        let (hierarchy, path) = (&sandbox.hierarchy, &sandbox.path);
        let mut child = busy(&sandbox, path);
        hierarchy.freeze(path).unwrap();
        assert_eq!(
            hierarchy.events(path).unwrap().flag("frozen").unwrap(),
            Some(true)
        );
        hierarchy.thaw(path).unwrap();
        assert_eq!(
            hierarchy.events(path).unwrap().flag("frozen").unwrap(),
            Some(false)
        );
        hierarchy.freeze(path).unwrap();
        hierarchy.kill(path).unwrap();
        assert!(hierarchy.wait_empty(path, soon()).unwrap());
        child.wait().unwrap();
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn a_cgroup_that_is_gone_is_empty() {
        let sandbox = Sandbox::new("gone");
        let gone = sandbox.child("never");
        assert_eq!(sandbox.hierarchy.populated(&gone).unwrap(), Populated::Gone);
        assert!(sandbox.hierarchy.wait_empty(&gone, soon()).unwrap());
        sandbox.hierarchy.kill(&gone).unwrap();
    }

    #[test]
    #[ignore = "needs root and cgroup v2"]
    fn a_process_never_kills_itself() {
        let sandbox = Sandbox::new("self");
        // The guard alone is asked: were it broken, `kill` would end the machine's processes.
        let guard = |path: &CgroupPath| sandbox.hierarchy.not_inside("kill", path);
        let own = sandbox.hierarchy.cgroup_of(process::id()).unwrap();
        for path in [own, CgroupPath::root()] {
            let error = guard(&path).unwrap_err();
            assert!(matches!(error, Error::SelfInside { .. }), "{error:?}");
        }
        guard(&sandbox.path).unwrap();
    }
}
