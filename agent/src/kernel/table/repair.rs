//! Puts right what an inspection found. What is too much goes first; each agent that was touched
//! then gets a policy of its own anew, whose word voids what the cache took from the old one.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    thread,
    time::{Duration, Instant},
};

use agent_ebpf::abi::{AgentName, SERVE};

use super::{ApplyError, Image, Place, Spot, SpotKey, Tables, name_bytes, put};
use crate::kernel::{image::with_entry, sys};

/// Longer than any program runs, should the kernel not say when the last one has ended.
const PROGRAM: Duration = Duration::from_millis(20);

impl Tables {
    /// Puts each of these right; the results are in their order. One that fails leaves the others
    /// alone.
    pub fn repair(&mut self, spots: &[Spot]) -> Vec<Result<(), String>> {
        self.sweep(Instant::now());
        let users = self.users_of_chains();
        let known: HashSet<Place> = self
            .in_force
            .values()
            .flat_map(|installed| installed.places().map(|(place, _)| place))
            .collect();
        let owners: BTreeMap<u64, u32> = self
            .in_force
            .iter()
            .map(|(agent, installed)| (installed.content.policy, *agent))
            .collect();
        let mut results = Vec::with_capacity(spots.len());
        let mut agents_of: Vec<Vec<u32>> = Vec::with_capacity(spots.len());
        let mut epoch_is_due = false;
        for spot in spots {
            let mut agents = Vec::new();
            let result = match *spot {
                Spot::Word(agent) | Spot::Row(agent) if self.in_force.contains_key(&agent) => {
                    agents.push(agent);
                    Ok(())
                }
                Spot::Word(agent) => put("agents", &self.agents, agent, 0).map_err(said),
                Spot::Row(_) => Ok(()),
                Spot::Name(agent) => self.rename(agent).map_err(said),
                Spot::Key(SpotKey(place)) => {
                    agents.extend(owners.get(&place.policy()));
                    if known.contains(&place) {
                        Ok(())
                    } else {
                        self.delete(place).map_err(|error| error.to_string())
                    }
                }
                Spot::Chain(head) => {
                    self.sets.bar(head);
                    agents.extend(users.get(&head).into_iter().flatten());
                    Ok(())
                }
                Spot::Claim(cgroup) => {
                    epoch_is_due = true;
                    match self.attributed.get(&cgroup).copied() {
                        Some(agent) => self.claim(cgroup, agent),
                        None => self.unclaim(cgroup),
                    }
                    .map_err(said)
                }
                Spot::Epoch => {
                    epoch_is_due = true;
                    Ok(())
                }
                Spot::Unreadable => Err("a map that cannot be read cannot be repaired".to_owned()),
            };
            results.push(result);
            agents_of.push(agents);
        }

        let epoch = if epoch_is_due {
            self.next_epoch().map_err(said)
        } else {
            Ok(())
        };
        let touched: BTreeSet<u32> = agents_of.iter().flatten().copied().collect();
        let restaged: BTreeMap<u32, Result<(), String>> = touched
            .into_iter()
            .map(|agent| (agent, self.restage(agent)))
            .collect();
        let spots = spots.iter().zip(agents_of);
        for (result, (spot, agents)) in results.iter_mut().zip(spots) {
            let is_claim = matches!(spot, Spot::Claim(_) | Spot::Epoch);
            let further = agents.iter().filter_map(|agent| restaged.get(agent));
            let further = further.chain(is_claim.then_some(&epoch));
            for further in further {
                if result.is_ok() {
                    result.clone_from(further);
                }
            }
        }
        results
    }

    /// Writes what is in force for an agent anew, and points the agent there.
    fn restage(&mut self, agent: u32) -> Result<(), String> {
        let image = self
            .image(agent)
            .ok_or("what must be in force is not known; reload the registry")?;
        let installed = match self.stage(&image) {
            Ok(installed) => installed,
            Err(ApplyError::Full { .. }) => self.make_room(agent, &image)?,
            Err(error) => return Err(said(error)),
        };
        self.flip(vec![(agent, installed)]).map_err(said)
    }

    /// Where there is no room for both, the agent is denied while the new replaces the old.
    fn make_room(&mut self, agent: u32, image: &Image) -> Result<super::Installed, String> {
        put("agents", &self.agents, agent, 0).map_err(said)?;
        sys::await_running_programs();
        thread::sleep(PROGRAM);
        if let Some(old) = self.in_force.remove(&agent) {
            self.remove(old);
        }
        self.stage(image).map_err(|error| {
            format!(
                "it is denied until the registry is loaded again: {}",
                said(error)
            )
        })
    }

    /// What is in force for an agent.
    fn image(&self, agent: u32) -> Option<Image> {
        let installed = self.in_force.get(&agent)?;
        let mut image = Image {
            id: self.ids.get(&agent)?.clone(),
            row: installed.content,
            reach: Vec::new(),
            serve: Vec::new(),
            leases: self.leased_in(installed),
            fresh: false,
        };
        for (place, leaf) in &installed.entries {
            let rules = self.sets.rules(leaf.set)?.iter();
            let rules = rules.map(|rule| with_entry(rule, leaf.entry)).collect();
            let placed = (place.prefix()?, rules);
            if place.key.space & SERVE == 0 {
                image.reach.push(placed);
            } else {
                image.serve.push(placed);
            }
        }
        Some(image)
    }

    fn rename(&mut self, agent: u32) -> Result<(), ApplyError> {
        let name = match self.ids.get(&agent) {
            Some(id) => name_bytes(id),
            None => AgentName::zeroed(),
        };
        put("names", &self.names, agent, name)
    }
}

/// An error with its causes, on one line.
fn said(error: ApplyError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
