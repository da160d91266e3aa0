//! A second, naive reading of the contract against the compiler and the verdict: scopes and
//! questions are generated from a universe so small that overlaps are the rule, the model walks
//! the entries one by one, and both have to say the same, down to the entry that decides.
//!
//! `PROPTEST_CASES` sets how many scopes are tried, each with [`QUESTIONS`] questions.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its input has failed"
)]

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use agent_ebpf::{
    abi::{Hook, LOOPBACK_ENTRY, NO_ENTRY},
    decide::{Decision, Peer, decide},
};
use proptest::{prelude::*, sample::select};
use remit::policy::{
    AgentTables, Clock, Compilation, MemoryRules, Question, Source, SourceKind, compile,
};

const SCOPES: u32 = 3_000;
const QUESTIONS: usize = 24;
/// 2026-10-01T00:00:00Z.
const NOW: i64 = 1_790_812_800_000;
const CLOCK: Clock = Clock::at(1 << 60, NOW);

// === the universe ===

const ADDRESSES: &[&str] = &[
    "10.0.0.0",
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "10.0.0.4",
    "10.0.1.1",
    "11.0.0.1",
    "0.0.0.0",
    "127.0.0.1",
    "127.0.0.2",
    "126.255.255.255",
    "128.0.0.1",
    "224.0.0.1",
    "224.0.0.2",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.254",
    "255.255.255.255",
    "169.254.0.1",
    "169.254.0.2",
    "169.254.169.254",
    "169.254.170.2",
    "169.253.0.1",
    "::",
    "::1",
    "::2",
    "2001:db8::",
    "2001:db8::1",
    "2001:db8::2",
    "2001:db8:1::1",
    "fe80::1",
    "fe80::2",
    "fd00:ec2::254",
    "fd00:ec2::253",
    "ff02::1",
    "ff05::2",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::10.0.0.2",
    "64:ff9b::127.0.0.1",
    "64:ff9b::224.0.0.1",
    "2002:a00:1::1",
    "2002:a9fe:a9fe::1",
    "::10.0.0.1",
    "::169.254.0.1",
];
const V4_LENGTHS: &[u8] = &[0, 1, 3, 4, 5, 7, 8, 15, 16, 24, 29, 30, 31, 32];
const V6_LENGTHS: &[u8] = &[
    0, 1, 3, 7, 8, 9, 10, 16, 32, 64, 95, 96, 97, 104, 120, 124, 127, 128,
];
const PORTS: &[&str] = &[
    "1",
    "2",
    "3/tcp",
    "4/udp",
    "1-3",
    "2-4/udp",
    "3-65535",
    "1-65535/udp",
    "any/tcp",
    "any/udp",
    "icmp",
    "any",
];
const SERVED: &[&str] = &["1", "2/udp", "1-3", "any/tcp", "any"];

#[derive(Clone, Debug)]
enum To {
    /// Network bits in the one space, length there, and how it is written.
    Net { bits: u128, len: u8, text: String },
    /// The one set there is.
    Set,
}

#[derive(Clone, Debug)]
struct Line {
    to: To,
    /// Empty for a denial without `ports`.
    ports: Vec<&'static str>,
    /// Seconds from now.
    expires: Option<i64>,
    tag: String,
}

