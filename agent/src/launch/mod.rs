//! Starts a command inside a cgroup, joined before its first instruction, with nothing from
//! outside the fence in its hands.
//!
//! [`Launch::prepare`] settles all that can fail without a trace (is there such a command, whose
//! is it, what are its standard streams), [`Launch::spawn`] starts it. Between clone and exec only
//! system calls are made, on memory laid out before (`child`): other threads may have held any
//! lock at that moment.
//!
//! The child is born in the cgroup (`CLONE_INTO_CGROUP`). Moving it in by `cgroup.procs` takes
//! 14 ms on an idle machine (measured on 6.18: the first writer waits for an RCU grace period),
//! more than the whole start may cost; it is the fallback where `clone3` is filtered. Either way
//! the child reads `/proc/self/cgroup` before it goes on, and a start that did not end up in the
//! cgroup is an error and no process.
//!
//! What the command inherits:
//! - descriptors 0, 1 and 2, unless they are a way around the fence (`stdio`); no others;
//! - the process group and terminal of its caller, so that job control works as without remit,
//!   but not the right to type into that terminal (`terminal`);
//! - the environment, less `LISTEN_*`, whose descriptors are closed;
//! - under sudo, the invoking user's ids, groups and home, not root's (`user`).

mod child;
mod program;
mod scope;
mod signals;
mod stdio;
mod terminal;
mod user;

use std::{
    ffi::{CString, OsString},
    fs,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt as _,
    },
    path::PathBuf,
    sync::Arc,
};

use nix::{
    fcntl::OFlag,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::pipe2,
};

use crate::cgroup::{self, CgroupPath, Hierarchy};
pub use child::Step;
use child::{Joining, Plan};
pub use program::Program;
pub use scope::{Scope, is_managed, stop};
pub use signals::Signals;
pub use stdio::StdioError;
pub use user::{Account, User, UserError};

/// How a command is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Run it as root although sudo says who is behind.
    pub as_root: bool,
    /// Set `no_new_privs`: setuid programs and file capabilities give the command nothing. On by
    /// default, because `sudo` inside is a way out: whatever it starts may write to
    /// `cgroup.procs`, load BPF programs or ask systemd for a process elsewhere. It ends when the
    /// command ends and costs those who need `sudo`, `ping` with file capabilities or `newuidmap`
    /// in the agent.
    pub no_new_privs: bool,
}

/// A command that can be started.
#[derive(Clone, Debug)]
pub struct Launch {
    program: Program,
    user: User,
    environment: Vec<(OsString, OsString)>,
    no_new_privs: bool,
    terminal: bool,
    streams: Option<Streams>,
}

/// Standard streams of a command's own, in place of its parent's.
#[derive(Clone, Debug)]
pub struct Streams {
    /// What it reads.
    pub stdin: Arc<OwnedFd>,
    /// Where it writes.
    pub stdout: Arc<OwnedFd>,
    /// Where it complains.
    pub stderr: Arc<OwnedFd>,
}

/// A started command. Dropping it neither ends nor reaps it.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: OwnedFd,
    exit: Option<Exit>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// What a shell would show as `$?`: its own code, or 128 and the signal.
    pub code: u8,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

/// Why a command was not started or not waited for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An empty command line.
    #[error("no command given: write it after `--`")]
    NoCommand,
    /// No such file, on PATH or as a path.
    #[error("command `{0}` not found")]
    NotFound(String),
    /// There is one, but it can't be executed.
    #[error("command `{0}` is not executable")]
    NotExecutable(String),
    /// A NUL byte, which no argument or variable can carry.
    #[error("`{0}` has a NUL byte in it")]
    Nul(String),
    /// A standard stream that is a way around the fence.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// It is not clear as whom to run.
    #[error(transparent)]
    User(#[from] UserError),
    /// The cgroup is not there or not as it should be.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// No process could be made in the cgroup.
    #[error("cannot create a process in cgroup `{path}`")]
    Clone {
        /// The cgroup.
        path: CgroupPath,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The new process gave up before the command ran.
    #[error("cannot start `{command}`: {step} failed")]
    Child {
        /// The command's name.
        command: String,
        /// Where it gave up.
        step: Step,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A system call around it.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Default for Options {
    fn default() -> Self {
        Self {
            as_root: false,
            no_new_privs: true,
        }
    }
}

impl Error {
    /// The exit code that a shell gives: 127 when there is no such command, 126 when it can't be
    /// executed. None for what has nothing to do with the command.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::NotFound(_) => Some(127),
            Self::NotExecutable(_) => Some(126),
            Self::Child { step, source, .. } if *step == Step::Exec => {
                match source.raw_os_error() {
                    Some(libc::ENOENT) => Some(127),
                    _ => Some(126),
                }
            }
            _ => None,
        }
    }

    fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System {
            operation,
            source: source.into(),
        }
    }
}

// === impl Launch ===

impl Launch {
    /// Settles what the command is, as whom it runs and what it inherits. It leaves no trace.
    ///
    /// # Errors
    /// When there is no such command, a standard stream is a socket other than a unix one, or the
    /// variables of sudo make no sense.
    pub fn prepare(argv: Vec<OsString>, options: Options) -> Result<Self, Error> {
        stdio::check()?;
        let user = if options.as_root {
            User::Same
        } else {
            user::invoking()?
        };
        Self::plan(argv, user, options.no_new_privs)
    }

