//! Whether the standard streams may be handed into the fence. A socket belongs to the cgroup in
//! which it was made, whoever uses it, so one from outside is never judged: such a stream is
//! refused before the command starts.
//!
//! | stream | |
//! |---|---|
//! | file, directory, pipe, terminal, device | handed on |
//! | unix socket | handed on: it reaches nobody but the peer that the caller chose, and is how systemd's journal, sshd and many programs connect a child. What is passed over it (SCM_RIGHTS) is containment's concern |
//! | any other socket | refused |
//! | `/dev/net/tun` | refused: it sends packets that no cgroup hook sees |
//! | io_uring and other anonymous files | refused: a ring may hold sockets |

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use nix::sys::stat::{SFlag, fstat, major, minor};

/// Device number of `/dev/net/tun` (Documentation/admin-guide/devices.txt).
const TUN: (u64, u64) = (10, 200);

/// A standard stream that can't be handed on.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It leads around the fence.
    #[error(
        "{stream} is {what}, which the fence does not judge (mend: put a pipe or a file there, as in `{mend}`)"
    )]
    Open {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// What it is.
        what: String,
        /// How to get rid of it.
        mend: &'static str,
    },
    /// It can't be told what it is.
    #[error("cannot tell what {stream} is")]
    Unknown {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Checks all three.
///
/// # Errors
/// At the first that is refused.
pub(super) fn check() -> Result<(), StdioError> {
    stream(&io::stdin(), "stdin", "remit run … </dev/null")?;
    stream(&io::stdout(), "stdout", "remit run … | cat")?;
    stream(&io::stderr(), "stderr", "remit run … 2>FILE")
}

fn stream(fd: &impl AsFd, name: &'static str, mend: &'static str) -> Result<(), StdioError> {
    match refused(fd.as_fd()) {
        Ok(None) => Ok(()),
        Ok(Some(what)) => Err(StdioError::Open {
            stream: name,
            what,
            mend,
        }),
        Err(source) => Err(StdioError::Unknown {
            stream: name,
            source,
        }),
    }
}

/// What is wrong with it, if anything.
fn refused(fd: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let stat = fstat(fd)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    if kind == SFlag::S_IFSOCK {
        return Ok(match domain(fd)? {
            libc::AF_UNIX => None,
            family => Some(format!("a socket ({})", family_name(family))),
        });
    }
    if kind == SFlag::S_IFCHR && (major(stat.st_rdev), minor(stat.st_rdev)) == TUN {
        return Ok(Some("a network tunnel (/dev/net/tun)".to_owned()));
    }
    // Anonymous files had no type bits before 6.16 and look like regular ones since: ask by name.
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let link = link.to_string_lossy();
    Ok(link
        .strip_prefix("anon_inode:")
        .map(|name| format!("an anonymous file ({name})")))
}

fn domain(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut family = 0_i32;
    let mut length: libc::socklen_t = 4;
    // SAFETY: `family` is the four bytes that `length` announces, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut family).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(family)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn family_name(family: i32) -> String {
    let name = match family {
        libc::AF_INET => "AF_INET",
        libc::AF_INET6 => "AF_INET6",
        libc::AF_PACKET => "AF_PACKET",
        libc::AF_NETLINK => "AF_NETLINK",
        libc::AF_VSOCK => "AF_VSOCK",
        libc::AF_XDP => "AF_XDP",
        other => return format!("address family {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        net::{TcpListener, UdpSocket},
        os::{
            fd::{FromRawFd as _, OwnedFd},
            unix::net::UnixStream,
        },
    };

    use super::*;

    fn verdict(fd: &impl AsFd) -> Option<String> {
        refused(fd.as_fd()).unwrap()
    }

    #[test]
    fn files_pipes_devices_and_unix_sockets_are_handed_on() {
        let (reader, writer) = io::pipe().unwrap();
        let (left, right) = UnixStream::pair().unwrap();
        for fd in [reader.as_fd(), writer.as_fd(), left.as_fd(), right.as_fd()] {
            assert_eq!(verdict(&fd), None);
        }
        for name in ["/dev/null", "/etc/passwd", "/etc"] {
            assert_eq!(verdict(&File::open(name).unwrap()), None, "{name}");
        }
    }

    #[test]
    fn network_sockets_are_refused_by_name() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(verdict(&tcp).as_deref(), Some("a socket (AF_INET)"));
        let Ok(udp) = UdpSocket::bind("[::1]:0") else {
            eprintln!("not tested: the IPv6 half: no ::1");
            return;
        };
        assert_eq!(verdict(&udp).as_deref(), Some("a socket (AF_INET6)"));
    }

    #[test]
    fn anonymous_files_are_refused() {
        // SAFETY: plain numbers; the call touches no memory of ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        assert_eq!(
            verdict(&fd).as_deref(),
            Some("an anonymous file ([eventfd])")
        );
    }

    #[test]
    fn the_message_names_the_mend() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = stream(&tcp, "stdin", "remit run … </dev/null").unwrap_err();
        assert_eq!(
            error.to_string(),
            "stdin is a socket (AF_INET), which the fence does not judge \
             (mend: put a pipe or a file there, as in `remit run … </dev/null`)"
        );
    }
}