#[derive(Clone, Debug)]
struct World {
    mode: &'static str,
    loopback: &'static str,
    state: &'static str,
    not_before: Option<i64>,
    expires: i64,
    allow: Vec<Line>,
    deny: Vec<Line>,
    set: Vec<Line>,
    floor: Vec<Line>,
    serve: Vec<(Vec<&'static str>, Vec<To>)>,
}

#[derive(Clone, Debug)]
struct Ask {
    addr: &'static str,
    port: u16,
    local_port: u16,
    protocol: u8,
    hook: Hook,
    opening: bool,
    peer: Peer,
    /// Seconds from now.
    at: i64,
}

fn bits_of(text: &str) -> u128 {
    match text.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn mask(len: u8) -> u128 {
    if len == 0 {
        0
    } else {
        u128::MAX << (128 - len)
    }
}

/// A network around an address; IPv4 is written as such or, now and then, mapped.
fn net() -> impl Strategy<Value = To> {
    (select(ADDRESSES), any::<prop::sample::Index>(), 0..8_u8).prop_map(|(text, index, form)| {
        let v4 = text.parse::<IpAddr>().unwrap().is_ipv4();
        let (lengths, shift) = if v4 {
            (V4_LENGTHS, 96)
        } else {
            (V6_LENGTHS, 0)
        };
        // Every third one is a single address: that is where most rules meet.
        let len = if form < 3 {
            *lengths.last().unwrap()
        } else {
            *index.get(lengths)
        };
        let bits = bits_of(text) & mask(len + shift);
        let text = if v4 {
            let low = u32::try_from(bits & u128::from(u32::MAX)).unwrap();
            let v4 = Ipv4Addr::from(low);
            if form == 7 {
                format!("::ffff:{v4}/{}", len + 96)
            } else {
                format!("{v4}/{len}")
            }
        } else {
            format!("{}/{len}", Ipv6Addr::from(bits))
        };
        // A single unspecified address is loopback.
        let bits = match (len + shift, bits) {
            (128, 0) => 1,
            (128, 0xffff_0000_0000) => 0xffff_7f00_0001,
            _ => bits,
        };
        To::Net {
            bits,
            len: len + shift,
            text,
        }
    })
}

fn ports() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(select(PORTS), 1..3)
}

fn expiry() -> impl Strategy<Value = Option<i64>> {
    select(vec![None, None, Some(-10), Some(10), Some(20), Some(30)])
}

fn lines(kind: &'static str, max: usize, sets: bool) -> impl Strategy<Value = Vec<Line>> {
    let to = if sets {
        prop_oneof![7 => net(), 1 => Just(To::Set)].boxed()
    } else {
        net().boxed()
    };
    let optional = kind == "d" || kind == "f";
    let line =
        (to, ports(), expiry(), any::<bool>()).prop_map(move |(to, ports, expires, all)| Line {
            to,
            ports: if optional && all { Vec::new() } else { ports },
            expires: if optional { None } else { expires },
            tag: String::new(),
        });
    prop::collection::vec(line, 0..max).prop_map(move |mut lines| {
        for (index, line) in lines.iter_mut().enumerate() {
            line.tag = format!("{kind}{index}");
        }
        lines
    })
}

fn world() -> impl Strategy<Value = World> {
    let loopback_net = Just(To::Net {
        bits: 1,
        len: 128,
        text: "loopback".into(),
    });
    let client = prop_oneof![4 => net(), 1 => loopback_net];
    let serve = (
        prop::collection::vec(select(SERVED), 1..3),
        prop::collection::vec(client, 1..3),
    );
    (
        (
            select(&["enforce", "enforce", "monitor"][..]),
            select(&["own", "none", "any"][..]),
            select(
                &[
                    "active",
                    "active",
                    "active",
                    "active",
                    "active",
                    "active",
                    "draft",
                    "suspended",
                    "revoked",
                ][..],
            ),
            select(vec![None, None, None, Some(-30), Some(15)]),
            select(vec![25, 1000, 1000, 1000]),
        ),
        lines("a", 7, true),
        lines("d", 4, true),
        lines("s", 4, false),
        lines("f", 3, false),
        prop::collection::vec(serve, 0..3),
    )
        .prop_map(
            |((mode, loopback, state, not_before, expires), allow, deny, set, floor, serve)| {
                World {
                    mode,
                    loopback,
                    state,
                    not_before,
                    expires,
                    allow,
                    deny,
                    set,
                    floor,
                    serve,
                }
            },
        )
}

fn ask() -> impl Strategy<Value = Ask> {
    (
        select(ADDRESSES),
        (0..6_u16, 0..6_u16),
        select(&[6_u8, 6, 6, 17, 17, 1, 58, 132][..]),
        select(&[Hook::Connect4, Hook::Connect6, Hook::Egress, Hook::Egress][..]),
        any::<bool>(),
        select(&[Peer::Nobody, Peer::Own, Peer::Foreign][..]),
        select(vec![0_i64, 0, 10, 15, 20, 25, 31]),
    )
        .prop_map(
            |(addr, (port, local_port), protocol, hook, opening, peer, at)| Ask {
                addr,
                port,
                local_port,
                protocol,
                hook,
                opening,
                peer,
                at,
            },
        )
}

// === the files ===

fn time(seconds: i64) -> String {
    jiff::Timestamp::from_millisecond(NOW + seconds * 1_000)
        .unwrap()
        .to_string()
}

fn list(words: impl IntoIterator<Item = String>) -> String {
    let quoted: Vec<String> = words
        .into_iter()
        .map(|word| format!("\"{word}\""))
        .collect();
    format!("[{}]", quoted.join(", "))
}

fn write_lines(text: &mut String, header: &str, lines: &[Line], skip: &[String]) {
    for line in lines.iter().filter(|line| !skip.contains(&line.tag)) {
        let to = match &line.to {
            To::Net { text, .. } => text.as_str(),
            To::Set => "@s",
        };
        let _ = writeln!(text, "[[{header}]]\nto = \"{to}\"");
        if !line.ports.is_empty() {
            let _ = writeln!(
                text,
                "ports = {}",
                list(line.ports.iter().map(ToString::to_string))
            );
        }
        if let Some(expires) = line.expires {
            let _ = writeln!(text, "expires = {}", time(expires));
        }
        // What comes through the set carries the set's reason.
        if !matches!((&line.to, header), (To::Set, "scope.allow")) {
            let _ = writeln!(text, "reason = \"{}\"", line.tag);
        }
    }
}

fn sources(world: &World, skip: &[String]) -> Vec<Source> {
    let mut agent = format!(
        "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"{}\"\n\
         approved_by = \"p\"\nexpires = {}\n",
        world.state,
        time(world.expires)
    );
    if let Some(from) = world.not_before {
        let _ = writeln!(agent, "not_before = {}", time(from));
    }
    let _ = writeln!(
        agent,
        "[selector]\ncgroup = [\"/r/a\"]\n[scope]\nmode = \"{}\"\nloopback = \"{}\"",
        world.mode, world.loopback
    );
    for (ports, from) in &world.serve {
        let ports = list(ports.iter().map(ToString::to_string));
        let from = from.iter().map(|to| match to {
            To::Net { text, .. } => text.clone(),
            To::Set => unreachable!("clients are networks"),
        });
        let _ = writeln!(
            agent,
            "[[scope.serve]]\nports = {ports}\nfrom = {}",
            list(from)
        );
    }
    write_lines(&mut agent, "scope.allow", &world.allow, skip);
    write_lines(&mut agent, "scope.deny", &world.deny, &[]);
    let mut set = String::from("schema = 1\n[set]\nname = \"s\"\n");
    write_lines(&mut set, "allow", &world.set, &[]);
    let mut floor = String::from("schema = 1\n");
    write_lines(&mut floor, "deny", &world.floor, &[]);
    let source = |path: &str, text, kind| Source {
        path: path.into(),
        text,
        kind,
    };
    vec![
        source("a.toml", agent, SourceKind::Agent),
        source("s.toml", set, SourceKind::Set),
        source("floor.toml", floor, SourceKind::Floor),
    ]
}

/// The tags of grants in `file` that the compiler calls dead.
fn dead(compilation: &Compilation, file: &str, lines: &[Line], skip: &[String]) -> Vec<String> {
    let written: Vec<&Line> = lines
        .iter()
        .filter(|line| !skip.contains(&line.tag))
        .collect();
    let of_file = compilation
        .findings
        .iter()
        .filter(|finding| finding.file.as_os_str() == file);
    of_file
        .filter(|finding| finding.message.contains("can never take effect"))
        .map(|finding| {
            let index = finding.message.split(['[', ']']).nth(1).unwrap();
            written[index.parse::<usize>().unwrap()].tag.clone()
        })
        .collect()
}

/// The agent's tables. Dead grants are refused by contract, so they are left out here, while the
/// model keeps them: if they were not dead, the two would differ.
fn compiled(world: &mut World) -> AgentTables {
    let mut skip = Vec::new();
    for _ in 0..20 {
        // A set without entries is an error, and so is what uses it.
        if world.set.is_empty() {
            let line = Line {
                to: To::Net {
                    bits: bits_of("192.0.2.1"),
                    len: 128,
                    text: "192.0.2.1".into(),
                },
                ports: vec!["any"],
                expires: None,
                tag: "s9".into(),
            };
            world.set.push(line);
        }
        let compilation = compile(&sources(world, &skip), NOW);
        if let Some(tables) = compilation.agents.into_iter().next() {
            return std::sync::Arc::unwrap_or_clone(tables);
        }
        let compilation = Compilation {
            agents: Vec::new(),
            ..compilation
        };
        let in_set = dead(&compilation, "s.toml", &world.set, &[]);
        world.set.retain(|line| !in_set.contains(&line.tag));
        let mut in_scope = dead(&compilation, "a.toml", &world.allow, &skip);
        assert!(
            !in_set.is_empty() || !in_scope.is_empty(),
            "refused for another reason: {:#?}",
            compilation.findings
        );
        if in_set.is_empty() {
            skip.append(&mut in_scope);
        }
    }
    panic!("the compiler keeps finding dead grants");
}

// === the model ===

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Allow,
    Deny,
    Floor,
    Builtin,
    Multicast,
}

