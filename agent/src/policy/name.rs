//! The names that the registry uses, parsed once and valid from then on: agents, sets and hosts.
//! Addresses and ports are in `net`, cgroups in `selector`.

use std::{fmt, str::FromStr};

use thiserror::Error;

use super::{
    finding::quoted,
    net::{Cidr, CidrError},
};

/// Characters of an id or a set's name.
const ID_CHARS: usize = 63;
/// Octets of a host name (RFC 1035, section 2.3.4, without the root's).
const HOST_CHARS: usize = 253;

/// The id of an agent, or the name of a set: `[a-z0-9][a-z0-9.-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(String);

/// Why a text is no [`Id`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{} is not a valid name", quoted(.0))]
pub struct IdError(String);

/// What `to` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A network or address.
    Net(Cidr),
    /// A host name or pattern.
    Host(HostPattern),
    /// `@NAME`.
    Set(Id),
}

/// Why a text is no [`Destination`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DestinationError {
    /// It looks like a network or address.
    #[error(transparent)]
    Net(#[from] CidrError),
    /// It looks like a host name.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It starts with `@`.
    #[error(transparent)]
    Set(#[from] IdError),
}

/// A host name in its ASCII form, lower case, or a pattern of names. Patterns match whole labels:
/// `*.example.com` has nothing to do with `badexample.com`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPattern {
    depth: Depth,
    base: String,
}

/// Which names below the base a pattern covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Depth {
    /// The name itself and none below.
    Exact,
    /// `*.`: exactly one label more.
    One,
    /// `**.`: one or more labels more.
    Any,
}

/// Why a text is no [`HostPattern`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HostError {
    /// A scheme or a path.
    #[error("{} is a URL, not a name", quoted(.text))]
    Url {
        /// What was written.
        text: String,
        /// The host in it.
        host: String,
    },
    /// Not a name by UTS 46 and the rules for host names.
    #[error("{} is not a host name", quoted(.0))]
    Syntax(String),
    /// A `*` elsewhere than as the whole first label.
    #[error("the `*` in {} is not its whole first label", quoted(.0))]
    Star(String),
    /// `*` or `**` alone.
    #[error("{} would be every name there is", quoted(.0))]
    Everything(String),
    /// Everybody who registers below a public suffix would be covered.
    #[error("{} covers a public suffix, where anybody can register a name", quoted(.0))]
    PublicSuffix(String),
}

// === impl Id ===

impl Id {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let first = text.bytes().next().is_some_and(word);
        let all = text
            .bytes()
            .all(|byte| word(byte) || byte == b'.' || byte == b'-');
        if first && all && text.len() <= ID_CHARS {
            Ok(Self(text.into()))
        } else {
            Err(IdError(text.into()))
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl IdError ===

impl IdError {
    /// What to write instead.
    pub fn help(&self) -> String {
        format!(
            "use `a` to `z`, `0` to `9`, `.` and `-`, starting with a letter or digit, at most \
             {ID_CHARS} characters"
        )
    }
}

// === impl Destination ===

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(name) = text.strip_prefix('@') {
            return Ok(Self::Set(name.parse()?));
        }
        let numeric = text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b"./:".contains(&byte));
        let network = text.split_once('/').is_some_and(|(address, length)| {
            let no_name = !address.is_empty() && !address.ends_with(':');
            no_name && !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit())
        });
        let v6 = text.matches(':').count() > 1 && !text.contains("//");
        if numeric || network || v6 {
            return Ok(Self::Net(text.parse()?));
        }
        Ok(Self::Host(text.parse()?))
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(cidr) => cidr.fmt(f),
            Self::Host(host) => host.fmt(f),
            Self::Set(name) => write!(f, "@{name}"),
        }
    }
}

// === impl DestinationError ===

impl DestinationError {
    /// What to write instead.
    pub fn help(&self) -> String {
        match self {
            Self::Net(error) => error.help(),
            Self::Host(error) => error.help(),
            Self::Set(error) => error.help(),
        }
    }
}

// === impl HostPattern ===

impl HostPattern {
    /// The name, or what the pattern is below.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Which names below [`Self::base`] are covered.
    pub const fn depth(&self) -> Depth {
        self.depth
    }

