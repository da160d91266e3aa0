//! What the kernel's numbers mean: which agent, which entry, which cgroup, which name.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use agent_ebpf::abi::{Event, Fold, NO_ENTRY, UNREGISTERED};

use super::Recorder;
use crate::{
    audit::{Context, EntryRef, ProcessInfo, Subject},
    kernel::Enforcer,
    policy::AgentTables,
};

/// Policies whose entries are remembered after they have left force: records may lag behind, by
/// milliseconds as a rule.
const POLICIES: usize = 4096;

/// Entries and places that these may have in all. Past it the oldest go: a registry of 100,000
/// prefixes that changes every minute must not fill the memory with what it was.
const REMEMBERED: usize = 250_000;

/// Stands for a policy that is not known: no policy has this id.
const LOST: u64 = u64::MAX;

/// Cgroup paths remembered, so that a burst of records costs one look-up.
const PATHS: usize = 4096;

/// An agent as it was under one policy.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) subject: Subject,
    pub(super) entries: Arc<AgentTables>,
}

/// What the last record of a fold's tenant said, for the repeats that get none of their own. Numbers of
/// entries mean something only with the policy.
pub(super) struct Tenant {
    generation: u32,
    policy: u64,
    entry: u32,
}

impl Known {
    fn nobody() -> Self {
        Self {
            subject: Subject::unregistered(String::new()),
            entries: Arc::new(AgentTables::nobody()),
        }
    }
}

/// A cgroup that records name by its id.
#[derive(Clone)]
pub(super) struct Whereabouts {
    path: String,
    invocation: Option<String>,
}

/// The name that each address of an agent was last an answer to.
#[derive(Default)]
pub(super) struct Hostnames {
    names: HashMap<IpAddr, Arc<str>>,
    order: VecDeque<IpAddr>,
}

/// Addresses of one agent whose names are remembered.
const HOSTNAMES: usize = 8192;

impl Hostnames {
    fn learn(&mut self, addr: IpAddr, name: &Arc<str>) {
        if self.names.insert(addr, Arc::clone(name)).is_none() {
            self.order.push_back(addr);
        }
        if self.order.len() > HOSTNAMES
            && let Some(oldest) = self.order.pop_front()
        {
            self.names.remove(&oldest);
        }
    }
}