/// One network of one entry.
#[derive(Clone, Debug)]
struct Piece {
    kind: Kind,
    bits: u128,
    len: u8,
    /// All of these have to have the port.
    ports: Vec<Vec<&'static str>>,
    expires: Option<i64>,
    tag: String,
}

fn inside(bits: u128, len: u8, outer: &str, outer_len: u8) -> bool {
    len >= outer_len && (bits ^ bits_of(outer)) & mask(outer_len) == 0
}

fn is_loopback(bits: u128, len: u8) -> bool {
    inside(bits, len, "127.0.0.0", 96 + 8) || inside(bits, len, "::1", 128)
}

fn multicast_range(bits: u128, len: u8) -> Option<u8> {
    let ranges = [("224.0.0.0", 100), ("255.255.255.255", 128), ("ff00::", 8)];
    ranges
        .iter()
        .position(|(at, outer)| inside(bits, len, at, *outer))
        .map(|at| at as u8)
}

fn has_port(specs: &[&str], protocol: u8, port: u16) -> bool {
    specs.iter().any(|spec| match (*spec, protocol) {
        ("any", _) | ("icmp", 1 | 58) | ("any/tcp", 6) | ("any/udp", 17) => true,
        ("icmp" | "any/tcp" | "any/udp", _) => false,
        (spec, protocol) => {
            let (range, of) = spec.split_once('/').unwrap_or((spec, "tcp"));
            let (low, high) = range.split_once('-').unwrap_or((range, range));
            let span = low.parse::<u16>().unwrap()..=high.parse::<u16>().unwrap();
            protocol == (if of == "tcp" { 6 } else { 17 }) && span.contains(&port)
        }
    })
}

