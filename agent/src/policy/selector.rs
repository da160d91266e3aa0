//! Claims on cgroups: globs of paths, parsed once and valid from then on, and whether two of them
//! can meet.

use std::str::FromStr;

use agent_ebpf::abi::MAX_LEVELS;
use globset::{GlobBuilder, GlobMatcher};
use thiserror::Error;

use super::finding::quoted;

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