impl Recorder {
    /// Learns which agents and policies the kernel's numbers mean from now on.
    pub fn learn<'a>(
        &mut self,
        enforcer: &Enforcer,
        revision: u64,
        tables: impl IntoIterator<Item = &'a Arc<AgentTables>>,
    ) {
        self.revision = revision;
        let mut past = std::mem::take(&mut self.present);
        for tables in tables {
            let Some(index) = enforcer.index_of(&tables.id) else {
                continue;
            };
            let Some(policy) = enforcer.policy_of(index) else {
                continue;
            };
            let subject = if index == UNREGISTERED {
                Subject::unregistered(tables.hash.clone())
            } else {
                Subject::from(tables.as_ref())
            };
            let known = Known {
                subject,
                entries: Arc::clone(tables),
            };
            if self.policies.insert(policy, known.clone()).is_none() {
                self.order.push_back(policy);
            }
            self.present.insert(index, (policy, known));
        }
        // What an agent that left the registry was refused is its own for ever: the next daemon adds
        // up the lines of each id.
        let mut former = std::mem::take(&mut self.former);
        let nobody = Arc::new(AgentTables::nobody());
        for (id, index) in enforcer.indices() {
            if self.present.contains_key(&index) || index == UNREGISTERED {
                continue;
            }
            let known = past.remove(&index).map(|(_, known)| known);
            let known = known.or_else(|| former.remove(&index));
            // Entries are those of policies, and remembered as long as these.
            let subject = known.map_or_else(|| Subject::former(id), |known| known.subject);
            let entries = Arc::clone(&nobody);
            self.former.insert(index, Known { subject, entries });
        }
        self.forget();
        // Cgroups come and go with the registry's changes as well.
        self.paths.clear();
    }

    /// Learns which name led to these addresses.
    pub fn learn_name(&mut self, agent: u32, name: &str, addresses: &[IpAddr]) {
        let name: Arc<str> = name.into();
        let known = self.hostnames.entry(agent).or_default();
        for addr in addresses {
            known.learn(addr.to_canonical(), &name);
        }
    }

    /// Forgets what names an agent had.
    pub fn forget_names(&mut self, agent: u32) {
        self.hostnames.remove(&agent);
    }

    /// The name that led the agent to an address, if it is remembered.
    pub fn name_of(&self, agent: u32, addr: IpAddr) -> Option<&str> {
        let known = self.hostnames.get(&agent)?;
        known.names.get(&addr.to_canonical()).map(|name| &**name)
    }

    /// Forgets the oldest policies that are out of force, past the bounds.
    fn forget(&mut self) {
        let mut present = HashSet::new();
        let mut seen = HashSet::new();
        for (policy, known) in self.present.values() {
            present.insert(*policy);
            seen.insert(Arc::as_ptr(&known.entries));
        }
        let (mut count, mut weight) = (0, 0);
        let policies = &mut self.policies;
        let mut kept: VecDeque<u64> = VecDeque::with_capacity(self.order.len());
        for policy in self.order.drain(..).rev() {
            let Some(known) = policies.get(&policy) else {
                continue;
            };
            if !present.contains(&policy) {
                // The same tables under another policy weigh nothing.
                if seen.insert(Arc::as_ptr(&known.entries)) {
                    weight += known.entries.entries.len() + known.entries.scope.reach.len();
                }
                count += 1;
                // The latest stays, whatever it weighs.
                if count > 1 && (weight > REMEMBERED || count > POLICIES) {
                    policies.remove(&policy);
                    continue;
                }
            }
            kept.push_front(policy);
        }
        self.order = kept;
    }

    /// An agent as it was under a policy; 0 for the present one. Under one that nobody remembers
    /// numbers of entries mean nothing.
    pub(super) fn known(&self, agent: u32, policy: u64) -> Known {
        if let Some(known) = self.policies.get(&policy) {
            return known.clone();
        }
        let present = self.present.get(&agent).map(|(_, known)| known);
        let known = present.or_else(|| self.former.get(&agent));
        match known {
            Some(known) if policy == 0 => known.clone(),
            Some(known) => Known {
                subject: known.subject.clone(),
                entries: Arc::new(AgentTables::nobody()),
            },
            None => Known::nobody(),
        }
    }

    /// Takes note of what a record says of its fold.
    pub(super) fn note(&mut self, event: &Event) {
        let tenant = Tenant {
            generation: event.generation,
            policy: event.policy,
            entry: event.entry,
        };
        self.tenants.insert(event.fold, tenant);
    }

    /// The agent of a fold as it was when the last record of it was made, and the entry. Where that
    /// record was lost, which entry it was is not known either.
    pub(super) fn known_of(&self, id: u32, fold: &Fold) -> (Known, u32) {
        let tenant = self.tenants.get(&id);
        match tenant.filter(|tenant| tenant.generation == fold.generation) {
            Some(tenant) => (self.known(fold.agent, tenant.policy), tenant.entry),
            None => (self.known(fold.agent, LOST), fold.entry),
        }
    }

    fn whereabouts(&mut self, cgroup: u64) -> Option<Whereabouts> {
        if self.paths.len() > PATHS {
            self.paths.clear();
        }
        let hierarchy = &self.hierarchy;
        self.paths
            .entry(cgroup)
            .or_insert_with(|| {
                let path = hierarchy.path_of(cgroup).ok().flatten()?;
                Some(Whereabouts {
                    invocation: hierarchy.invocation(&path),
                    path: path.to_string(),
                })
            })
            .clone()
    }

    pub(super) fn context(
        &mut self,
        known: &Known,
        process: ProcessInfo,
        cgroup: u64,
        entry: u32,
        time: u64,
        count: u64,
    ) -> Context {
        let entry = (entry != NO_ENTRY).then(|| {
            let at = usize::try_from(entry).ok();
            at.and_then(|at| known.entries.entries.get(at))
                .map_or_else(EntryRef::unknown, EntryRef::from)
        });
        let (path, invocation) = match self.whereabouts(cgroup) {
            Some(place) => (Some(place.path), place.invocation),
            None => (None, None),
        };
        Context {
            time: self.offset.wall(time),
            agent: known.subject.clone(),
            process: self.processes.enrich(process),
            cgroup: path,
            invocation,
            entry,
            dst_name: None,
            revision: self.revision,
            count,
        }
    }
}