impl Piece {
    fn covers(&self, addr: u128, protocol: u8, port: u16) -> bool {
        if (self.bits ^ addr) & mask(self.len) != 0 {
            return false;
        }
        if !self
            .ports
            .iter()
            .all(|specs| specs.is_empty() || has_port(specs, protocol, port))
        {
            return false;
        }
        // "a CIDR covers loopback only if it lies inside 127.0.0.0/8 or ::1"
        if is_loopback(addr, 128) && !is_loopback(self.bits, self.len) {
            return false;
        }
        if self.kind == Kind::Allow {
            // "multicast and broadcast are denied unless granted"
            let range = multicast_range(addr, 128);
            if range.is_some() && multicast_range(self.bits, self.len) != range {
                return false;
            }
            // An IPv6 network does not grant the IPv4 internet.
            if addr >> 32 == 0xffff && self.len < 96 {
                return false;
            }
        }
        true
    }
}

fn pieces(world: &World) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut add = |kind, to: &To, ports: Vec<Vec<&'static str>>, expires, tag: &str| {
        if let To::Net { bits, len, .. } = to {
            let (bits, len) = (*bits, *len);
            pieces.push(Piece {
                kind,
                bits,
                len,
                ports,
                expires,
                tag: tag.into(),
            });
        }
    };
    for line in &world.allow {
        add(
            Kind::Allow,
            &line.to,
            vec![line.ports.clone()],
            line.expires,
            &line.tag,
        );
        if matches!(line.to, To::Set) {
            for inner in &world.set {
                let expires = [line.expires, inner.expires].into_iter().flatten().min();
                let ports = vec![line.ports.clone(), inner.ports.clone()];
                add(Kind::Allow, &inner.to, ports, expires, &inner.tag);
            }
        }
    }
    for line in &world.deny {
        add(
            Kind::Deny,
            &line.to,
            vec![line.ports.clone()],
            None,
            &line.tag,
        );
        if matches!(line.to, To::Set) {
            for inner in &world.set {
                add(
                    Kind::Deny,
                    &inner.to,
                    vec![line.ports.clone()],
                    None,
                    &line.tag,
                );
            }
        }
    }
    for line in &world.floor {
        add(
            Kind::Floor,
            &line.to,
            vec![line.ports.clone()],
            None,
            &line.tag,
        );
    }
    let builtin = [
        ("169.254.0.0", 96 + 16, Kind::Builtin),
        ("fe80::", 10, Kind::Builtin),
        ("169.254.169.254", 128, Kind::Builtin),
        ("169.254.170.2", 128, Kind::Builtin),
        ("fd00:ec2::254", 128, Kind::Builtin),
        ("224.0.0.0", 96 + 4, Kind::Multicast),
        ("255.255.255.255", 128, Kind::Multicast),
        ("ff00::", 8, Kind::Multicast),
    ];
    for (index, (at, len, kind)) in builtin.into_iter().enumerate() {
        let to = To::Net {
            bits: bits_of(at),
            len,
            text: String::new(),
        };
        add(
            kind,
            &to,
            Vec::new(),
            None,
            &format!("floor.builtin[{index}]"),
        );
    }
    pieces
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Says {
    Nothing,
    Floor(String),
    Deny(String),
    Allow(String, Option<i64>),
}

