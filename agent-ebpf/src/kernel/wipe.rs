//! Zeroes, word by word. What the compiler makes of a zeroed value of more than a few words is a call
//! of `memset`, which on this target is a loop over bytes: 30 ns for a packet's headers, 100 for an
//! event.

use core::mem::MaybeUninit;

/// Writes zeroes, and lends what is then a value.
#[inline(always)]
pub fn wiped<T: zerocopy::FromBytes>(place: &mut MaybeUninit<T>) -> &mut T {
    let words = place.as_mut_ptr().cast::<u32>();
    // All shared types are whole words, and aligned to words at least.
    for at in 0..size_of::<T>() / size_of::<u32>() {
        // SAFETY: within the place.
        let word = unsafe { words.add(at) };
        // SAFETY: as above; volatile, or the compiler would make it a `memset` again.
        unsafe { word.write_volatile(0) };
    }
    // SAFETY: zeroes are a value of every `FromBytes` type.
    unsafe { place.assume_init_mut() }
}

/// A place for [`wiped`].
#[inline(always)]
pub const fn place<T>() -> MaybeUninit<T> {
    MaybeUninit::uninit()
}
