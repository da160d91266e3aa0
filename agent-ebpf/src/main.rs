//! The kernel programs. On any target but BPF this is an empty program: the library beside it
//! carries what the host needs.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// Atomic addition: core has `fetch_add` only for targets with compare-and-swap.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    expect(internal_features, reason = "see above")
)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
