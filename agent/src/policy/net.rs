//! Addresses and ports as the registry writes them, parsed once and valid from then on.

use std::{fmt, net::IpAddr, str::FromStr};

use agent_ebpf::abi::{Addr, Class};
use thiserror::Error;

use super::{finding::quoted, tables::Prefix};

/// A network or a single address, in the one address space. `0.0.0.0` and `::` as single
/// addresses are the loopback addresses that the kernel puts in their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    prefix: Prefix,
    /// How the address was written; mapped IPv6 keeps its own form.
    shown: (IpAddr, u8),
}

/// Why a text is no [`Cidr`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CidrError {
    /// Not an address at all.
    #[error("{} is not an address", quoted(.0))]
    Address(String),
    /// An IPv6 zone.
    #[error("{} names an interface, which a scope cannot", quoted(.0))]
    Zone(String),
    /// The part behind the slash.
    #[error("the prefix length of {} is not a number from 0 to {max}", quoted(.text))]
    Length {
        /// What was written.
        text: String,
        /// 32 or 128.
        max: u8,
    },
    /// Bits below the prefix length.
    #[error("{} has host bits set", quoted(.text))]
    HostBits {
        /// What was written.
        text: String,
        /// The network without them.
        network: String,
    },
}

/// An interval of ports of one protocol, or all of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortSpec {
    /// None is every protocol.
    class: Option<Class>,
    low: u16,
    high: u16,
}

/// Why a text is no [`PortSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PortError {
    /// Not a number, or too large.
    #[error("{} is not a port from 1 to 65535", quoted(.0))]
    Number(String),
    /// Port 0.
    #[error("port 0 is never reached")]
    Zero,
    /// `N-M` with N > M.
    #[error("the range {low}-{high} is reversed")]
    Reversed {
        /// The first number.
        low: u16,
        /// The second number.
        high: u16,
    },
    /// Behind the slash.
    #[error("{} is not a protocol that has ports here", quoted(.0))]
    Protocol(String),
}

/// A set of ports of all classes: sorted, disjoint, not adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Indexed as [`Class::ALL`].
    intervals: [Vec<(u16, u16)>; 4],
}

// === impl Cidr ===

impl Cidr {
    /// The prefix.
    pub const fn prefix(&self) -> Prefix {
        self.prefix
    }

    /// Whether it is one address.
    pub const fn is_host(&self) -> bool {
        self.prefix.len == 128
    }
}

impl From<IpAddr> for Cidr {
    fn from(ip: IpAddr) -> Self {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let addr = Addr::from(ip).effective();
        Self {
            prefix: Prefix { addr, len: 128 },
            shown: (ip, bits),
        }
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        if address.contains(':') && address.contains('%') {
            return Err(CidrError::Zone(text.into()));
        }
        // `parse` takes no leading zeros, which some C libraries read as octal.
        let parsed = address.parse::<IpAddr>().ok();
        let ip = parsed.ok_or_else(|| CidrError::Address(text.into()))?;
        let max: u8 = if ip.is_ipv4() { 32 } else { 128 };
        let Some(length) = length else {
            return Ok(Self::from(ip));
        };
        let digits = length.bytes().all(|byte| byte.is_ascii_digit());
        let len = length
            .parse::<u8>()
            .ok()
            .filter(|len| digits && *len <= max);
        let len = len.ok_or_else(|| CidrError::Length {
            text: text.into(),
            max,
        })?;
        if len == max {
            return Ok(Self {
                shown: (ip, len),
                ..Self::from(ip)
            });
        }
        let prefix = Prefix::new(ip, len);
        let bits = prefix.bits();
        let network = bits & network_mask(prefix.len);
        if network != bits {
            let whole = network.to_be_bytes();
            let network = if ip.is_ipv4() {
                IpAddr::from(Addr::from_octets(whole))
            } else {
                IpAddr::from(whole)
            };
            let network = format!("{network}/{len}");
            return Err(CidrError::HostBits {
                text: text.into(),
                network,
            });
        }
        Ok(Self {
            prefix,
            shown: (ip, len),
        })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ip, len) = self.shown;
        let host = if ip.is_ipv4() { 32 } else { 128 };
        if len == host {
            write!(f, "{ip}")
        } else {
            write!(f, "{ip}/{len}")
        }
    }
}

/// The bits that a prefix of this length fixes.
pub(super) const fn network_mask(len: u8) -> u128 {
    match len {
        0 => 0,
        len => u128::MAX << (128 - len as u32),
    }
}

// === impl CidrError ===

