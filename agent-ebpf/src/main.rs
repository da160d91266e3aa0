//! The kernel programs. On any target but BPF this is an empty program: the library beside it
//! carries what the host needs.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
