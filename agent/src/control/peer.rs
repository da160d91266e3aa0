//! Who is at the other end of a control connection, asked of the kernel once, at accept.
//!
//! Credentials come from SO_PEERCRED and SO_PEERGROUPS. The cgroup is that of the process which
//! connected: SO_PEERPIDFD (Linux 6.5) holds on to exactly that process, so a reading of its
//! `/proc/PID/cgroup` is true if the process still lives afterwards. Before 6.5 there is only the
//! number, which may have gone to another process by now: then the process must also hold the
//! other end of the connection, which a process that merely inherited the number does not.
//! Whatever can't be told counts as governed.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::sys::socket::{getsockopt, sockopt};

use super::holder;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Ask and change.
    Change,
    /// Ask.
    Read,
    /// Ask about itself alone: it is governed, or it can't be told whether.
    OnlySelf,
    /// Nothing.
    Nothing,
}

/// The process at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Effective user id when it connected.
    pub uid: u32,
    /// Effective group id when it connected.
    pub gid: u32,
    /// Supplementary groups when it connected.
    pub groups: Vec<u32>,
    /// Process id; none when it could not be told.
    pub pid: Option<i32>,
    /// The cgroup that it was in, as `/proc/PID/cgroup` writes it; none when it could not be told.
    pub cgroup: Option<String>,
    /// What it may do.
    pub rights: Rights,
}

impl Caller {
    /// Somebody of whom nothing is known, and who may therefore change nothing.
    pub fn unknown() -> Self {
        Self {
            uid: u32::MAX,
            gid: u32::MAX,
            groups: Vec::new(),
            pid: None,
            cgroup: None,
            rights: Rights::Nothing,
        }
    }
}

/// What rights are decided by, besides the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Governed roots as `/proc/PID/cgroup` writes them: from the root of our cgroup namespace,
    /// which is above the mount where only a part of the hierarchy is mounted.
    pub roots: Vec<String>,
    /// Members of this group may read.
    pub readers: Option<u32>,
}

/// Settles who the peer of `socket` is.
///
/// # Errors
/// Where the kernel does not even tell the credentials: then there is nobody to answer.
pub fn settle(socket: impl AsFd, rules: &Rules) -> io::Result<Caller> {
    let socket = socket.as_fd();
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    let (uid, gid) = (credentials.uid(), credentials.gid());
    // Unreadable groups make a caller a member of none.
    let groups = peer_groups(socket).unwrap_or_default();
    let place = place(socket, credentials.pid());
    let (pid, cgroup) = place.map_or((None, None), |(pid, cgroup)| (Some(pid), Some(cgroup)));
    let rights = rules.rights(uid, gid, &groups, cgroup.as_deref());
    Ok(Caller {
        uid,
        gid,
        groups,
        pid,
        cgroup,
        rights,
    })
}

// === impl Rules ===

impl Rules {
    /// The table of the module above.
    fn rights(&self, uid: u32, gid: u32, groups: &[u32], cgroup: Option<&str>) -> Rights {
        match cgroup {
            Some(path) if !self.governs(path) => {}
            Some(_) | None => return Rights::OnlySelf,
        }
        if uid == 0 {
            return Rights::Change;
        }
        match self.readers {
            Some(readers) if gid == readers || groups.contains(&readers) => Rights::Read,
            Some(_) | None => Rights::Nothing,
        }
    }

    fn governs(&self, path: &str) -> bool {
        self.roots.iter().any(|root| {
            let root = root.trim_end_matches('/');
            path.strip_prefix(root)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }
}

// === the kernel's answers ===

/// Process id and cgroup of the peer, if both can be told for certain.
fn place(socket: BorrowedFd<'_>, pid: i32) -> Option<(i32, String)> {
    let peer = match getsockopt(&socket, sockopt::PeerPidfd) {
        Ok(pidfd) => Peer::Held(pidfd),
        // Any other error is about the peer (ESRCH: it is gone), not about the kernel.
        Err(nix::errno::Errno::ENOPROTOOPT) => Peer::Numbered(open_pidfd(pid).ok()?),
        Err(_) => return None,
    };
    confirm(&peer, socket)
}

/// Number and cgroup of the process, if both are certainly those of the peer.
fn confirm(peer: &Peer, socket: BorrowedFd<'_>) -> Option<(i32, String)> {
    let pidfd = peer.pidfd();
    let pid = pid_of(pidfd)?;
    let cgroup = read_cgroup(pid)?;
    if let Peer::Numbered(_) = peer
        // Where the kernel cannot tell, the process that has the number counts. It would take a
        // caller who may open the socket, ends at once, and has its number given out anew before
        // its connection is accepted.
        && holder::holds_other_end(pid, socket) == Some(false)
    {
        return None;
    }
    // Reaped in between, the number may have been another process's while it was read.
    (pid_of(pidfd) == Some(pid)).then_some((pid, cgroup))
}

/// How the peer was found.
enum Peer {
    /// By the kernel: it is the process that connected.
    Held(OwnedFd),
    /// By its number: it may be another.
    Numbered(OwnedFd),
}

impl Peer {
    fn pidfd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(pidfd) | Self::Numbered(pidfd) => pidfd.as_fd(),
        }
    }
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: two integers, no memory; the kernel checks both.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of a pidfd's process in our PID namespace, as long as it is not reaped.
fn pid_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    parse_fdinfo(&text)
}

