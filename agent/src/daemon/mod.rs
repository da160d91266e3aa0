//! The daemon: the only place where the other modules meet.

pub mod settings;
