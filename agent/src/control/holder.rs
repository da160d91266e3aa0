//! Whether a process holds the other end of a unix connection. Needed before Linux 6.5 only, where
//! the kernel tells the peer's process by its number, and numbers are given out again.
//!
//! The inode of the other end comes from sock_diag (`UNIX_DIAG_PEER`); the process holds it if one
//! of its descriptors links to `socket:[INODE]`. Start times would not do: a process that got the
//! number between connect and accept started before accept too.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt,
    },
    stat::fstat,
    time::TimeVal,
};

/// `SOCK_DIAG_BY_FAMILY`, linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `UDIAG_SHOW_PEER`, linux/unix_diag.h.
const SHOW_PEER: u32 = 4;
/// `UNIX_DIAG_PEER`, linux/unix_diag.h: the peer's inode.
const PEER: u16 = 2;
/// Bytes of `nlmsghdr` and of `unix_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
/// The answer comes from the kernel within the call; this is for the case that it does not.
const PATIENCE: Duration = Duration::from_secs(1);

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
    let netlink = open()?;
    send(netlink.as_raw_fd(), &request(inode), MsgFlags::empty())?;
    let mut answer = [0; 512];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = answer.get(..length).unwrap_or_default();
    if let Some(errno) = refusal(answer) {
        return Err(io::Error::from_raw_os_error(errno));
    }
    parse(answer, inode).ok_or_else(|| io::Error::other("sock_diag tells no peer"))
}

/// The error number in an `NLMSG_ERROR`. ENOENT about a socket that we hold means that no module
/// answers for unix sockets.
fn refusal(answer: &[u8]) -> Option<i32> {
    const NLMSG_ERROR: u16 = 2;
    let kind = u16::from_ne_bytes(bytes(answer, 4)?);
    let errno = i32::from_ne_bytes(bytes(answer, HEADER)?);
    (kind == NLMSG_ERROR).then_some(-errno)
}

fn open() -> io::Result<OwnedFd> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
    setsockopt(&netlink, sockopt::ReceiveTimeout, &patience)?;
    Ok(netlink)
}

/// A `nlmsghdr` and a `unix_diag_req` for one socket.
fn request(inode: u32) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const LENGTH: u32 = 40;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend(1_u32.to_ne_bytes()); // sequence
    bytes.extend(0_u32.to_ne_bytes()); // port id: the kernel fills it in
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]); // family, protocol, padding
    bytes.extend(u32::MAX.to_ne_bytes()); // every state
    bytes.extend(inode.to_ne_bytes());
    bytes.extend(SHOW_PEER.to_ne_bytes());
    bytes.extend([0xff; 8]); // cookie: not checked
    bytes
}

/// The peer's inode in the answer about `inode`.
fn parse(answer: &[u8], inode: u32) -> Option<u32> {
    let kind = u16::from_ne_bytes(bytes(answer, 4)?);
    let told = u32::from_ne_bytes(bytes(answer, HEADER + 4)?);
    if kind != SOCK_DIAG_BY_FAMILY || told != inode {
        return None;
    }
    let mut attributes = answer.get(HEADER + MESSAGE..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes(attributes, 0)?));
        if u16::from_ne_bytes(bytes(attributes, 2)?) == PEER {
            return Some(u32::from_ne_bytes(bytes(attributes, 4)?));
        }
        // An attribute is at least its own header, and the next begins at a multiple of four.
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
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
        let mut answer = request(7);
        for length in 0..answer.len() {
            assert_eq!(parse(&answer[..length], 7), None);
        }
        answer.extend([0; 64]);
        assert_eq!(parse(&answer, 8), None);
    }
}
