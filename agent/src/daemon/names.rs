//! Names: where the DNS guard meets the kernel. Whose question it is is told by its socket, as egress
//! has noted it; leases are written and read back before an answer leaves.
//!
//! Each agent that uses names has an endpoint in the network namespace of whoever guards it and in
//! each that a process of it lives in. One that is new is seen within a second, or at once when the
//! kernel refuses a lookup there; until then lookups are refused.
//!
//! The daemon guards with it ([`super::naming`]), and so does a fence without one
//! ([`super::watch`]).

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

use super::{
    lookups::Refused,
    recorder::Recorder,
    self_asked::SelfAsked,
    settings::{Dns, Settings, Upstream},
    time::Offset,
};
use crate::{
    dns::{
        budget::Limit,
        endpoint::Sockets,
        guard::{AddressLease, Limits, Report},
        lease::Bounds,
        resolv,
        server::{
            Client, Config, Endpoint, Identity, LeaseError, Request, SearchIn, Server, Source,
            Transport,
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
/// How often what has ended is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
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
    /// Whether it answers.
    pub(super) asked: SelfAsked,
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

/// Whom to ask.
pub(super) fn sources(dns: &Dns) -> Vec<Source> {
    let upstream = dns.upstream.iter();
    upstream
        .map(|upstream| match upstream {
            Upstream::System => Source::File(resolv::PATH.into()),
            Upstream::At(at) => Source::At(*at),
        })
        .collect()
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
                sources: sources(&settings.dns),
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
            asked: SelfAsked::default(),
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
        if process == OWN {
            let at = [endpoint.v4, endpoint.v6].into_iter().flatten();
            self.asked.add(place.id, agent, at.collect());
        }
        let used = Instant::now();
        let door = Door {
            endpoint,
            cookie,
            used,
        };
        if let Some(old) = self.doors.insert((agent, netns), door) {
            self.asked.remove(old.endpoint.id.0);
            self.whose.remove(&old.endpoint.id.0);
        }
        Ok(())
    }

    /// Closes an agent's endpoint in the network namespace of this process.
    pub(super) fn close_own(&mut self, enforcer: &mut Enforcer, agent: u32) {
        if let Some(own) = Netns::of(OWN) {
            self.close(enforcer, (agent, own));
        }
    }

    fn close(&mut self, enforcer: &mut Enforcer, key: (u32, Netns)) {
        if let Some(door) = self.doors.remove(&key) {
            enforcer.endpoints().close_endpoint(key.0, door.cookie);
            self.asked.remove(door.endpoint.id.0);
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

    /// Whose question it is; `tables` are those in force of the agent with an id.
    pub fn identify(
        &self,
        enforcer: &Enforcer,
        client: &Client,
        tables: impl FnOnce(&str) -> Option<Arc<AgentTables>>,
    ) -> Option<Identity> {
        let (agent, noted) = self.noted(enforcer, client)?;
        Some(Identity {
            tables: tables(enforcer.id_of(agent)?)?,
            search: SearchIn::Process(noted.pid),
        })
    }

    /// A lookup to tell of, if it is known who asked.
    pub fn refused(&self, enforcer: &Enforcer, report: Report, client: Client) -> Option<Refused> {
        let (agent, asked) = self.noted(enforcer, &client)?;
        Some(Refused {
            agent,
            report,
            client,
            asked,
        })
    }

    /// Sees to the endpoints of the agents `named`: one in the network namespace of this process,
    /// and one in each that one of `processes` lives in (each with its agent). Closes those that
    /// nobody needs.
    ///
    /// # Errors
    /// In words, which lookups are refused because an endpoint could not be opened.
    pub fn tend(
        &mut self,
        enforcer: &mut Enforcer,
        named: &BTreeSet<u32>,
        processes: impl IntoIterator<Item = (u32, u32)>,
    ) -> Result<(), String> {
        if self.server.is_none() {
            return Ok(());
        }
        let mut wanted: BTreeMap<(u32, Netns), String> = BTreeMap::new();
        if let Some(own) = Netns::of(OWN) {
            wanted.extend(named.iter().map(|agent| ((*agent, own), OWN.to_owned())));
        }
        let mut seen: HashMap<u32, Option<Netns>> = HashMap::new();
        for (agent, pid) in processes {
            let netns = seen
                .entry(pid)
                .or_insert_with(|| Netns::of(&pid.to_string()));
            if let Some(netns) = *netns {
                let of = wanted.entry((agent, netns));
                of.or_insert_with(|| pid.to_string());
            }
        }
        let mut failed = None;
        for ((agent, netns), process) in &wanted {
            if let Some(door) = self.doors.get_mut(&(*agent, *netns)) {
                door.used = Instant::now();
                continue;
            }
            if let Err(error) = self.open(enforcer, *agent, *netns, process) {
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
            .doors
            .iter()
            .filter(|((agent, _), door)| !named.contains(agent) || door.used.elapsed() > UNUSED)
            .map(|(key, _)| *key)
            .collect();
        for key in unused {
            self.close(enforcer, key);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether it is time to look again for namespaces in which lookups are refused; then that is
    /// noted as done.
    pub fn looks_again(&mut self) -> bool {
        let due = |at: Instant| at.elapsed() >= AGAIN;
        let looks = self.looked.is_none_or(due);
        if looks {
            self.looked = Some(Instant::now());
        }
        looks
    }

    /// Once a second: forgets what has ended. Returns the agents with open connections that have
    /// outlived their leases for as long as they may, whose packets the kernel refuses from now on.
    pub fn turn(&mut self, enforcer: &mut Enforcer) -> Vec<u32> {
        let now = boot_nanos();
        let since = std::mem::replace(&mut self.ended, now);
        let over = enforcer.leases_over(since, now);
        let due = |at: Instant| at.elapsed() >= SWEEP_EVERY;
        if self.swept.is_none_or(due) {
            self.swept = Some(Instant::now());
            if let Some(server) = &self.server {
                server.sweep();
            }
            enforcer.drop_leases(now, REMEMBERED);
        }
        over
    }

    /// Agents whose names are in force; returns those that were before and are not any more, which
    /// the guard forgets.
    pub fn know(&mut self, named: BTreeSet<String>) -> Vec<String> {
        let gone: Vec<String> = self.known.difference(&named).cloned().collect();
        if let Some(server) = &self.server {
            gone.iter().for_each(|gone| server.forget(gone));
        }
        self.known = named;
        gone
    }
}

/// What an answer waits for.
pub struct LeaseOrder {
    /// The tables under which it was judged.
    pub tables: Arc<AgentTables>,
    /// The rules of each address.
    pub leases: Vec<AddressLease>,
    /// The name.
    pub host: String,
    /// All addresses that it led to.
    pub addresses: Vec<IpAddr>,
}

/// Puts leases in force and reads them back. `current` are the agent's tables in force.
///
/// # Errors
/// When they are others by now, or the kernel does not have the leases.
pub fn put_leases(
    enforcer: &mut Enforcer,
    recorder: &mut Recorder,
    current: Option<&Arc<AgentTables>>,
    order: LeaseOrder,
) -> Result<(), LeaseError> {
    let failed = |why: &str| LeaseError::Failed(why.to_owned());
    let current = current.ok_or_else(|| failed("the agent is not registered any more"))?;
    if !Arc::ptr_eq(current, &order.tables) {
        return Err(LeaseError::Changed(Arc::clone(current)));
    }
    let index = enforcer.index_of(&current.id);
    let index = index.ok_or_else(|| failed("the agent is not in the kernel"))?;
    recorder.learn_name(index, &order.host, &order.addresses);
    let leases = rules(order.leases);
    let mut done = enforcer.lease(index, &leases);
    if let Err(ApplyError::Full { .. }) = done {
        // What is only remembered gives way.
        enforcer.drop_leases(boot_nanos(), 0);
        enforcer.sweep();
        done = enforcer.lease(index, &leases);
    }
    done.map_err(|error| LeaseError::Failed(format!("{:#}", anyhow::Error::from(error))))
}

/// This process, in /proc.
const OWN: &str = "self";

/// Blocks of rules that there is room for where names are used: leases of different names share
/// none.
pub const RULE_SETS: u32 = 65_536;
/// The same for one agent without a daemon, which lives as long as one command: 4 MiB. Past it what
/// is over and only remembered gives way.
pub const RULE_SETS_ALONE: u32 = 16_384;

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
fn rules(leases: Vec<AddressLease>) -> Vec<(Addr, Vec<Rule>)> {
    let each = leases.into_iter().map(|lease| {
        let rules = lease.rules.iter().map(|rule| rule.rule()).collect();
        (Addr::from(lease.addr).effective(), rules)
    });
    each.collect()
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
