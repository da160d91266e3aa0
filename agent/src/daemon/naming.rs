//! The daemon's part in names: which agents use them, where their processes live, and the guard's
//! questions answered. What is the same for a fence without a daemon is in [`super::names`].

use std::{collections::BTreeSet, sync::Arc};

use tracing::warn;

use super::{
    core::Core,
    force::{self, Force},
    names::{self, LeaseOrder},
};
use crate::{dns::server::Request, kernel::Image, policy::AgentTables};

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
        names::mark(&self.names, tables, image);
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
        let named = self.named().into_iter().map(|(_, id)| id).collect();
        for gone in self.names.know(named) {
            if let Some(index) = self.enforcer.index_of(&gone) {
                self.recorder.forget_names(index);
            }
        }
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
        let named: BTreeSet<u32> = self.named().into_iter().map(|(agent, _)| agent).collect();
        let places = self.claims.iter().filter(|(_, (_, claimant))| {
            named.contains(claimant) && only.is_none_or(|only| only.contains(claimant))
        });
        let hierarchy = &self.hierarchy;
        let processes = places.flat_map(|(path, (_, claimant))| {
            let inside = hierarchy.processes(path, true).unwrap_or_default();
            inside.into_iter().map(move |pid| (*claimant, pid))
        });
        match self.names.tend(&mut self.enforcer, &named, processes) {
            Err(why) if self.problems.get("endpoints") != Some(&why) => {
                warn!(message = "An endpoint of the DNS guard is missing.", why);
                self.problems.insert("endpoints", why);
            }
            Err(_) => {}
            Ok(()) => drop(self.problems.remove("endpoints")),
        }
    }

    /// Lookups were refused for want of an endpoint.
    pub(super) fn unguarded(&mut self, agents: &BTreeSet<u32>) {
        if !agents.is_empty() && self.names.looks_again() {
            self.tend_endpoints(Some(agents));
        }
    }

    /// Once a second.
    pub(super) fn tend_names(&mut self) {
        if let Some(server) = self.names.server() {
            self.names.asked.note_busy(server.unanswered().busy);
        }
        self.tend_endpoints(None);
        let over = self.names.turn(&mut self.enforcer);
        if !over.is_empty() {
            self.close_unreachable(Some(&over));
        }
    }

    /// Answers the guard.
    pub fn lookup(&mut self, request: Request) {
        // One that waits no longer is no reason to complain.
        match request {
            Request::Identify { client, reply } => {
                let tables = |id: &str| Some(Arc::clone(&self.force.agents.get(id)?.tables));
                let identity = self.names.identify(&self.enforcer, &client, tables);
                drop(reply.send(identity));
            }
            Request::Lease {
                tables,
                leases,
                host,
                addresses,
                reply,
            } => {
                let current = self.force.agents.get(&tables.id);
                let order = LeaseOrder {
                    tables,
                    leases,
                    host,
                    addresses,
                };
                let done = names::put_leases(
                    &mut self.enforcer,
                    &mut self.recorder,
                    current.map(|agent| &agent.tables),
                    order,
                );
                drop(reply.send(done));
            }
            Request::Report { report, client } => {
                if let Some(refused) = self.names.refused(&self.enforcer, report, client) {
                    self.lookups.tell(&mut self.recorder, refused);
                }
            }
        }
    }
}