impl CidrError {
    /// What to write instead.
    pub fn help(&self) -> String {
        match self {
            Self::Address(text) if text.matches(':').count() == 1 => {
                "the port goes into `ports`, the address alone into `to`".into()
            }
            Self::Address(_) => "write an address such as `192.0.2.7` or `2001:db8::7`, or a \
                                 network such as `192.0.2.0/24`"
                .into(),
            Self::Zone(_) => "leave out `%` and what follows".into(),
            Self::Length { .. } => "a network is ADDRESS/LENGTH, such as `192.0.2.0/24`".into(),
            Self::HostBits { network, .. } => format!(
                "write {} for the network, or the address alone for one host",
                quoted(network)
            ),
        }
    }
}

// === impl PortSpec ===

impl PortSpec {
    /// One TCP port, as an integer in `ports` means it.
    pub fn tcp(port: i64) -> Result<Self, PortError> {
        let number = u16::try_from(port);
        let port = number.map_err(|_out_of_range| PortError::Number(port.to_string()))?;
        if port == 0 {
            return Err(PortError::Zero);
        }
        Ok(Self {
            class: Some(Class::Tcp),
            low: port,
            high: port,
        })
    }

    /// The protocol; none is every protocol.
    pub const fn class(&self) -> Option<Class> {
        self.class
    }

    /// An interval that is known to be one.
    pub const fn interval(class: Option<Class>, low: u16, high: u16) -> Self {
        Self { class, low, high }
    }

    /// All of one protocol.
    pub const fn whole(class: Class) -> Self {
        Self::all(Some(class))
    }

    const fn all(class: Option<Class>) -> Self {
        Self {
            class,
            low: 0,
            high: u16::MAX,
        }
    }
}

impl FromStr for PortSpec {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "any" => return Ok(Self::all(None)),
            "any/tcp" => return Ok(Self::all(Some(Class::Tcp))),
            "any/udp" => return Ok(Self::all(Some(Class::Udp))),
            "icmp" => return Ok(Self::all(Some(Class::Icmp))),
            _ => {}
        }
        let (range, class) = match text.split_once('/') {
            None => (text, Class::Tcp),
            Some((range, "tcp")) => (range, Class::Tcp),
            Some((range, "udp")) => (range, Class::Udp),
            Some((_, other)) => return Err(PortError::Protocol(other.into())),
        };
        let (low, high) = match range.split_once('-') {
            Some((low, high)) => (port(low, text)?, port(high, text)?),
            None => {
                let port = port(range, text)?;
                (port, port)
            }
        };
        if low > high {
            return Err(PortError::Reversed { low, high });
        }
        Ok(Self {
            class: Some(class),
            low,
            high,
        })
    }
}

/// One port number; `whole` is the text to complain about.
fn port(digits: &str, whole: &str) -> Result<u16, PortError> {
    let number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.parse::<u16>().ok().filter(|_| number);
    match port {
        Some(0) => Err(PortError::Zero),
        Some(port) => Ok(port),
        None => Err(PortError::Number(whole.into())),
    }
}

// === impl PortError ===

impl PortError {
    /// What to write instead.
    pub fn help(&self) -> String {
        match self {
            Self::Number(_) => "write `443`, \"443/tcp\", \"8000-8100\", \"53/udp\", \"any/tcp\", \
                                \"any/udp\", \"icmp\" or \"any\""
                .into(),
            Self::Zero => "ports start at 1; \"any/tcp\" and \"any/udp\" are all of them".into(),
            Self::Reversed { low, high } => format!("write \"{high}-{low}\""),
            Self::Protocol(_) => "write `/tcp` or `/udp`; \"icmp\" stands alone, and \"any\" is \
                                  every protocol"
                .into(),
        }
    }
}

// === impl Ports ===

impl Ports {
    /// Every port of every protocol.
    pub fn all() -> Self {
        [PortSpec::all(None)].into_iter().collect()
    }

    /// The intervals of one class, sorted and disjoint.
    pub fn of(&self, class: Class) -> &[(u16, u16)] {
        let index = Class::ALL.iter().position(|each| *each == class);
        index
            .and_then(|index| self.intervals.get(index))
            .map_or(&[], Vec::as_slice)
    }

    /// Whether it has `port` of `class`; protocols without ports have port 0 alone.
    pub fn contains(&self, class: Class, port: u16) -> bool {
        let inside = |(low, high): &(u16, u16)| (*low..=*high).contains(&port);
        self.of(class).iter().any(inside)
    }

    /// Each class with its intervals.
    pub fn iter(&self) -> impl Iterator<Item = (Class, &[(u16, u16)])> {
        Class::ALL
            .iter()
            .copied()
            .zip(self.intervals.iter().map(Vec::as_slice))
    }

