//! `remit discover`: processes outside every root that look like AI agents, with the TOML that
//! would register each. 1 when there are any.
//!
//! What they execute is looked at here. What they reach is known to the daemon alone, and only where
//! its observer runs; where it does not, that is said, for an empty list would be no answer.

use std::{ffi::OsStr, path::PathBuf};

use anyhow::Context as _;

use super::{
    Global, client, format,
    outcome::{Outcome, Result},
    output::{Output, Tone, plain, plain_lines, talk, warning},
};
use crate::{
    cgroup::CgroupPath,
    control::{client::ClientError, protocol::Traffic},
    daemon::{
        self,
        settings::{DEFAULT_PATH, Settings},
    },
    doctor::{Known, Note, Reached, Stray, discover},
    kernel::boot_nanos,
};

/// Arguments of `remit discover`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Names and command lines to look for, in place of the built-in list.
    #[arg(long, value_name = "FILE")]
    known: Option<PathBuf>,
}

/// Destinations of one process that are shown; it may try each port there is.
const SHOWN: usize = 8;

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let settings = global.settings()?;
    let known =
        Known::load(arguments.known.as_deref()).context("cannot read the list of agents")?;
    let hierarchy = daemon::hierarchy(&settings).map_err(anyhow::Error::from)?;
    let roots: Vec<CgroupPath> = settings
        .enforcement
        .roots
        .iter()
        .filter_map(|root| CgroupPath::new(root).ok())
        .collect();
    let traffic = client(&settings)?.get::<Traffic>("/traffic");
    let config = global.config.as_deref().map(OsStr::to_string_lossy);
    let (notes, told) = heard(traffic, &settings, config.as_deref());
    let found = discover(&hierarchy, &roots, &known, &notes);
    match told {
        Some(told) if settings.discover.traffic => warning(plain(&told)),
        Some(told) => talk(plain(&told)),
        None => {}
    }
    if output.wants_json() {
        output.json(&found)?;
        return Ok(Outcome::of(found.is_empty()));
    }
    for stray in &found {
        print(stray, output)?;
    }
    if found.is_empty() {
        talk("no process outside the roots looks like an agent that is known here");
    }
    Ok(Outcome::of(found.is_empty()))
}

fn print(stray: &Stray, output: &Output) -> Result<()> {
    let whose = match (stray.ended, stray.processes) {
        (false, _) => format!("pid {}", stray.pid),
        (true, 1) => format!("pid {}, which has ended,", stray.pid),
        (true, many) => format!(
            "{many} processes that have ended, the last with pid {},",
            stray.pid
        ),
    };
    output.line(format_args!(
        "{} {whose} of user {} in {}: {}",
        output.paint(Tone::Doubtful, &plain(&stray.looks_like)),
        stray.uid,
        stray
            .cgroup
            .as_deref()
            .map_or_else(|| "a cgroup that is gone".to_owned(), plain),
        plain(&stray.command)
    ))?;
    let now = daemon::wall_millis();
    for reached in stray.reached.iter().take(SHOWN) {
        output.line(format_args!("  {}", plain(&destination(reached, now))))?;
    }
    let more = stray.reached.len().saturating_sub(SHOWN);
    if more > 0 {
        output.line(format_args!("  and {more} destinations more"))?;
    }
    output.line(plain_lines(&stray.toml))?;
    output.line("")
}

/// `reached api.example.com (192.0.2.1:443), 12 times, last 3 s ago`.
fn destination(reached: &Reached, now: i64) -> String {
    let at = std::net::SocketAddr::new(reached.addr, reached.port);
    let at = match reached.protocol {
        6 => at.to_string(),
        17 => format!("{at}/udp"),
        other => format!("{at}/{other}"),
    };
    let to = match reached.names.as_slice() {
        [] => at,
        [name] => format!("{name} ({at})"),
        [name, more @ ..] => format!(
            "{name} ({at}, shared with {})",
            format::count(more.len() as u64, "other name")
        ),
    };
    let times = match reached.count {
        1 => "once".to_owned(),
        count => format::count(count, "time"),
    };
    let ago = format::span(now.saturating_sub(reached.last_ms));
    format!("reached {to}, {times}, last {ago} ago")
}

