//! Secrets in command lines, made unreadable before anything is written. It is a courtesy to those
//! who pass secrets as arguments, not a guard: a program can call a secret what it likes. Pure.
//!
//! Patterns see the arguments with a NUL between them, and once more with a space. What group 1
//! matches becomes `***`; of a pattern without groups, all that it matches.

use std::borrow::Cow;

use regex::{Captures, Regex, RegexBuilder};

use super::text::spaced;

/// What stands in a secret's place.
pub const MASKED: &str = "***";
/// Largest compiled size of one pattern, in bytes.
const PATTERN_BYTES: usize = 1 << 20;

/// Patterns when the settings name none.
pub const DEFAULTS: [&str; 8] = [
    // `--password X`, `-token X`: the whole next argument.
    r"(?i)(?:^|\x00)--?[A-Za-z0-9_-]*(?:passw(?:or)?d|passphrase|secret|token|api-?_?key|access-?_?key|private-?_?key|credentials?)\x00([^\x00]+)",
    // `--password=X`, `API_KEY=X` as an argument: the rest of it.
    r"(?i)(?:^|\x00)[A-Za-z0-9_./-]*(?:passw(?:or)?d|passphrase|secret|token|api-?_?key|access-?_?key|private-?_?key|credentials?)[A-Za-z0-9_-]*=([^\x00]+)",
    // The same inside an argument, as in `sh -c '…'`, JSON and headers.
    r#"(?i)\b[A-Za-z0-9_-]*(?:passw(?:or)?d|passphrase|secret|token|api-?_?key|access-?_?key|private-?_?key|credentials?)["']?\s*[=:]\s*["']?([^\s"'\x00&,;}]+)"#,
    r"(?i)\s--?[A-Za-z0-9_-]*(?:passw(?:or)?d|passphrase|secret|token|api-?_?key|access-?_?key|private-?_?key)\s+([^\s\x00]+)",
    r"(?i)\b(?:bearer|basic|digest|negotiate)[\s\x00]+([A-Za-z0-9+/=._~-]{6,})",
    // `https://user:X@host`.
    r"://[^/\s:@\x00]*:([^/\s@\x00]+)@",
    // `curl -u user:X`, `sshpass -p X`.
    r"(?:(?:^|[\s\x00])(?:-u|--user|--proxy-user)[=\s\x00]?[^\s:\x00]+:|sshpass[\s\x00]+-p[\s\x00]*)([^\s\x00]+)",
    // Tokens that tell what they are.
    r"\b((?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}|xox[abeoprs]-[A-Za-z0-9_-]{10,}|sk-[A-Za-z0-9_-]{16,}|[rs]k_(?:live|test)_[A-Za-z0-9_]{10,}|npm_[A-Za-z0-9]{20,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)",
];

/// Compiled patterns.
#[derive(Clone, Debug)]
pub struct Mask {
    patterns: Vec<Regex>,
}

/// Why a text is no pattern, in the words of the regex library.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{pattern}` is no pattern: {why}")]
pub struct PatternError {
    /// The text.
    pub pattern: String,
    /// Why.
    pub why: String,
}

// === impl Mask ===

impl Mask {
    /// A mask of these patterns; see [`DEFAULTS`]. None masks nothing.
    pub fn new<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Result<Self, PatternError> {
        let patterns = patterns.into_iter().map(|pattern| {
            RegexBuilder::new(pattern)
                .size_limit(PATTERN_BYTES)
                .build()
                .map_err(|error| PatternError {
                    pattern: pattern.to_owned(),
                    why: error.to_string(),
                })
        });
        Ok(Self {
            patterns: patterns.collect::<Result<_, _>>()?,
        })
    }

    /// A command line as `/proc/PID/cmdline` has it, as text with spaces between the arguments and
    /// without its secrets.
    pub fn command_line(&self, bytes: &[u8]) -> String {
        let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        text = self.apply(text);
        self.apply(spaced(&text))
    }

    fn apply(&self, mut text: String) -> String {
        for pattern in &self.patterns {
            let masked = pattern.replace_all(&text, |found: &Captures<'_>| {
                let all = found.get(0).map_or(0..0, |all| all.range());
                let whole = text.get(all.clone()).unwrap_or_default();
                let secret = if pattern.captures_len() > 1 {
                    found.get(1).map(|group| group.range())
                } else {
                    Some(all.clone())
                };
                let Some(secret) = secret else {
                    return whole.to_owned();
                };
                let before = text.get(all.start..secret.start).unwrap_or_default();
                let after = text.get(secret.end..all.end).unwrap_or_default();
                format!("{before}{MASKED}{after}")
            });
            if let Cow::Owned(masked) = masked {
                text = masked;
            }
        }
        text
    }
}

