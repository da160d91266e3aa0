//! TCP connections that a change leaves without a grant: their programs are told at once, and no
//! other connection ends with them.

use std::{
    net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, socket,
};

use crate::{
    actor::Op,
    harness::{Case, Need, Outcome},
    support::{
        Actor, Agent, Ctx, Family, Fixture, claim, eventually, expect,
        listener::{accept, expect_bytes, expect_silence},
        netlink,
        network::{IN_V4, IN_V6},
        way::PAYLOAD,
    },
};

/// In scope, and still so when the first one is not.
const STAYS_V4: &str = "198.51.100.20";
const STAYS_V6: &str = "2001:db8:1::11";
/// The program must know within this time after the change.
const AT_ONCE: Duration = Duration::from_secs(1);

const MPTCP: Need = Need::Socket(
    "MPTCP",
    libc::AF_INET,
    libc::SOCK_STREAM,
    libc::IPPROTO_MPTCP,
);

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("ends_after_narrowing", |ctx| {
            ends(ctx, "out_of_scope", &|_| Agent::new("alpha"))
        }),
        case("ends_after_a_deny", |ctx| {
            ends(ctx, "denied", &|to| {
                Agent::standard("alpha").deny(&to.ip().to_string())
            })
        }),
        case("ends_after_suspension", |ctx| {
            ends(ctx, "suspended", &|_| {
                Agent::standard("alpha").state("suspended")
            })
        }),
        case("ends_with_the_registry_entry", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let mut open = Open::to(&mut actor, Family::V4, to)?;
            open.wait(&mut actor)?;
            std::fs::remove_file(fx.place().at("agents.d/alpha.toml"))?;
            expect("exit code", fx.place().remit(&["reload"])?.code, 0)?;
            open.ended(&mut actor)
        }),
        case("ends_when_its_client_is_not_served_any_more", |ctx| {
            let serving = |from: &str| Agent::new("alpha").serve("8080", from);
            let mut fx = Fixture::start(ctx, &[serving(r#""10.0.0.0/8""#)])?;
            let mut actor = fx.actor("alpha")?;
            let (id, client) = served(&mut fx, &mut actor)?;
            actor.tell(&recv(id))?;
            fx.change(&serving(r#""192.0.2.0/24""#))?;
            told(&mut actor)?;
            // Its client never learns more than that nothing comes.
            let got = fx.outside().ask(&Op::Recv {
                id: client,
                timeout_ms: 300,
            })?;
            expect("errno of the client", got.errno, libc::ETIMEDOUT)
        }),
        case("lives_on_in_monitor_mode", |ctx| {
            let fx = Fixture::start(ctx, &[Agent::standard("alpha").monitor()])?;
            let mut actor = fx.actor("alpha")?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let mut open = Open::to(&mut actor, Family::V4, to)?;
            fx.change(&Agent::new("alpha").monitor())?;
            open.lives(&mut actor)
        }),
        case("ends_in_a_network_namespace_of_its_own", own_namespace),
        case("ends_while_it_connects", connecting),
        case("lives_on_while_it_connects_to_its_own", connecting_to_own),
        case("ends_where_mptcp_fell_back_to_it", fallen_back).needs(MPTCP),
        case("of_mptcp_goes_silent", silent).needs(MPTCP),
    ];
    for family in Family::ALL {
        cases.push(case(
            &format!("of_{}_loopback_ends_unless_it_is_its_own", family.name()),
            move |ctx| loopback(ctx, family),
        ));
        cases.push(case(
            &format!("of_{}_lives_on_beside_what_ends", family.name()),
            move |ctx| neighbours(ctx, family),
        ));
    }
    cases
}

/// A case that needs a kernel which can end connections.
fn case(name: &str, run: impl Fn(&Ctx) -> Result<()> + 'static) -> Case {
    Case::with_outcome(format!("change::open_tcp_{name}"), move |ctx| {
        if let Some(missing) = cannot_end()? {
            return Ok(Outcome::NotTested(missing));
        }
        run(ctx).map(|()| Outcome::Passed)
    })
}

/// Why this kernel cannot end a connection; found out on one outside of any fence.
fn cannot_end() -> Result<Option<String>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) =
        (stream.local_addr()?, stream.peer_addr()?)
    else {
        bail!("not an IPv4 connection");
    };
    let tried: std::io::Result<()> = netlink::destroy(local, remote);
    let tried = match tried {
        Ok(()) => return Ok(None),
        Err(error) => error,
    };
    match tried.raw_os_error() {
        Some(libc::ENOENT) => Ok(Some("no tcp_diag in this kernel".to_owned())),
        Some(libc::EOPNOTSUPP) => Ok(Some("no CONFIG_INET_DIAG_DESTROY".to_owned())),
        _ => Err(tried).context("cannot find out whether this kernel ends connections"),
    }
}

/// An open connection of an actor, and its other end, which is ours.
struct Open {
    id: usize,
    stream: TcpStream,
}

impl Open {
    /// A listener on `to`, a connection to it, and bytes that arrive.
    fn to(actor: &mut Actor, family: Family, to: SocketAddr) -> Result<Self> {
        let listener = listener(to)?;
        Self::at(actor, family, to, &listener)
    }

    fn at(
        actor: &mut Actor,
        family: Family,
        to: SocketAddr,
        listener: &TcpListener,
    ) -> Result<Self> {
        let id = actor.socket(family.domain(), libc::SOCK_STREAM, 0)?;
        actor.must(&connect(id, to))?;
        let stream = accept(listener, 3000)?;
        let mut open = Self { id, stream };
        open.lives(actor).context("before the change")?;
        Ok(open)
    }

    /// Lets the actor wait for bytes.
    fn wait(&self, actor: &mut Actor) -> Result<()> {
        actor.tell(&recv(self.id))
    }

    /// The waiting actor was told, nothing can be sent, and the other end hears nothing. That one
    /// stays open: its own end would be a packet, too.
    fn ended(&mut self, actor: &mut Actor) -> Result<()> {
        told(actor)?;
        let sent = actor.ask(&send(self.id))?.errno;
        claim([libc::EPIPE, libc::ECONNABORTED].contains(&sent), || {
            format!("errno of a send afterwards: {sent}")
        })?;
        expect_silence(&mut self.stream, 300)
    }

    /// Bytes go both ways.
    fn lives(&mut self, actor: &mut Actor) -> Result<()> {
        use std::io::Write as _;
        actor.must(&send(self.id))?;
        expect_bytes(&mut self.stream, PAYLOAD)?;
        self.stream.write_all(PAYLOAD)?;
        let got = actor.ask(&recv(self.id))?;
        expect("bytes back", got.data.as_slice(), PAYLOAD)
    }
}

/// The actor, waiting in `recv` or `connect`, gets ECONNABORTED at once.
fn told(actor: &mut Actor) -> Result<()> {
    let since = Instant::now();
    let reply = actor.hear()?;
    let took = since.elapsed();
    expect("errno of the waiting call", reply.errno, libc::ECONNABORTED)?;
    claim(took < AT_ONCE, || format!("told only after {took:?}"))
}

/// One connection of each family, ended by what becomes of the entry.
fn ends(ctx: &Ctx, reason: &str, after: &dyn Fn(SocketAddr) -> Agent) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let mut actor = fx.actor("alpha")?;
    for family in Family::ALL {
        let to = family.pick(IN_V4, IN_V6, 443)?;
        fx.change(&Agent::standard("alpha"))?;
        let mut open = Open::to(&mut actor, family, to)?;
        let before = fx.violations()?.len();
        open.wait(&mut actor)?;
        settle(&mut fx)?;
        fx.change(&after(to))?;
        open.ended(&mut actor).context(family.name())?;
        expect("packets after the change", fx.seen_at(to.ip())?, 0)?;
        // The kernel's reset, which egress refuses like any packet.
        fx.await_line(before, "alpha", |line| {
            line.text("/unmapped/reason") == reason
                && line.text("/unmapped/hook") == "cgroup_skb/egress"
        })?;
    }
    expect(
        "posture",
        fx.place().status()?.0["posture"].as_str(),
        Some("enforcing"),
    )?;
    fx.reconcile("alpha")
}

