//! The contract between the kernel programs and the daemon.

mod addr;
mod dns;
mod event;
mod key;
mod limit;
mod observe;
mod row;
mod word;

pub use addr::Addr;
pub use dns::*;
pub use event::*;
pub use key::*;
pub use limit::*;
pub use observe::*;
pub use row::*;
pub use word::*;

/// Version of everything in this module but what is the observer's. It is part of the pin path, so that two layouts never
/// meet; bump it in the commit that changes a type, a map or their meaning.
///
/// Another version's tags, owners, events, folds, budgets, names, counters, used, access and beyond
/// are taken over while their sizes are the same: what changes the meaning of one must change its size as well, or its
/// name.
pub const ABI_VERSION: u32 = if cfg!(feature = "abi-next") {
    CURRENT + 1
} else {
    CURRENT
};
const CURRENT: u32 = 3;

/// Derives what crosses the kernel boundary, and proves it: no padding, any bit pattern valid.
macro_rules! shared {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident : $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, Hash,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)* }

        impl $name {
            /// A value with every byte zero.
            pub const fn zeroed() -> Self {
                // SAFETY: `FromBytes` is derived above, so all-zero bytes are a valid value.
                unsafe { core::mem::zeroed() }
            }
        }

        // SAFETY: `IntoBytes` and `FromBytes` are derived above: no padding, any bytes are valid.
        #[cfg(not(target_arch = "bpf"))]
        unsafe impl aya::Pod for $name {}
    )*};
}
pub(crate) use shared;

/// One size or offset of the layout, folded into a fingerprint (FNV-1a).
const fn fold(hash: u64, value: usize) -> u64 {
    (hash ^ value as u64).wrapping_mul(0x0100_0000_01b3)
}

/// Hash of the sizes and the telling offsets of all shared types. The object carries it in its
/// read-only data; the loader refuses an object whose value differs from its own.
pub const FINGERPRINT: u64 = {
    let mut hash = fold(0xcbf2_9ce4_8422_2325, ABI_VERSION as usize);
    let facts = [
        size_of::<ScopeKey>(),
        size_of::<Rule>(),
        core::mem::offset_of!(Rule, entry),
        core::mem::offset_of!(Rule, effect),
        core::mem::offset_of!(Rule, tail),
        size_of::<Leaf>(),
        size_of::<RuleSet>(),
        size_of::<AgentRow>(),
        core::mem::offset_of!(AgentRow, state),
        core::mem::offset_of!(AgentRow, flags),
        size_of::<Slots>(),
        size_of::<AccessKey>(),
        size_of::<Access>(),
        size_of::<Usage>(),
        core::mem::offset_of!(Slot, passed),
        size_of::<Home>(),
        core::mem::offset_of!(Slot, agent),
        size_of::<Counters>(),
        size_of::<Fold>(),
        size_of::<Budget>(),
        size_of::<Owner>(),
        size_of::<Event>(),
        core::mem::offset_of!(Event, agent),
        core::mem::offset_of!(Event, comm),
        size_of::<Question>(),
        size_of::<Answer>(),
        size_of::<EndpointKey>(),
        size_of::<Endpoint>(),
        size_of::<Guardian>(),
        size_of::<Asked>(),
        size_of::<Asker>(),
        core::mem::offset_of!(Asked, agent),
        REASONS,
        RULES_PER_SET,
    ];
    let mut i = 0;
    while i < facts.len() {
        hash = fold(hash, facts[i]);
        i += 1;
    }
    hash
};
