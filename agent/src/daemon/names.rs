//! Names: where the DNS guard meets the kernel. Whose question it is is told by its socket, as egress
//! has noted it; leases are written and read back before an answer leaves.
//!
//! Each agent that uses names has an endpoint in the daemon's own network namespace and in each that
//! a process of it lives in. One that is new is seen within a second, or at once when the kernel
//! refuses a lookup there; until then lookups are refused.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    net::IpAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use agent_ebpf::abi::{Addr, Asked, Endpoint as Place, FLAG_NAMES, Rule};
use tokio::sync::mpsc;
use tracing::warn;

use super::{
    core::Core,
    force::{self, Force},
    settings::{Dns, Settings, Upstream},
    time::Offset,
};
use crate::{
    dns::{
        budget::Limit,
        endpoint::Sockets,
        guard::{AddressLease, Limits},
        lease::Bounds,
        resolv,
        server::{
            Client, Config, Endpoint, Identity, LeaseError, Request, Server, Source, Transport,
        },
    },
    kernel::{ApplyError, Enforcer, Image, boot_nanos},
    policy::{AgentTables, Clock},
};

/// Leases that one agent may have at a time: pairs of name and address. Each is an exact address
/// with rules of its own in the kernel, some 400 octets.
pub const LEASES_PER_AGENT: usize = 32_768;
/// Questions and reports that wait for the daemon.
const WAITING: usize = 1024;
/// A note older than this tells of another packet than the one that is asked about, in nanoseconds:
/// its port may be somebody else's by now.
const NOTE: u64 = 10_000_000_000;
/// A lease that is over is kept for this long in nanoseconds, and says why its address is refused.
const REMEMBERED: u64 = 3_600_000_000_000;
/// An endpoint stays this long without a process of its agent in its network namespace.
const UNUSED: Duration = Duration::from_secs(10);
/// A namespace in which lookups are refused is looked for again after this.
const AGAIN: Duration = Duration::from_millis(100);
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// A network namespace: device and inode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Netns {
    device: u64,
    inode: u64,
}

/// An endpoint of an agent in a namespace.
struct Door {
    endpoint: Endpoint,
    /// The kernel's name for the namespace.
    cookie: u64,
    used: Instant,
}

/// The guard and its endpoints. Without the guard no name resolves.
pub struct Names {
    server: Option<Server>,
    offset: Arc<Mutex<Offset>>,
    doors: BTreeMap<(u32, Netns), Door>,
    /// The agent of each endpoint.
    whose: HashMap<u64, u32>,
    /// Agents of which the guard may remember something.
    known: BTreeSet<String>,
    looked: Option<Instant>,
    swept: Option<Instant>,
    /// Boot time up to which connections of leases that are over were ended.
    ended: u64,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn limits(dns: &Dns) -> Limits {
    Limits {
        min_lease: nanos(dns.min_lease),
        max_lease: nanos(dns.max_lease),
        budget: Limit {
            names: dns.wildcard_budget,
        },
        bounds: Bounds {
            per_name: usize::try_from(dns.max_addresses_per_name).unwrap_or(usize::MAX),
            per_agent: LEASES_PER_AGENT,
        },
    }
}

impl Netns {
    fn of(process: &str) -> Option<Self> {
        let about = fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
        Some(Self {
            device: about.dev(),
            inode: about.ino(),
        })
    }
}

impl Names {
    /// The guard as the settings want it, and what it asks of the daemon.
    pub fn start(settings: &Settings, offset: Offset) -> (Self, mpsc::Receiver<Request>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        let offset = Arc::new(Mutex::new(offset));
        let server = settings.dns.enabled.then(|| {
            let clock = Arc::clone(&offset);
            let config = Config {
                sources: settings
                    .dns
                    .upstream
                    .iter()
                    .map(|upstream| match upstream {
                        Upstream::System => Source::File(resolv::PATH.into()),
                        Upstream::At(at) => Source::At(*at),
                    })
                    .collect(),
                limits: limits(&settings.dns),
                clock: Arc::new(move || {
                    clock
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .clock_now()
                }),
            };
            Server::new(config, sender)
        });
        let names = Self {
            server,
            offset,
            doors: BTreeMap::new(),
            whose: HashMap::new(),
            known: BTreeSet::new(),
            looked: None,
            swept: None,
            ended: boot_nanos(),
        };
        (names, receiver)
    }