/// Beside the one that ends: the same agent's in scope, on loopback and served; another agent's and
/// one outside of the fence to the same destination.
fn neighbours(ctx: &Ctx, family: Family) -> Result<()> {
    let alpha = || Agent::standard("alpha").serve("8080", r#""10.0.0.0/8""#);
    let mut fx = Fixture::start(ctx, &[alpha(), Agent::standard("beta")])?;
    let (mut actor, mut second) = (fx.actor("alpha")?, fx.actor("alpha")?);
    let mut beta = fx.actor("beta")?;
    let to = family.pick(IN_V4, IN_V6, 443)?;
    let shared = listener(to)?;
    let mut doomed = Open::at(&mut actor, family, to, &shared)?;
    let mut others = Open::at(&mut beta, family, to, &shared)?;
    let mut outside = Open::at(fx.outside(), family, to, &shared)?;
    let stays = family.pick(STAYS_V4, STAYS_V6, 443)?;
    let mut in_scope = Open::to(&mut second, family, stays)?;
    let (one, other) = own_pair(&mut actor, &mut second, family)?;
    let (accepted, client) = served(&mut fx, &mut second)?;

    doomed.wait(&mut actor)?;
    fx.change(&alpha().deny(&to.ip().to_string()))?;
    doomed.ended(&mut actor)?;

    others.lives(&mut beta).context("another agent's")?;
    outside.lives(fx.outside()).context("one outside")?;
    in_scope.lives(&mut second).context("one in scope")?;
    answers(&mut actor, one, &mut second, other).context("its own, on loopback")?;
    answers(&mut second, other, &mut actor, one).context("its own, backwards")?;
    answers(&mut second, accepted, fx.outside(), client).context("a served one")?;
    fx.reconcile("alpha")?;
    expect(
        "denied to beta",
        fx.place().status()?.denied("beta", None)?,
        0,
    )
}

fn loopback(ctx: &Ctx, family: Family) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::new("alpha").loopback("any")])?;
    let (mut actor, mut second) = (fx.actor("alpha")?, fx.actor("alpha")?);
    let foreign = family.pick("127.0.0.1", "::1", 7701)?;
    let mut open = Open::to(&mut actor, family, foreign)?;
    let (one, other) = own_pair(&mut actor, &mut second, family)?;
    open.wait(&mut actor)?;
    fx.change(&Agent::new("alpha").loopback("own"))?;
    open.ended(&mut actor)?;
    answers(&mut actor, one, &mut second, other)?;
    answers(&mut second, other, &mut actor, one)?;
    // When it may not reach its own either, both ends are told.
    actor.tell(&recv(one))?;
    second.tell(&recv(other))?;
    fx.change(&Agent::new("alpha").loopback("none"))?;
    told(&mut actor)?;
    told(&mut second)
}

