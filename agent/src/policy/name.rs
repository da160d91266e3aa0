//! The names that the registry uses, parsed once and valid from then on: agents, sets, hosts and
//! cgroups. Addresses and ports are in `net`.

use std::{fmt, str::FromStr};

use agent_ebpf::abi::MAX_LEVELS;
use globset::{GlobBuilder, GlobMatcher};
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

/// A host name in its ASCII form, lower case, or a pattern of names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPattern {
    depth: Depth,
    base: String,
}

/// Which names below the base a pattern covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// A glob of cgroup paths below the v2 mount. `*`, `?` and `[…]` stay within one level; `**` as a
/// level is any number of them.
#[derive(Clone, Debug)]
pub struct Selector {
    text: String,
}

/// Why a text is no [`Selector`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SelectorError {
    /// No leading slash.
    #[error("the cgroup path {} does not start with `/`", quoted(.0))]
    Relative(String),
    /// `/` itself, or stars alone.
    #[error("{} would claim every process of the host", quoted(.0))]
    Top(String),
    /// `//`, a trailing slash, `.` or `..`.
    #[error("the cgroup path {} has an empty, `.` or `..` level", quoted(.0))]
    Level(String),
    /// Deeper than the kernel side looks.
    #[error("the cgroup path {} has {levels} levels, more than {MAX_LEVELS}", quoted(.text))]
    Deep {
        /// What was written.
        text: String,
        /// How many.
        levels: usize,
    },
    /// A level no cgroup can match.
    #[error("the cgroup path {} is not a glob: {reason}", quoted(.text))]
    Glob {
        /// What was written.
        text: String,
        /// Why not.
        reason: String,
    },
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

// === impl Selector ===

impl Selector {
    /// The glob as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is more than a plain path.
    pub fn is_pattern(&self) -> bool {
        self.text.contains(WILD)
    }

    /// What matches a cgroup path (`/a/b`) by this glob. Descendants are the caller's to add.
    pub fn matcher(&self) -> Option<GlobMatcher> {
        glob(&self.text).ok()
    }

    /// Whether a cgroup may exist that both claim, itself or through an ancestor. Two globs that
    /// cannot be told apart count as overlapping.
    pub fn overlaps(&self, other: &Self) -> bool {
        for (ours, theirs) in levels(&self.text).zip(levels(&other.text)) {
            if ours == "**" || theirs == "**" {
                return true;
            }
            if !may_meet(ours, theirs) {
                return false;
            }
        }
        true
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.starts_with('/') {
            return Err(SelectorError::Relative(text.into()));
        }
        if text == "/" {
            return Err(SelectorError::Top(text.into()));
        }
        if levels(text).any(|level| matches!(level, "" | "." | "..")) {
            return Err(SelectorError::Level(text.into()));
        }
        let count = levels(text).count();
        if count > MAX_LEVELS as usize {
            return Err(SelectorError::Deep {
                text: text.into(),
                levels: count,
            });
        }
        let refuse = |reason: &str| SelectorError::Glob {
            text: text.into(),
            reason: reason.into(),
        };
        if text.chars().any(char::is_control) {
            return Err(refuse("it has control characters"));
        }
        if levels(text).all(|level| level.bytes().all(|byte| byte == b'*')) {
            return Err(SelectorError::Top(text.into()));
        }
        if levels(text).any(|level| level.contains("**") && level != "**") {
            return Err(refuse("`**` has to be a level of its own"));
        }
        if text.contains(['{', '}']) {
            return Err(refuse("alternatives in braces are several selectors"));
        }
        if let Err(error) = glob(text) {
            return Err(refuse(&error.kind().to_string()));
        }
        Ok(Self { text: text.into() })
    }
}

/// `*` stays within a level, and a backslash is itself: systemd writes `\x2d` into unit names.
fn glob(text: &str) -> Result<GlobMatcher, globset::Error> {
    let mut builder = GlobBuilder::new(text);
    let glob = builder
        .literal_separator(true)
        .backslash_escape(false)
        .build()?;
    Ok(glob.compile_matcher())
}