    /// The clocks have stepped.
    pub fn set_offset(&mut self, offset: Offset) {
        *self.offset.lock().unwrap_or_else(PoisonError::into_inner) = offset;
    }

    /// The guard.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Endpoints that are open.
    pub fn endpoints(&self) -> usize {
        self.doors.len()
    }

    /// Whether somebody listens at each endpoint.
    pub fn is_serving(&self) -> bool {
        self.doors.values().all(|door| door.endpoint.is_served())
    }

    /// Whether an agent has an endpoint.
    pub fn serves(&self, agent: u32) -> bool {
        self.doors.keys().any(|(of, _)| *of == agent)
    }

    /// Opens an endpoint for `agent` in the network namespace of `process`.
    fn open(
        &mut self,
        enforcer: &mut Enforcer,
        agent: u32,
        netns: Netns,
        process: &str,
    ) -> anyhow::Result<()> {
        let Some(server) = &self.server else {
            return Ok(());
        };
        let sockets = if process == OWN {
            Sockets::open()?
        } else {
            let file = File::open(format!("/proc/{process}/ns/net"))?;
            let about = file.metadata()?;
            // The process may be another one by now.
            anyhow::ensure!(
                (about.dev(), about.ino()) == (netns.device, netns.inode),
                "process {process} has left the namespace"
            );
            Sockets::open_in(file.into())?
        };
        let handles = sockets.handles()?;
        let endpoint = server.listen(sockets)?;
        let port = |at: Option<std::net::SocketAddr>| at.map_or(0, |at| at.port());
        let place = Place {
            id: endpoint.id.0,
            v4: port(endpoint.v4),
            v6: port(endpoint.v6),
            pad: 0,
        };
        let marked: Vec<_> = handles.iter().map(|handle| handle.as_fd()).collect();
        let cookie = enforcer.endpoints().open_endpoint(agent, place, &marked)?;
        self.whose.insert(place.id, agent);
        let used = Instant::now();
        let door = Door {
            endpoint,
            cookie,
            used,
        };
        if let Some(old) = self.doors.insert((agent, netns), door) {
            self.whose.remove(&old.endpoint.id.0);
        }
        Ok(())
    }

    fn close(&mut self, enforcer: &mut Enforcer, key: (u32, Netns)) {
        if let Some(door) = self.doors.remove(&key) {
            enforcer.endpoints().close_endpoint(key.0, door.cookie);
            self.whose.remove(&door.endpoint.id.0);
        }
    }

    /// Whose socket a question came from, as egress has noted it.
    pub fn noted(&self, enforcer: &Enforcer, client: &Client) -> Option<(u32, Asked)> {
        let agent = *self.whose.get(&client.endpoint.0)?;
        let protocol = match client.transport {
            Transport::Udp => IPPROTO_UDP,
            Transport::Tcp => IPPROTO_TCP,
        };
        let noted = enforcer.asker(
            client.endpoint.0,
            client.from.ip(),
            client.from.port(),
            protocol,
        )?;
        let fresh = boot_nanos().saturating_sub(noted.time) < NOTE;
        (fresh && noted.agent == agent && noted.endpoint == client.endpoint.0)
            .then_some((agent, noted))
    }
}

/// The daemon itself, in /proc.
const OWN: &str = "self";

/// Blocks of rules that there is room for where names are used: leases of different names share
/// none.
pub const RULE_SETS: u32 = 65_536;

/// Has the kernel turn the lookups of an agent that uses names, and gives the image the leases that
/// the guard knows. Returns whether it does.
pub fn mark(names: &Names, tables: &AgentTables, image: &mut Image) -> bool {
    let Some(server) = &names.server else {
        return false;
    };
    if tables.names.is_empty() {
        return false;
    }
    image.row.flags |= FLAG_NAMES;
    image.leases = rules(server.renew(tables));
    true
}

/// What the kernel takes of leases.
pub(super) fn rules(leases: Vec<AddressLease>) -> Vec<(Addr, Vec<Rule>)> {
    let each = leases.into_iter().map(|lease| {
        let rules = lease.rules.iter().map(|rule| rule.rule()).collect();
        (Addr::from(lease.addr).effective(), rules)
    });
    each.collect()
}

impl Core {
    /// What shall be in force of `force`, with the leases that it has.
    pub(super) fn images(&self, force: &Force) -> Vec<Image> {
        let mut images = force.images(&self.offset.clock());
        for image in &mut images {
            if let Some(agent) = force.agents.get(&image.id) {
                self.name(image, &agent.tables);
            }
        }
        images
    }

