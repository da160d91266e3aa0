//! `DEST[:PORT[/PROTO]]` as people write it. Pure.
//!
//! | written                  | means |
//! |--------------------------|-------|
//! | `192.0.2.7:443`          | port 443 over TCP |
//! | `192.0.2.7:53/udp`       | port 53 over UDP |
//! | `[2001:db8::1]:443`      | the same in IPv6, which needs brackets before a port |
//! | `192.0.2.7:443/any`      | port 443 over TCP and over UDP |
//! | `192.0.2.7/icmp`         | ICMP, or ICMPv6 |
//! | `192.0.2.7`, `2001:db8::1` | whatever the agent's scope says about the address |
//! | `api.example.com:443`    | a name, and port 443 over TCP at its addresses; the forms are the same |
//! | `api.example.com`        | whether the name may be resolved |

use std::{fmt, net::IpAddr, str::FromStr};

use agent_ebpf::abi::Class;

use crate::policy::{Depth, HostPattern};

/// What to explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// An address.
    Address(Destination),
    /// A name.
    Name(Named),
}

/// A name to explain, and which traffic to its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Lower case, A-labels, no trailing dot.
    pub(super) name: String,
    pub(super) what: What,
}

/// An address to explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) addr: IpAddr,
    pub(super) what: What,
}

/// Which traffic to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A port over TCP.
    Tcp(u16),
    /// A port over UDP.
    Udp(u16),
    /// A port over both.
    Any(u16),
    /// ICMP of the address's family.
    Icmp,
    /// Whatever the scope says.
    Everything,
}

/// IP protocol numbers.
pub(super) const TCP: u8 = 6;
/// UDP.
pub(super) const UDP: u8 = 17;

/// Why a text is no destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DestinationError {
    #[error("`{0}` is neither an address nor a host name")]
    Name(String),
    #[error("`{0}` is not an address, nor ADDRESS:PORT or [IPV6]:PORT")]
    Address(String),
    #[error("`{0}` is not a port: 1 to 65535")]
    Port(String),
    #[error("`{0}` is not a protocol: tcp, udp, icmp or any")]
    Protocol(String),
    #[error("icmp has no ports: write `{0}/icmp`")]
    IcmpPort(String),
    #[error("{0} needs a port: write `{1}:PORT/{0}`")]
    NoPort(&'static str, String),
}

// === impl Destination ===

impl Destination {
    /// The protocol numbers and ports to ask for; none where the scope has to say what there is.
    pub(super) fn questions(&self) -> Vec<(u8, u16)> {
        match self.what {
            What::Tcp(port) => vec![(TCP, port)],
            What::Udp(port) => vec![(UDP, port)],
            What::Any(port) => vec![(TCP, port), (UDP, port)],
            What::Icmp => vec![(icmp(self.addr), 0)],
            What::Everything => Vec::new(),
        }
    }
}

/// ICMP's number in the address's family.
pub(super) const fn icmp(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 1,
        IpAddr::V6(_) => 58,
    }
}

/// `192.0.2.7:443/tcp`, `[2001:db8::1]:53/udp`, `192.0.2.7/icmp`.
pub(super) fn written(addr: IpAddr, protocol: u8, port: u16) -> String {
    let host = match addr {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    match protocol {
        TCP => format!("{host}:{port}/tcp"),
        UDP => format!("{host}:{port}/udp"),
        1 | 58 => format!("{addr}/icmp"),
        other => format!("{addr} protocol {other}"),
    }
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (endpoint, protocol) = match text.rsplit_once('/') {
            Some((endpoint, protocol)) => (endpoint, Some(protocol)),
            None => (text, None),
        };
        let (host, port) = split(endpoint);
        let addr = host.parse().map_err(|_| not_an_address(host))?;
        let what = what(host, port, protocol)?;
        Ok(Self { addr, what })
    }
}

impl FromStr for Target {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(destination) => Ok(Self::Address(destination)),
            Err(DestinationError::Name(_)) => Ok(Self::Name(text.parse()?)),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(destination) => destination.fmt(f),
            Self::Name(named) => named.fmt(f),
        }
    }
}

// === impl Named ===

