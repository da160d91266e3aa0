//! `remit daemon --detach-all`: the only way to lift the fence.

use std::path::PathBuf;

use super::{DaemonError, settings::Settings, time::wall_millis};
use crate::{
    audit::{Decided, Decision, Limits, Log, LogName},
    kernel,
};

/// Removes every pin below the settings' bpffs folder and writes it to the audit log.
pub fn detach_all(settings: &Settings) -> Result<Vec<PathBuf>, DaemonError> {
    let limits = Limits {
        max_size: settings.log.max_size,
        max_total: settings.log.max_total,
        retention: settings.log.retention,
    };
    let mut audit = Log::open(&settings.paths.log, LogName::Audit, limits)?;
    let removed =
        kernel::detach_pinned(&settings.paths.bpffs).map_err(|source| DaemonError::System {
            what: "remove the pins that hold the fence",
            source,
        })?;
    let host = crate::audit::Host::read();
    let decided = Decided {
        time: wall_millis(),
        what: Decision::Stopped {
            pid: std::process::id(),
            reason: "--detach-all: the fence was lifted".to_owned(),
            revision: 0,
        },
    };
    audit.append(|sequence| decided.to_ocsf(&host, sequence))?;
    Ok(removed)
}
