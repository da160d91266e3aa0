//! The hash chain. Pure: an event goes in and the bytes of its line come out, or the other way
//! round.
//!
//! A sealed line is one JSON object whose last member is `attestation_list` (OCSF profile
//! `record_integrity`), and of that the last thing is the record's own fingerprint:
//!
//! ```text
//! {"time":…,…,"attestation_list":[{"authority_uid":…,"chain_uid":…,
//!  "prev_event":{"uid":…,"type_uid":…,"fingerprint":{…,"value":"HASH OF THE RECORD BEFORE"}},
//!  "fingerprint":{"algorithm_id":3,"algorithm":"SHA-256","value":"HASH"}}]}
//! ```
//!
//! `HASH` is the SHA-256 of the line's bytes up to it, in lower case; behind it stands [`END`]. So
//! no byte of a line can change, not even a space, and `head -c` with `sha256sum` check it too.
//! A record is known by `metadata.uid`, the chain's id and the record's number in it, from 1,
//! across all files: `metadata.sequence` starts again with each.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::policy::tables::UnixMillis;

/// What stands behind the hash.
pub const END: &str = "\"}}]}";
/// Characters of a hash.
const HEX: usize = 64;
/// The profile that has `attestation_list`.
const PROFILE: &str = "record_integrity";

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

/// Where a chain has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Number of the last record, from 1.
    pub record: u64,
    /// Its hash.
    pub hash: Hash,
    /// What it is: `type_uid`.
    pub type_uid: u64,
}

/// What the next record hangs on.
#[derive(Clone, Copy, Debug)]
pub struct Link<'a> {
    /// The chain's id.
    pub chain: &'a str,
    /// Who vouches: the host.
    pub authority: &'a str,
    /// The record before; none for the first.
    pub after: Option<Position>,
}

/// A record ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its line, with its end.
    pub line: Vec<u8>,
    /// Where the chain is with it.
    pub position: Position,
}

/// What a line says of its place in the chain. Its hash is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The chain's id.
    pub chain: String,
    /// The record.
    pub position: Position,
    /// Number and hash of the record before.
    pub previous: Option<(u64, Hash)>,
    /// `metadata.sequence`.
    pub sequence: u64,
    /// `metadata.event_code`.
    pub code: String,
    /// `time`.
    pub time: UnixMillis,
}

/// Why a line is no record of a chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// It is no event.
    #[error("it is no JSON event: {0}")]
    NoEvent(String),
    /// It is an event, but has no place in a chain.
    #[error("it is in no chain")]
    Unchained(Option<u64>),
    /// It is in a chain, but not as Remit writes it.
    #[error("it is not as it was written: {0}")]
    Form(&'static str),
    /// Its bytes give another hash than it states. The record is what it says of itself.
    #[error("it was altered: its bytes give {found}, it states {}", stated.position.hash)]
    Altered {
        /// What the bytes give.
        found: Hash,
        /// What the line says.
        stated: Box<Record>,
    },
}

/// Why a text is no hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a hash is 64 characters of 0-9 and a-f")]
pub struct NoHash;

/// The hash of some bytes.
pub fn hash(bytes: &[u8]) -> Hash {
    Hash(Sha256::digest(bytes).into())
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

/// The bytes of a lower-case hexadecimal text of exactly that many.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    let nibble = |character: u8| match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    };
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = nibble(*high)? << 4 | nibble(*low)?;
    }
    Some(bytes)
}

/// Puts an event behind the record that `link` names.
pub fn seal(mut event: Map<String, Value>, link: &Link<'_>) -> Sealed {
    let record = link.after.map_or(1, |after| after.record + 1);
    if let Some(Value::Object(metadata)) = event.get_mut("metadata") {
        metadata.insert("uid".to_owned(), json!(uid(link.chain, record)));
        if let Some(Value::Array(profiles)) = metadata.get_mut("profiles")
            && !profiles.iter().any(|profile| profile == PROFILE)
        {
            profiles.push(json!(PROFILE));
        }
    }
    let mut attestation = json!({
        "authority_uid": link.authority,
        "chain_uid": link.chain,
    });
    if let Some(after) = link.after {
        attestation["prev_event"] = json!({
            "uid": uid(link.chain, after.record),
            "type_uid": after.type_uid,
            "fingerprint": fingerprint(&after.hash),
        });
    }
    attestation["fingerprint"] = fingerprint(&Hash::ZERO);
    // Members keep the order in which they are put in, so this one is the last.
    event.remove("attestation_list");
    event.insert("attestation_list".to_owned(), json!([attestation]));
    let type_uid = event.get("type_uid").and_then(Value::as_u64).unwrap_or(0);
    let mut line = Value::Object(event).to_string().into_bytes();
    line.truncate(line.len() - HEX - END.len());
    let hash = hash(&line);
    line.extend_from_slice(hash.to_string().as_bytes());
    line.extend_from_slice(END.as_bytes());
    line.push(b'\n');
    Sealed {
        line,
        position: Position {
            record,
            hash,
            type_uid,
        },
    }
}

