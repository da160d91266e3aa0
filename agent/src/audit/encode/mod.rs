//! One event, several forms. The log of record is OCSF 1.9.0; every other form is derived from its
//! value and from nothing else, so a line can be turned into any of them at any later time. Pure.
//!
//! | module    | form |
//! |-----------|------|
//! | `ocsf18`  | OCSF 1.8.0, for readers that have no newer schema |
//! | `ecs`     | Elastic Common Schema |
//! | `journal` | fields of the systemd journal |

pub mod ecs;
pub mod journal;
pub mod ocsf18;

use std::str::FromStr;

use serde_json::Value;

use super::line::human;

/// A form of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// OCSF 1.9.0, as it stands in the log.
    Ocsf19,
    /// OCSF 1.8.0.
    Ocsf18,
    /// Elastic Common Schema.
    Ecs,
    /// One line for people.
    Human,
}

/// Why a text names no form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` must be one of ocsf-1.9, ocsf-1.8, ecs, human")]
pub struct NoFormat(String);

// === impl Format ===

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ocsf19, Self::Ocsf18, Self::Ecs, Self::Human];

    /// As in settings and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ocsf19 => "ocsf-1.9",
            Self::Ocsf18 => "ocsf-1.8",
            Self::Ecs => "ecs",
            Self::Human => "human",
        }
    }

    /// One line without its end.
    pub fn encode(self, event: &Value) -> String {
        match self {
            Self::Ocsf19 => event.to_string(),
            Self::Ocsf18 => ocsf18::encode(event).to_string(),
            Self::Ecs => ecs::encode(event).to_string(),
            Self::Human => human(event, false),
        }
    }
}

impl FromStr for Format {
    type Err = NoFormat;

    fn from_str(text: &str) -> Result<Self, NoFormat> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| NoFormat(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::record::tests::{host, violation};

    #[test]
    fn every_form_is_one_line() {
        let event = violation().to_ocsf(&host(), 1);
        for format in Format::ALL {
            assert_eq!(format.name().parse(), Ok(format));
            let line = format.encode(&event);
            assert!(!line.contains('\n') && line.contains("billing-recon"));
        }
        assert!("ocsf".parse::<Format>().is_err());
        // What somebody else wrote is turned into something, whatever it is.
        for event in [Value::Null, serde_json::json!([1]), serde_json::json!({})] {
            for format in Format::ALL {
                assert!(!format.encode(&event).contains('\n'));
            }
        }
    }
}
