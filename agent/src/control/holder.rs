//! Whether a process holds the other end of a unix connection. Needed before Linux 6.5 only, where
//! the kernel tells the peer's process by its number, and numbers are given out again.
//!
//! The inode of the other end comes from sock_diag (`UNIX_DIAG_PEER`); the process holds it if one
//! of its descriptors links to `socket:[INODE]`. Start times would not do: a process that got the
//! number between connect and accept started before accept too.

use std::{fs, io, os::fd::BorrowedFd};

use nix::sys::stat::fstat;

use crate::netlink::{More, SOCK_DIAG_BY_FAMILY, SockDiag, attributes, word};

/// `UDIAG_SHOW_PEER`, linux/unix_diag.h.
const SHOW_PEER: u32 = 4;
/// `UNIX_DIAG_PEER`, linux/unix_diag.h: the peer's inode.
const PEER: u16 = 2;
/// Bytes of `unix_diag_msg`.
const MESSAGE: usize = 16;

/// Whether `pid` has a descriptor of the peer of `connection`. None where the kernel has no
/// unix_diag (a module that may be missing), so that nobody can tell.
pub(super) fn holds_other_end(pid: i32, connection: BorrowedFd<'_>) -> Option<bool> {
    match peer_inode(connection) {
        Ok(inode) => Some(holds(pid, inode)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(_) => Some(false),
    }
}

fn holds(pid: i32, inode: u32) -> bool {
    let wanted = format!("socket:[{inode}]");
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|link| link.as_os_str() == wanted.as_str())
}

fn peer_inode(connection: BorrowedFd<'_>) -> io::Result<u32> {
    let inode = u32::try_from(fstat(connection)?.st_ino).map_err(io::Error::other)?;
    let mut peer = None;
    // ENOENT about a socket that we hold means that no module answers for unix sockets.
    SockDiag::open()?.ask(SOCK_DIAG_BY_FAMILY, 0, &request(inode), |answer| {
        peer = parse(answer, inode);
        More::Enough
    })?;
    peer.ok_or_else(|| io::Error::other("sock_diag tells no peer"))
}

/// A `unix_diag_req` for one socket.
fn request(inode: u32) -> Vec<u8> {
    let mut bytes = vec![libc::AF_UNIX as u8, 0, 0, 0]; // family, protocol, padding
    bytes.extend(u32::MAX.to_ne_bytes()); // every state
    bytes.extend(inode.to_ne_bytes());
    bytes.extend(SHOW_PEER.to_ne_bytes());
    bytes.extend([0xff; 8]); // cookie: not checked
    bytes
}

/// The peer's inode in the answer about `inode`.
fn parse(answer: &[u8], inode: u32) -> Option<u32> {
    if word(answer, 4)? != inode {
        return None;
    }
    attributes(answer.get(MESSAGE..)?)
        .find(|(kind, _)| *kind == PEER)
        .and_then(|(_, value)| word(value, 0))
}

#[cfg(test)]
mod tests {
    use std::os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    #[test]
    fn the_holder_of_the_other_end_is_told_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (accepted, _) = listener.accept().unwrap();

        let inode = peer_inode(accepted.as_fd()).unwrap();
        assert_eq!(u64::from(inode), fstat(&client).unwrap().st_ino);
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(holds_other_end(own, accepted.as_fd()), Some(true));

        // A process with no descriptor of it: what a reused number would lead to.
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let held = holds_other_end(i32::try_from(other.id()).unwrap(), accepted.as_fd());
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(held, Some(false));

        drop(client);
        assert_eq!(holds_other_end(own, accepted.as_fd()), Some(false));
    }

    #[test]
    fn a_torn_answer_tells_nothing() {
        let mut answer = vec![libc::AF_UNIX as u8, 1, 1, 0];
        answer.extend(7_u32.to_ne_bytes());
        answer.extend([0; 8]);
        answer.extend([8, 0, PEER as u8, 0]);
        answer.extend(9_u32.to_ne_bytes());
        assert_eq!(parse(&answer, 7), Some(9));
        for length in 0..answer.len() {
            assert_eq!(parse(&answer[..length], 7), None);
        }
        assert_eq!(parse(&answer, 8), None);
    }
}
