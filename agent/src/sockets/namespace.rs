//! Network namespaces by the processes in them. sock_diag answers about the namespace in which its
//! socket was opened, so only opening one needs to be there.

use std::{
    collections::{BTreeMap, btree_map},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::{Error, failed};
use crate::netlink::SockDiag;

const OWN: &str = "/proc/thread-self/ns/net";
const ENTER: &str = "enter a network namespace";

/// A network namespace that can be asked about its sockets.
#[derive(Debug)]
pub struct Namespace {
    /// What identifies it: the number in `net:[…]`.
    pub inode: u64,
    pub(super) netlink: SockDiag,
}

/// The namespaces of some processes and the own one, each once, and each opened when it is its
/// turn: a host may have more than a process may have descriptors.
#[derive(Debug)]
pub struct Namespaces {
    own: io::Result<u64>,
    told_own: bool,
    others: btree_map::IntoIter<u64, Vec<u32>>,
}

// === impl Namespaces ===

impl Namespaces {
    /// Of these processes, those that are gone left out, and of this one.
    pub fn of(pids: impl IntoIterator<Item = u32>) -> Self {
        let own = inode(Path::new(OWN));
        let mut others: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for pid in pids {
            // Of one that is gone there is nothing to ask; one that may not be looked at would
            // belong to somebody with more rights than root.
            if let Ok(inode) = inode(Path::new(&format!("/proc/{pid}/ns/net"))) {
                others.entry(inode).or_default().push(pid);
            }
        }
        if let Ok(own) = &own {
            others.remove(own);
        }
        Self {
            own,
            told_own: false,
            others: others.into_iter(),
        }
    }
}

impl Iterator for Namespaces {
    type Item = Result<Namespace, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.told_own {
            self.told_own = true;
            let inode = *self.own.as_ref().unwrap_or(&0);
            let opened = SockDiag::open().map(|netlink| Namespace { inode, netlink });
            return Some(opened.map_err(|error| failed("open sock_diag", error)));
        }
        for (inode, pids) in self.others.by_ref() {
            // Any of its processes will do; when all have gone meanwhile, so have its programs.
            let Some(file) = pids.iter().find_map(|pid| open(*pid, inode)) else {
                continue;
            };
            return Some(
                enter(&file)
                    .map(|netlink| Namespace { inode, netlink })
                    .map_err(|error| failed(ENTER, error)),
            );
        }
        None
    }
}

fn inode(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| metadata.ino())
}

/// The namespace of a process, if it is still the one with this number.
fn open(pid: u32, inode: u64) -> Option<File> {
    let file = File::open(format!("/proc/{pid}/ns/net")).ok()?;
    (file.metadata().ok()?.ino() == inode).then_some(file)
}

/// Opens a socket over there, from a thread that ends with it: none that lives on may find itself
/// in another namespace.
fn enter(namespace: &File) -> io::Result<SockDiag> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                SockDiag::open()
            })?
            .join()
            .map_err(|_| io::Error::other("the thread that entered it panicked"))?
    })
}
