//! Remit's user side. Modules in dependency order; each may use only those above it, and the
//! peers `kernel`, `audit`, `control`, `cgroup`, `launch` and `state` never each other:
//!
//! | module    | may know                       | promises |
//! |-----------|--------------------------------|----------|
//! | `policy`  | `agent_ebpf`                   | pure: text in, tables or findings out |
//! | `cgroup`  | nothing here                   | which cgroup is which |
//! | `launch`  | `cgroup`                       | starts a command inside a cgroup, joined before exec |
//! | `kernel`  | `policy` (its tables)          | the only module that names aya |
//! | `audit`   | `policy` (its words)           | OCSF records, the line for people, rotation |
//! | `control` | nothing here                   | the socket: protocol, peer credentials, client |
//! | `state`   | `policy` (its tables)          | what survives: last good registry, holds, clocks |
//! | `daemon`  | all of the above               | the only place where they meet |
//! | `cli`     | all of the above               | argv and terminal |

pub mod audit;
pub mod cgroup;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod kernel;
pub mod launch;
pub mod policy;
pub mod state;
