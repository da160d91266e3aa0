//! `remit guard`: for `ExecStartPre` of an agent's unit. 0 only when the unit's cgroup is below a
//! root whose every hook is live, and the agent that claims it is active; so a unit that needs it
//! never starts unfenced.
//!
//! Called from inside the cgroup, as systemd calls it, it may ask only about itself; from outside it
//! asks about the cgroup.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use super::{
    Global,
    outcome::{Failure, Outcome, Result},
    output::{Output, Tone, plain, talk},
};
use crate::{
    cgroup::{CgroupPath, Hierarchy},
    control::{
        client::{Client, ClientError},
        protocol::{Code, Guarded, Myself},
    },
    daemon, launch,
};

/// Arguments of `remit guard`.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Arguments {
    /// The systemd unit whose cgroup is meant, such as `billing-recon.service`.
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
    /// The cgroup itself, as a path below the v2 mount.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
}

/// A cgroup that was just born is attributed within milliseconds; a daemon that restarts takes
/// longer.
const WAIT: Duration = Duration::from_secs(5);
/// At a boot an agent's unit may start long before the daemon can; the unit waits here, fenced.
const BOOT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let settings = global.settings()?;
    let hierarchy = daemon::hierarchy(&settings).map_err(anyhow::Error::from)?;
    let inside = hierarchy.cgroup_of(std::process::id());
    let inside = inside.map_err(anyhow::Error::from)?;
    let wanted = match (&arguments.unit, &arguments.cgroup) {
        (Some(unit), _) => of_unit(&hierarchy, &inside, unit)?,
        (None, Some(path)) => CgroupPath::new(path)
            .map_err(|error| Failure::usage(format!("`{}`: {error}", plain(path))))?,
        (None, None) => return Err(Failure::usage("name a unit or a cgroup")),
    };
    let client = super::client(&settings)?.patient_for(WAIT);
    let began = Instant::now();
    // As `ExecStartPre`.
    let boots = launch::is_managed() && arguments.unit.is_some() && inside.is_within(&wanted);
    let no_daemon = if boots { BOOT } else { WAIT };
    let mut answered = None;
    let guarded = loop {
        match ask(&client, &wanted, &inside) {
            Ok(guarded) => {
                let since: &mut Instant = answered.get_or_insert_with(Instant::now);
                if is_settled(&guarded) || since.elapsed() >= WAIT {
                    break guarded;
                }
            }
            Err(Untold::NoDaemon(_)) if began.elapsed() < no_daemon => {}
            Err(Untold::NoDaemon(error)) => return Err(error.into()),
            Err(Untold::Final(failure)) => return Err(failure),
        }
        sleep(PAUSE);
    };
    if output.wants_json() {
        output.json(&guarded)?;
    } else if guarded.ok {
        let agent = guarded.agent.as_deref().unwrap_or("-");
        output.line(format_args!(
            "{} {}: fenced, agent {} is {}",
            output.paint(Tone::Good, "guarded"),
            plain(&guarded.cgroup),
            plain(agent),
            plain(&guarded.state)
        ))?;
    } else {
        for why in &guarded.why {
            talk(format_args!(
                "not guarded: {}: {}",
                plain(&guarded.cgroup),
                plain(why)
            ));
        }
    }
    Ok(Outcome::of(guarded.ok))
}

/// Whether waiting changes nothing: only a cgroup that was just born is not anybody's yet.
fn is_settled(guarded: &Guarded) -> bool {
    guarded.ok || guarded.agent.is_some() || guarded.root.is_none()
}

/// Why nothing was told.
enum Untold {
    /// Nobody is there, which may change.
    NoDaemon(ClientError),
    /// All else.
    Final(Failure),
}

impl From<ClientError> for Untold {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoDaemon(_) => Self::NoDaemon(error),
            error => Self::Final(error.into()),
        }
    }
}

fn ask(
    client: &Client,
    wanted: &CgroupPath,
    inside: &CgroupPath,
) -> std::result::Result<Guarded, Untold> {
    let path = wanted.to_string();
    let query = format!("/guard?cgroup={}", super::agents::segment(&path));
    match client.get::<Guarded>(&query) {
        Ok(guarded) => return Ok(guarded),
        // Behind the fence nobody but itself may be asked about.
        Err(ClientError::Refused(refusal)) if refusal.code == Code::Forbidden => {}
        Err(error) => return Err(error.into()),
    }
    if !inside.is_within(wanted) {
        let why = format!("from inside `{inside}` nothing can be told of `{wanted}`");
        return Err(Untold::Final(Failure::unknown(why)));
    }
    let myself: Myself = client.get("/self")?;
    let none = "the daemon cannot tell in which cgroup this process runs";
    myself
        .guard
        .ok_or_else(|| Untold::Final(Failure::unknown(none)))
}

/// The cgroup of a unit: this process's own, or the only one of that name.
fn of_unit(hierarchy: &Hierarchy, inside: &CgroupPath, unit: &str) -> Result<CgroupPath> {
    // As systemd's own commands have it.
    let unit = if [".service", ".scope", ".slice"]
        .iter()
        .any(|end| unit.ends_with(end))
    {
        unit.to_owned()
    } else {
        format!("{unit}.service")
    };
    let unit = unit.as_str();
    let named = |path: &CgroupPath| path.names().last().is_some_and(|name| name == unit);
    let mut up = Some(inside.clone());
    while let Some(path) = up {
        if named(&path) {
            return Ok(path);
        }
        up = path.parent();
    }
    let all = hierarchy
        .subtree(&CgroupPath::root())
        .map_err(anyhow::Error::from)?;
    let mut found: Vec<CgroupPath> = all.into_iter().filter(named).collect();
    // A user's manager may have a unit of that name too. systemd tells what it starts which start
    // it is (systemd.exec(5)), and writes that on the unit's cgroup.
    if found.len() > 1
        && let Ok(invocation) = std::env::var("INVOCATION_ID")
    {
        let is_it = |path: &CgroupPath| hierarchy.invocation(path).as_ref() == Some(&invocation);
        if found.iter().any(is_it) {
            found.retain(is_it);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        (Some(_), false) => Err(Failure::unknown(format!(
            "several cgroups are named `{}`",
            plain(unit)
        ))
        .help("name the one that is meant: `--cgroup PATH`")),
        (None, _) => Err(Failure::no(format!(
            "no cgroup is named `{}`: the unit does not run",
            plain(unit)
        ))),
    }
}