fn levels(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').skip(1)
}

const WILD: [char; 4] = ['*', '?', '[', ']'];

/// Whether some name may match both levels. Exact for names; for two globs it compares what they
/// have to start and to end with.
fn may_meet(left: &str, right: &str) -> bool {
    let matches = |pattern: &str, name: &str| glob(pattern).is_ok_and(|glob| glob.is_match(name));
    match (left.contains(WILD), right.contains(WILD)) {
        (false, false) => left == right,
        (true, false) => ends_meet(left, right) && matches(left, right),
        (false, true) => ends_meet(left, right) && matches(right, left),
        (true, true) => ends_meet(left, right),
    }
}

/// Whether what the levels have to start and to end with agrees.
fn ends_meet(left: &str, right: &str) -> bool {
    fn head(level: &str) -> &str {
        level.split(WILD).next().unwrap_or_default()
    }
    fn tail(level: &str) -> &str {
        level.rsplit(WILD).next().unwrap_or_default()
    }
    let (ours, theirs) = (head(left), head(right));
    let heads = ours.starts_with(theirs) || theirs.starts_with(ours);
    let (ours, theirs) = (tail(left), tail(right));
    heads && (ours.ends_with(theirs) || theirs.ends_with(ours))
}

// === impl SelectorError ===

impl SelectorError {
    /// What to write instead.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Relative(_) => "paths count from the cgroup v2 mount: `/agents.slice/x.service`",
            Self::Top(_) => {
                "name a cgroup below one of the enforced roots, such as \
                          `/agents.slice/x.service`"
            }
            Self::Level(_) => "write each level once: `/agents.slice/x.service`",
            Self::Deep { .. } => "claim a cgroup further up: what is below belongs to it",
            Self::Glob { .. } => "`*`, `?` and `[a-z]` match within a level, `**` any levels",
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

    #[test]
    fn selectors_are_absolute_bounded_globs() {
        let deepest = "/a".repeat(32);
        for good in [
            "/a",
            "/agents.slice/x-*.service",
            "/a/**/b",
            "/a/b\\x2dc",
            "/a/[a-c]?",
            &deepest,
        ] {
            assert!(good.parse::<Selector>().is_ok(), "{good}");
        }
        let deeper = "/a".repeat(33);
        for bad in [
            "", "a", "/", "/a/", "//a", "/a/../b", "/a/.", "/**", "/*", "/a/b**", "/a/[b",
            "/a/{b,c}", "/a\n", &deeper,
        ] {
            assert!(bad.parse::<Selector>().is_err(), "{bad}");
        }
        let unit: Selector = "/a/b\\x2dc".parse().unwrap();
        assert!(unit.matcher().unwrap().is_match("/a/b\\x2dc"));
    }

    #[test]
    fn claims_overlap_when_a_cgroup_could_be_in_both() {
        let overlapping = [
            ("/a", "/a"),
            ("/a", "/a/b"),
            ("/a/*", "/a/b"),
            ("/a/*/c", "/a/b"),
            ("/a/x-*", "/a/x-1*"),
            ("/a/*.service", "/a/x*"),
            ("/a/**/z", "/a/b"),
            ("/a/[xy]", "/a/y/deep"),
        ];
        let apart = [
            ("/a", "/b"),
            ("/a", "/ab"),
            ("/a/x-*", "/a/y-*"),
            ("/a/*.service", "/a/x*.scope"),
            ("/a/*.service", "/a/b.scope/c"),
            ("/a/x/**", "/b/x"),
        ];
        let selector = |text: &str| text.parse::<Selector>().unwrap();
        for (left, right) in overlapping {
            assert!(selector(left).overlaps(&selector(right)), "{left} {right}");
            assert!(selector(right).overlaps(&selector(left)), "{right} {left}");
        }
        for (left, right) in apart {
            assert!(!selector(left).overlaps(&selector(right)), "{left} {right}");
            assert!(!selector(right).overlaps(&selector(left)), "{right} {left}");
        }
    }
}
