//! `remit daemon --detach-all`: the only way to lift the fence.

use std::path::PathBuf;

use super::{DaemonError, evidence::places, settings::Settings, time::wall_millis};
use crate::{
    audit::{Actor, Decided, Decision, FenceLifted, Host, Limits, Trail},
    kernel,
};

/// Removes every pin below the settings' bpffs folder and writes it to the audit log, also where it
/// fails halfway.
pub fn detach_all(settings: &Settings) -> Result<Vec<PathBuf>, DaemonError> {
    let limits = Limits {
        max_size: settings.log.max_size,
        max_total: settings.log.max_total,
        retention: settings.log.retention,
    };
    let host = Host::read();
    let mut audit = Trail::open(&places(settings), limits, &host, wall_millis())?;
    let removed = kernel::detach_pinned(&settings.paths.bpffs);
    let decided = Decided {
        time: wall_millis(),
        what: Decision::FenceLifted(FenceLifted {
            by: Actor::Caller {
                uid: nix::unistd::getuid().as_raw(),
                pid: i32::try_from(std::process::id()).ok(),
            },
            login_uid: login_uid(),
            removed: removed
                .iter()
                .flatten()
                .map(|path| path.display().to_string())
                .collect(),
            error: removed.as_ref().err().map(ToString::to_string),
        }),
    };
    audit.append(decided.time, |sequence| decided.to_ocsf(&host, sequence))?;
    audit.close(decided.time)?;
    removed.map_err(|source| DaemonError::System {
        what: "remove the pins that hold the fence",
        source,
    })
}

/// Who logged in, as the kernel's audit keeps it through sudo and su; none where nobody did, as for
/// services, or where the kernel keeps none.
fn login_uid() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/self/loginuid").ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}