fn own_namespace(ctx: &Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let (mut actor, mut outside) = (fx.actor("alpha")?, Actor::spawn(None)?);
    actor.must(&Op::NewNetwork {
        addrs: vec![("198.51.100.1".parse()?, 24), (IN_V6.parse()?, 128)],
    })?;
    outside.must(&Op::EnterNetwork { pid: actor.pid() })?;
    for family in Family::ALL {
        fx.change(&Agent::standard("alpha"))?;
        let to = family.pick(IN_V4, IN_V6, 443)?;
        let (listening, _) = outside.listen(to)?;
        let id = actor.socket(family.domain(), libc::SOCK_STREAM, 0)?;
        actor.must(&connect(id, to))?;
        let accepted = accept_by(&mut outside, listening)?;
        answers(&mut actor, id, &mut outside, accepted)?;
        actor.tell(&recv(id))?;
        fx.change(&Agent::new("alpha"))?;
        told(&mut actor).context(family.name())?;
        for id in [listening, accepted] {
            outside.must(&Op::Close { id })?;
        }
    }
    Ok(())
}

/// A destination that does not answer: its queue is full.
fn connecting(ctx: &Ctx) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let mut actor = fx.actor("alpha")?;
    let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
    let _full = FullListener::start(to)?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    fx.wire.drain()?;
    actor.tell(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 10_000,
    })?;
    eventually(5, || {
        let sent = fx.seen_at(to.ip())?;
        claim(sent > 0, || "no SYN on the wire".to_owned())
    })?;
    fx.change(&Agent::new("alpha"))?;
    told(&mut actor)
}

/// The same on loopback, where the agent's own listener is the slow one.
fn connecting_to_own(ctx: &Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let (mut actor, mut server) = (fx.actor("alpha")?, fx.actor("alpha")?);
    let (listening, to) = server.listen("127.0.0.1:0".parse()?)?;
    // Sixty-four wait to be accepted, and one more.
    for _ in 0..65 {
        let id = server.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        server.must(&connect(id, to))?;
    }
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    actor.tell(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 10_000,
    })?;
    sleep(Duration::from_millis(300));
    fx.change(&Agent::new("alpha"))?;
    for _ in 0..65 {
        accept_by(&mut server, listening)?;
    }
    expect("errno of the connect", actor.hear()?.errno, 0)
}

/// An MPTCP socket whose peer speaks TCP alone is told what its only subflow is told.
fn fallen_back(ctx: &Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let (mut actor, mut outside) = (fx.actor("alpha")?, Actor::spawn(None)?);
    let (id, _) = mptcp(&mut actor, &mut outside, 0)?;
    actor.tell(&recv(id))?;
    fx.change(&Agent::new("alpha"))?;
    told(&mut actor)
}

