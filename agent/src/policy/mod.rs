//! The registry compiler.

pub mod tables;
