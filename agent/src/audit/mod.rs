//! The record of what agents attempted and what was decided about them.
//!
//! | module    | promises |
//! |-----------|----------|
//! | `record`  | a violation as one OCSF value; pure |
//! | `decided` | what was decided about agents and by the daemon, as OCSF values; pure |
//! | `line`    | the one line that a person reads, derived from the value; pure |
//! | `ledger`  | how many attempts each line stands for, so that sums are exact; pure |
//! | `text`    | bytes that an agent chose, made harmless; pure |
//! | `writer`  | one object a line, one write a line, sequence without gaps, rotation |
//! | `encode`  | other forms of an event: OCSF 1.8, ECS, journal fields; pure |
//! | `export`  | those forms in files and in the journal |
//! | `otlp`    | those events to an OpenTelemetry collector, in builds that have it |
//! | `mask`    | secrets in command lines made unreadable; pure |
//! | `flow`    | the community id of a flow; pure |
//! | `metrics` | Prometheus text out of one value; pure |
//! | `files`   | the files of a log as they were written, line by line |
//! | `tail`    | reads the log as it grows, over rotation |
//! | `query`   | finds lines in all files of the logs |
//! | `sums`    | what a log says was written, for the next daemon's ledger |
//! | `trail`   | the audit log: hash chain, signed checkpoints, and their check |
//! | `accounting` | whether lines add up to the kernel's counters; pure |
//! | `process` | what /proc says of a process, and of this host |
//!
//! Nothing is lost silently: what could not be written as a line of its own is counted, and
//! written as such within five seconds.

pub mod accounting;
pub mod decided;
pub mod encode;
pub mod export;
pub mod files;
pub mod flow;
pub mod ledger;
pub mod line;
pub mod mask;
pub mod metrics;
pub mod ocsf;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod process;
pub mod query;
pub mod record;
pub mod span;
pub mod sums;
pub mod tail;
pub mod text;
pub mod trail;
pub mod writer;

pub use decided::{
    Actor, Change, ClockAccepted, ClockBehind, ClockStepped, Damaged, Decided, Decision,
    Difference, Drifted, FenceLifted, Lifecycle, Mending, ProbeResult, ProbeRun, Refenced,
    Succession, Tables,
};
pub use export::Exports;
pub use ledger::{Allowance, Key, Ledger, Owed, Residual};
pub use line::human;
pub use mask::Mask;
pub use ocsf::{Code, Host, LogName};
pub use process::Processes;
pub use record::{
    Context, Dropped, Endpoint, EntryRef, Lookup, Lost, Parent, ProcessInfo, Reached, Subject,
    Violation,
};
pub use sums::{Sums, written_since};
pub use tail::{Filter, Line, Tail};
pub use trail::{Places, Trail, TrailError};
pub use writer::{Limits, Log, LogError};
