//! Traffic to model APIs, for `remit discover`: which names are watched, which addresses they lead
//! to, and who was seen to reach one. Nothing here enforces; whatever fails is told, and the daemon
//! goes on.
//!
//! Names are looked up in tasks of their own. Once a second what these found goes into the kernel,
//! and the cgroups of new notes are looked for while they are there. The notes themselves are read
//! when somebody asks.

mod book;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use agent_ebpf::abi::Addr;
use serde::Deserialize;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::{info, warn};

use self::book::Book;
use super::{
    answers::host_guard,
    core::{Core, boot_now},
    names,
    settings::Settings,
    time::wall_millis,
};
use crate::{
    audit::text::clean,
    cgroup::{CgroupPath, Hierarchy},
    control::protocol::{Guard, GuardState, Reached, Traffic},
    dns::{
        hosts::{self, Resolvers},
        server::Source,
    },
    kernel::{OBSERVER as OBJECT, Observer},
};

/// The kind that the observer has among the guards of `remit status`.
pub(super) const OBSERVER: &str = "observer";
/// The names that come with Remit.
const BUILT_IN: &str = include_str!("../../doctor/apis.toml");
/// A name is looked up so often: oftener than most answers live.
const REFRESH: Duration = Duration::from_secs(60);
/// After a lookup that failed, first; doubles up to [`REFRESH`].
const RETRY: Duration = Duration::from_secs(2);
/// Names that are looked up at the same time.
const LANES: usize = 4;
/// Answers that wait for the daemon.
const WAITING: usize = 64;
/// Cgroups that are looked for in one second: without the right to find one by its id, all of the
/// host's are looked through.
const PLACED: usize = 8;
/// It is looked so often whether the programs are there.
const AGAIN: Duration = Duration::from_secs(5);
/// Bytes of a process's name.
const COMM: usize = 64;

/// A list of APIs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Apis {
    api: Vec<Api>,
}

/// One of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Api {
    /// For whoever reads the list.
    #[serde(rename = "name")]
    _name: String,
    hosts: Vec<String>,
}

/// What came of a lookup.
type Found = (String, Result<BTreeSet<IpAddr>, String>);

/// The observer as the settings ask for it.
pub struct Observing {
    /// The cgroup whose processes are looked at.
    directory: PathBuf,
    /// Why there is none, in words.
    kernel: Result<Observer, String>,
    /// When it was seen last whether the programs are there.
    looked: Instant,
    names: Vec<String>,
    sources: Vec<Source>,
    /// The lookups; they end with this. None are made before there is an observer.
    lookups: JoinSet<()>,
    sender: mpsc::Sender<Found>,
    found: mpsc::Receiver<Found>,
    book: Book,
    /// Where cgroups of notes were; none where they were gone.
    places: BTreeMap<u64, Option<CgroupPath>>,
    /// Notes begun when cgroups were looked for last.
    begun: u64,
    /// What went wrong in the last second.
    fault: Option<String>,
}

impl Core {
    /// Begins to observe, if the settings ask for it. It takes a runtime.
    pub fn observe(&mut self) {
        if self.settings.discover.traffic {
            let mut observing = Observing::new(&self.settings, &self.hierarchy);
            observing.start();
            observing.tend(&self.hierarchy, &self.roots);
            self.observing = Some(observing);
        }
    }

    /// Once a second.
    pub(super) fn tend_observer(&mut self) {
        if let Some(observing) = &mut self.observing {
            observing.tend(&self.hierarchy, &self.roots);
        }
    }

    /// What the observer is, among the guards. It is none of them.
    pub(super) fn observer_guard(&self) -> Guard {
        let (state, evidence) = match &self.observing {
            None => (GuardState::Off, "turned off by the settings".to_owned()),
            Some(observing) => observing.state(),
        };
        host_guard("traffic", OBSERVER, state, &evidence, wall_millis())
    }

    /// What was seen.
    pub(super) fn traffic(&mut self) -> Traffic {
        let boot_ms = self.offset.origin();
        let Some(observing) = &mut self.observing else {
            return Traffic {
                wanted: self.settings.discover.traffic,
                boot_ms,
                ..Traffic::default()
            };
        };
        // What resolved or was noted within this second as well.
        observing.tend(&self.hierarchy, &self.roots);
        Traffic {
            boot_ms,
            ..observing.traffic()
        }
    }
}