impl Default for Mask {
    fn default() -> Self {
        // A test holds that they all compile; one that did not would mask less, never more.
        let patterns = DEFAULTS
            .iter()
            .filter_map(|pattern| Regex::new(pattern).ok());
        Self {
            patterns: patterns.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(arguments: &str) -> String {
        Mask::default().command_line(arguments.replace('|', "\0").as_bytes())
    }

    #[test]
    fn every_default_compiles() {
        assert_eq!(Mask::default().patterns.len(), DEFAULTS.len());
        Mask::new(DEFAULTS).unwrap();
    }

    #[test]
    fn secrets_are_masked_where_people_put_them() {
        for (arguments, shown) in [
            ("mysql|--password=hunter2|db", "mysql --password=*** db"),
            ("x|--password|hunter2 and more|y", "x --password *** y"),
            ("x|--api-key|k3y|--port|80", "x --api-key *** --port 80"),
            (
                "env|AWS_SECRET_ACCESS_KEY=abc/def|x",
                "env AWS_SECRET_ACCESS_KEY=*** x",
            ),
            ("env|GITHUB_TOKEN=abc d|x", "env GITHUB_TOKEN=*** x"),
            (
                "curl|-H|Authorization: Bearer abcdef.ghi|https://x",
                "curl -H Authorization: Bearer *** https://x",
            ),
            (
                "curl|-u|bill:hunter2|https://x",
                "curl -u bill:*** https://x",
            ),
            ("curl|https://bill:hunter2@x/y", "curl https://bill:***@x/y"),
            ("sshpass|-p|hunter2|ssh|x", "sshpass -p *** ssh x"),
            (
                "sh|-c|X_TOKEN_FILE=f; TOKEN=abc ./run --token xyz --n 3",
                "sh -c X_TOKEN_FILE=***",
            ),
            (
                "sh|-c|cd x; TOKEN=abc ./run --token xyz --n 3",
                "sh -c cd x; TOKEN=*** ./run --token *** --n 3",
            ),
            (
                "x|{\"client_secret\": \"abc\", \"n\": 1}",
                "x {\"client_secret\": \"***\", \"n\": 1}",
            ),
            (
                "x|https://api/v1?access_token=abc&n=1",
                "x https://api/v1?access_token=***&n=1",
            ),
            ("x|ghp_0123456789abcdefABCD", "x ***"),
            ("x|AKIAIOSFODNN7EXAMPLE", "x ***"),
            ("x|sk-proj-0123456789abcdef", "x ***"),
        ] {
            assert_eq!(masked(arguments), shown, "{arguments}");
        }
    }

    #[test]
    fn what_is_no_secret_stays() {
        for arguments in [
            "python3|-m|recon|--port|8080",
            "curl|https://api.example.com/tokens/7?n=1",
            "git|log|--author=bill",
            "ssh|-p|22|host",
            "x|--user|bill",
            "basic|x",
            "",
        ] {
            assert_eq!(masked(arguments), arguments.replace('|', " "));
        }
    }

    #[test]
    fn the_operators_patterns_mask_their_group_or_all() {
        let mask = Mask::new([r"--pin (\d+)", "internal-[a-z]+"]).unwrap();
        assert_eq!(
            mask.command_line(b"x\0--pin\x001234\0internal-abc\0"),
            "x --pin *** ***"
        );
        let none = Mask::new([]).unwrap();
        assert_eq!(none.command_line(b"--password\0x\0"), "--password x");
        let error = Mask::new(["(", "x"]).unwrap_err();
        assert_eq!(error.pattern, "(");
        assert!(Mask::new([r"\w{1000}{1000}"]).is_err(), "it has a bound");
    }

    #[test]
    fn no_text_takes_long() {
        let begun = std::time::Instant::now();
        let hostile = "token=".repeat(1_400) + &"--password ".repeat(700);
        let mask = Mask::default();
        mask.command_line(hostile.as_bytes());
        mask.command_line(&[b'-'; 8_192]);
        mask.command_line(&[0xff; 8_192]);
        assert!(begun.elapsed().as_secs() < 5);
    }
}