/// Reads a line without its end, and computes its hash.
pub fn read(line: &[u8]) -> Result<Record, Flaw> {
    let skim: Skim<'_> = match serde_json::from_slice(line) {
        Ok(skim) => skim,
        Err(error) => return Err(Flaw::NoEvent(error.to_string())),
    };
    let [attestation] = match skim.attestation_list {
        Some(list) => list,
        None => return Err(Flaw::Unchained(skim.metadata.sequence)),
    };
    let record = number(&skim.metadata.uid, &attestation.chain_uid)
        .ok_or(Flaw::Form("its `metadata.uid` is not that of its chain"))?;
    let previous = match attestation.prev_event {
        None => None,
        Some(previous) => {
            let number = number(&previous.uid, &attestation.chain_uid).ok_or(Flaw::Form(
                "its `prev_event.uid` is not that of its own chain",
            ))?;
            let hash = previous
                .fingerprint
                .value
                .parse()
                .map_err(|NoHash| Flaw::Form("its `prev_event.fingerprint` is no hash"))?;
            Some((number, hash))
        }
    };
    if previous.map_or(0, |(number, _)| number).checked_add(1) != Some(record) {
        return Err(Flaw::Form("it does not name the record before its own"));
    }
    let at = line.len().saturating_sub(HEX + END.len());
    let (body, tail) = line.split_at(at);
    let stated = std::str::from_utf8(tail)
        .ok()
        .and_then(|tail| tail.strip_suffix(END))
        .and_then(|stated| stated.parse::<Hash>().ok())
        .ok_or(Flaw::Form("its end is not a fingerprint"))?;
    let sequence = skim
        .metadata
        .sequence
        .ok_or(Flaw::Form("it has no `metadata.sequence`"))?;
    let stated = Record {
        chain: attestation.chain_uid.into_owned(),
        position: Position {
            record,
            hash: stated,
            type_uid: skim.type_uid,
        },
        previous,
        sequence,
        code: skim.metadata.event_code.into_owned(),
        time: skim.time,
    };
    let found = hash(body);
    if found == stated.position.hash {
        return Ok(stated);
    }
    Err(Flaw::Altered {
        found,
        stated: Box::new(stated),
    })
}

/// `CHAIN:RECORD`.
pub fn uid(chain: &str, record: u64) -> String {
    format!("{chain}:{record}")
}

fn number(uid: &str, chain: &str) -> Option<u64> {
    let digits = uid.strip_prefix(chain)?.strip_prefix(':')?;
    // One spelling for each number.
    digits
        .parse()
        .ok()
        .filter(|number: &u64| number.to_string() == digits)
}

fn fingerprint(hash: &Hash) -> Value {
    json!({ "algorithm_id": 3, "algorithm": "SHA-256", "value": hash.to_string() })
}

/// What is looked at of a line. A member that is there twice is an error.
#[derive(Deserialize)]
struct Skim<'a> {
    #[serde(borrow)]
    metadata: Metadata<'a>,
    #[serde(default)]
    time: UnixMillis,
    #[serde(default)]
    type_uid: u64,
    #[serde(borrow, default)]
    attestation_list: Option<[Attestation<'a>; 1]>,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow, default)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    event_code: Cow<'a, str>,
    sequence: Option<u64>,
}

#[derive(Deserialize)]
struct Attestation<'a> {
    #[serde(borrow)]
    chain_uid: Cow<'a, str>,
    #[serde(borrow, default)]
    prev_event: Option<Previous<'a>>,
}