// === impl Observing ===

impl Observing {
    fn new(settings: &Settings, hierarchy: &Hierarchy) -> Self {
        let names = match &settings.discover.apis {
            Some(names) => names.clone(),
            None => built_in(),
        };
        // The settings have checked it.
        let cgroup = CgroupPath::new(&settings.discover.cgroup);
        let cgroup = cgroup.unwrap_or_else(|_| CgroupPath::root());
        let (sender, found) = mpsc::channel(WAITING);
        Self {
            directory: hierarchy.directory(&cgroup),
            kernel: Err(String::new()),
            looked: Instant::now(),
            book: Book::new(names.len()),
            names,
            sources: names::sources(&settings.dns),
            lookups: JoinSet::new(),
            sender,
            found,
            places: BTreeMap::new(),
            begun: 0,
            fault: None,
        }
    }

    /// Loads and attaches.
    fn start(&mut self) {
        self.looked = Instant::now();
        self.begun = 0;
        let started = Observer::start(OBJECT, &self.directory)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)));
        match (&started, &self.kernel) {
            (Ok(_), _) => info!(
                message = "Traffic to model APIs is observed.",
                cgroup = %self.directory.display(),
                names = self.names.len()
            ),
            // Told once, and then in the status.
            (Err(why), Err(before)) if why == before => {}
            (Err(why), _) => warn!(message = "Traffic to model APIs is not observed.", why),
        }
        self.kernel = started;
        if self.kernel.is_ok() && self.lookups.is_empty() {
            for lane in 0..LANES {
                let mine = self.names.iter().skip(lane).step_by(LANES);
                let (sources, sender) = (self.sources.clone(), self.sender.clone());
                self.lookups
                    .spawn(look_up(mine.cloned().collect(), sources, sender));
            }
        }
    }

    /// Starts anew where nothing is attached: the cgroup was not there yet, or is another by now.
    fn restart(&mut self) {
        if self.looked.elapsed() < AGAIN {
            return;
        }
        self.looked = Instant::now();
        let stands = self
            .kernel
            .as_ref()
            .is_ok_and(|kernel| kernel.seats().iter().any(|seat| seat.is_live));
        if !stands {
            self.start();
        }
    }

    /// Puts into the kernel what has changed, and looks for the cgroups of new notes.
    fn tend(&mut self, hierarchy: &Hierarchy, roots: &[CgroupPath]) {
        while let Ok((name, found)) = self.found.try_recv() {
            self.book.learn(&name, found, boot_now());
        }
        self.restart();
        let Ok(kernel) = &mut self.kernel else {
            return;
        };
        // A root that is gone has no processes, and its id is nobody's.
        let ids = roots.iter().filter_map(|root| hierarchy.id(root).ok());
        let watched = self.book.watched(boot_now());
        let done = kernel
            .exempt(ids)
            .and_then(|()| kernel.watch(watched.into_iter().map(Addr::from)));
        let done = done.and_then(|()| self.place(hierarchy));
        self.fault = done.err().map(|error| error.to_string());
    }

    /// Finds out where the cgroups of new notes are, while they are there.
    fn place(&mut self, hierarchy: &Hierarchy) -> io::Result<()> {
        let Ok(kernel) = &self.kernel else {
            return Ok(());
        };
        // Read before the notes are: what comes meanwhile is looked for next time.
        let begun = kernel.begun()?;
        if begun == self.begun {
            return Ok(());
        }
        let noted: BTreeSet<u64> = kernel.notes()?.iter().map(|(key, _)| key.cgroup).collect();
        self.places.retain(|cgroup, _| noted.contains(cgroup));
        let new: Vec<u64> = noted
            .into_iter()
            .filter(|cgroup| !self.places.contains_key(cgroup))
            .collect();
        let all = new.len() <= PLACED;
        for cgroup in new.into_iter().take(PLACED) {
            let place = hierarchy.path_of(cgroup).map_err(io::Error::other)?;
            self.places.insert(cgroup, place);
        }
        if all {
            self.begun = begun;
        }
        Ok(())
    }

    fn state(&self) -> (GuardState, String) {
        let kernel = match &self.kernel {
            Ok(kernel) => kernel,
            Err(why) => return (GuardState::Absent, why.clone()),
        };
        let seats = kernel.seats();
        let missing: Vec<&str> = seats
            .iter()
            .filter(|seat| !seat.is_live)
            .map(|seat| seat.hook)
            .collect();
        if missing.len() == seats.len() {
            let cgroup = kernel.cgroup;
            let gone = format!("the kernel lists none of its programs on cgroup {cgroup}");
            return (GuardState::Absent, gone);
        }
        if let Some(why) = self.amiss(&missing) {
            return (GuardState::Degraded, why);
        }
        let evidence = format!(
            "{} programs on cgroup {} watch {} addresses of {} names and let everything through",
            seats.len(),
            kernel.cgroup,
            self.book.watched(boot_now()).len(),
            self.book.names()
        );
        (GuardState::Live, evidence)
    }

    /// What is amiss where it runs, in words.
    fn amiss(&self, missing: &[&str]) -> Option<String> {
        let mut words = Vec::new();
        if !missing.is_empty() {
            words.push(format!("not there: {}", missing.join(", ")));
        }
        words.extend(self.fault.clone());
        words.extend(self.book.trouble());
        (!words.is_empty()).then(|| words.join("; "))
    }

    fn traffic(&self) -> Traffic {
        let (state, evidence) = self.state();
        let mut traffic = Traffic {
            wanted: true,
            observed: matches!(state, GuardState::Live | GuardState::Degraded),
            why: (state != GuardState::Live).then_some(evidence),
            names: self.book.names() as u64,
            addresses: self.book.watched(boot_now()).len() as u64,
            ..Traffic::default()
        };
        let Ok(kernel) = &self.kernel else {
            return traffic;
        };
        match kernel.notes() {
            Ok(notes) => {
                traffic.notes = notes
                    .iter()
                    .map(|(key, seen)| Reached {
                        pid: key.tgid,
                        uid: seen.uid,
                        comm: name(&seen.comm),
                        cgroup_id: key.cgroup,
                        cgroup: self
                            .places
                            .get(&key.cgroup)
                            .and_then(|place| place.as_ref().map(ToString::to_string)),
                        addr: key.addr.into(),
                        port: key.port,
                        protocol: key.protocol,
                        names: self.book.names_of(key.addr),
                        count: seen.count,
                        first_ns: seen.first,
                        last_ns: seen.last,
                    })
                    .collect();
            }
            Err(error) => {
                traffic.observed = false;
                traffic.why = Some(format!("the notes cannot be read: {error}"));
            }
        }
        traffic
    }
}

