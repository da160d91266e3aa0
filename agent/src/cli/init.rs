//! `remit init`: the first steps on a host. Looks at it as `remit doctor` does, and writes the
//! registry entry of a first agent, in monitor mode and with an end. What it would write is compiled
//! with the rest of the registry first; what is there is never overwritten.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::Context as _;
use serde::Serialize;

use super::{
    Global,
    outcome::{Failure, Outcome, Result},
    output::{Output, Tone, plain, plain_lines, talk},
};
use crate::{
    daemon::{registry, settings::Settings},
    doctor::{self, Check, State},
    policy::{self, Id, Source, SourceKind},
};

const DAY: i64 = 86_400_000;

/// Arguments of `remit init`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// What the agent is called: a-z, 0-9, `.` and `-`. On a terminal what is missing is asked for.
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// The accountable person, or `group:NAME`.
    #[arg(long, value_name = "PERSON")]
    owner: Option<String>,
    /// Who approves the entry: somebody other than the owner. Without it the entry is a draft, which
    /// reaches nothing.
    #[arg(long, value_name = "PERSON")]
    approved_by: Option<String>,
    /// Why the agent exists.
    #[arg(long, value_name = "TEXT")]
    purpose: Option<String>,
    /// Which processes it is: a cgroup below the v2 mount, or a glob of them. Without it the unit
    /// `ID.service` in the first root.
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// A grant: `api.example.com:443`, `198.51.100.0/24:443,53/udp`, `[2001:db8::/32]:443`.
    #[arg(long, value_name = "TO:PORTS")]
    allow: Vec<String>,
    /// When the entry ends: days from now (`30d`) or a date (`2027-12-31`).
    #[arg(long, value_name = "WHEN", default_value = "30d")]
    expires: String,
    /// Print the entry instead of writing it.
    #[arg(long)]
    dry_run: bool,
}

/// All that an entry is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    id: String,
    owner: String,
    approved_by: Option<String>,
    purpose: Option<String>,
    cgroups: Vec<String>,
    /// Destination and ports.
    grants: Vec<(String, Vec<String>)>,
    /// RFC 3339.
    expires: String,
}

/// What was done, as JSON.
#[derive(Debug, Serialize)]
struct Report<'r> {
    path: &'r Path,
    written: bool,
    id: &'r str,
    state: &'static str,
    expires: &'r str,
    /// What this host lacks.
    lacks: &'r [Check],
}

pub(super) fn run(global: &Global, arguments: Arguments, output: &Output) -> Result {
    let settings = global.settings()?;
    let dry = arguments.dry_run;
    let wanted = gather(arguments, &settings)?;
    let text = wanted.entry();
    let path = settings.paths.registry.join(format!("{}.toml", wanted.id));
    if path.symlink_metadata().is_ok() {
        return Err(is_there(&path));
    }
    compiles(&settings, &path, &text)?;
    let lacks: Vec<Check> = doctor::features(&settings)
        .into_iter()
        .filter(|check| matches!(check.state, State::Missing | State::Unknown))
        .collect();
    if !dry {
        write(&path, &text)?;
    }
    let state = wanted.state();
    if output.wants_json() {
        output.json(&Report {
            path: &path,
            written: !dry,
            id: &wanted.id,
            state,
            expires: &wanted.expires,
            lacks: &lacks,
        })?;
        return Ok(Outcome::Yes);
    }
    for check in &lacks {
        talk(format_args!(
            "{} {}: {}: {}",
            if check.needed { "missing" } else { "note" },
            plain(&check.name),
            plain(&check.found),
            plain(&check.mend)
        ));
    }
    if dry {
        output.bytes(text.as_bytes())?;
        return Ok(Outcome::Yes);
    }
    output.line(format_args!(
        "{} {}: {state}, monitored, until {}",
        output.paint(Tone::Good, "wrote"),
        plain(&path.display().to_string()),
        wanted.expires
    ))?;
    talk(wanted.next(&path));
    Ok(Outcome::Yes)
}

/// What the arguments say, and on a terminal what they do not.
fn gather(arguments: Arguments, settings: &Settings) -> Result<Wanted> {
    let id = match arguments.id {
        Some(id) => id,
        None => ask("What is the agent called (a-z, 0-9, `.`, `-`)?", "ID")?,
    };
    if let Err(error) = id.parse::<Id>() {
        return Err(Failure::usage(format!("`{}`: {error}", plain(&id))).help(error.help()));
    }
    let owner = match arguments.owner {
        Some(owner) => owner,
        None => ask("Who answers for it (a person, or group:NAME)?", "--owner")?,
    };
    let approved_by = match arguments.approved_by {
        None if io::stdin().is_terminal() => {
            Some(ask("Who approves it (empty: it stays a draft)?", "")?)
                .filter(|answer| !answer.is_empty())
        }
        given => given,
    };
    let cgroups = if arguments.cgroup.is_empty() {
        let root = settings.enforcement.roots.first();
        let root = root.map_or("/agents.slice", String::as_str);
        vec![format!("{root}/{id}.service")]
    } else {
        arguments.cgroup
    };
    let grants = arguments.allow.iter().map(|text| grant(text));
    let now = jiff::Timestamp::now().as_millisecond();
    Ok(Wanted {
        owner,
        approved_by,
        purpose: arguments.purpose,
        cgroups,
        grants: grants.collect::<Result<_>>()?,
        expires: end(&arguments.expires, now)?,
        id,
    })
}

