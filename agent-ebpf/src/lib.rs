//! What the kernel programs and the daemon share: the layout of every map and record ([`abi`]),
//! and the one verdict ([`decide`]) that hooks, `remit explain` and the tests all ask.
//!
//! Layout rules: `repr(C)`, fixed-width integers and byte arrays only, explicit padding, no
//! `bool`, `usize` or enums with payloads. Each type derives zerocopy's traits, which prove that
//! no hidden padding exists; [`abi::FINGERPRINT`] lets the loader compare an object with itself.
#![no_std]
#![warn(missing_docs)]

pub mod abi;
pub mod decide;
pub mod verifier;
