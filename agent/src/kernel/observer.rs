//! The observer of traffic to model APIs: an object of its own, loaded where the settings ask for
//! it. Its programs let everything through and note who reaches a watched address.
//!
//! It is no guard. Nothing is pinned: its links and maps end with this process, also when that is
//! killed. What cannot be loaded or attached is an [`ObserverError`], and no reason for anything
//! else to stop.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use agent_ebpf::abi::{Addr, Seen, SeenKey};
use aya::Ebpf;

use super::{
    OpenError,
    attach::{attach, program_id},
    bulk::{Bulk, Keyed, Plain},
    error::AttachError,
    object::{self, Expected},
    sys,
    table::bulk,
};

/// The object as built beside this binary.
pub static OBSERVER: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/agent-ebpf-observe"));

/// Its programs. Those at sendmsg see UDP that is not connected.
const HOOKS: [Expected; 4] = [
    Expected {
        program: "seen_connect4",
        hook: "cgroup/connect4",
        attach_type: 10,
    },
    Expected {
        program: "seen_connect6",
        hook: "cgroup/connect6",
        attach_type: 11,
    },
    Expected {
        program: "seen_sendmsg4",
        hook: "cgroup/sendmsg4",
        attach_type: 14,
    },
    Expected {
        program: "seen_sendmsg6",
        hook: "cgroup/sendmsg6",
        attach_type: 15,
    },
];

/// Why traffic is not observed.
#[derive(Debug, thiserror::Error)]
pub enum ObserverError {
    /// The object.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The cgroup to watch.
    #[error("cannot open cgroup `{}`", path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program cannot be attached there.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// One hook, as read back from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Hook name.
    pub hook: &'static str,
    /// Whether our link is there, holds our program, and the kernel lists that on the cgroup.
    pub is_live: bool,
}

/// The programs at work. Dropping it detaches them.
pub struct Observer {
    /// Id of the cgroup that is watched.
    pub cgroup: u64,
    directory: PathBuf,
    links: Vec<Held>,
    watched: Bulk<Addr, u32>,
    exempt: Bulk<u64, u32>,
    seen: Bulk<SeenKey, Seen>,
    begun: Bulk<u32, u64>,
    /// What `watched` holds.
    watching: BTreeSet<[u8; 16]>,
    /// What `exempt` holds.
    exempted: BTreeSet<u64>,
    /// Keeps the programs and maps.
    _ebpf: Ebpf,
}

struct Held {
    expected: Expected,
    link: OwnedFd,
    program: u32,
}

// === impl Observer ===

impl Observer {
    /// Loads `object` and attaches its programs to the cgroup at `directory`, beside whatever is
    /// there. It watches nothing yet.
    ///
    /// # Errors
    /// When that is not possible; then nothing is attached.
    pub fn start(object: &[u8], directory: &Path) -> Result<Self, ObserverError> {
        let open = |source| ObserverError::Cgroup {
            path: directory.to_owned(),
            source,
        };
        let cgroup = File::open(directory).map_err(open)?;
        let id = cgroup.metadata().map_err(open)?.ino();
        let ebpf = load(object)?;
        let mut links = Vec::new();
        for expected in HOOKS {
            let link = attach(&ebpf, expected, &cgroup, directory)?;
            let program = program_id(&ebpf, expected.program).ok_or(OpenError::HookMissing {
                program: expected.program,
            })?;
            links.push(Held {
                expected,
                link,
                program,
            });
        }
        Ok(Self {
            cgroup: id,
            directory: directory.to_owned(),
            links,
            watched: map(&ebpf, "watched", Keyed::Free)?,
            exempt: map(&ebpf, "exempt", Keyed::Free)?,
            seen: map(&ebpf, "seen", Keyed::Free)?,
            begun: map(&ebpf, "begun", Keyed::Array)?,
            watching: BTreeSet::new(),
            exempted: BTreeSet::new(),
            _ebpf: ebpf,
        })
    }

