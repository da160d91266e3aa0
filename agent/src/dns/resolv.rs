//! `resolv.conf`. The host's: whom to ask, and which domains its resolvers try; read again when it
//! changes. That of a process with files of its own: only the domains.

use std::{
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hickory_proto::rr::Name;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::name::canonical;

/// Where resolvers look.
pub const PATH: &str = "/etc/resolv.conf";
/// DNS.
const PORT: u16 = 53;
/// Servers that a resolver asks at most (resolv.conf(5) says three; some hosts list more).
const MAX_SERVERS: usize = 8;
/// Search domains that count; glibc has had no limit since 2.26.
const MAX_SEARCH: usize = 32;
/// The longest file.
const MAX_BYTES: u64 = 64 << 10;
/// How often the file is looked at, at most.
const LOOK: Duration = Duration::from_millis(500);

/// What a `resolv.conf` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolv {
    /// Whom to ask, in order.
    pub servers: Vec<SocketAddr>,
    /// Domains that are tried behind a name: lower case, no trailing dot.
    pub search: Vec<String>,
}

/// A file that is read again when it changes.
#[derive(Debug)]
pub struct Watched {
    path: PathBuf,
    looked: Option<Instant>,
    /// Device, inode, size, seconds and nanoseconds of its last change.
    stamp: Option<(u64, u64, u64, i64, i64)>,
    /// Whether it was told that the file can't be read.
    missing: bool,
    held: Resolv,
}

/// Whether a process sees the files that this one sees: the same mounts, the same root. Not for one
/// that has ended.
pub fn shares_files(process: u32) -> bool {
    let mounts = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let root = fs::read_link(format!("/proc/{process}/root")).ok();
    let (own, its) = (mounts("self"), mounts(&process.to_string()));
    own.is_some() && own == its && root.as_deref() == Some(Path::new("/"))
}

/// The search domains of a process, out of the `resolv.conf` that it sees. Its files may be the
/// agent's: no link leads out of its root, nothing but a regular file is opened, and no more is read
/// than a `resolv.conf` may have. Whoever serves the file (FUSE) can hold this up for good: to be
/// called on a thread that may stay.
///
/// # Errors
/// When the process has ended, or there is no such file.
pub fn search_of(process: u32) -> io::Result<Vec<String>> {
    let root = fs::File::options()
        .read(true)
        .custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits())
        .open(format!("/proc/{process}/root"))?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let found = fs::File::from(openat2(&root, PATH, how)?);
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let file = fs::File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(Resolv::parse(&String::from_utf8_lossy(&bytes)).search)
}

// === impl Resolv ===

impl Resolv {
    /// Reads a file's text. What is not understood is left out, as resolvers do.
    pub fn parse(text: &str) -> Self {
        let mut read = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // An address with an interface has no meaning in another namespace.
                    let addr = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    let server = addr.map(|addr| SocketAddr::new(addr, PORT));
                    if read.servers.len() < MAX_SERVERS {
                        read.servers.extend(server);
                    }
                }
                // The last of these lines counts.
                Some("search" | "domain") => {
                    let domain = |word: &str| canonical(&Name::from_ascii(word).ok()?);
                    read.search = words.filter_map(domain).take(MAX_SEARCH).collect();
                }
                _ => {}
            }
        }
        if read.servers.is_empty() {
            // What resolvers do (resolv.conf(5)).
            read.servers.push((Ipv4Addr::LOCALHOST, PORT).into());
        }
        read
    }
}

// === impl Watched ===

impl Watched {
    /// A file that was not read yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            looked: None,
            stamp: None,
            missing: false,
            held: Resolv::parse(""),
        }
    }

    /// What the file says now, or said at most half a second ago. While it can't be read, what it
    /// said last.
    ///
    /// # Errors
    /// Why it can't be read, once for each change.
    pub fn read(&mut self) -> (Resolv, io::Result<()>) {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return (self.held.clone(), Ok(()));
        }
        self.looked = Some(Instant::now());
        let told = self.look();
        (self.held.clone(), told)
    }

    fn look(&mut self) -> io::Result<()> {
        let file = match fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) => {
                let told = std::mem::replace(&mut self.missing, true);
                self.stamp = None;
                return if told { Ok(()) } else { Err(error) };
            }
        };
        self.missing = false;
        let about = file.metadata()?;
        let stamp = (
            about.dev(),
            about.ino(),
            about.size(),
            about.mtime(),
            about.mtime_nsec(),
        );
        if self.stamp != Some(stamp) {
            let mut bytes = Vec::new();
            file.take(MAX_BYTES).read_to_end(&mut bytes)?;
            self.held = Resolv::parse(&String::from_utf8_lossy(&bytes));
            self.stamp = Some(stamp);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf_is_read_as_resolvers_do() {
        let text = "# made by a tool\nnameserver 192.0.2.1\nnameserver\t2001:db8::1 # second\n\
                    nameserver fe80::1%eth0\nnameserver nonsense\ndomain old.example\n\
                    search Corp.Example. eu.example bad..name\noptions ndots:5\n";
        let read = Resolv::parse(text);
        assert_eq!(
            read.servers,
            [
                "192.0.2.1:53".parse().unwrap(),
                "[2001:db8::1]:53".parse().unwrap(),
            ]
        );
        assert_eq!(read.search, ["corp.example", "eu.example"]);
        let empty = Resolv::parse("");
        assert_eq!(empty.servers, ["127.0.0.1:53".parse().unwrap()]);
        assert!(empty.search.is_empty());
    }

    #[test]
    fn a_process_says_by_its_files_what_it_searches() {
        let own = std::process::id();
        assert!(shares_files(own));
        assert!(!shares_files(0), "no process");
        let mut host = Watched::new(Path::new(PATH));
        // Where there is no such file, there is none for this process either.
        assert_eq!(search_of(own).unwrap_or_default(), host.read().0.search);
        assert!(search_of(0).is_err());
    }

    #[test]
    fn a_change_is_noticed_and_a_lost_file_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut watched = Watched::new(&path);
        let mut read = || {
            watched.looked = None;
            watched.read().0.servers
        };
        assert_eq!(read(), ["127.0.0.1:53".parse().unwrap()]);
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(read(), ["192.0.2.1:53".parse().unwrap()]);
        fs::write(folder.path().join("new"), "nameserver 192.0.2.2\n").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(read(), ["192.0.2.2:53".parse().unwrap()]);
        fs::remove_file(&path).unwrap();
        assert_eq!(read(), ["192.0.2.2:53".parse().unwrap()]);
    }
}
