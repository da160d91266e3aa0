//! Ways to keep the verifier's work a sum and not a product.
//!
//! The verifier follows each path through a function, and remembers the constants that a path left
//! behind. If a look-up can end in thirty ways, all that comes after it is followed thirty times,
//! although nothing there depends on which it was. [`hide`] makes a result one unknown number on
//! every path; the second path then meets a state that was seen before, and ends there.
//! (Linux 6.1 to 6.18; `states_equal` in kernel/bpf/verifier.c.)

use core::sync::atomic::AtomicU64;

use crate::abi::Addr;

/// Always zero. Not constant, so that it lies in a map which the verifier does not read.
static ZERO: AtomicU64 = AtomicU64::new(0);

/// The value itself, of which neither compiler nor verifier know anything afterwards.
#[inline(always)]
pub fn hide(value: u64) -> u64 {
    // SAFETY: a static, which nothing ever writes; volatile, or the compiler would read its zero.
    value | unsafe { ZERO.as_ptr().read_volatile() }
}

/// [`hide`] for a byte.
#[inline(always)]
pub fn hide8(value: u8) -> u8 {
    hide(value as u64) as u8
}

/// [`hide`] for a port.
#[inline(always)]
pub fn hide16(value: u16) -> u16 {
    hide(value as u64) as u16
}

/// [`hide`] for a word.
#[inline(always)]
pub fn hide32(value: u32) -> u32 {
    hide(value as u64) as u32
}

/// [`hide`] for an address.
#[inline(always)]
pub fn hide_addr(addr: Addr) -> Addr {
    let [a, b, c, d] = addr.words;
    Addr {
        words: [hide32(a), hide32(b), hide32(c), hide32(d)],
    }
}

/// The value itself, of which the compiler knows nothing afterwards, not even which bits are zero:
/// a mask that follows is really applied. ([`hide`] will not do: the compiler splits its `or`.)
#[inline(always)]
pub fn opaque(value: usize) -> usize {
    // SAFETY: a live local.
    unsafe { (&raw const value).read_volatile() }
}