/// Otherwise a subflow's end is not the connection's: another one may follow, so the program is not
/// told, and no kernel ends the whole at request. Nothing passes all the same.
fn silent(ctx: &Ctx) -> Result<()> {
    let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
    let (mut actor, mut outside) = (fx.actor("alpha")?, Actor::spawn(None)?);
    let (id, accepted) = mptcp(&mut actor, &mut outside, libc::IPPROTO_MPTCP)?;
    settle(&mut fx)?;
    fx.change(&Agent::new("alpha"))?;
    actor.ask(&send(id))?;
    let got = outside.ask(&Op::Recv {
        id: accepted,
        timeout_ms: 1000,
    })?;
    expect("bytes after the change", got.data.len(), 0)?;
    expect("packets after the change", fx.seen_at(IN_V4.parse()?)?, 0)
}

/// An MPTCP connection to a server outside that speaks `protocol`: the sockets at both ends.
fn mptcp(actor: &mut Actor, outside: &mut Actor, protocol: i32) -> Result<(usize, usize)> {
    let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
    let listening = outside.socket(libc::AF_INET, libc::SOCK_STREAM, protocol)?;
    outside.must(&Op::Bind {
        id: listening,
        addr: to,
    })?;
    outside.must(&Op::Listen { id: listening })?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?;
    actor.must(&connect(id, to))?;
    let accepted = accept_by(outside, listening)?;
    answers(actor, id, outside, accepted)?;
    answers(outside, accepted, actor, id)?;
    Ok((id, accepted))
}

/// Lets delayed acknowledgements of what went before pass, and forgets them.
fn settle(fx: &mut Fixture) -> Result<()> {
    sleep(Duration::from_millis(200));
    fx.wire.drain().map(drop)
}

/// A listener that takes no client any more.
struct FullListener {
    _fd: std::os::fd::OwnedFd,
    _waiting: Vec<TcpStream>,
}

impl FullListener {
    fn start(to: SocketAddr) -> Result<Self> {
        let fd = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        listen(&fd, Backlog::new(0)?)?;
        // The queue takes one more than its length.
        let waiting = vec![TcpStream::connect(to)?];
        Ok(Self {
            _fd: fd,
            _waiting: waiting,
        })
    }
}

fn listener(to: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(to).with_context(|| format!("cannot listen on {to}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A connection on loopback between two processes of an agent: the sockets at both ends.
fn own_pair(server: &mut Actor, client: &mut Actor, family: Family) -> Result<(usize, usize)> {
    let any = match family {
        Family::V4 => "127.0.0.1:0",
        Family::V6 => "[::1]:0",
        Family::Mapped => "[::]:0",
    };
    let (listening, at) = server.listen(any.parse()?)?;
    let id = client.socket(family.domain(), libc::SOCK_STREAM, 0)?;
    let to = family.pick("127.0.0.1", "::1", at.port())?;
    client.must(&connect(id, to))?;
    let accepted = accept_by(server, listening)?;
    answers(server, accepted, client, id)?;
    Ok((accepted, id))
}

/// A client from 10.0.0.5, outside of the fence: the agent's socket, and the client's.
fn served(fx: &mut Fixture, actor: &mut Actor) -> Result<(usize, usize)> {
    let (listening, _) = actor.listen("0.0.0.0:8080".parse()?)?;
    let client = fx.outside().bound(
        SocketAddrV4::new("10.0.0.5".parse()?, 0).into(),
        libc::SOCK_STREAM,
    )?;
    fx.outside()
        .must(&connect(client, "198.51.100.30:8080".parse()?))?;
    let accepted = accept_by(actor, listening)?;
    answers(actor, accepted, fx.outside(), client)?;
    Ok((accepted, client))
}

/// Bytes go from one actor's socket to another's.
fn answers(from: &mut Actor, sender: usize, to: &mut Actor, receiver: usize) -> Result<()> {
    from.must(&send(sender))?;
    let got = to.ask(&recv(receiver))?;
    expect("bytes at the other end", got.data.as_slice(), PAYLOAD)
}

fn accept_by(actor: &mut Actor, id: usize) -> Result<usize> {
    actor.must(&Op::Accept {
        id,
        timeout_ms: 3000,
    })
}

fn connect(id: usize, addr: SocketAddr) -> Op {
    Op::Connect {
        id,
        addr,
        timeout_ms: 3000,
    }
}

fn send(id: usize) -> Op {
    Op::Send {
        id,
        data: PAYLOAD.to_vec(),
    }
}

fn recv(id: usize) -> Op {
    Op::Recv {
        id,
        timeout_ms: 10_000,
    }
}
