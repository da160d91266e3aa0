//! What a command comes to, and the exit code that says it.

use std::process::ExitCode;

use crate::{
    control::{client::ClientError, protocol::Code},
    daemon::settings::SettingsError,
};

/// What a command comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done, allowed, valid, healthy: 0.
    Yes,
    /// The answer is no: 1.
    No,
    /// It was asked wrongly: 2.
    Usage,
    /// It could not be told: 3.
    Unknown,
    /// The code of the command that was run.
    Child(u8),
}

/// Why a command came to nothing.
#[derive(Debug)]
pub struct Failure {
    /// What it comes to.
    pub outcome: Outcome,
    /// What went wrong, causes included.
    pub error: anyhow::Error,
    /// What to do about it.
    pub help: Option<String>,
}

/// What commands return.
pub type Result<T = Outcome> = std::result::Result<T, Failure>;

// === impl Outcome ===

impl Outcome {
    /// Yes or no.
    pub const fn of(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(match outcome {
            Outcome::Yes => 0,
            Outcome::No => 1,
            Outcome::Usage => 2,
            Outcome::Unknown => 3,
            Outcome::Child(code) => code,
        })
    }
}

// === impl Failure ===

impl Failure {
    /// The command was asked wrongly.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Usage,
            error: anyhow::Error::msg(message.into()),
            help: None,
        }
    }

    /// It could not be told.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Unknown,
            error: anyhow::Error::msg(message.into()),
            help: None,
        }
    }

    /// The answer is no.
    pub fn no(message: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::No,
            error: anyhow::Error::msg(message.into()),
            help: None,
        }
    }

    /// The same with advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Whatever nobody gave a meaning to could not be told.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self {
            outcome: Outcome::Unknown,
            error,
            help: None,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let outcome = match &error {
            ClientError::Refused(refusal) if refusal.code == Code::NoSuchAgent => Outcome::No,
            ClientError::Refused(refusal) if refusal.code == Code::BadRequest => Outcome::Usage,
            _ => Outcome::Unknown,
        };
        Self {
            outcome,
            help: error.help().map(str::to_owned),
            error: error.into(),
        }
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        let help = match &error {
            SettingsError::Read { .. } => {
                Some("`--config` or `REMIT_CONFIG` named this file".to_owned())
            }
            // Each mistake brings its own.
            SettingsError::Invalid(_) => None,
        };
        Self {
            outcome: Outcome::Unknown,
            error: error.into(),
            help,
        }
    }
}