impl Named {
    /// What to ask for, each with its label; one question about no port in particular where none
    /// was named.
    pub(super) fn questions(&self) -> Vec<(String, Option<(Class, u16)>)> {
        let name = &self.name;
        let tcp = |port: u16| (format!("{name}:{port}/tcp"), Some((Class::Tcp, port)));
        let udp = |port: u16| (format!("{name}:{port}/udp"), Some((Class::Udp, port)));
        match self.what {
            What::Tcp(port) => vec![tcp(port)],
            What::Udp(port) => vec![udp(port)],
            What::Any(port) => vec![tcp(port), udp(port)],
            What::Icmp => vec![(format!("{name}/icmp"), Some((Class::Icmp, 0)))],
            What::Everything => vec![(name.clone(), None)],
        }
    }
}

impl FromStr for Named {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (endpoint, protocol) = match text.rsplit_once('/') {
            Some((endpoint, protocol)) => (endpoint, Some(protocol)),
            None => (text, None),
        };
        let (host, port) = split(endpoint);
        let wrong = || DestinationError::Name(host.to_owned());
        let name: HostPattern = host.parse().map_err(|_| wrong())?;
        if name.depth() != Depth::Exact {
            return Err(wrong());
        }
        Ok(Self {
            name: name.base().to_owned(),
            what: what(host, port, protocol)?,
        })
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match self.what {
            What::Tcp(port) => write!(f, "{name}:{port}/tcp"),
            What::Udp(port) => write!(f, "{name}:{port}/udp"),
            What::Any(port) => write!(f, "{name}:{port}/any"),
            What::Icmp => write!(f, "{name}/icmp"),
            What::Everything => f.write_str(name),
        }
    }
}

/// Which traffic to `host`.
fn what(host: &str, port: Option<&str>, protocol: Option<&str>) -> Result<What, DestinationError> {
    let port = port.map(parse_port).transpose()?;
    let shown = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    Ok(match (protocol, port) {
        (None | Some("any"), None) => What::Everything,
        (None | Some("tcp"), Some(port)) => What::Tcp(port),
        (Some("udp"), Some(port)) => What::Udp(port),
        (Some("any"), Some(port)) => What::Any(port),
        (Some("icmp"), None) => What::Icmp,
        (Some("icmp"), Some(_)) => return Err(DestinationError::IcmpPort(host.to_owned())),
        (Some("tcp"), None) => return Err(DestinationError::NoPort("tcp", shown)),
        (Some("udp"), None) => return Err(DestinationError::NoPort("udp", shown)),
        (Some(other), _) => return Err(DestinationError::Protocol(other.to_owned())),
    })
}

/// Host and port: `[v6]:port`, `[v6]`, a bare address, or `host:port`.
fn split(endpoint: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = endpoint
        .strip_prefix('[')
        .and_then(|inner| inner.split_once(']'))
    {
        return match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            // Something between bracket and port: not an address, as a whole.
            None => (endpoint, None),
        };
    }
    if endpoint.parse::<IpAddr>().is_ok() {
        return (endpoint, None);
    }
    match endpoint.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => (host, Some(port)),
        _ => (endpoint, None),
    }
}

fn parse_port(text: &str) -> Result<u16, DestinationError> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(DestinationError::Port(text.to_owned())),
    }
}

