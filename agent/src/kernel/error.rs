//! What can go wrong between the daemon and the kernel.

use std::{io, path::PathBuf};

/// Why the fence could not be opened. Whatever it is, nothing has been let through.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Built with `AYA_BUILD_SKIP`.
    #[error("this binary was built without its BPF object; build it with `cargo xtask build`")]
    ObjectMissing,
    /// The kernel or the library refused the object.
    #[error("cannot load the BPF object")]
    Load(#[source] Box<aya::EbpfError>),
    /// A program that the fence needs is not in the object.
    #[error("the BPF object has no program `{program}`: a fence without it would have a hole")]
    HookMissing {
        /// Its name.
        program: &'static str,
    },
    /// The verifier refused a program.
    #[error("the kernel refuses program `{program}`")]
    Program {
        /// Its name.
        program: &'static str,
        /// The verifier's words are inside.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A map that the daemon needs is not in the object.
    #[error("the BPF object has no map `{name}`")]
    MapMissing {
        /// Its name.
        name: &'static str,
    },
    /// A map cannot be read.
    #[error("cannot read map `{name}`")]
    Map {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// Kernel and daemon disagree about a struct.
    #[error(
        "map `{name}` has a {what} of {found} bytes where this daemon has {wanted}: the object or \
         the pinned state belongs to another version"
    )]
    Layout {
        /// Map.
        name: &'static str,
        /// "key" or "value".
        what: &'static str,
        /// Bytes in the kernel.
        found: u32,
        /// Bytes in this binary.
        wanted: usize,
    },
    /// The loaded object answers with another layout than this binary's.
    #[error(
        "the BPF object was built for layout {found:#018x} (ABI {found_abi}), this daemon for \
         {wanted:#018x} (ABI {wanted_abi})"
    )]
    Fingerprint {
        /// In the object.
        found: u64,
        /// In the object.
        found_abi: u32,
        /// In this binary.
        wanted: u64,
        /// In this binary.
        wanted_abi: u32,
    },
    /// A pinned map is too small for the registry.
    #[error("map `{name}` holds {has} entries, and the registry needs {needs}")]
    Capacity {
        /// Map.
        name: &'static str,
        /// Entries it has room for.
        has: u32,
        /// Entries needed.
        needs: u32,
    },
    /// The pin directory is not usable.
    #[error("cannot use `{}` for pins", path.display())]
    Pins {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The self-test could not be run, or the kernel answers otherwise than memory does.
    #[error("self-test: {0}")]
    SelfTest(String),
    /// Attaching failed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Filling the tables failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Why a root could not be fenced.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The cgroup cannot be opened.
    #[error("cannot open root cgroup `{}`", path.display())]
    Open {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program cannot be attached there.
    #[error(
        "cannot attach `{program}` to `{}` (a foreign program that holds the cgroup or an \
         ancestor exclusively gives EPERM)", path.display()
    )]
    Attach {
        /// Program.
        program: &'static str,
        /// The root's directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A link cannot be pinned, opened or changed.
    #[error("cannot {what} link pin `{}`", path.display())]
    Pin {
        /// "open", "update", ….
        what: &'static str,
        /// The pin.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Attached, but the kernel does not list it.
    #[error("`{program}` was attached to `{}`, but the kernel does not list it there", path.display())]
    NotThere {
        /// Program.
        program: &'static str,
        /// The root's directory.
        path: PathBuf,
    },
}

/// Why tables could not be changed. What was in force stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// No room.
    #[error(
        "map `{map}` is full: it holds {has} entries and this registry needs {needs}; raise \
         `limits.{limit}` and start the daemon anew"
    )]
    Full {
        /// Map.
        map: &'static str,
        /// Capacity.
        has: u32,
        /// Needed.
        needs: u32,
        /// Key of `[limits]`.
        limit: &'static str,
    },
    /// A write failed.
    #[error("cannot write `{map}` {key}")]
    Write {
        /// Map.
        map: &'static str,
        /// The key, in words.
        key: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Leases and a probe's grants do not share an address.
    #[error("{key} has {by} for the moment")]
    Taken {
        /// The key, in words.
        key: String,
        /// What stands there.
        by: &'static str,
    },
    /// A map cannot be read.
    #[error("cannot read `{map}`")]
    Read {
        /// Map.
        map: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A value read back is not the one written.
    #[error("`{map}` {key} reads back other than it was written")]
    ReadBack {
        /// Map.
        map: &'static str,
        /// The key, in words.
        key: String,
    },
}