    /// One agent of [`Self::images`].
    pub(super) fn image(&self, tables: &AgentTables) -> Image {
        let mut image = force::image(tables, &self.offset.clock());
        self.name(&mut image, tables);
        image
    }

    fn name(&self, image: &mut Image, tables: &AgentTables) {
        mark(&self.names, tables, image);
        // What leases open is a matter of the names; they have to be written anew with them.
        let now = self.force.agents.get(&image.id);
        image.fresh = self.names.server().is_some()
            && now.is_some_and(|now| now.tables.names != tables.names);
    }

    /// Whether some agent in force uses names, and the guard is there for it.
    pub(super) fn uses_names(&self, force: &Force) -> bool {
        self.names.server().is_some()
            && force
                .agents
                .values()
                .any(|agent| !agent.tables.names.is_empty())
    }

    /// Has the fences turn lookups if an agent in force wants it, and not otherwise.
    pub(super) fn guard_names(&mut self, wanted: bool) {
        match self.enforcer.guard_names(wanted) {
            Ok(_) => drop(self.problems.remove("names")),
            Err(error) => {
                let why = format!("{:#}", anyhow::Error::from(error));
                warn!(message = "The DNS guard's hooks could not be changed.", why);
                self.problems.insert(
                    "names",
                    format!("lookups are not turned to the guard: {why}"),
                );
            }
        }
    }

    /// After new tables are in force: forgets agents that are gone, and opens endpoints.
    pub(super) fn follow_names(&mut self) {
        let wanted = self.uses_names(&self.force);
        self.guard_names(wanted);
        let named: BTreeSet<String> = self.named().into_iter().map(|(_, id)| id).collect();
        for gone in self.names.known.difference(&named) {
            if let Some(server) = self.names.server() {
                server.forget(gone);
            }
            if let Some(index) = self.enforcer.index_of(gone) {
                self.recorder.forget_names(index);
            }
        }
        self.names.known = named;
        self.tend_endpoints(None);
    }

    /// The agents that use names, with their indices.
    pub(super) fn named(&self) -> Vec<(u32, String)> {
        let named = self
            .force
            .agents
            .iter()
            .filter(|(_, agent)| !agent.tables.names.is_empty());
        named
            .filter_map(|(id, _)| Some((self.enforcer.index_of(id)?, id.clone())))
            .collect()
    }

    /// Opens what endpoints are missing, of `only` these agents or of all, and closes those that
    /// nobody needs.
    pub(super) fn tend_endpoints(&mut self, only: Option<&BTreeSet<u32>>) {
        if self.names.server().is_none() {
            return;
        }
        let named = self.named();
        let mut wanted: BTreeMap<(u32, Netns), String> = BTreeMap::new();
        let own = Netns::of(OWN);
        let mut seen: HashMap<u32, Option<Netns>> = HashMap::new();
        for (agent, _) in &named {
            if let Some(own) = own {
                wanted.insert((*agent, own), OWN.to_owned());
            }
            if only.is_some_and(|only| !only.contains(agent)) {
                continue;
            }
            let places = self
                .claims
                .iter()
                .filter(|(_, (_, claimant))| claimant == agent);
            for (path, _) in places {
                for pid in self.hierarchy.processes(path, true).unwrap_or_default() {
                    let netns = seen
                        .entry(pid)
                        .or_insert_with(|| Netns::of(&pid.to_string()));
                    if let Some(netns) = *netns {
                        wanted
                            .entry((*agent, netns))
                            .or_insert_with(|| pid.to_string());
                    }
                }
            }
        }
        let mut failed = None;
        for ((agent, netns), process) in &wanted {
            if let Some(door) = self.names.doors.get_mut(&(*agent, *netns)) {
                door.used = Instant::now();
                continue;
            }
            if let Err(error) = self.names.open(&mut self.enforcer, *agent, *netns, process) {
                // A process that has ended meanwhile needs none.
                if Netns::of(process) == Some(*netns) {
                    failed.get_or_insert(format!(
                        "lookups of agent {agent} in the network namespace of process {process} \
                         are refused: {error:#}"
                    ));
                }
            }
        }
        let unused: Vec<(u32, Netns)> = self
            .names
            .doors
            .iter()
            .filter(|((agent, _), door)| {
                !named.iter().any(|(of, _)| of == agent) || door.used.elapsed() > UNUSED
            })
            .map(|(key, _)| *key)
            .collect();
        for key in unused {
            self.names.close(&mut self.enforcer, key);
        }
        match failed {
            Some(why) if self.problems.get("endpoints") != Some(&why) => {
                warn!(message = "An endpoint of the DNS guard is missing.", why);
                self.problems.insert("endpoints", why);
            }
            Some(_) => {}
            None => drop(self.problems.remove("endpoints")),
        }
    }

