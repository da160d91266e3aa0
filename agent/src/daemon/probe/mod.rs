//! The fence, tried from inside: `remit probe`.
//!
//! A worker thread takes one agent at a time. It starts a [`helper`] in a cgroup of its own below
//! one that the agent claims, has it try what must be refused and what must arrive, and looks at the
//! error, at listeners of the daemon's, at the kernel's counters and at the log on the disk. What
//! must come of an attempt is what the registry says ([`plan`]); the kernel is on trial and is not
//! asked. [`judge`] weighs the evidence.
//!
//! Destinations are addresses of this host, so no packet leaves it. First what is in force is tried
//! as it stands. Then two exact addresses, 127.0.0.1 and ::1, are granted on the ports of the
//! daemon's listeners, without touching the agent's row or word. What that widens: for those
//! moments every process of the agent may reach these listeners, which answer nothing and close.
//! The grant ends by its deadline in the kernel should the daemon die meanwhile.

mod ears;
pub mod helper;
mod judge;
mod lookup;
mod order;
mod packet;
mod places;
mod plan;
mod steps;
mod trace;
mod trial;
mod worker;

pub use steps::Probing;
pub use worker::Worker;