    /// Whether `name` (lower case, A-labels, no trailing dot) is one that it covers.
    pub fn matches(&self, name: &str) -> bool {
        let below = name
            .strip_suffix(&self.base)
            .and_then(|rest| rest.strip_suffix('.'));
        match (self.depth, below) {
            (Depth::Exact, _) => name == self.base,
            (Depth::One, Some(labels)) => !labels.is_empty() && !labels.contains('.'),
            (Depth::Any, Some(labels)) => !labels.is_empty(),
            (Depth::One | Depth::Any, None) => false,
        }
    }

    /// Whether every name that `other` covers is one that it covers.
    pub fn covers(&self, other: &Self) -> bool {
        match (self.depth, other.depth) {
            (_, Depth::Exact) => self.matches(&other.base),
            (Depth::Exact, _) | (Depth::One, Depth::Any) => false,
            (Depth::One, Depth::One) => self.base == other.base,
            (Depth::Any, _) => self.base == other.base || self.matches(&other.base),
        }
    }
}

impl FromStr for HostPattern {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') {
            let after = text.split_once("://").map_or(text, |(_, after)| after);
            let host = after.split(['/', ':']).next().unwrap_or_default().into();
            return Err(HostError::Url {
                text: text.into(),
                host,
            });
        }
        if text == "*" || text == "**" {
            return Err(HostError::Everything(text.into()));
        }
        let (depth, base) = match (text.strip_prefix("**."), text.strip_prefix("*.")) {
            (Some(base), _) => (Depth::Any, base),
            (None, Some(base)) => (Depth::One, base),
            (None, None) => (Depth::Exact, text),
        };
        if base.contains('*') {
            return Err(HostError::Star(text.into()));
        }
        let base = host(base).ok_or_else(|| HostError::Syntax(text.into()))?;
        // A suffix the list does not know is no public one: private zones use such.
        let public = psl::suffix(base.as_bytes())
            .is_some_and(|suffix| suffix.is_known() && suffix.as_bytes() == base.as_bytes());
        if depth != Depth::Exact && public {
            return Err(HostError::PublicSuffix(text.into()));
        }
        Ok(Self { depth, base })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stars = match self.depth {
            Depth::Exact => "",
            Depth::One => "*.",
            Depth::Any => "**.",
        };
        write!(f, "{stars}{}", self.base)
    }
}

/// A host name as it goes over the wire; one trailing dot is the root's and left out.
fn host(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let ascii = idna::domain_to_ascii_strict(text).ok()?;
    let labels = ascii.split('.').all(|label| !label.is_empty());
    // The last label is never a number: that is an address written some other way.
    let number = ascii
        .rsplit('.')
        .next()?
        .bytes()
        .all(|byte| byte.is_ascii_digit());
    (labels && !number && ascii.len() <= HOST_CHARS).then_some(ascii)
}

// === impl HostError ===