#[derive(Deserialize)]
struct Previous<'a> {
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    fingerprint: Fingerprint<'a>,
}

#[derive(Deserialize)]
struct Fingerprint<'a> {
    #[serde(borrow)]
    value: Cow<'a, str>,
}

// === impl Hash ===

impl Hash {
    /// What stands where there is none.
    pub const ZERO: Self = Self([0; 32]);
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Hash {
    type Err = NoHash;

    fn from_str(text: &str) -> Result<Self, NoHash> {
        unhex(text).map(Self).ok_or(NoHash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(in crate::audit::trail) fn event(sequence: u64, message: &str) -> Map<String, Value> {
        let event = json!({
            "time": 1_795_544_570_000_i64,
            "message": message,
            "type_uid": 600_203,
            "metadata": { "profiles": ["host"], "event_code": "RM9001", "sequence": sequence },
        });
        event.as_object().unwrap().clone()
    }

    fn link(after: Option<Position>) -> Link<'static> {
        Link {
            chain: "c0ffee",
            authority: "host17/remit",
            after,
        }
    }

    #[test]
    fn what_is_sealed_can_be_read() {
        let first = seal(event(1, "a"), &link(None));
        let second = seal(event(2, "b \u{2028} \" é"), &link(Some(first.position)));
        let line = second.line.strip_suffix(b"\n").unwrap();
        let record = read(line).unwrap();
        assert_eq!(record.position, second.position);
        assert_eq!(record.previous, Some((1, first.position.hash)));
        assert_eq!((record.sequence, record.code.as_str()), (2, "RM9001"));
        let value: Value = serde_json::from_slice(line).unwrap();
        assert_eq!(value["metadata"]["uid"], "c0ffee:2");
        assert_eq!(value["metadata"]["profiles"], json!(["host", PROFILE]));
        assert_eq!(
            value["attestation_list"][0]["fingerprint"]["value"],
            second.position.hash.to_string()
        );
        // As anybody would compute it.
        let text = std::str::from_utf8(line).unwrap();
        let (body, _) = text.rsplit_once(&second.position.hash.to_string()).unwrap();
        assert_eq!(hash(body.as_bytes()), second.position.hash);
    }

    #[test]
    fn no_byte_of_a_line_can_change() {
        let first = seal(event(1, "a"), &link(None));
        let sealed = seal(event(2, "b"), &link(Some(first.position)));
        let line = sealed.line.strip_suffix(b"\n").unwrap();
        for at in 0..line.len() {
            let mut other = line.to_vec();
            for byte in [b'x', b'0', b' ', b'"', line[at] ^ 0x20, line[at] ^ 1] {
                other[at] = byte;
                if other != line {
                    assert!(read(&other).is_err(), "{}", String::from_utf8_lossy(&other));
                }
            }
            other[at] = line[at];
            other.insert(at, b' ');
            assert!(read(&other).is_err());
            other.remove(at);
            other.remove(at);
            assert!(read(&other).is_err());
        }
        for end in [" ", "\r", "{}"] {
            let mut other = line.to_vec();
            other.extend_from_slice(end.as_bytes());
            assert!(read(&other).is_err());
        }
    }

    #[test]
    fn a_line_without_a_place_is_told_from_rubbish() {
        assert_eq!(
            read(b"{\"metadata\":{\"sequence\":7}}"),
            Err(Flaw::Unchained(Some(7)))
        );
        for rubbish in ["", "{", "null", "{\"metadata\":1}", "\u{0}"] {
            assert!(matches!(read(rubbish.as_bytes()), Err(Flaw::NoEvent(_))));
        }
        assert!(matches!(
            read(b"{\"metadata\":{},\"attestation_list\":[{\"chain_uid\":\"\"}]}"),
            Err(Flaw::Form(_))
        ));
    }

    #[test]
    fn hexadecimal_has_one_spelling() {
        assert_eq!(hex(&[0, 0x9f, 0xff]), "009fff");
        assert_eq!(unhex::<2>("9fff"), Some([0x9f, 0xff]));
        for text in ["9FFF", "9ff", "9fff0", "9ffg", "+fff"] {
            assert_eq!(unhex::<2>(text), None, "{text}");
        }
    }
}
