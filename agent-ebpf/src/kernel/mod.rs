//! The programs. A hook reads its context, asks [`agent_ebpf::decide`], and acts; what it needs
//! for that stands in the files beside it. No arithmetic on addresses, no policy, no strings here.

mod bind;
mod cache;
mod connect;
mod create;
mod egress;
mod emit;
mod identity;
mod judge;
mod maps;
mod peer;
mod verdict;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the object is checked to have no call to it (`cargo xtask lint`).
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
