//! Records of the trail about itself.

use serde_json::Value;

use super::{Checkpoint, Code, Hash, PublicKey, Resumed};

/// A record of the trail itself.
pub(super) enum Special {
    Begun(PublicKey),
    Checkpoint(Checkpoint),
    Removed(u64, Hash),
    Resumed(Resumed),
    KeyChanged(PublicKey, PublicKey),
    Broken,
}

impl Special {
    pub(super) fn read(code: Code, unmapped: &Value) -> Option<Self> {
        let key = |name: &str| PublicKey::from_hex(unmapped[name].as_str()?);
        match code {
            Code::TrailBegun => key("key").map(Self::Begun),
            Code::TrailCheckpoint => {
                Checkpoint::from_value(&unmapped["checkpoint"]).map(Self::Checkpoint)
            }
            Code::TrailRemoved => {
                let through = &unmapped["through"];
                let hash = through["hash"].as_str()?.parse().ok()?;
                Some(Self::Removed(through["record"].as_u64()?, hash))
            }
            Code::TrailResumed => Resumed::from_value(unmapped).map(Self::Resumed),
            Code::TrailKeyChanged => Some(Self::KeyChanged(key("from")?, key("to")?)),
            _ => None,
        }
    }
}
