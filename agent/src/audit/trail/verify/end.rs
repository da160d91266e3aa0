//! How far a trail is complete: what its end is compared with.

use super::{Anchor, Complete, Head, Position, PublicKey, Seen, Verifier};

impl Verifier {
    pub(super) fn complete(&mut self, anchor: &Anchor) -> Complete {
        let Some(last) = self.last else {
            if let Anchor::Host { after, .. } = anchor
                && !matches!(&**after, Seen::Missing)
                && !matches!(&**after, Seen::Head(head, _) if head.last.record == 0)
            {
                self.finding_at_end("there is a head, and no record of the chain is here".into());
            }
            return Complete::Nothing;
        };
        match anchor {
            Anchor::None => self.complete_alone(last),
            Anchor::Hash(hash) => match self.anchored {
                Some(record) => Complete::Hash {
                    record,
                    behind: last.record.saturating_sub(record),
                },
                None => {
                    let what = format!(
                        "no record has the hash {hash}: the trail was cut or replaced before it"
                    );
                    self.finding_at_end(what);
                    self.complete_alone(last)
                }
            },
            Anchor::Host { before, after, key } => {
                if let (Some(key), Some(signs)) = (key, self.key)
                    && *key != signs
                {
                    let what = format!("this host signs with {key}, the trail ends with {signs}");
                    self.finding_at_end(what);
                }
                let wrong = match &**after {
                    Seen::Missing => Some("the head is missing from the state directory".into()),
                    Seen::Untrusted(why) => Some(why.clone()),
                    Seen::Head(head, key) => self.at_head(last, before, head, *key),
                };
                match wrong {
                    None => Complete::Head {
                        record: last.record,
                    },
                    Some(what) => {
                        self.finding_at_end(what);
                        self.complete_alone(last)
                    }
                }
            }
        }
    }

    /// What is wrong with an end at `last`, where the head is `head`.
    fn at_head(
        &self,
        last: Position,
        before: &Seen,
        head: &Head,
        key: PublicKey,
    ) -> Option<String> {
        if self.key.is_some_and(|signs| signs != key) {
            return Some(format!("the head is signed by another key, {key}"));
        }
        if self.chain.as_ref() != Some(&head.chain) {
            return Some(format!("the head is of another chain, {}", head.chain));
        }
        if last == head.last || Some(last) == head.next {
            return None;
        }
        let moved = match before {
            Seen::Head(before, _) => before != head,
            Seen::Missing | Seen::Untrusted(_) => true,
        };
        // The daemon wrote on while this was read: then the end lies between the two heads.
        if moved && self.passed && last.record < head.last.record {
            return None;
        }
        let (ends, says) = (last.record, head.last.record);
        Some(match ends.cmp(&says) {
            std::cmp::Ordering::Less => {
                format!(
                    "the log ends with record {ends}, the head says {says}: records are missing"
                )
            }
            std::cmp::Ordering::Equal => format!(
                "record {ends} is {}, the head says {}: it was replaced",
                last.hash, head.last.hash
            ),
            std::cmp::Ordering::Greater => format!(
                "the log ends with record {ends}, the head says {says}: records were put in"
            ),
        })
    }

    fn complete_alone(&self, last: Position) -> Complete {
        match self.checkpoint {
            Some((number, record, time)) => Complete::Checkpoint {
                number,
                record,
                time,
                behind: last.record.saturating_sub(record),
            },
            None => Complete::Unsigned {
                record: last.record,
            },
        }
    }
}