/// What the daemon has seen, and what there is to say of that: a list without what it saw would look
/// as if there was nothing.
fn heard(
    traffic: std::result::Result<Traffic, ClientError>,
    settings: &Settings,
    config: Option<&str>,
) -> (Vec<Note>, Option<String>) {
    let off = || {
        let file = config.filter(|file| !file.is_empty());
        format!(
            "traffic to model APIs is not observed; `traffic = true` in `[discover]` of {} has the \
             daemon do it from its next start on",
            file.unwrap_or(DEFAULT_PATH)
        )
    };
    let traffic = match traffic {
        Ok(traffic) => traffic,
        Err(error) if settings.discover.traffic => {
            return (
                Vec::new(),
                Some(format!("traffic was not observed: {error}")),
            );
        }
        Err(_) => return (Vec::new(), Some(off())),
    };
    let told = match (traffic.wanted, traffic.observed, &traffic.why) {
        (true, true, None) => None,
        (true, true, Some(why)) => Some(format!("traffic was observed only in part: {why}")),
        (true, false, why) => Some(format!(
            "traffic was not observed: {}",
            why.as_deref().unwrap_or("the daemon does not say why")
        )),
        (false, ..) if settings.discover.traffic => Some(
            "traffic was not observed: the daemon runs with settings from before `discover.traffic`; \
             start it again"
                .to_owned(),
        ),
        (false, ..) => Some(off()),
    };
    (notes(traffic), told)
}

fn notes(traffic: Traffic) -> Vec<Note> {
    let wall = |nanos: u64| {
        let millis = i64::try_from(nanos / 1_000_000).unwrap_or(i64::MAX);
        traffic.boot_ms.saturating_add(millis)
    };
    let now = boot_nanos();
    let note = |one: crate::control::protocol::Reached| Note {
        pid: one.pid,
        uid: one.uid,
        comm: one.comm,
        cgroup_id: one.cgroup_id,
        cgroup: one.cgroup.and_then(|path| CgroupPath::new(path).ok()),
        reached: Reached {
            names: one.names,
            addr: one.addr,
            port: one.port,
            protocol: one.protocol,
            count: one.count,
            first_ms: wall(one.first_ns),
            last_ms: wall(one.last_ns),
        },
        first: one.first_ns.min(now),
        last: one.last_ns.min(now),
    };
    traffic.notes.into_iter().map(note).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(names: &[&str], addr: &str, protocol: u8, count: u64) -> Reached {
        Reached {
            names: names.iter().map(ToString::to_string).collect(),
            addr: addr.parse().unwrap(),
            port: 443,
            protocol,
            count,
            first_ms: 0,
            last_ms: 7_000,
        }
    }

    #[test]
    fn a_destination_is_one_line() {
        let line = |one: &Reached| destination(one, 10_000);
        assert_eq!(
            line(&reached(&["api.anthropic.com"], "160.79.104.10", 6, 12)),
            "reached api.anthropic.com (160.79.104.10:443), 12 times, last 3 s ago"
        );
        assert_eq!(
            line(&reached(&["a.test", "b.test"], "2001:db8::1", 17, 1)),
            "reached a.test ([2001:db8::1]:443/udp, shared with 1 other name), once, last 3 s ago"
        );
        assert_eq!(
            line(&reached(&[], "192.0.2.1", 6, 2)),
            "reached 192.0.2.1:443, 2 times, last 3 s ago"
        );
    }

    #[test]
    fn what_was_not_observed_is_said() {
        let mut settings = Settings::default();
        let nobody = || Err(ClientError::NoDaemon("/run/remit/remit.sock".into()));
        let said = |traffic, settings: &Settings| heard(traffic, settings, Some("/x.toml")).1;
        let off = said(nobody(), &settings).unwrap();
        assert!(
            off.contains("not observed") && off.contains("/x.toml"),
            "{off}"
        );
        assert_eq!(said(Ok(Traffic::default()), &settings), Some(off));
        settings.discover.traffic = true;
        let none = said(nobody(), &settings).unwrap();
        assert!(none.contains("no daemon at"), "{none}");
        let old = said(Ok(Traffic::default()), &settings).unwrap();
        assert!(old.contains("start it again"), "{old}");
        let with = |observed, why: Option<&str>| {
            said(
                Ok(Traffic {
                    wanted: true,
                    observed,
                    why: why.map(str::to_owned),
                    ..Traffic::default()
                }),
                &settings,
            )
        };
        assert_eq!(with(true, None), None);
        assert_eq!(
            with(false, Some("EPERM")).as_deref(),
            Some("traffic was not observed: EPERM")
        );
        assert!(with(true, Some("x")).unwrap().contains("only in part"));
    }
}