fn says(pieces: &[Piece], addr: u128, protocol: u8, port: u16) -> Says {
    let covering: Vec<&Piece> = pieces
        .iter()
        .filter(|piece| piece.covers(addr, protocol, port))
        .collect();
    // The longest network is named, then the first entry.
    let named = |kinds: &[Kind]| {
        let mut found: Option<&Piece> = None;
        for piece in covering.iter().filter(|piece| kinds.contains(&piece.kind)) {
            if found.is_none_or(|found| piece.len > found.len) {
                found = Some(piece);
            }
        }
        found.map(|piece| piece.tag.clone())
    };
    // The later expiry wins, none is endless, then the first entry.
    let granted = |exact: bool| {
        let mut found: Option<&Piece> = None;
        for piece in &covering {
            if piece.kind != Kind::Allow || exact && piece.len != 128 {
                continue;
            }
            let ends = |piece: &Piece| piece.expires.unwrap_or(i64::MAX);
            if found.is_none_or(|found| ends(piece) > ends(found)) {
                found = Some(piece);
            }
        }
        found.map(|piece| Says::Allow(piece.tag.clone(), piece.expires))
    };
    let denied = named(&[Kind::Deny]);
    if let Some(floor) = named(&[Kind::Floor, Kind::Builtin]) {
        let exact = granted(true).filter(|_| denied.is_none());
        return exact.unwrap_or(Says::Floor(floor));
    }
    if let Some(multicast) = named(&[Kind::Multicast]) {
        let grant = granted(false).filter(|_| denied.is_none());
        return grant.unwrap_or(Says::Floor(multicast));
    }
    denied
        .map(Says::Deny)
        .or_else(|| granted(false))
        .unwrap_or(Says::Nothing)
}