/// `Pid:` of a pidfd's fdinfo: -1 when reaped, 0 when in a PID namespace that we can't see.
fn parse_fdinfo(text: &str) -> Option<i32> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse().ok().filter(|pid| *pid > 0)
}

fn read_cgroup(pid: i32) -> Option<String> {
    parse_cgroup(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// The v2 line of `/proc/PID/cgroup`. No answer for a cgroup that is removed, or that lies outside
/// our cgroup namespace: where that is can't be said in paths below the mount.
fn parse_cgroup(text: &str) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let clear = path.starts_with('/')
        && !path.ends_with(" (deleted)")
        && !path.split('/').any(|part| part == "..");
    clear.then(|| path.to_owned())
}

/// SO_PEERGROUPS, which nix does not know.
fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // NGROUPS_MAX: the kernel gives a process no more.
    let mut groups = vec![0_u32; 65_536];
    let mut bytes = libc::socklen_t::try_from(size_of_val(groups.as_slice())).unwrap_or(0);
    // SAFETY: the buffer is `bytes` long and lives through the call; the kernel writes at most
    // that much, and any bit pattern is a valid u32.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(bytes as usize / size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn rules() -> Rules {
        Rules {
            roots: vec!["/agents.slice".to_owned(), "/lab/".to_owned()],
            readers: Some(700),
        }
    }

    #[test]
    fn each_row_of_the_table() {
        let outside = Some("/user.slice");
        for (uid, gid, groups, cgroup, expected) in [
            (0, 0, &[][..], outside, Rights::Change),
            (1000, 700, &[], outside, Rights::Read),
            (1000, 100, &[4, 700], outside, Rights::Read),
            (1000, 100, &[4], outside, Rights::Nothing),
            (0, 0, &[], Some("/agents.slice"), Rights::OnlySelf),
            (
                0,
                0,
                &[],
                Some("/agents.slice/a.service/x"),
                Rights::OnlySelf,
            ),
            (0, 0, &[], Some("/lab/a"), Rights::OnlySelf),
            (1000, 700, &[700], Some("/lab"), Rights::OnlySelf),
            (0, 0, &[], None, Rights::OnlySelf),
            (0, 0, &[], Some("/agents.slice2"), Rights::Change),
            (
                0,
                0,
                &[],
                Some("/system.slice/agents.slice"),
                Rights::Change,
            ),
        ] {
            let got = rules().rights(uid, gid, groups, cgroup);
            assert_eq!(got, expected, "{uid} {gid} {groups:?} {cgroup:?}");
        }
    }

    #[test]
    fn the_root_of_all_governs_everything() {
        let rules = Rules {
            roots: vec!["/".to_owned()],
            readers: None,
        };
        assert_eq!(rules.rights(0, 0, &[], Some("/")), Rights::OnlySelf);
        assert_eq!(rules.rights(0, 0, &[], Some("/a")), Rights::OnlySelf);
    }

    #[test]
    fn a_cgroup_that_is_unclear_is_none() {
        let hybrid = "12:pids:/x\n1:name=systemd:/y\n0::/user.slice/a:b\n";
        assert_eq!(parse_cgroup(hybrid).as_deref(), Some("/user.slice/a:b"));
        for text in [
            "12:pids:/x\n",
            "",
            "0::/agents.slice/a (deleted)\n",
            "0::/../../elsewhere\n",
            "0::\n",
        ] {
            assert_eq!(parse_cgroup(text), None, "{text}");
        }
    }

    #[test]
    fn a_reaped_process_has_no_number() {
        assert_eq!(parse_fdinfo("pos:\t0\nPid:\t42\nNSpid:\t42\n"), Some(42));
        assert_eq!(parse_fdinfo("Pid:\t-1\nNSpid:\t-1\n"), None);
        assert_eq!(parse_fdinfo("Pid:\t0\n"), None);
        assert_eq!(parse_fdinfo("pos:\t0\n"), None);
    }

    #[test]
    fn a_number_alone_is_believed_only_of_the_holder() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let numbered = Peer::Numbered(open_pidfd(own).unwrap());
        let found = confirm(&numbered, ours.as_fd());
        assert_eq!(found.map(|(pid, _)| pid), Some(own));

        // Another process got the number meanwhile.
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        let numbered = Peer::Numbered(open_pidfd(pid).unwrap());
        let held = Peer::Held(open_pidfd(pid).unwrap());
        let (by_number, by_kernel) = (
            confirm(&numbered, ours.as_fd()),
            confirm(&held, ours.as_fd()),
        );
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(by_number, None);
        assert_eq!(by_kernel.map(|(pid, _)| pid), Some(pid));
        assert_eq!(confirm(&held, ours.as_fd()), None, "it is gone");
    }

    #[test]
    fn this_process_is_found_as_its_own_peer() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let caller = settle(&ours, &Rules::default()).unwrap();
        assert_eq!(caller.pid, i32::try_from(std::process::id()).ok());
        assert_eq!(caller.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(caller.groups.len(), nix::unistd::getgroups().unwrap().len());
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        assert_eq!(caller.cgroup, parse_cgroup(&own));
    }
}
