//! The registry on disk, compiled here and now: what `check`, `explain` and `run --policy` stand on.

use std::path::PathBuf;

use anyhow::Context as _;
use nix::time::{ClockId, clock_gettime};

use super::outcome::Result;
use crate::{
    daemon::{
        registry::{self, Unread},
        settings::Settings,
    },
    policy::{self, AgentTables, Clock, Compilation, Finding, SourceKind},
};

/// A compiled registry and what was wrong with it.
#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) compilation: Compilation,
    pub(super) unread: Vec<Unread>,
    /// Files read.
    pub(super) files: usize,
}

/// Reads and compiles the given files, or without any the registry of the settings.
pub(super) fn compile(settings: &Settings, given: &[PathBuf]) -> Compiled {
    let read = if given.is_empty() {
        registry::read(&settings.paths)
    } else {
        registry::read_given(given, &settings.paths)
    };
    let now = jiff::Timestamp::now().as_millisecond();
    let mut compilation = policy::compile_on(&read.sources, now, registry::names(settings));
    let files = read.sources.len();
    if !given.is_empty() {
        // A set that was not named and that nothing uses is somebody else's.
        let theirs = |finding: &Finding| {
            finding.agents.is_empty()
                && !given.iter().any(|path| finding.file.starts_with(path))
                && read
                    .sources
                    .iter()
                    .any(|source| source.path == finding.file && source.kind == SourceKind::Set)
        };
        compilation.findings.retain(|finding| !theirs(finding));
    }
    Compiled {
        compilation,
        unread: read.unread,
        files,
    }
}

/// This moment on both clocks.
pub(super) fn clock() -> Result<Clock> {
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).context("cannot read the boot clock")?;
    let seconds = u64::try_from(boot.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(boot.tv_nsec()).unwrap_or(0);
    Ok(Clock::at(
        seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
        jiff::Timestamp::now().as_millisecond(),
    ))
}

// === impl Compiled ===

impl Compiled {
    /// Whether everything could be read and compiled.
    pub(super) fn is_good(&self) -> bool {
        self.unread.is_empty() && !self.compilation.has_errors()
    }

    pub(super) fn agent(&self, id: &str) -> Option<&AgentTables> {
        self.compilation.agent(id)
    }

    /// Everything that keeps `id` from being compiled, rendered; empty when nothing is known of it.
    pub(super) fn troubles(&self, id: &str) -> Vec<String> {
        let unread = self.unread.iter().filter(|unread| {
            unread.folder || unread.path.file_stem().is_some_and(|stem| stem == id)
        });
        let findings =
            self.compilation.findings.iter().filter(|finding| {
                finding.is_error() && finding.agents.iter().any(|agent| agent == id)
            });
        unread
            .map(ToString::to_string)
            .chain(findings.map(ToString::to_string))
            .collect()
    }
}
