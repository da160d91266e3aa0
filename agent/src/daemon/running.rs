//! A cgroup for `remit run --agent`.

use super::{
    core::{Core, boot_now},
    placing::place_by,
};
use crate::{
    cgroup::CgroupPath,
    control::protocol::{Code, Refusal, RunGrant, RunRequest},
    policy::AgentTables,
};

impl Core {
    /// Makes and claims a cgroup for `remit run --agent`. When this returns, what is started there
    /// is the agent.
    pub(super) fn run(&mut self, request: &RunRequest) -> Result<RunGrant, Refusal> {
        let agent = self
            .force
            .agents
            .get(&request.agent)
            .ok_or_else(|| Refusal::no_such_agent(&request.agent))?;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Refusal::new(Code::Internal, format!("cannot {what}: {error}"))
        };
        let serial = boot_now();
        let path = self.place_for(&agent.tables, serial).ok_or_else(|| {
            Refusal::new(
                Code::Conflict,
                format!(
                    "no selector of `{}` names a cgroup below a governed root",
                    request.agent
                ),
            )
            .help("give it `selector.cgroup` a path below one of `enforcement.roots`")
        })?;
        self.hierarchy
            .create(&path)
            .map_err(|error| failed("create the cgroup", &error))?;
        self.survey();
        let id = self
            .hierarchy
            .id(&path)
            .map_err(|error| failed("read the cgroup", &error))?;
        let index = self.enforcer.index_of(&request.agent);
        let claimed = self
            .claims
            .iter()
            .any(|(claimed, (_, agent))| Some(*agent) == index && path.is_within(claimed));
        if !claimed {
            return Err(Refusal::new(
                Code::Conflict,
                format!("cgroup `{path}` is not attributed to `{}`", request.agent),
            )
            .help("`remit status` says what stands in the way"));
        }
        Ok(RunGrant {
            cgroup: self.hierarchy.directory(&path),
            id,
        })
    }

    /// A new cgroup that one of the agent's selectors claims.
    fn place_for(&self, tables: &AgentTables, serial: u64) -> Option<CgroupPath> {
        tables.selectors.iter().find_map(|selector| {
            let path = CgroupPath::new(place_by(selector, serial)?).ok()?;
            self.roots
                .iter()
                .any(|root| path.is_within(root) && path != *root)
                .then_some(path)
        })
    }
}