/// What a process called itself.
fn name(comm: &[u8; 16]) -> String {
    let name = comm.split(|byte| *byte == 0).next().unwrap_or_default();
    clean(name, COMM)
}

/// The names that come with Remit.
fn built_in() -> Vec<String> {
    // It is checked by a test.
    let apis = toml::from_str(BUILT_IN).unwrap_or(Apis { api: Vec::new() });
    apis.api.into_iter().flat_map(|api| api.hosts).collect()
}

/// Looks names up, one after the other, again and again.
async fn look_up(names: Vec<String>, sources: Vec<Source>, found: mpsc::Sender<Found>) {
    let mut resolvers = Resolvers::new(sources);
    let mut wait = RETRY;
    loop {
        let mut failed = false;
        for name in &names {
            let addresses = hosts::addresses(&resolvers.servers(), name).await;
            failed |= addresses.is_err();
            if found.send((name.clone(), addresses)).await.is_err() {
                return;
            }
        }
        wait = if failed {
            wait.saturating_mul(2).min(REFRESH)
        } else {
            REFRESH
        };
        tokio::time::sleep(wait).await;
        if !failed {
            wait = RETRY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Depth, HostPattern};

    #[test]
    fn the_built_in_names_can_be_looked_up() {
        let names = built_in();
        assert!(names.len() > 20, "{names:?}");
        assert!(names.iter().any(|name| name == "api.anthropic.com"));
        for name in &names {
            let host: HostPattern = name.parse().unwrap();
            assert_eq!((host.depth(), host.base()), (Depth::Exact, name.as_str()));
        }
        let distinct: BTreeSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn what_a_process_calls_itself_is_harmless() {
        assert_eq!(name(b"codex\0\0\0\0\0\0\0\0\0\0\0"), "codex");
        assert_eq!(name(b"\x1b[31mred\0\0\0\0\0\0\0\0"), "\\x1b[31mred");
    }
}
