//! The helper: this very binary, started inside the agent's cgroup. It does what it is told, one
//! attempt a line, and says what the kernel answered. It knows no policy and opens no file.

use std::{
    io::{self, BufRead as _, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use nix::sys::{
    prctl,
    socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket},
};

use super::order::{Family, Order, Task, Tried, Way};
use crate::kernel;

/// How long one attempt may take.
pub(super) const PATIENCE: Duration = Duration::from_millis(800);

/// Serves orders on standard input until it ends.
///
/// # Errors
/// When whoever gives the orders is gone.
pub fn serve() -> io::Result<()> {
    // Processes of the agent must not look into it, should they run as the same user.
    prctl::set_dumpable(false)?;
    let mut answers = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let tried = match serde_json::from_str(&line?)? {
            Task::Try(order) => attempt(&order),
            Task::Run { program, packet } => run(&program, &packet),
            Task::Lookup { via, message } => {
                let mut tried = Tried::default();
                let result = look_up(via, &message, &mut tried);
                failed(&mut tried, result);
                tried
            }
        };
        let mut text = serde_json::to_vec(&tried)?;
        text.push(b'\n');
        answers.write_all(&text)?;
        answers.flush()?;
    }
    Ok(())
}

/// The packet is judged as one of a socket that this process made, so as the agent's.
fn run(program: &Path, packet: &[u8]) -> Tried {
    let mut tried = Tried {
        step: "running the program".to_owned(),
        ..Tried::default()
    };
    match kernel::run_pinned(program, packet) {
        Ok((id, verdict)) => {
            tried.program = id;
            tried.heard = verdict == 1;
        }
        Err(error) => tried.errno = error.raw_os_error().unwrap_or(libc::EIO),
    }
    tried
}

fn attempt(order: &Order) -> Tried {
    let mut tried = Tried::default();
    let result = match order.way {
        Way::Tcp => tcp(order, &mut tried),
        Way::Udp => udp(order, false, &mut tried),
        Way::UdpConnected => udp(order, true, &mut tried),
        Way::Raw => raw(order.family, &mut tried),
        Way::OwnTcp => own_tcp(order, &mut tried),
        Way::OwnUdp => own_udp(order, &mut tried),
    };
    failed(&mut tried, result);
    tried
}

/// Notes why, if it went wrong.
fn failed(tried: &mut Tried, result: io::Result<()>) {
    if let Err(error) = result {
        tried.errno = match error.raw_os_error() {
            Some(errno) => errno,
            // `connect_timeout` makes one up for it.
            None if error.kind() == ErrorKind::TimedOut => libc::ETIMEDOUT,
            None => libc::EIO,
        };
    }
}

/// Only the first answer with the question's number counts.
fn look_up(via: SocketAddr, message: &[u8], tried: &mut Tried) -> io::Result<()> {
    step(tried, "bind");
    let socket = unbound(if via.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    })?;
    step(tried, "connect");
    socket.connect(via)?;
    step(tried, "send");
    socket.send(message)?;
    step(tried, "receive");
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    let answer = answer.get(..length).unwrap_or_default();
    if answer.get(..2) == message.get(..2) {
        tried.code = answer.get(3).map(|flags| flags & 0x0f);
    }
    Ok(())
}

fn step(tried: &mut Tried, name: &str) {
    name.clone_into(&mut tried.step);
}

fn tcp(order: &Order, tried: &mut Tried) -> io::Result<()> {
    step(tried, "connect");
    let to = order.family.written(order.to);
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    step(tried, "send");
    stream.write_all(order.nonce.as_bytes())
}

fn unbound(family: Family) -> io::Result<UdpSocket> {
    match family {
        Family::V4 => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
        Family::V6 | Family::Mapped => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
    }
}

fn udp(order: &Order, connected: bool, tried: &mut Tried) -> io::Result<()> {
    step(tried, "bind");
    let socket = unbound(order.family)?;
    let to = order.family.written(order.to);
    if !connected {
        step(tried, "sendto");
        return socket.send_to(order.nonce.as_bytes(), to).map(drop);
    }
    step(tried, "connect");
    socket.connect(to)?;
    step(tried, "send");
    socket.send(order.nonce.as_bytes()).map(drop)
}

fn raw(family: Family, tried: &mut Tried) -> io::Result<()> {
    step(tried, "socket");
    let (family, protocol) = match family {
        Family::V4 => (AddressFamily::Inet, SockProtocol::Raw),
        Family::V6 | Family::Mapped => (AddressFamily::Inet6, SockProtocol::Udp),
    };
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    Ok(())
}

fn own_tcp(order: &Order, tried: &mut Tried) -> io::Result<()> {
    step(tried, "bind");
    let listener = TcpListener::bind((order.to.ip(), 0))?;
    let at = listener.local_addr()?;
    tried.port = at.port();
    step(tried, "connect");
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
    step(tried, "send");
    stream.write_all(order.nonce.as_bytes())?;
    step(tried, "accept");
    listener.set_nonblocking(true)?;
    let (mut arrived, _) = patiently(|| listener.accept())?;
    arrived.set_nonblocking(false)?;
    arrived.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = vec![0; order.nonce.len()];
    step(tried, "receive");
    arrived.read_exact(&mut bytes)?;
    tried.heard = bytes == order.nonce.as_bytes();
    Ok(())
}

fn own_udp(order: &Order, tried: &mut Tried) -> io::Result<()> {
    step(tried, "bind");
    let receiver = UdpSocket::bind((order.to.ip(), 0))?;
    let at: SocketAddr = receiver.local_addr()?;
    tried.port = at.port();
    let sender = unbound(order.family)?;
    step(tried, "sendto");
    sender.send_to(order.nonce.as_bytes(), at)?;
    step(tried, "receive");
    receiver.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = vec![0; order.nonce.len()];
    let (length, _) = receiver.recv_from(&mut bytes)?;
    bytes.truncate(length);
    tried.heard = bytes == order.nonce.as_bytes();
    Ok(())
}

/// Until it does not say that it would block, or the patience ends.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(way: Way, family: Family, to: &str) -> Order {
        Order {
            family,
            way,
            to: to.parse().unwrap(),
            nonce: "0123456789abcdef".to_owned(),
        }
    }

    #[test]
    fn what_arrives_and_what_does_not_is_told_apart() {
        let own = attempt(&order(Way::OwnTcp, Family::V4, "127.0.0.1:0"));
        assert_eq!((own.errno, own.heard), (0, true), "{own:?}");
        let own = attempt(&order(Way::OwnUdp, Family::V4, "127.0.0.1:0"));
        assert_eq!((own.errno, own.heard), (0, true), "{own:?}");
        let closed = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = closed.local_addr().unwrap().to_string();
        drop(closed);
        for family in [Family::V4, Family::Mapped] {
            let refused = attempt(&order(Way::Tcp, family, &at));
            assert_eq!(
                (refused.errno, refused.step.as_str()),
                (libc::ECONNREFUSED, "connect"),
            );
        }
    }
}