impl HostError {
    /// What to write instead.
    pub fn help(&self) -> String {
        match self {
            Self::Url { host, .. } if host.is_empty() => "write the host's name alone".into(),
            Self::Url { host, .. } => {
                format!("write {} and put the port into `ports`", quoted(host))
            }
            Self::Syntax(text) if text.contains(':') => {
                "the port goes into `ports`, the name alone into `to`".into()
            }
            Self::Syntax(_) => "a name is labels of letters, digits and `-`, with dots between \
                                them, such as `api.example.com`"
                .into(),
            Self::Star(_) => "`*.example.com` is one label more than `example.com`, \
                              `**.example.com` any number"
                .into(),
            Self::Everything(_) => {
                "name the domains; for every address write \"0.0.0.0/0\" and \"::/0\"".into()
            }
            Self::PublicSuffix(text) => {
                let stars = text.trim_start_matches('*');
                let stars = text.strip_suffix(stars).unwrap_or_default();
                let base = text.trim_start_matches(['*', '.']);
                format!(
                    "name the domain, such as {}",
                    quoted(&format!("{stars}.example.{base}"))
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_what_the_contract_says() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "billing-recon", "a.b", "9-.", longest.as_str()] {
            assert!(good.parse::<Id>().is_ok(), "{good}");
        }
        let longer = "a".repeat(64);
        for bad in [
            "",
            "-a",
            ".a",
            "A",
            "a_b",
            "a b",
            "ä",
            "a/b",
            longer.as_str(),
        ] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
    }

    #[test]
    fn destinations_are_told_apart() {
        let kind = |text: &str| match text.parse::<Destination>() {
            Ok(Destination::Net(_)) => "net",
            Ok(Destination::Host(_)) => "host",
            Ok(Destination::Set(_)) => "set",
            Err(DestinationError::Net(_)) => "bad net",
            Err(DestinationError::Host(_)) => "bad host",
            Err(DestinationError::Set(_)) => "bad set",
        };
        let cases = [
            ("10.0.0.0/8", "net"),
            ("2001:db8::/32", "net"),
            ("::", "net"),
            ("::ffff:10.0.0.1", "net"),
            ("api.example.com", "host"),
            ("fe80.example", "host"),
            ("bücher.example", "host"),
            ("@github", "set"),
            ("@", "bad set"),
            ("@Git", "bad set"),
            ("10.0.0.1:443", "bad net"),
            ("1.2.3", "bad net"),
            ("10.0.0.0/64", "bad net"),
            ("gg::1", "bad net"),
            ("example.com/24", "bad net"),
            ("https://api.example.com/v1", "bad host"),
            ("api.example.com:443", "bad host"),
            ("", "bad net"),
        ];
        for (text, expected) in cases {
            assert_eq!(kind(text), expected, "{text}");
        }
    }

    #[test]
    fn host_names_come_out_in_their_wire_form() {
        let cases = [
            ("API.Example.com.", Depth::Exact, "api.example.com"),
            ("*.bücher.example", Depth::One, "xn--bcher-kva.example"),
            ("**.s3.example.org", Depth::Any, "s3.example.org"),
            ("*.corp.internal", Depth::One, "corp.internal"),
            ("db", Depth::Exact, "db"),
            ("com", Depth::Exact, "com"),
        ];
        for (text, depth, base) in cases {
            let host: HostPattern = text.parse().unwrap();
            assert_eq!((host.depth(), host.base()), (depth, base), "{text}");
        }
    }

    #[test]
    fn patterns_match_whole_labels() {
        let cases = [
            ("example.com", "example.com", true),
            ("example.com", "a.example.com", false),
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "a.b.example.com", false),
            ("*.example.com", "badexample.com", false),
            ("*.example.com", ".example.com", false),
            ("**.example.com", "a.b.example.com", true),
            ("**.example.com", "example.com", false),
            ("**.google.com", "evilgoogle.com", false),
            ("**.google.com", "a.evilgoogle.com", false),
            ("**.example.com", "example.com.evil.net", false),
        ];
        for (pattern, name, expected) in cases {
            let host: HostPattern = pattern.parse().unwrap();
            assert_eq!(host.matches(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_covers_narrower_ones() {
        let cases = [
            ("*.a.example", "x.a.example", true),
            ("*.a.example", "*.a.example", true),
            ("*.a.example", "**.a.example", false),
            ("*.a.example", "*.x.a.example", false),
            ("**.a.example", "**.a.example", true),
            ("**.a.example", "*.a.example", true),
            ("**.a.example", "*.x.a.example", true),
            ("**.a.example", "**.y.x.a.example", true),
            ("**.a.example", "a.example", false),
            ("**.a.example", "**.ba.example", false),
            ("x.a.example", "*.a.example", false),
            ("**.x.a.example", "**.a.example", false),
        ];
        for (left, right, expected) in cases {
            let (left, right): (HostPattern, HostPattern) =
                (left.parse().unwrap(), right.parse().unwrap());
            assert_eq!(left.covers(&right), expected, "{left} {right}");
        }
    }

    #[test]
    fn bad_host_names_say_why() {
        type Check = fn(&HostError) -> bool;
        let syntax: Check = |error| matches!(error, HostError::Syntax(_));
        let star: Check = |error| matches!(error, HostError::Star(_));
        let public: Check = |error| matches!(error, HostError::PublicSuffix(_));
        let everything: Check = |error| matches!(error, HostError::Everything(_));
        let long = format!("{}.example", "a".repeat(64));
        let cases = [
            ("a..b", syntax),
            ("-a.example", syntax),
            ("a_b.example", syntax),
            ("a b.example", syntax),
            ("example.1", syntax),
            (long.as_str(), syntax),
            ("a.*.example.com", star),
            ("*a.example.com", star),
            ("*.*.example.com", star),
            ("***.example.com", star),
            ("*.com", public),
            ("**.co.uk", public),
            ("*.github.io", public),
            ("*.foo.ck", public),
            ("*", everything),
            ("**", everything),
        ];
        for (text, check) in cases {
            let error = text.parse::<HostPattern>().unwrap_err();
            assert!(check(&error), "{text}: {error:?}");
        }
        let help = "**.co.uk".parse::<HostPattern>().unwrap_err().help();
        assert!(help.ends_with("`**.example.co.uk`"), "{help}");
    }
}