/// NAT64, 6to4 and v4-compatible forms.
fn embedded(addr: u128) -> Option<u128> {
    let v4 = |low: u128| Some(0xffff << 32 | (low & 0xffff_ffff));
    if inside(addr, 128, "64:ff9b::", 96) || inside(addr, 128, "64:ff9b:1::", 48) {
        return v4(addr);
    }
    if inside(addr, 128, "2002::", 16) {
        return v4(addr >> 80);
    }
    if addr > 1 && addr >> 32 == 0 {
        v4(addr)
    } else {
        None
    }
}

fn served(world: &World, addr: u128, ask: &Ask) -> Option<String> {
    let tcp_or_udp = matches!(ask.protocol, 6 | 17);
    if ask.hook != Hook::Egress || !tcp_or_udp || ask.protocol == 6 && ask.opening {
        return None;
    }
    for (index, (ports, from)) in world.serve.iter().enumerate() {
        let peer = from.iter().any(|to| match to {
            To::Net { text, .. } if text == "loopback" => is_loopback(addr, 128),
            To::Net { bits, len, .. } => {
                // As a grant reads a network, without the floor.
                let (kind, ports, expires) = (Kind::Allow, Vec::new(), None);
                let piece = Piece {
                    kind,
                    bits: *bits,
                    len: *len,
                    ports,
                    expires,
                    tag: String::new(),
                };
                piece.covers(addr, ask.protocol, 1)
            }
            To::Set => false,
        });
        if peer && has_port(ports, ask.protocol, ask.local_port) {
            return Some(format!("scope.serve[{index}]"));
        }
    }
    None
}

/// Outcome and reason, the entry's tag, and for a lasting allow its end in seconds from now.
type Verdict = (String, String, Option<i64>);

fn model(world: &World, ask: &Ask) -> Verdict {
    let deny = |reason: &str, tag: &str| (format!("deny {reason}"), tag.to_owned(), None);
    let lift = |reason: &str, tag: &str| {
        let word = if world.mode == "monitor" {
            "monitor"
        } else {
            "deny"
        };
        (format!("{word} {reason}"), tag.to_owned(), None)
    };
    if world.state != "active" {
        return deny(world.state, "");
    }
    if world.not_before.is_some_and(|from| ask.at < from) {
        return deny("not_yet_valid", "");
    }
    if ask.at >= world.expires {
        return deny("expired", "");
    }
    let pieces = pieces(world);
    let addr = match bits_of(ask.addr) {
        0 => 1,
        0xffff_0000_0000 => bits_of("127.0.0.1"),
        bits => bits,
    };
    if let Some(inner) = embedded(addr) {
        match says(&pieces, inner, ask.protocol, ask.port) {
            Says::Floor(tag) => return deny("floor", &tag),
            Says::Deny(tag) => return lift("denied", &tag),
            Says::Allow(..) | Says::Nothing => {}
        }
    }
    let mut expired = None;
    match says(&pieces, addr, ask.protocol, ask.port) {
        Says::Floor(tag) => return deny("floor", &tag),
        Says::Deny(tag) => return lift("denied", &tag),
        Says::Allow(tag, end) if end.is_none_or(|end| ask.at < end) => {
            let until = end.unwrap_or(i64::MAX).min(world.expires);
            return ("allow".into(), tag, Some(until));
        }
        Says::Allow(tag, _) => expired = Some(tag),
        Says::Nothing => {}
    }
    if let Some(tag) = served(world, addr, ask) {
        return ("allow".into(), tag, None);
    }
    if is_loopback(addr, 128) {
        let reachable = match world.loopback {
            "any" => true,
            "own" => match ask.peer {
                Peer::Own => true,
                Peer::Foreign => false,
                // The rest of a connection whose other end has closed; it opens nothing.
                Peer::Nobody => ask.hook == Hook::Egress && ask.protocol == 6 && !ask.opening,
            },
            _ => false,
        };
        let allow = ("allow".into(), "loopback".into(), None);
        return if reachable {
            allow
        } else {
            deny("loopback_foreign", "")
        };
    }
    if let Some(tag) = expired {
        return deny("expired", &tag);
    }
    lift("out_of_scope", "")
}