/// Asks on the terminal; where there is none, `instead` is what was left out.
fn ask(question: &str, instead: &str) -> Result<String> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!("`{instead}` is missing"))
            .help("`remit init --help` says what is needed where nobody can be asked"));
    }
    let mut terminal = io::stderr();
    write!(terminal, "{question} ").context("cannot ask")?;
    terminal.flush().context("cannot ask")?;
    let mut answer = String::new();
    let mut input = io::stdin().lock();
    input
        .read_line(&mut answer)
        .context("cannot read an answer")?;
    Ok(answer.trim().to_owned())
}

/// `TO:PORTS` taken apart. Whether either makes sense is the compiler's to say.
fn grant(text: &str) -> Result<(String, Vec<String>)> {
    let wrong = || {
        Failure::usage(format!("`{}` is no grant", plain(text))).help(
            "write a destination and its ports: `api.example.com:443`, \
             `198.51.100.0/24:443,53/udp`, `[2001:db8::/32]:443`",
        )
    };
    let (to, ports) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or_else(wrong)?,
        None => text.rsplit_once(':').ok_or_else(wrong)?,
    };
    // An address of IPv6 without brackets: its last group would be taken for a port.
    let is_bare = !text.starts_with('[') && to.contains(':');
    let ports: Vec<String> = ports
        .split(',')
        .map(|port| port.trim().to_owned())
        .collect();
    if to.is_empty() || is_bare || ports.iter().any(String::is_empty) {
        return Err(wrong());
    }
    Ok((to.to_owned(), ports))
}

/// The end of the entry: the beginning of a day, in UTC.
fn end(text: &str, now_ms: i64) -> Result<String> {
    let days = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u16>().ok());
    let time = match days {
        Some(days) => {
            let day = now_ms.div_euclid(DAY) + i64::from(days);
            jiff::Timestamp::from_millisecond(day * DAY).ok()
        }
        None => format!("{text}T00:00:00Z").parse().ok(),
    };
    match time {
        Some(time) if time.as_millisecond() > now_ms => Ok(format!("{time:.0}")),
        Some(_) => Err(Failure::usage(format!("`{}` is past", plain(text)))),
        None => Err(Failure::usage(format!("`{}` is no end", plain(text)))
            .help("write days from now, `30d`, or a date, `2027-12-31`")),
    }
}

/// Compiles the entry with everything else that there is.
fn compiles(settings: &Settings, path: &Path, text: &str) -> Result<()> {
    let mut files = registry::read(&settings.paths);
    files.sources.push(Source {
        path: path.to_owned(),
        text: text.to_owned(),
        kind: SourceKind::Agent,
    });
    let now = jiff::Timestamp::now().as_millisecond();
    let compilation = policy::compile_on(&files.sources, now, registry::names(settings));
    let ours = |finding: &&policy::Finding| {
        let stem = path.file_stem().unwrap_or_default();
        finding.is_error() && finding.agents.iter().any(|id| **id == *stem)
    };
    let mut bad = false;
    for finding in compilation.findings.iter().filter(ours) {
        talk(plain_lines(&finding.to_string()));
        bad = true;
    }
    if bad {
        return Err(Failure::no(
            "the entry would not compile; nothing was written",
        ));
    }
    Ok(())
}

fn is_there(path: &Path) -> Failure {
    let path = path.display();
    Failure::no(format!("`{path}` is there already; nothing was written"))
}

/// Writes the file as a whole or not at all, and never over another.
fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let failed = |path: &Path| format!("cannot write `{}`", path.display());
    fs::create_dir_all(folder).with_context(|| failed(folder))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = folder.join(format!(".{name}.{}", std::process::id()));
    let written = (|| -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        // Unlike a rename it fails where there is a file.
        fs::hard_link(&beside, path)
    })();
    // Under its own name it is not needed any more, if it was made at all.
    drop(fs::remove_file(&beside));
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(is_there(path)),
        written => Ok(written.with_context(|| failed(path))?),
    }
}

