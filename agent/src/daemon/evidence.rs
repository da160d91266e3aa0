//! The audit trail and the other forms of events, as the settings want them.

use tracing::{error, warn};

use super::{DaemonError, core::Core, recorder::Recorder, settings::Settings, time::wall_millis};
use crate::audit::{Exports, Limits, Mask, Places, Trail};

/// Where the audit trail and what vouches for it are.
pub fn places(settings: &Settings) -> Places {
    Places {
        log: settings.paths.log.clone(),
        state: settings.paths.state.clone(),
        key: settings.log.signing_key.clone(),
    }
}

/// Masks and exports as the settings say.
pub(super) fn arrange(
    settings: &Settings,
    limits: Limits,
    recorder: &mut Recorder,
    trail: &mut Trail,
) -> Result<(), DaemonError> {
    let log = &settings.log;
    if let Some(patterns) = &log.mask {
        recorder.set_mask(Mask::new(patterns.iter().map(String::as_str))?);
    }
    let exports = Exports::open(&settings.paths.log, &log.export, log.journal, limits)?;
    #[cfg(feature = "otlp")]
    let exports = {
        let mut exports = exports;
        if let Some(collector) = log.otlp.as_ref().and_then(|text| text.parse().ok()) {
            exports.send_to(collector)?;
        }
        exports
    };
    if !exports.is_empty() {
        trail.keep_written();
    }
    recorder.set_exports(exports);
    Ok(())
}

impl Core {
    /// Once a second: signs, hands to the disk, and says what is wrong.
    pub(super) fn tend_trail(&mut self) {
        self.audit.tick(wall_millis());
        match self.audit.take_trouble() {
            Some(trouble) => {
                error!(message = "The audit trail is not as it should be.", trouble);
                self.problems
                    .insert("trail", format!("audit trail: {trouble}"));
            }
            None => drop(self.problems.remove("trail")),
        }
        self.export();
    }

    /// What the trail has written, in its other forms.
    pub(super) fn export(&mut self) {
        let exports = self.recorder.exports();
        for line in self.audit.take_written() {
            if let Ok(event) = serde_json::from_slice(&line) {
                exports.write(&event);
            }
        }
        let lost = exports.take_lost();
        self.meter.unexported += lost;
        if lost > 0 {
            warn!(
                message = "Events were not exported; the log has them.",
                lost
            );
        }
        match exports.trouble() {
            Some(trouble) => {
                let problem = format!("events are not exported: {trouble}");
                self.problems.insert("export", problem);
            }
            None => drop(self.problems.remove("export")),
        }
    }
}
