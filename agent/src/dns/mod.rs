//! The DNS guard: turns names into short-lived grants of addresses.
//!
//! An address is reachable by its name only while an answer lives that the guard gave. A question
//! belongs to the agent whose socket sent it. What its scope does not name is refused and goes
//! nowhere; the rest is asked upstream in the guard's own words, and the answer is released once
//! its leases are in force.
//!
//! Pure: [`name`], [`message`], [`budget`], [`lease`], [`guard`]. The rim: `server`. The guard knows
//! no kernel: it *returns* leases, and whoever runs it writes them.

pub mod budget;
pub mod guard;
pub mod lease;
pub mod message;
pub mod name;
