//! The observer: programs that note which processes outside every root reach a model API, for
//! `remit discover`. They decide nothing. Whatever happens in here, the answer is [`PASS`].
//!
//! They stand in an object of their own, so that nothing of what enforces depends on them: not its
//! maps, not its version, not what the verifier has to follow. The daemon loads them only where the
//! settings ask for it, and pins nothing, so they end with it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// Atomic addition: core has `fetch_add` only for targets with compare-and-swap.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    expect(internal_features, reason = "see above")
)]

/// Reads a field of a context: one at a time and volatile, as the verifier wants it.
#[cfg(target_arch = "bpf")]
macro_rules! field {
    ($context:expr, $($field:tt)+) => {{
        // SAFETY: the context as the kernel gave it; nothing is read yet.
        let place = unsafe { &raw const (*$context).$($field)+ };
        // SAFETY: a field of the context, which outlives the program.
        unsafe { place.read_volatile() }
    }};
}

#[cfg(target_arch = "bpf")]
mod hooks;
#[cfg(target_arch = "bpf")]
mod note;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
