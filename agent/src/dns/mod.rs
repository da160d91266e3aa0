//! The DNS guard: turns names into short-lived grants of addresses.
//!
//! An address is reachable by its name only while an answer lives that the guard gave. A question
//! belongs to the agent whose socket sent it. What its scope does not name is refused and goes
//! nowhere; the rest is asked upstream in the guard's own words, and the answer is released once
//! its leases are in force.
//!
//! ```text
//!  agent ─ endpoint ─▶ server ─ Identify ─▶ daemon: whose socket is this?
//!                        │ guard.ask: refused, or asked
//!                        ├─▶ upstream
//!                        │ guard.judge: what of the answer, which leases
//!                        ├─ Lease ─▶ daemon: written and read back
//!  agent ◀── reply ──────┘
//! ```
//!
//! Pure: [`name`], [`message`], [`budget`], [`lease`], [`guard`], [`tally`]. The rim: [`endpoint`],
//! [`resolv`], [`upstream`], [`server`], [`hosts`]. The guard knows no kernel: it *returns* leases, and the
//! daemon writes them. Nothing is cached here but what the leases need: see [`upstream`].
//!
//! While the daemon is down nobody listens at the endpoints: a lookup over UDP or TCP is refused by
//! the kernel at once (ECONNREFUSED), and leases run out.

pub mod budget;
pub mod endpoint;
pub mod guard;
pub mod hosts;
pub mod lease;
pub mod message;
pub mod name;
pub mod resolv;
pub mod server;
pub mod tally;
pub mod upstream;