/// What the compiled tables and the verdict say, in the same words.
fn machine(tables: &AgentTables, ask: &Ask) -> Verdict {
    let question = Question {
        local_port: ask.local_port,
        opening: ask.opening,
        hook: ask.hook,
        peer: ask.peer,
        ..Question::to(ask.addr.parse().unwrap(), ask.port, ask.protocol)
    };
    let rules = MemoryRules::new(tables, &CLOCK, ask.peer);
    let mut attempt = question.attempt(&CLOCK);
    attempt.now = CLOCK.boot_now_ns + u64::try_from(ask.at).unwrap() * 1_000_000_000;
    let tag = |entry: u32| match entry {
        NO_ENTRY => String::new(),
        LOOPBACK_ENTRY => "loopback".into(),
        entry => {
            let entry = &tables.entries[entry as usize];
            entry.reason.clone().unwrap_or_else(|| entry.name.clone())
        }
    };
    match decide(&rules, rules.row(), &attempt) {
        Decision::Allow { entry, until, .. } => {
            let seconds = (until != 0)
                .then(|| i64::try_from((until - CLOCK.boot_now_ns) / 1_000_000_000).unwrap());
            ("allow".into(), tag(entry), seconds)
        }
        Decision::Monitor { reason, entry } => {
            (format!("monitor {}", reason.name()), tag(entry), None)
        }
        Decision::Deny { reason, entry } => (format!("deny {}", reason.name()), tag(entry), None),
        Decision::Fault(cause) => (format!("fault {}", cause.name()), String::new(), None),
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(SCOPES),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn tables_and_verdict_say_what_the_contract_says(
        world in world(),
        asks in prop::collection::vec(ask(), QUESTIONS),
    ) {
        let mut world = world;
        let tables = compiled(&mut world);
        for ask in &asks {
            let (expected, found) = (model(&world, ask), machine(&tables, ask));
            prop_assert_eq!(&expected, &found, "{:?}\n{}", ask, sources(&world, &[])[0].text);
        }
        // The kernel's tables are sorted, and at most one rule matches any class and port.
        for space in [&tables.scope.reach, &tables.scope.serve] {
            prop_assert!(space.is_sorted_by_key(|placed| (placed.prefix.bits(), placed.prefix.len)));
            for placed in space {
                for (index, rule) in placed.rules.iter().enumerate() {
                    prop_assert!(rule.low <= rule.high);
                    let apart = placed.rules.iter().skip(index + 1).all(|other| {
                        let classes = rule.class.zip(other.class).is_some_and(|(a, b)| a != b);
                        classes || other.low > rule.high || other.high < rule.low
                    });
                    prop_assert!(apart, "{:?}", placed);
                }
            }
        }
    }
}