fn not_an_address(host: &str) -> DestinationError {
    // Numbers and dots alone are a mistyped address rather than a name.
    let name = host.contains(char::is_alphabetic)
        && !host.contains(|c: char| matches!(c, ':' | '/' | '[' | ']') || c.is_whitespace());
    if name {
        DestinationError::Name(host.to_owned())
    } else {
        DestinationError::Address(host.to_owned())
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Tcp(port) => f.write_str(&written(self.addr, TCP, port)),
            What::Udp(port) => f.write_str(&written(self.addr, UDP, port)),
            What::Any(port) => {
                let tcp = written(self.addr, TCP, port);
                f.write_str(&tcp.replace("/tcp", "/any"))
            }
            What::Icmp => write!(f, "{}/icmp", self.addr),
            What::Everything => write!(f, "{}", self.addr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Destination, DestinationError> {
        text.parse()
    }

    #[test]
    fn each_row_of_the_table() {
        for (text, addr, what) in [
            ("192.0.2.7:443", "192.0.2.7", What::Tcp(443)),
            ("192.0.2.7:443/tcp", "192.0.2.7", What::Tcp(443)),
            ("192.0.2.7:53/udp", "192.0.2.7", What::Udp(53)),
            ("[2001:db8::1]:443", "2001:db8::1", What::Tcp(443)),
            ("[2001:db8::1]:53/udp", "2001:db8::1", What::Udp(53)),
            ("192.0.2.7:443/any", "192.0.2.7", What::Any(443)),
            ("192.0.2.7/icmp", "192.0.2.7", What::Icmp),
            ("[::1]/icmp", "::1", What::Icmp),
            ("::1/icmp", "::1", What::Icmp),
            ("192.0.2.7", "192.0.2.7", What::Everything),
            ("192.0.2.7/any", "192.0.2.7", What::Everything),
            ("2001:db8::1", "2001:db8::1", What::Everything),
            ("[2001:db8::1]", "2001:db8::1", What::Everything),
            ("::ffff:192.0.2.7", "::ffff:192.0.2.7", What::Everything),
            // Not port 443 at `2001:db8::`: a bare IPv6 address takes no port.
            ("2001:db8::443", "2001:db8::443", What::Everything),
        ] {
            let addr = addr.parse().unwrap();
            assert_eq!(parse(text), Ok(Destination { addr, what }), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_apart() {
        use DestinationError as E;
        for (text, error) in [
            ("api.stripe.com:443", E::Name("api.stripe.com".into())),
            ("localhost", E::Name("localhost".into())),
            ("192.0.2.300:443", E::Address("192.0.2.300".into())),
            ("", E::Address(String::new())),
            ("[::1]x:443", E::Address("[::1]x:443".into())),
            ("192.0.2.7:0", E::Port("0".into())),
            ("192.0.2.7:https", E::Port("https".into())),
            ("192.0.2.7:65536", E::Port("65536".into())),
            ("192.0.2.7:", E::Port(String::new())),
            ("192.0.2.7:443/sctp", E::Protocol("sctp".into())),
            ("192.0.2.0/24", E::Protocol("24".into())),
            ("192.0.2.7:1/icmp", E::IcmpPort("192.0.2.7".into())),
            ("192.0.2.7/tcp", E::NoPort("tcp", "192.0.2.7".into())),
            ("::1/udp", E::NoPort("udp", "[::1]".into())),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn names_are_told_from_addresses() {
        let parse = |text: &str| text.parse::<Target>();
        for (text, name, what) in [
            ("api.stripe.com:443", "api.stripe.com", What::Tcp(443)),
            ("API.Stripe.com.:53/udp", "api.stripe.com", What::Udp(53)),
            (
                "b\u{fc}cher.example",
                "xn--bcher-kva.example",
                What::Everything,
            ),
            ("localhost/icmp", "localhost", What::Icmp),
        ] {
            let name = name.to_owned();
            assert_eq!(
                parse(text),
                Ok(Target::Name(Named { name, what })),
                "{text}"
            );
        }
        for text in ["*.stripe.com:443", "a..b:443", "-a.example"] {
            let host = text.trim_end_matches(":443").to_owned();
            assert_eq!(parse(text), Err(DestinationError::Name(host)), "{text}");
        }
        assert!(matches!(parse("[2001:db8::1]:443"), Ok(Target::Address(_))));
        assert_eq!(
            parse("api.stripe.com:0"),
            Err(DestinationError::Port("0".into()))
        );
    }

    #[test]
    fn a_destination_is_written_as_it_is_read() {
        for text in [
            "192.0.2.7:443/tcp",
            "[2001:db8::1]:53/udp",
            "192.0.2.7:80/any",
            "::1/icmp",
            "192.0.2.7",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn questions_are_what_was_meant() {
        let questions = |text: &str| parse(text).unwrap().questions();
        assert_eq!(questions("192.0.2.7:443/any"), [(TCP, 443), (UDP, 443)]);
        assert_eq!(questions("::1/icmp"), [(58, 0)]);
        assert_eq!(questions("192.0.2.7/icmp"), [(1, 0)]);
        assert_eq!(questions("192.0.2.7"), []);
    }
}
