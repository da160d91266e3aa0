//! What a case needs, looked for on the running kernel, never guessed from a version.

use crate::support::{cgroup, remit};

/// A thing that must be there.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// User id 0.
    Root,
    /// A cgroup v2 mount.
    CgroupV2,
    /// The `remit` binary.
    Remit,
    /// The `remit` binary of the next ABI version.
    Next,
    /// A socket of this domain, type and protocol can be made.
    Socket(&'static str, i32, i32, i32),
    /// io_uring is built in and allowed.
    IoUring,
}

impl Need {
    /// Nothing, or what is missing.
    pub fn check(self) -> Result<(), String> {
        match self {
            Self::Root if nix::unistd::geteuid().is_root() => Ok(()),
            Self::Root => Err("not root".to_owned()),
            Self::CgroupV2 => cgroup::mount().map(drop).map_err(|error| error.to_string()),
            Self::Remit => remit::binary().map(drop).map_err(|error| error.to_string()),
            Self::Next => remit::next_binary()
                .map(drop)
                .map_err(|error| error.to_string()),
            Self::Socket(name, domain, kind, protocol) => {
                crate::actor::socket::open(domain, kind, protocol)
                    .map(drop)
                    .map_err(|error| format!("no {name} sockets in this kernel: {error}"))
            }
            Self::IoUring => crate::actor::uring::available()
                .map_err(|error| format!("no io_uring here: {error}")),
        }
    }
}