impl Wanted {
    const fn state(&self) -> &'static str {
        if self.approved_by.is_some() {
            "active"
        } else {
            "draft"
        }
    }

    /// The file.
    fn entry(&self) -> String {
        let mut text = format!(
            "# Written by `remit init`. remit-registry(5) says what else there is.\nschema = 1\n\n\
             [agent]\nid = {}\nowner = {}\n",
            quoted(&self.id),
            quoted(&self.owner)
        );
        if let Some(purpose) = &self.purpose {
            text += &format!("purpose = {}\n", quoted(purpose));
        }
        text += &format!("\n[lifecycle]\nstate = \"{}\"\n", self.state());
        match &self.approved_by {
            Some(approver) => text += &format!("approved_by = {}\n", quoted(approver)),
            None => {
                text += "# Active needs it, from somebody other than the owner:\n\
                             # approved_by = \"\"\n"
            }
        }
        text += &format!(
            "# The kernel denies from then on.\nexpires = {}\n\n[selector]\ncgroup = [{}]\n\n",
            self.expires,
            self.cgroups
                .iter()
                .map(|path| quoted(path))
                .collect::<Vec<_>>()
                .join(", ")
        );
        text += "[scope]\n# What would be refused is let through, and reported. Once nothing is \
                 reported that\n# should pass: \"enforce\".\nmode = \"monitor\"\n";
        for (to, ports) in &self.grants {
            let ports: Vec<String> = ports.iter().map(|port| quoted(port)).collect();
            text += &format!(
                "\n[[scope.allow]]\nto = {}\nports = [{}]\n",
                quoted(to),
                ports.join(", ")
            );
        }
        text
    }

    /// What to do next.
    fn next(&self, path: &Path) -> String {
        let (id, path) = (&self.id, path.display());
        let mut steps = Vec::new();
        if self.approved_by.is_none() {
            steps.push(format!("approve it: state and approved_by in {path}"));
        }
        if let Some(unit) = self
            .cgroups
            .first()
            .and_then(|path| path.rsplit('/').next())
            && unit.ends_with(".service")
        {
            steps.push(format!(
                "systemctl edit {unit}     # [Service], Slice=agents.slice, \
                 ExecStartPre=+remit guard --unit %n"
            ));
        }
        steps.push("remit reload".to_owned());
        steps.push(format!(
            "remit tail -f --agent {id}     # what it would be refused"
        ));
        steps.push(format!(
            "grants for what it needs, then mode = \"enforce\" in {path}"
        ));
        let steps: Vec<String> = (1..)
            .zip(steps)
            .map(|(number, step)| format!("  {number}. {step}"))
            .collect();
        format!("Next:\n{}", steps.join("\n"))
    }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            id: "coder".to_owned(),
            owner: "alice@example.com".to_owned(),
            approved_by: Some("dave@example.com".to_owned()),
            purpose: Some("Says \"hello\"".to_owned()),
            cgroups: vec!["/agents.slice/coder.service".to_owned()],
            grants: vec![grant("198.51.100.0/24:443,53/udp").unwrap()],
            expires: "2099-01-01T00:00:00Z".to_owned(),
        }
    }

    fn compiled(text: &str) -> policy::Compilation {
        let source = Source {
            path: PathBuf::from("agents/coder.toml"),
            text: text.to_owned(),
            kind: SourceKind::Agent,
        };
        policy::compile(&[source], 1_793_836_800_000)
    }

    #[test]
    fn what_is_written_compiles_and_monitors() {
        let compilation = compiled(&wanted().entry());
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        let agent = compilation.agent("coder").unwrap();
        assert_eq!(agent.mode, agent_ebpf::abi::Mode::Monitor);
        assert_eq!(agent.state, agent_ebpf::abi::State::Active);
        assert_eq!(agent.selectors, ["/agents.slice/coder.service"]);
        assert!(
            agent
                .entries
                .iter()
                .any(|entry| entry.name == "scope.allow[0]")
        );
    }

    #[test]
    fn without_an_approver_it_is_a_draft() {
        let draft = Wanted {
            approved_by: None,
            ..wanted()
        };
        let compilation = compiled(&draft.entry());
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        let agent = compilation.agent("coder").unwrap();
        assert_eq!(agent.state, agent_ebpf::abi::State::Draft);
        assert!(draft.next(Path::new("/x")).contains("1. approve it"));
    }

    #[test]
    fn grants_are_taken_apart() {
        let parts = |text: &str| {
            let (to, ports) = grant(text).ok()?;
            Some(format!("{to} {}", ports.join(" ")))
        };
        assert_eq!(parts("a.example:443").as_deref(), Some("a.example 443"));
        assert_eq!(
            parts("[2001:db8::/32]:443, 53/udp").as_deref(),
            Some("2001:db8::/32 443 53/udp")
        );
        for wrong in [
            "a.example",
            "a.example:",
            ":443",
            "2001:db8::1:443",
            "[::1]",
            "a:1,,2",
        ] {
            assert_eq!(parts(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_end_is_a_day_to_come() {
        let now = 1_793_836_800_000 + DAY / 2;
        assert_eq!(end("30d", now).unwrap(), "2026-12-05T00:00:00Z");
        assert_eq!(end("2027-12-31", now).unwrap(), "2027-12-31T00:00:00Z");
        for wrong in ["0d", "2020-01-01", "soon", "2027-13-01", ""] {
            assert!(end(wrong, now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_that_is_there_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agents.d/coder.toml");
        write(&path, "one").unwrap();
        assert!(write(&path, "two").is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