    /// Lookups were refused for want of an endpoint.
    pub(super) fn unguarded(&mut self, agents: &BTreeSet<u32>) {
        let again = |at: Instant| at.elapsed() >= AGAIN;
        if agents.is_empty() || !self.names.looked.is_none_or(again) {
            return;
        }
        self.names.looked = Some(Instant::now());
        self.tend_endpoints(Some(agents));
    }

    /// Ends connections that have outlived their leases for as long as they may: the kernel refuses
    /// their packets from now on.
    fn end_leased(&mut self) {
        let now = boot_nanos();
        let since = std::mem::replace(&mut self.names.ended, now);
        let agents = self.enforcer.leases_over(since, now);
        if !agents.is_empty() {
            self.close_unreachable(Some(&agents));
        }
    }

    /// Once a second.
    pub(super) fn tend_names(&mut self) {
        self.tend_endpoints(None);
        self.end_leased();
        let due = |at: Instant| at.elapsed() >= Duration::from_secs(5);
        if self.names.swept.is_none_or(due) {
            self.names.swept = Some(Instant::now());
            if let Some(server) = self.names.server() {
                server.sweep();
            }
            self.enforcer.drop_leases(boot_nanos(), REMEMBERED);
        }
    }

    /// Answers the guard.
    pub fn lookup(&mut self, request: Request) {
        // One that waits no longer is no reason to complain.
        match request {
            Request::Identify { client, reply } => drop(reply.send(self.identify(&client))),
            Request::Lease {
                tables,
                leases,
                host,
                addresses,
                reply,
            } => {
                let done = self.put_leases(&tables, leases, &host, &addresses);
                drop(reply.send(done));
            }
            Request::Report { report, client } => self.tell_lookup(&report, &client),
        }
    }

    fn identify(&self, client: &Client) -> Option<Identity> {
        let (agent, _) = self.names.noted(&self.enforcer, client)?;
        let id = self.enforcer.id_of(agent)?;
        let tables = Arc::clone(&self.force.agents.get(id)?.tables);
        let search = self.names.server()?.search().into();
        Some(Identity { tables, search })
    }

    fn put_leases(
        &mut self,
        tables: &Arc<AgentTables>,
        leases: Vec<AddressLease>,
        host: &str,
        addresses: &[IpAddr],
    ) -> Result<(), LeaseError> {
        let failed = |why: &str| LeaseError::Failed(why.to_owned());
        let agent = self.force.agents.get(&tables.id);
        let current = agent.ok_or_else(|| failed("the agent is not registered any more"))?;
        if !Arc::ptr_eq(&current.tables, tables) {
            return Err(LeaseError::Changed(Arc::clone(&current.tables)));
        }
        let index = self.enforcer.index_of(&tables.id);
        let index = index.ok_or_else(|| failed("the agent is not in the kernel"))?;
        self.recorder.learn_name(index, host, addresses);
        let leases = rules(leases);
        let mut done = self.enforcer.lease(index, &leases);
        if let Err(ApplyError::Full { .. }) = done {
            // What is only remembered gives way.
            self.enforcer.drop_leases(boot_nanos(), 0);
            self.enforcer.sweep();
            done = self.enforcer.lease(index, &leases);
        }
        done.map_err(|error| LeaseError::Failed(format!("{:#}", anyhow::Error::from(error))))
    }
}

impl Offset {
    /// Both clocks now. In whole milliseconds, so that what is computed from it is the same at any
    /// time while the offset is.
    pub(super) fn clock_now(&self) -> Clock {
        let millis = boot_nanos() / 1_000_000;
        let ahead = i64::try_from(millis).unwrap_or(i64::MAX);
        Clock {
            boot_now_ns: millis * 1_000_000,
            wall_now_ms: self.origin().saturating_add(ahead),
            latest_now_ms: self.latest().saturating_add(ahead),
        }
    }
}