    /// Every hook as the kernel has it now.
    pub fn seats(&self) -> Vec<Seat> {
        let cgroup = File::open(&self.directory).ok();
        let of = |held: &Held| {
            let link = sys::link_info(held.link.as_fd()).ok();
            let holds =
                link.is_some_and(|link| link.cgroup == self.cgroup && link.program == held.program);
            let listed = cgroup.as_ref().is_some_and(|cgroup| {
                sys::attached_programs(cgroup.as_fd(), held.expected.attach_type)
                    .is_ok_and(|programs| programs.contains(&held.program))
            });
            Seat {
                hook: held.expected.hook,
                is_live: holds && listed,
            }
        };
        self.links.iter().map(of).collect()
    }

    /// Watches these addresses and no others; at most [`WATCHED`](agent_ebpf::abi::WATCHED) of them.
    ///
    /// # Errors
    /// When the kernel does not take them all.
    pub fn watch(&mut self, addresses: impl IntoIterator<Item = Addr>) -> io::Result<()> {
        let wanted: BTreeSet<[u8; 16]> = addresses.into_iter().map(Addr::octets).collect();
        let key = |octets: &[u8; 16]| Addr::from_octets(*octets);
        follow(&self.watched, &mut self.watching, wanted, key)
    }

    /// Leaves out what is in these cgroups and below; at most [`EXEMPT`](agent_ebpf::abi::EXEMPT) of them.
    ///
    /// # Errors
    /// When the kernel does not take them all.
    pub fn exempt(&mut self, cgroups: impl IntoIterator<Item = u64>) -> io::Result<()> {
        let wanted = cgroups.into_iter().collect();
        follow(&self.exempt, &mut self.exempted, wanted, |id| *id)
    }

    /// How many notes were begun so far.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn begun(&self) -> io::Result<u64> {
        Ok(self.begun.get(0)?.unwrap_or_default())
    }

    /// The notes that are there.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn notes(&self) -> io::Result<Vec<(SeenKey, Seen)>> {
        self.seen.all()
    }
}

/// Makes a map of marks hold what is wanted. `standing` is what it held, and says afterwards what it
/// holds, also after an error.
fn follow<T: Ord + Clone, K: Plain + Eq + std::hash::Hash>(
    map: &Bulk<K, u32>,
    standing: &mut BTreeSet<T>,
    wanted: BTreeSet<T>,
    key: impl Fn(&T) -> K,
) -> io::Result<()> {
    let gone: Vec<T> = standing.difference(&wanted).cloned().collect();
    for one in gone {
        map.remove(key(&one))?;
        standing.remove(&one);
    }
    for one in wanted {
        if !standing.contains(&one) {
            map.set(key(&one), 1)?;
            standing.insert(one);
        }
    }
    Ok(())
}

fn load(object: &[u8]) -> Result<Ebpf, OpenError> {
    if object.is_empty() {
        return Err(OpenError::ObjectMissing);
    }
    let mut ebpf = object::loader()
        .load(object)
        .map_err(|source| OpenError::Load(Box::new(source)))?;
    for Expected { program: name, .. } in HOOKS {
        let program = ebpf
            .program_mut(name)
            .ok_or(OpenError::HookMissing { program: name })?;
        object::load_program(program, name)?;
    }
    Ok(ebpf)
}

/// Takes a map, if it is what this binary believes it to be.
fn map<K: Plain + Eq + std::hash::Hash, V: Plain>(
    ebpf: &Ebpf,
    name: &'static str,
    keyed: Keyed,
) -> Result<Bulk<K, V>, OpenError> {
    let map = ebpf.map(name).and_then(object::data);
    let map = map.ok_or(OpenError::MapMissing { name })?;
    let info = map.info().map_err(|source| OpenError::Map {
        name,
        source: Box::new(source.into()),
    })?;
    for (what, found, wanted) in [
        ("key", info.key_size(), size_of::<K>()),
        ("value", info.value_size(), size_of::<V>()),
    ] {
        if found as usize != wanted {
            return Err(OpenError::Layout {
                name,
                what,
                found,
                wanted,
            });
        }
    }
    bulk(ebpf, name, keyed)
}
