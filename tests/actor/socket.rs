//! A socket of any domain, type and protocol, by plain system calls: what is tested is what the
//! kernel does with them, so nothing may help, retry or hide an error.

use std::{
    io::IoSliceMut,
    mem::{size_of, size_of_val, zeroed},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType,
        SockaddrLike as _, SockaddrStorage, UnixAddr, accept4, bind, connect, getpeername,
        getsockname, listen, recv, recvfrom, recvmsg, sendto, socket, sockopt::SocketError,
    },
};

/// A socket and its domain, which decides how an address is written.
pub struct Socket {
    fd: OwnedFd,
    domain: i32,
}

/// Makes a socket, non-blocking and close-on-exec.
pub fn open(domain: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes three numbers.
    let fd = Errno::result(unsafe { libc::socket(domain, kind | flags, protocol) })?;
    // SAFETY: the kernel has just given out the descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

// === impl Socket ===

impl Socket {
    /// See [`open`].
    pub fn open(domain: i32, kind: i32, protocol: i32) -> nix::Result<Self> {
        let fd = open(domain, kind, protocol)?;
        Ok(Self { fd, domain })
    }

    /// The descriptor.
    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// The address as this socket's domain writes it: IPv4 on an IPv6 socket is v4-mapped.
    pub fn address(&self, addr: SocketAddr) -> SockaddrStorage {
        match addr {
            SocketAddr::V4(v4) if self.domain == libc::AF_INET6 => {
                SockaddrStorage::from(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
            }
            other => SockaddrStorage::from(other),
        }
    }

    /// bind(2).
    pub fn bind(&self, addr: SocketAddr) -> nix::Result<()> {
        self.set_option(libc::SOL_SOCKET, libc::SO_REUSEADDR, &1_i32.to_ne_bytes())?;
        bind(self.fd(), &self.address(addr))
    }

    /// listen(2).
    pub fn listen(&self) -> nix::Result<()> {
        listen(&self.fd, Backlog::new(64)?)
    }

    /// accept(2) with a deadline.
    pub fn accept(&self, timeout_ms: u64) -> nix::Result<Self> {
        self.wait_for(PollFlags::POLLIN, timeout_ms)?;
        let fd = accept4(&self.fd, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        Ok(Self {
            fd,
            domain: self.domain,
        })
    }

    /// setsockopt(2).
    pub fn set_option(&self, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
        // SAFETY: the pointer and the length describe `value`, which outlives the call.
        Errno::result(unsafe {
            libc::setsockopt(
                self.fd(),
                level,
                name,
                value.as_ptr().cast(),
                value.len() as libc::socklen_t,
            )
        })
        .map(drop)
    }

    /// connect(2), settled or ETIMEDOUT.
    pub fn connect(&self, addr: SocketAddr, timeout_ms: u64) -> nix::Result<()> {
        match connect(self.fd(), &self.address(addr)) {
            Err(Errno::EINPROGRESS) => {}
            other => return other,
        }
        self.wait_for(PollFlags::POLLOUT, timeout_ms)?;
        match nix::sys::socket::getsockopt(&self.fd, SocketError)? {
            0 => Ok(()),
            errno => Err(Errno::from_raw(errno)),
        }
    }

    /// send(2).
    pub fn send(&self, data: &[u8]) -> nix::Result<usize> {
        nix::sys::socket::send(self.fd(), data, MsgFlags::MSG_NOSIGNAL)
    }

    /// sendto(2).
    pub fn send_to(&self, addr: SocketAddr, data: &[u8], flags: i32) -> nix::Result<usize> {
        let flags = MsgFlags::from_bits_retain(flags | libc::MSG_NOSIGNAL);
        sendto(self.fd(), data, &self.address(addr), flags)
    }

    /// sendmmsg(2): one message to each address.
    pub fn send_many(&self, addrs: &[SocketAddr], data: &[u8]) -> nix::Result<usize> {
        let mut names: Vec<SockaddrStorage> =
            addrs.iter().map(|addr| self.address(*addr)).collect();
        let mut slice = libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        };
        let mut headers: Vec<libc::mmsghdr> = names
            .iter_mut()
            .map(|name| {
                // SAFETY: all zeros is a valid, empty header.
                let mut header: libc::mmsghdr = unsafe { zeroed() };
                header.msg_hdr.msg_name = name.as_ptr().cast_mut().cast();
                header.msg_hdr.msg_namelen = name.len();
                header.msg_hdr.msg_iov = &raw mut slice;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        // SAFETY: the headers point to `names` and `slice`, which outlive the call, and the
        // kernel only reads what they name.
        let sent = Errno::result(unsafe {
            libc::sendmmsg(
                self.fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_NOSIGNAL as _,
            )
        })?;
        usize::try_from(sent).map_err(|_| Errno::EIO)
    }

    /// recv(2) with a deadline.
    pub fn recv(&self, timeout_ms: u64) -> nix::Result<Vec<u8>> {
        self.wait_for(PollFlags::POLLIN, timeout_ms)?;
        let mut buffer = vec![0; 65_536];
        let length = recv(self.fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }

    /// recvfrom(2) with a deadline.
    pub fn recv_from(&self, timeout_ms: u64) -> nix::Result<(Vec<u8>, SocketAddr)> {
        self.wait_for(PollFlags::POLLIN, timeout_ms)?;
        let mut buffer = vec![0; 65_536];
        let (length, from) = recvfrom::<SockaddrStorage>(self.fd(), &mut buffer)?;
        buffer.truncate(length);
        let from = from.as_ref().and_then(inet).ok_or(Errno::EAFNOSUPPORT)?;
        Ok((buffer, from))
    }

    /// getpeername(2).
    pub fn peer_addr(&self) -> nix::Result<SocketAddr> {
        let name: SockaddrStorage = getpeername(self.fd())?;
        inet(&name).ok_or(Errno::EAFNOSUPPORT)
    }

    /// getsockname(2).
    pub fn local_addr(&self) -> nix::Result<SocketAddr> {
        let name: SockaddrStorage = getsockname(self.fd())?;
        inet(&name).ok_or(Errno::EAFNOSUPPORT)
    }

    /// sendto(2) on a packet socket (SOCK_DGRAM): the kernel writes the link header.
    pub fn send_frame(&self, device: i32, ethertype: u16, data: &[u8]) -> nix::Result<usize> {
        // SAFETY: all zeros is a valid address.
        let mut to: libc::sockaddr_ll = unsafe { zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = ethertype.to_be();
        to.sll_ifindex = device;
        to.sll_halen = 6;
        // SAFETY: pointers and lengths describe `data` and `to`, which outlive the call.
        let sent = Errno::result(unsafe {
            libc::sendto(
                self.fd(),
                data.as_ptr().cast(),
                data.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        })?;
        usize::try_from(sent).map_err(|_| Errno::EIO)
    }

    /// Connects to a unix socket and takes the descriptor that comes with its first byte.
    pub fn receive(path: &str) -> nix::Result<Self> {
        let unix = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        connect(unix.as_raw_fd(), &UnixAddr::new(path)?)?;
        let mut byte = [0];
        let mut slices = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!(i32);
        let message = recvmsg::<UnixAddr>(
            unix.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control
                && let Some(fd) = fds.first()
            {
                // SAFETY: the kernel has just installed the descriptor for this process alone.
                let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
                let domain = domain_of(&fd)?;
                return Ok(Self { fd, domain });
            }
        }
        Err(Errno::EPROTO)
    }

    fn wait_for(&self, flags: PollFlags, timeout_ms: u64) -> nix::Result<()> {
        let until = Instant::now() + Duration::from_millis(timeout_ms);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), flags)], left) {
                Ok(0) => return Err(Errno::ETIMEDOUT),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// An internet address.
fn inet(name: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = name.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    let v6 = name.as_sockaddr_in6()?;
    Some(SocketAddrV6::new(v6.ip(), v6.port(), 0, 0).into())
}

fn domain_of(fd: &OwnedFd) -> nix::Result<i32> {
    let mut domain = 0_i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the pointers describe `domain` and `length`, which outlive the call.
    Errno::result(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut domain).cast(),
            &raw mut length,
        )
    })?;
    Ok(domain)
}
