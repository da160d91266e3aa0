//! Set-up, builds, tests and VMs of Remit, as commands.

fn main() {}