    /// Whether it holds no port at all.
    pub fn is_empty(&self) -> bool {
        self.intervals.iter().all(Vec::is_empty)
    }

    /// The ports in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let pairs = self.intervals.iter().zip(&other.intervals);
        let mut intervals = pairs.map(|(left, right)| intersect(left, right));
        let mut next = || intervals.next().unwrap_or_default();
        Self {
            intervals: [next(), next(), next(), next()],
        }
    }

    /// The ports that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let pairs = self.intervals.iter().zip(&other.intervals);
        let mut intervals = pairs.map(|(left, right)| subtract(left, right));
        let mut next = || intervals.next().unwrap_or_default();
        Self {
            intervals: [next(), next(), next(), next()],
        }
    }

    /// The ports of either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let specs = [self, other].into_iter().flat_map(|ports| {
            ports.iter().flat_map(|(class, intervals)| {
                let spec = move |&(low, high): &(u16, u16)| PortSpec {
                    class: Some(class),
                    low,
                    high,
                };
                intervals.iter().map(spec)
            })
        });
        specs.collect()
    }

    /// The same without the protocols that have no ports, which a server's ports cannot be.
    #[must_use]
    pub fn with_ports_only(mut self) -> Self {
        for (class, intervals) in Class::ALL.iter().zip(&mut self.intervals) {
            if !class.has_ports() {
                intervals.clear();
            }
        }
        self
    }
}

impl FromIterator<PortSpec> for Ports {
    fn from_iter<I: IntoIterator<Item = PortSpec>>(specs: I) -> Self {
        let mut ports = Self::default();
        for spec in specs {
            for (class, intervals) in Class::ALL.iter().zip(&mut ports.intervals) {
                if spec.class.is_none_or(|only| only == *class) {
                    intervals.push((spec.low, spec.high));
                }
            }
        }
        for intervals in &mut ports.intervals {
            intervals.sort_unstable();
            intervals.dedup_by(|next, kept| {
                let joins = u32::from(next.0) <= u32::from(kept.1) + 1;
                if joins {
                    kept.1 = kept.1.max(next.1);
                }
                joins
            });
        }
        ports
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::all() {
            return f.write_str("any");
        }
        let mut separator = "";
        for (class, intervals) in self.iter() {
            for (low, high) in intervals {
                f.write_str(separator)?;
                separator = ", ";
                match (class.has_ports(), *low, *high) {
                    (false, ..) => f.write_str(class.name())?,
                    (true, 0, u16::MAX) => write!(f, "any/{}", class.name())?,
                    (true, low, high) if low == high => write!(f, "{low}/{}", class.name())?,
                    (true, low, high) => write!(f, "{low}-{high}/{}", class.name())?,
                }
            }
        }
        Ok(())
    }
}

/// What two sorted lists of disjoint intervals share.
fn intersect(left: &[(u16, u16)], right: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    let mut shared = Vec::new();
    while let (Some(&&(a, b)), Some(&&(c, d))) = (left.peek(), right.peek()) {
        let (low, high) = (a.max(c), b.min(d));
        if low <= high {
            shared.push((low, high));
        }
        if b < d {
            left.next();
        } else {
            right.next();
        }
    }
    shared
}

