//! Which cgroup is whose, and whether every root is fenced: by events as cgroups come and go, and
//! by a survey of all of them now and then.

use std::collections::BTreeMap;

use tracing::{error, warn};

use super::{DaemonError, core::Core, lock::RootLock};
use crate::{
    audit::{Decision, Refenced},
    cgroup::{CgroupPath, Change, Claimant},
};

impl Core {
    /// Finds out anew which cgroup is whose, and tells the kernel.
    pub fn survey(&mut self) {
        self.refence();
        match self.attribute() {
            Ok(()) => {
                self.problems.remove("attribution");
            }
            Err(error) => {
                warn!(message = "Cgroups could not be attributed.", %error);
                self.problems.insert("attribution", error.to_string());
            }
        }
    }

    pub(super) fn attribute(&mut self) -> Result<(), DaemonError> {
        let mut claims = BTreeMap::new();
        self.problems.remove("disputes");
        for root in &self.roots {
            let survey = match self.hierarchy.claims(root, &self.selectors) {
                Ok(survey) => survey,
                Err(error) if error.is_missing() => continue,
                Err(error) => return Err(error.into()),
            };
            for claim in survey.claims {
                claims.insert(claim.path, (claim.id, claim.agent));
            }
            if let Some(dispute) = survey.disputes.first() {
                self.problems.insert(
                    "disputes",
                    format!(
                        "cgroup `{}` is claimed by several agents, so by none",
                        dispute.path
                    ),
                );
            }
        }
        self.claims = claims;
        self.push_claims()
    }

    fn push_claims(&mut self) -> Result<(), DaemonError> {
        let wanted: Vec<(u64, u32)> = self.claims.values().copied().collect();
        self.enforcer.attribute_indices(&wanted)?;
        Ok(())
    }

    /// Follows cgroups as they come and go.
    pub fn cgroups_changed(&mut self, changes: &[Change]) {
        let mut again = false;
        for change in changes {
            match change {
                Change::Created {
                    path,
                    id,
                    claimant: Claimant::Agent(agent),
                } => {
                    self.claims.insert(path.clone(), (*id, *agent));
                }
                Change::Created {
                    claimant: Claimant::Several(_),
                    ..
                }
                | Change::RootDeleted(_)
                | Change::RootCreated { .. }
                | Change::Unwatched(_) => again = true,
                Change::Created {
                    claimant: Claimant::Nobody,
                    ..
                } => {}
                Change::Deleted { path, id } => {
                    if self.claims.get(path).is_some_and(|(known, _)| known == id) {
                        self.claims.remove(path);
                    }
                }
            }
        }
        if again {
            self.survey();
        } else if let Err(error) = self.push_claims() {
            warn!(message = "Cgroups could not be attributed.", %error);
            self.problems.insert("attribution", error.to_string());
        }
    }

    /// Raises fences on roots that were removed and made again.
    pub(super) fn refence(&mut self) {
        for root in self.roots.clone() {
            let name = root.to_string();
            let stands = self
                .enforcer
                .fences()
                .any(|(fenced, fence)| fenced == name && fence.stands());
            if stands {
                continue;
            }
            let directory = self.hierarchy.directory(&root);
            let raised = self
                .hierarchy
                .create(&root)
                .map_err(|error| error.to_string())
                .and_then(|_| {
                    self.enforcer
                        .fence(&name, &directory)
                        .map_err(|error| format!("{:#}", anyhow::Error::from(error)))
                });
            match raised {
                Ok(()) => {
                    self.relock(&root);
                    warn!(
                        message = "A root was gone; it is fenced again.",
                        root = name
                    );
                    self.problems.remove("roots");
                    self.decide_refenced(&name, None);
                }
                Err(why) => {
                    let problem = format!("root `{name}` is not fenced: {why}");
                    if self.problems.get("roots") != Some(&problem) {
                        error!(message = "A root is not fenced.", root = name, why);
                        self.decide_refenced(&name, Some(why));
                    }
                    self.problems.insert("roots", problem);
                }
            }
        }
    }

    fn decide_refenced(&mut self, root: &str, error: Option<String>) {
        let revision = self.force.revision;
        self.decide(Decision::Refenced(Refenced {
            root: root.to_owned(),
            error,
            revision,
        }));
    }

    /// Locks a root that was made again. Its fence stands in any case.
    fn relock(&mut self, root: &CgroupPath) {
        let Ok(id) = self.hierarchy.id(root) else {
            return;
        };
        if self.locks.iter().any(|lock| lock.is_for(root, id)) {
            return;
        }
        match RootLock::take(&self.hierarchy, root, &self.roots) {
            Ok(lock) => self.locks.push(lock),
            Err(error) => warn!(message = "A root could not be locked.", %root, %error),
        }
    }
}
