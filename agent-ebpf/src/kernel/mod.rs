//! The programs. A hook reads its context, asks [`agent_ebpf::decide`], and acts; what it needs
//! for that stands in the files beside it. No arithmetic on addresses, no policy, no strings here.

/// Reads a field of a context. One field at a time and volatile, or the compiler may join reads in
/// ways that the verifier refuses.
macro_rules! field {
    ($context:expr, $($field:tt)+) => {{
        // SAFETY: the context as the kernel gave it; nothing is read yet.
        let place = unsafe { &raw const (*$context).$($field)+ };
        // SAFETY: a field of the context, which outlives the program.
        unsafe { place.read_volatile() }
    }};
}

mod access;
mod bind;
mod cache;
mod connect;
mod create;
mod dns;
mod egress;
mod emit;
mod identity;
mod judge;
mod maps;
mod peer;
mod verdict;
mod wipe;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the object is checked to have no call to it (`cargo xtask lint`).
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
