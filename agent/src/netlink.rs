//! The frame of netlink: a socket that listens to the kernel alone, messages, attributes. Knows
//! nothing of what they mean. By hand, for of all that netlink can do three requests are made here,
//! and the crate for sock_diag knows neither a socket's cgroup nor how to be sure who answers.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvfrom, sendto,
        setsockopt, socket, sockopt,
    },
    time::TimeVal,
};

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY`, linux/sock_diag.h.
pub const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// See [`SOCK_DIAG_BY_FAMILY`].
pub const SOCK_DESTROY: u16 = 21;
/// Flags of a request, linux/netlink.h.
pub const NLM_F_REQUEST: u16 = 1;
/// An answer is wanted also when all went well.
pub const NLM_F_ACK: u16 = 4;
/// All that fits is wanted.
pub const NLM_F_DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Bytes of `nlmsghdr` and of `nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
/// Attribute types carry two flags on top, `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_MASK: u16 = 0x3fff;
/// The kernel fills no more than this in one go (`netlink_dump`).
const BUFFER: usize = 32 * 1024;
/// Answers come from the kernel within the call; this is for the case that they do not.
const PATIENCE: Duration = Duration::from_secs(1);
/// Messages from others than the kernel that are passed over.
const STRANGERS: u32 = 1000;

/// A `NETLINK_SOCK_DIAG` socket. It asks about the network namespace in which it was opened,
/// whichever thread uses it afterwards.
#[derive(Debug)]
pub struct SockDiag {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

/// One message: its type and what follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// The end of a dump, or an answer of no content: 0 or an error number.
    End(i32),
    /// Content.
    Content(&'a [u8]),
    /// Of an earlier request, whose answer nobody waited for.
    Late,
}

// === impl SockDiag ===

impl SockDiag {
    /// Opens one in the namespace of the calling thread.
    ///
    /// # Errors
    /// Those of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&netlink, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self {
            socket: netlink,
            buffer: vec![0; BUFFER],
            sequence: 0,
        })
    }

    /// Puts a request and hands each content of the answer to `each`, until the kernel says that
    /// this was all, or `each` says that it has enough.
    ///
    /// # Errors
    /// The kernel's error number, or why the answer could not be had.
    pub fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]) -> More,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let request = request(kind, flags, sequence, body)?;
        let fd = self.socket.as_raw_fd();
        let kernel = NetlinkAddr::new(0, 0);
        sendto(fd, &request, &kernel, MsgFlags::empty())?;
        let mut strangers = 0;
        loop {
            let (length, from) = match recvfrom::<NetlinkAddr>(fd, &mut self.buffer) {
                Ok(received) => received,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            // Whoever is root in that namespace can send here, too.
            if from.is_none_or(|from| from.pid() != 0) {
                strangers += 1;
                if strangers > STRANGERS {
                    return Err(io::Error::other("others than the kernel keep answering"));
                }
                continue;
            }
            let answer = self.buffer.get(..length).unwrap_or_default();
            for message in messages(answer, kind, sequence) {
                match message? {
                    Message::Late => {}
                    Message::End(0) => return Ok(()),
                    Message::End(errno) => return Err(io::Error::from_raw_os_error(errno)),
                    Message::Content(content) => {
                        if matches!(each(content), More::Enough) {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}

/// Whether more is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum More {
    /// Go on.
    Wanted,
    /// The answer is complete.
    Enough,
}

fn request(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes()); // port id: the kernel fills it in
    bytes.extend(body);
    Ok(bytes)
}

/// The messages in what was received; one that is torn or answers something else is an error, and
/// the last.
fn messages(
    mut bytes: &[u8],
    kind: u16,
    sequence: u32,
) -> impl Iterator<Item = io::Result<Message<'_>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let (message, rest) = match next(bytes, kind, sequence) {
            Some((message, rest)) => (Ok(message), rest),
            None => (
                Err(io::Error::other("the kernel's answer cannot be read")),
                <&[u8]>::default(),
            ),
        };
        bytes = rest;
        Some(message)
    })
}

fn next(bytes: &[u8], wanted: u16, sequence: u32) -> Option<(Message<'_>, &[u8])> {
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    let kind = half(bytes, 4)?;
    let told = word(bytes, 8)?;
    let body = bytes.get(HEADER..length)?;
    let message = match kind {
        _ if told != sequence => Message::Late,
        NLMSG_ERROR => Message::End(word(body, 0)?.cast_signed().checked_neg()?),
        // Kernels tell there what stopped a dump; none has to.
        NLMSG_DONE => Message::End(
            word(body, 0)
                .unwrap_or_default()
                .cast_signed()
                .checked_neg()?,
        ),
        _ if kind == wanted => Message::Content(body),
        _ => return None,
    };
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((message, rest))
}

/// Type and content of each attribute; what is torn ends them.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?);
        let kind = half(bytes, 2)? & TYPE_MASK;
        let content = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

/// `N` bytes at `at`, if they are there.
pub fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// 16 bits of the host's order.
pub fn half(from: &[u8], at: usize) -> Option<u16> {
    bytes(from, at).map(u16::from_ne_bytes)
}

/// 32 bits of the host's order.
pub fn word(from: &[u8], at: usize) -> Option<u32> {
    bytes(from, at).map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = request(kind, 0, 7, body).unwrap();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Vec<Option<Message<'_>>> {
        messages(bytes, SOCK_DIAG_BY_FAMILY, 7)
            .map(Result::ok)
            .collect()
    }

    #[test]
    fn messages_are_taken_apart() {
        let mut bytes = message(SOCK_DIAG_BY_FAMILY, b"abcde");
        bytes.extend(message(SOCK_DIAG_BY_FAMILY, b""));
        bytes.extend(message(NLMSG_DONE, &(-2_i32).to_ne_bytes()));
        assert_eq!(
            read(&bytes),
            [
                Some(Message::Content(b"abcde")),
                Some(Message::Content(b"")),
                Some(Message::End(2)),
            ]
        );
        assert_eq!(read(&message(NLMSG_DONE, b"")), [Some(Message::End(0))]);
        assert_eq!(
            read(&message(NLMSG_ERROR, &(-95_i32).to_ne_bytes())),
            [Some(Message::End(95))]
        );
    }

    #[test]
    fn what_is_torn_or_about_something_else_is_an_error() {
        let whole = message(SOCK_DIAG_BY_FAMILY, b"abcd");
        for length in 1..whole.len() {
            assert_eq!(read(&whole[..length]), [None], "{length}");
        }
        assert_eq!(read(&message(16, b"abcd")), [None]);
        assert_eq!(read(&message(NLMSG_ERROR, b"ab")), [None]);
        assert_eq!(read(&message(NLMSG_ERROR, &i32::MIN.to_ne_bytes())), [None]);
        let mut late = whole.clone();
        late[8] ^= 1;
        assert_eq!(read(&late), [Some(Message::Late)]);
        // A length of less than a header, which would never end.
        let mut short = whole;
        short[0] = 4;
        assert_eq!(read(&short), [None]);
    }

    #[test]
    fn attributes_end_where_they_are_torn() {
        let mut bytes = vec![5, 0, 8, 0, 9, 0, 0, 0];
        bytes.extend([12, 0, 21, 0]);
        bytes.extend(77_u64.to_ne_bytes());
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(8, &[9][..]), (21, 77_u64.to_ne_bytes().as_slice())]);
        assert_eq!(attributes(&bytes[..19]).count(), 1);
        assert_eq!(attributes(&[0, 0, 8, 0]).count(), 0);
        assert_eq!(attributes(&[3, 0, 8, 0]).count(), 0);
    }
}