/// What of sorted, disjoint intervals is in none of `taken`, which are sorted and disjoint too.
fn subtract(intervals: &[(u16, u16)], taken: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut left = Vec::new();
    for &(low, high) in intervals {
        let mut from = Some(low);
        for &(first, last) in taken {
            let Some(start) = from.filter(|start| first <= high && last >= *start) else {
                continue;
            };
            if let Some(before) = first.checked_sub(1).filter(|before| *before >= start) {
                left.push((start, before));
            }
            from = last.checked_add(1).filter(|next| *next <= high);
        }
        left.extend(from.map(|start| (start, high)));
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(specs: &[&str]) -> Ports {
        specs
            .iter()
            .map(|spec| spec.parse::<PortSpec>().unwrap())
            .collect()
    }

    #[test]
    fn one_address_space() {
        let v4: Cidr = "10.0.0.0/8".parse().unwrap();
        let mapped: Cidr = "::ffff:10.0.0.0/104".parse().unwrap();
        assert_eq!(v4.prefix(), mapped.prefix());
        assert_eq!(v4.prefix().len, 104);
        let host: Cidr = "10.1.2.3/32".parse().unwrap();
        assert!(host.is_host());
        assert_eq!(host.to_string(), "10.1.2.3");
        assert_eq!("::/0".parse::<Cidr>().unwrap().prefix().len, 0);
    }

    #[test]
    fn unspecified_addresses_mean_loopback() {
        for (text, loopback) in [
            ("0.0.0.0", "127.0.0.1"),
            ("::", "::1"),
            ("0.0.0.0/32", "127.0.0.1"),
        ] {
            let (read, meant): (Cidr, Cidr) = (text.parse().unwrap(), loopback.parse().unwrap());
            assert_eq!(read.prefix(), meant.prefix(), "{text}");
        }
    }

    #[test]
    fn bad_networks_say_why() {
        let cases = [
            ("10.0.0.1/8", "`10.0.0.1/8` has host bits set"),
            ("::1/64", "`::1/64` has host bits set"),
            (
                "10.0.0.0/33",
                "the prefix length of `10.0.0.0/33` is not a number from 0 to 32",
            ),
            (
                "10.0.0.0/+8",
                "the prefix length of `10.0.0.0/+8` is not a number from 0 to 32",
            ),
            (
                "10.0.0.0/",
                "the prefix length of `10.0.0.0/` is not a number from 0 to 32",
            ),
            ("010.0.0.1", "`010.0.0.1` is not an address"),
            ("10.1", "`10.1` is not an address"),
            (
                "fe80::1%eth0",
                "`fe80::1%eth0` names an interface, which a scope cannot",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(text.parse::<Cidr>().unwrap_err().to_string(), message);
        }
        let help = "10.20.9.1/24".parse::<Cidr>().unwrap_err().help();
        assert!(help.contains("`10.20.9.0/24`"), "{help}");
    }

    #[test]
    fn ports_read_as_the_contract_says() {
        let cases: &[(&[&str], &str)] = &[
            (&["443"], "443/tcp"),
            (&["443/tcp", "444", "53/udp"], "443-444/tcp, 53/udp"),
            (&["8000-8100/udp", "8050-9000/udp"], "8000-9000/udp"),
            (&["any/tcp", "icmp"], "any/tcp, icmp"),
            (&["any/udp"], "any/udp"),
            (&["any", "80"], "any"),
            (&["1-65535"], "1-65535/tcp"),
        ];
        for (specs, shown) in cases {
            assert_eq!(ports(specs).to_string(), *shown);
        }
    }

    #[test]
    fn bad_ports_say_why() {
        let cases = [
            ("0", "port 0 is never reached"),
            ("0-5", "port 0 is never reached"),
            ("65536", "`65536` is not a port from 1 to 65535"),
            ("", "the empty string is not a port from 1 to 65535"),
            ("+80", "`+80` is not a port from 1 to 65535"),
            ("1-2-3", "`1-2-3` is not a port from 1 to 65535"),
            ("90-80", "the range 90-80 is reversed"),
            ("53/dns", "`dns` is not a protocol that has ports here"),
            ("any/icmp", "`icmp` is not a protocol that has ports here"),
        ];
        for (text, message) in cases {
            assert_eq!(text.parse::<PortSpec>().unwrap_err().to_string(), message);
        }
        assert_eq!(PortSpec::tcp(-1), Err(PortError::Number("-1".into())));
        assert_eq!(PortSpec::tcp(0), Err(PortError::Zero));
    }

    #[test]
    fn differences_keep_what_only_the_first_has() {
        let cases: &[(&[&str], &[&str], &str)] = &[
            (&["80-90"], &["85"], "80-84/tcp, 86-90/tcp"),
            (&["80-90"], &["80-82", "90-99"], "83-89/tcp"),
            (&["80-90", "443"], &["any/udp"], "80-90/tcp, 443/tcp"),
            (&["80-90", "443"], &["1-100"], "443/tcp"),
            (&["any/tcp"], &["1-65535"], "0/tcp"),
            (&["80"], &["any"], ""),
        ];
        for (from, taken, left) in cases {
            let shown = ports(from).without(&ports(taken)).to_string();
            assert_eq!(shown, *left, "{from:?} without {taken:?}");
        }
    }

    #[test]
    fn unions_have_what_either_has() {
        let both = ports(&["80-90"]).union(&ports(&["91", "53/udp"]));
        assert_eq!(both, ports(&["80-91", "53/udp"]));
    }

    #[test]
    fn intersections_keep_what_both_have() {
        let shared =
            ports(&["80-90", "443", "any/udp"]).intersection(&ports(&["85-500", "53/udp"]));
        assert_eq!(shared, ports(&["85-90", "443", "53/udp"]));
        assert!(ports(&["80"]).intersection(&ports(&["80/udp"])).is_empty());
        assert_eq!(
            Ports::all().intersection(&ports(&["icmp"])),
            ports(&["icmp"])
        );
    }
}
