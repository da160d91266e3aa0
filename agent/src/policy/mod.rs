//! The registry compiler: text in, tables or findings out. No files, clock, network or threads;
//! time is an argument.
//!
//! ```text
//! source ─ reader ─ document ─ validate ─ link ─ expand ─ lower ─> AgentTables
//!   text     shape     keys      model     files   sets    rules
//!                 └────────┴─────────┴───────┴───────┴──────────> Finding
//! ```
//!
//! [`MemoryRules`] asks the kernel's own verdict about tables that are in no kernel, and
//! [`explain`] puts that into words.

mod assemble;
mod clock;
mod compile;
mod dead;
mod document;
mod entries;
mod expand;
mod explain;
mod explain_name;
mod finding;
mod hash;
mod lease;
mod link;
mod looked;
mod lower;
mod memo;
mod memory;
mod model;
mod name;
mod names;
mod net;
mod reader;
mod selector;
mod source;
mod stored;
pub mod tables;
mod validate;

pub use assemble::UNREGISTERED_ID;
pub use clock::Clock;
pub use compile::{Compilation, Names, compile, compile_on};
pub use explain::{Explanation, Outcome, Question, explain, words};
pub use explain_name::explain_name;
pub use finding::{Finding, Severity};
pub use lease::{
    LeasedPorts, LeasedRule, TooManyRules, Unleasable, is_inside, leasable, leased_rules, reaches,
};
pub use looked::{Looked, LookedRule, looked_at};
pub use memo::Memory;
pub use memory::{MemoryRules, row, rule_sets};
pub use model::{Agent, Lifecycle, Set};
pub use name::{Depth, HostError, HostPattern, Id};
pub use names::{Allowance, NameRule, Resolution, resolve};
pub use net::{Cidr, CidrError, PortError, PortSpec, Ports};
pub use selector::{Selector, SelectorError};
pub use source::{Source, SourceKind, Span};
pub use stored::PrefixError;
pub use tables::{AgentTables, Entry, Placed, Prefix, Scope, TimedRule, UnixMillis};
