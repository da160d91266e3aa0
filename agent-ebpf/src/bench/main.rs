//! Programs that `cargo xtask bench` compares Remit with. They stand in an object of their own,
//! built only with the feature `bench`: nothing of this is ever part of the daemon.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

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
mod address_filter;
#[cfg(target_arch = "bpf")]
mod floor;
#[cfg(target_arch = "bpf")]
mod per_packet;

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
