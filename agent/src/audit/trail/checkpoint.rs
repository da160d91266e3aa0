//! A signed checkpoint: the host's word that its trail was complete up to a record. It is itself a
//! record, and covers those before it. Pure.

use serde_json::{Value, json};

use super::{
    chain::{Hash, Position},
    keys::{PublicKey, Signer},
};
use crate::policy::tables::UnixMillis;

/// A checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its own number, from 1.
    pub number: u64,
    /// The last record that it covers.
    pub record: u64,
    /// That record's hash.
    pub hash: Hash,
    /// When it was signed.
    pub time: UnixMillis,
    /// Whose signature it is.
    pub key: PublicKey,
    /// 64 bytes in hexadecimal.
    pub signature: String,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Signs the chain as it is with `last`.
    pub fn sign(
        signer: &Signer,
        chain: &str,
        number: u64,
        last: Position,
        time: UnixMillis,
    ) -> Self {
        let mut checkpoint = Self {
            number,
            record: last.record,
            hash: last.hash,
            time,
            key: signer.public(),
            signature: String::new(),
        };
        checkpoint.signature = signer.sign(&checkpoint.message(chain));
        checkpoint
    }

    /// Whether the signature is that of the key that it names.
    pub fn is_signed(&self, chain: &str) -> bool {
        self.key.verifies(&self.message(chain), &self.signature)
    }

    /// As it stands in `unmapped.checkpoint`.
    pub fn to_value(&self) -> Value {
        json!({
            "number": self.number,
            "record": self.record,
            "hash": self.hash.to_string(),
            "time": self.time,
            "algorithm": "Ed25519",
            "key": self.key.to_string(),
            "signature": self.signature,
        })
    }

    /// From `unmapped.checkpoint`.
    pub fn from_value(value: &Value) -> Option<Self> {
        let text = |key: &str| value[key].as_str();
        Some(Self {
            number: value["number"].as_u64()?,
            record: value["record"].as_u64()?,
            hash: text("hash")?.parse().ok()?,
            time: value["time"].as_i64()?,
            key: PublicKey::from_hex(text("key")?)?,
            signature: text("signature")?.to_owned(),
        })
    }

    /// What is signed.
    fn message(&self, chain: &str) -> String {
        format!(
            "remit-audit-checkpoint-v1\n{chain}\n{}\n{}\n{}\n{}\n",
            self.number, self.record, self.hash, self.time
        )
    }
}
