//! Remit's user side. Modules in dependency order; each may use only those above it, and the
//! peers `kernel`, `audit`, `control`, `cgroup`, `launch`, `state`, `sockets` and `dns` never
//! each other:
//!
//! | module    | may know                       | promises |
//! |-----------|--------------------------------|----------|
//! | `policy`  | `agent_ebpf`                   | pure: text in, tables or findings out |
//! | `netlink` | nothing here                   | the frame of sock_diag's messages |
//! | `cgroup`  | nothing here                   | which cgroup is which |
//! | `launch`  | `cgroup`                       | starts a command inside a cgroup, joined before exec |
//! | `kernel`  | `policy` (its tables)          | the only module that names aya |
//! | `audit`   | `policy` (its words)           | OCSF records, the line for people, rotation |
//! | `control` | `netlink`                      | the socket: protocol, peer credentials, client |
//! | `state`   | `policy` (its tables)          | what survives: last good registry, holds, clocks |
//! | `sockets` | `netlink`                      | TCP connections in every network namespace, and their end |
//! | `dns`     | `policy` (its tables)          | the guard: which name, whose, and which addresses it leases |
//! | `daemon`  | all of the above               | the only place where they meet |
//! | `doctor`  | all of the above               | what this host can, and how an agent gets out |
//! | `cli`     | all of the above               | argv and terminal |

pub mod audit;
pub mod cgroup;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod dns;
pub mod doctor;
pub mod kernel;
pub mod launch;
mod netlink;
pub mod policy;
pub mod sockets;
pub mod state;