    fn plan(argv: Vec<OsString>, user: User, no_new_privs: bool) -> Result<Self, Error> {
        let path = std::env::var_os("PATH");
        Ok(Self {
            program: Program::find(argv, path.as_deref())?,
            environment: user.environment(std::env::vars_os()),
            user,
            no_new_privs,
            terminal: terminal::is_shared(),
            streams: None,
        })
    }

    /// A command of Remit's own: as this very user, without an environment, on streams of its own.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn own(argv: Vec<OsString>, streams: Streams) -> Result<Self, Error> {
        Ok(Self {
            program: Program::find(argv, None)?,
            environment: Vec::new(),
            user: User::Same,
            no_new_privs: true,
            terminal: false,
            streams: Some(streams),
        })
    }

    /// As whom it will run.
    pub fn user(&self) -> &User {
        &self.user
    }

    /// Sets a variable for the command, in place of an inherited one.
    pub fn set_env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        let name = name.into();
        self.environment.retain(|(other, _)| *other != name);
        self.environment.push((name, value.into()));
    }

    /// Starts the command in `cgroup`. When this returns, the command itself runs there.
    ///
    /// # Errors
    /// When it could not be started in the cgroup; then nothing of it runs.
    pub fn spawn(&self, hierarchy: &Hierarchy, cgroup: &CgroupPath) -> Result<Child, Error> {
        match self.spawn_by(hierarchy, cgroup, Joining::Birth) {
            // Container runtimes filter clone3 so, and kernels before 5.7 don't know the flag.
            Err(Error::Clone { source, .. }) if source.raw_os_error() == Some(libc::ENOSYS) => {
                self.spawn_by(hierarchy, cgroup, Joining::Move)
            }
            result => result,
        }
    }

    fn spawn_by(
        &self,
        hierarchy: &Hierarchy,
        cgroup: &CgroupPath,
        joining: Joining,
    ) -> Result<Child, Error> {
        let directory = hierarchy.directory(cgroup);
        let (report, reported) =
            pipe2(OFlag::O_CLOEXEC).map_err(|error| Error::system("create a pipe", error))?;
        let plan = Plan {
            directory: open(&directory, libc::O_PATH | libc::O_DIRECTORY)?,
            procs: open(&directory.join("cgroup.procs"), 0)?,
            membership: [b"0::", hierarchy.proc_path(cgroup).as_slice()].concat(),
            account: match &self.user {
                User::Same => None,
                User::Account(account) => Some(account.ids()),
            },
            no_new_privs: self.no_new_privs,
            terminal: self.terminal,
            images: self.program.images(&self.environment)?,
            streams: self.streams.clone(),
            report: reported,
        };
        let (pid, pidfd) = plan.start(joining).map_err(|source| Error::Clone {
            path: cgroup.clone(),
            source,
        })?;
        let mut child = Child {
            pid,
            pidfd,
            exit: None,
        };
        // The child alone holds the writing end now: it ends with exec, a report, or death.
        drop(plan);
        let mut bytes = Vec::new();
        let read = fs::File::from(report).read_to_end(&mut bytes);
        let failure = match read {
            Ok(_) => child::Report::decode(&bytes),
            Err(error) => return Err(Error::system("hear from the new process", error)),
        };
        match failure {
            None => Ok(child),
            Some(report) => {
                child.wait()?;
                Err(Error::Child {
                    command: self.program.name(),
                    step: report.step,
                    source: io::Error::from_raw_os_error(report.errno),
                })
            }
        }
    }
}

fn open(path: &std::path::Path, flags: i32) -> Result<OwnedFd, Error> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path_only = flags & libc::O_PATH != 0;
    let file = fs::OpenOptions::new()
        .read(path_only)
        .write(!path_only)
        .custom_flags(flags)
        .open(path)
        .map_err(|source| cgroup::Error::Io {
            operation: "open",
            path: PathBuf::from(path),
            source,
        })?;
    Ok(file.into())
}

/// A C string, or an error that shows the text.
fn c_string(text: OsString) -> Result<CString, Error> {
    let bytes = text.into_vec();
    CString::new(bytes).map_err(|error| {
        let bytes = error.into_vec();
        Error::Nul(String::from_utf8_lossy(&bytes).into_owned())
    })
}

// === impl Child ===

impl Child {
    /// The process id; its own until it is waited for.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that becomes readable when the command ends (pidfd_open(2)).
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for the end and reaps. It says the same again when asked again.
    ///
    /// # Errors
    /// When the kernel refuses, as when somebody else reaped it.
    pub fn wait(&mut self) -> Result<Exit, Error> {
        loop {
            if let Some(exit) = self.ended(WaitPidFlag::WEXITED)? {
                return Ok(exit);
            }
        }
    }

    /// The end, if it has come.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn try_wait(&mut self) -> Result<Option<Exit>, Error> {
        self.ended(WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
    }

    fn ended(&mut self, flags: WaitPidFlag) -> Result<Option<Exit>, Error> {
        if self.exit.is_some() {
            return Ok(self.exit);
        }
        self.exit = match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => Some(Exit {
                // The kernel keeps the low eight bits.
                code: u8::try_from(code & 0xff).unwrap_or(u8::MAX),
                signal: None,
            }),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::by(signal as i32)),
            Ok(_) | Err(nix::errno::Errno::EINTR) => None,
            Err(error) => return Err(Error::system("wait for the command", error)),
        };
        Ok(self.exit)
    }
}

impl Exit {
    fn by(signal: i32) -> Self {
        Self {
            code: u8::try_from(128 + signal).unwrap_or(u8::MAX),
            signal: Some(signal),
        }
    }
}

#[cfg(test)]
mod tests;
