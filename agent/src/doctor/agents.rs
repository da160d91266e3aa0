//! Processes outside every root that look like AI agents: by the names of what they execute, and by
//! what the daemon's observer saw them reach, where it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::traffic::{self, Note, Reached};
use crate::{
    audit::{Mask, text::clean},
    cgroup::{CgroupPath, Hierarchy},
};

/// What is known of agents' programs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    agent: Vec<Program>,
}

/// One program.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    name: String,
    exe: Vec<String>,
    argument: Vec<String>,
}

/// A process that looks like an agent and is none of the registry's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stray {
    /// What it looks like.
    pub looks_like: String,
    /// Process id; of several that have ended the last one's.
    pub pid: u32,
    /// Whether it has ended. The kernel noted what is told of it.
    pub ended: bool,
    /// How many of one program, user and cgroup have ended; 1 for one that runs.
    pub processes: usize,
    /// User id.
    pub uid: u32,
    /// What it executes; none where that could not be read.
    pub exe: Option<String>,
    /// Its command line, secrets masked; of one that has ended what it called itself.
    pub command: String,
    /// Its cgroup below the v2 mount; none where that is gone, and nobody had looked.
    pub cgroup: Option<String>,
    /// The model APIs that it was seen to reach, the latest first.
    pub reached: Vec<Reached>,
    /// The entry that would register it, as a draft.
    pub toml: String,
}

/// The list that comes with Remit.
const BUILT_IN: &str = include_str!("agents.toml");
/// Longest command line that is looked at, in bytes.
const COMMAND: usize = 8 << 10;
/// Longest name that is proposed, in bytes.
const LABEL: usize = 120;
/// Destinations that a proposed entry names.
const GRANTS: usize = 32;

// === impl Known ===

impl Known {
    /// The built-in list, or the one in a file.
    ///
    /// # Errors
    /// When the file cannot be read or says something else.
    pub fn load(file: Option<&Path>) -> io::Result<Self> {
        let text = match file {
            Some(file) => fs::read_to_string(file)?,
            None => BUILT_IN.to_owned(),
        };
        toml::from_str(&text).map_err(io::Error::other)
    }

    /// What a program is known as. Of an interpreter only the script's name counts, not every word
    /// that somebody passes: the first few arguments are looked at.
    fn name_of(&self, exe: Option<&Path>, arguments: &[String]) -> Option<&str> {
        const FIRST: usize = 4;
        let file = exe.and_then(Path::file_name).and_then(|name| name.to_str());
        // A script's interpreter is not what people call it by.
        let own = arguments
            .first()
            .and_then(|first| Path::new(first).file_name())
            .and_then(|name| name.to_str());
        self.agent
            .iter()
            .find(|program| {
                let by_file = program
                    .exe
                    .iter()
                    .any(|name| Some(name.as_str()) == file || Some(name.as_str()) == own);
                by_file
                    || arguments
                        .iter()
                        .take(FIRST)
                        .any(|argument| program.argument.iter().any(|part| argument.contains(part)))
            })
            .map(|program| program.name.as_str())
    }
}

/// All of them: those that run by pid, then those that have ended. `notes` are what the kernel noted
/// of traffic; without them only what a process executes tells.
pub fn discover(
    hierarchy: &Hierarchy,
    roots: &[CgroupPath],
    known: &Known,
    notes: &[Note],
) -> Vec<Stray> {
    let mask = Mask::default();
    let mut all = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return all;
    };
    let mut pids: Vec<u32> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    for pid in pids {
        let Ok(cgroup) = hierarchy.cgroup_of(pid) else {
            continue;
        };
        if roots.iter().any(|root| cgroup.is_within(root)) {
            continue;
        }
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let Ok(mut command) = fs::read(proc.join("cmdline")) else {
            continue;
        };
        command.truncate(COMMAND);
        let arguments: Vec<String> = command
            .split(|byte| *byte == 0)
            .filter(|argument| !argument.is_empty())
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        let exe = fs::read_link(proc.join("exe")).ok();
        let reached = match traffic::started(pid) {
            Some(started) if !notes.is_empty() => traffic::of_process(notes, pid, started),
            Some(_) | None => Vec::new(),
        };
        let name = known.name_of(exe.as_deref(), &arguments);
        let Some(looks_like) = name.map(str::to_owned).or_else(|| client(&reached)) else {
            continue;
        };
        let Some(uid) = traffic::user(pid) else {
            continue;
        };
        let file = exe.as_deref().and_then(Path::file_name);
        let file = file.map(|file| file.to_string_lossy().into_owned());
        let name = name.map(str::to_owned).or(file).unwrap_or_default();
        all.push(Stray {
            looks_like,
            pid,
            ended: false,
            processes: 1,
            uid,
            exe: exe.map(|exe| exe.display().to_string()),
            command: mask.command_line(&command),
            toml: entry(&name, Some(&cgroup), false, &reached, roots.first()),
            cgroup: Some(cgroup.to_string()),
            reached,
        });
    }
    let ended = traffic::ended(notes, roots, traffic::started);
    all.extend(ended.into_iter().map(|ended| Stray {
        looks_like: client(&ended.reached).unwrap_or_default(),
        pid: ended.pid,
        ended: true,
        processes: ended.processes,
        uid: ended.uid,
        exe: None,
        toml: entry(
            &ended.comm,
            ended.cgroup.as_ref(),
            true,
            &ended.reached,
            roots.first(),
        ),
        command: ended.comm,
        cgroup: ended.cgroup.map(|cgroup| cgroup.to_string()),
        reached: ended.reached,
    }));
    all
}

/// What a process looks like that reached these.
fn client(reached: &[Reached]) -> Option<String> {
    Some(format!("client of {}", reached.first()?.name()))
}

/// A draft of an entry: it lets nothing through until somebody has filled it in and another has
/// approved it. `name` and `cgroup` may be an agent's own choice.
fn entry(
    name: &str,
    cgroup: Option<&CgroupPath>,
    ended: bool,
    reached: &[Reached],
    root: Option<&CgroupPath>,
) -> String {
    // Both go into TOML strings.
    let harmless = |text: &str| -> String {
        let text = clean(text.as_bytes(), LABEL);
        text.chars().filter(|c| !matches!(c, '"' | '\\')).collect()
    };
    let mut id: String = name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    id.truncate(60);
    let id = match id.trim_matches('-') {
        "" => "agent",
        id => id,
    };
    let name = match harmless(name) {
        name if name.trim().is_empty() => id.to_owned(),
        name => name,
    };
    let root = root.map_or_else(|| "/agents.slice".to_owned(), ToString::to_string);
    let leaf = cgroup
        .and_then(|cgroup| cgroup.names().last())
        .map(|leaf| leaf.to_string_lossy().into_owned());
    let unit = match leaf {
        Some(leaf) if leaf.ends_with(".service") => harmless(&leaf),
        _ => format!("{id}.service"),
    };
    let slice = root.trim_start_matches('/');
    let runs = match (cgroup, ended) {
        (Some(cgroup), false) => format!("Runs in {} now.", cgroup.to_string().escape_debug()),
        (Some(cgroup), true) => format!("Ran in {}.", cgroup.to_string().escape_debug()),
        (None, _) => "Ran in a cgroup that is gone.".to_owned(),
    };
    format!(
        "# {runs} Have it start below {root}: `Slice={slice}` in its unit, or\n\
         # `remit run --agent {id} -- COMMAND`.\n\
         schema = 1\n\n[agent]\nid = \"{id}\"\nname = \"{name}\"\nowner = \"WHO@ANSWERS.FOR.IT\"\n\n\
         [lifecycle]\nstate = \"draft\"\n\n[selector]\ncgroup = [\"{root}/{unit}\"]\n\n{grants}",
        grants = grants(reached),
    )
}

/// What was reached as grants that somebody may want, commented out.
fn grants(reached: &[Reached]) -> String {
    if reached.is_empty() {
        return "# [[scope.allow]]\n# to = \"api.example.com\"\n# ports = [443]\n".to_owned();
    }
    let mut ports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for one in reached.iter().take(GRANTS) {
        let port = match one.protocol {
            17 => format!("\"{}/udp\"", one.port),
            _ => one.port.to_string(),
        };
        ports.entry(one.name()).or_default().insert(port);
    }
    let grant = |(to, ports): (String, BTreeSet<String>)| {
        let ports: Vec<String> = ports.into_iter().collect();
        let ports = ports.join(", ");
        format!("# [[scope.allow]]\n# to = \"{to}\"\n# ports = [{ports}]\n")
    };
    ports.into_iter().map(grant).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    #[test]
    fn programs_are_known_by_file_and_script_and_not_by_every_word() {
        let known = Known::load(None).unwrap();
        let name = |exe: &str, arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            known
                .name_of(Some(Path::new(exe)), &arguments)
                .map(str::to_owned)
        };
        assert_eq!(
            name("/usr/bin/codex", &["codex"]).as_deref(),
            Some("Codex CLI")
        );
        assert_eq!(
            name(
                "/usr/bin/node",
                &[
                    "node",
                    "/usr/lib/node_modules/@anthropic-ai/claude-code/cli.js"
                ]
            )
            .as_deref(),
            Some("Claude Code")
        );
        assert_eq!(
            name(
                "/usr/bin/python3.12",
                &["python3", "/home/a/.local/bin/aider", "--yes"]
            )
            .as_deref(),
            Some("Aider")
        );
        assert_eq!(name("/usr/bin/vi", &["vi", "claude", "x"]), None);
        assert_eq!(
            name(
                "/usr/bin/grep",
                &["grep", "-r", "-n", "-e", "@openai/codex"]
            ),
            None
        );
        assert_eq!(name("/usr/bin/sshd", &[]), None);
    }

    #[test]
    fn the_proposed_entry_compiles_and_lets_nothing_through() {
        let cgroup = CgroupPath::new("/user.slice/user-1000.slice/session-2.scope").unwrap();
        let root = CgroupPath::new("/agents.slice").unwrap();
        let text = entry("Claude Code", Some(&cgroup), false, &[], Some(&root));
        assert_eq!(
            selectors(text, "claude-code"),
            ["/agents.slice/claude-code.service"]
        );
    }

    /// The selectors of an entry, which must compile as a draft.
    fn selectors(text: String, id: &str) -> Vec<String> {
        let source = Source {
            path: format!("{id}.toml").into(),
            text,
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], 0);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        let agent = compilation.agent(id).unwrap();
        assert_eq!(agent.state, agent_ebpf::abi::State::Draft);
        agent.selectors.clone()
    }

    fn reached(name: &str, port: u16, protocol: u8) -> Reached {
        Reached {
            names: vec![name.to_owned()],
            addr: "192.0.2.1".parse().unwrap(),
            port,
            protocol,
            count: 1,
            first_ms: 0,
            last_ms: 0,
        }
    }

    #[test]
    fn what_was_reached_is_proposed_and_not_granted() {
        let reached = [
            reached("api.test", 443, 17),
            reached("api.test", 443, 6),
            reached("b.test", 8443, 6),
        ];
        let cgroup = CgroupPath::new("/system.slice/cron.service").unwrap();
        let text = entry("node", Some(&cgroup), true, &reached, None);
        assert!(
            text.ends_with(
                "# [[scope.allow]]\n# to = \"api.test\"\n# ports = [\"443/udp\", 443]\n\
                 # [[scope.allow]]\n# to = \"b.test\"\n# ports = [8443]\n"
            ),
            "{text}"
        );
        assert!(text.starts_with("# Ran in /system.slice/cron.service. "));
        assert_eq!(selectors(text, "node"), ["/agents.slice/cron.service"]);
    }

    #[test]
    fn a_process_cannot_write_into_its_entry() {
        for name in [
            "x\"\n[lifecycle]\nstate = \"active\"",
            "\\",
            "",
            "---",
            "\u{202e}evil",
        ] {
            let text = entry(name, None, true, &[], None);
            assert_eq!(
                text.matches("[lifecycle]").count(),
                name.matches("[lifecycle]").count() + 1
            );
            assert_eq!(
                text.lines().filter(|line| *line == "[lifecycle]").count(),
                1
            );
            let id = text
                .lines()
                .find_map(|line| line.strip_prefix("id = \""))
                .unwrap()
                .trim_end_matches('"')
                .to_owned();
            let selector = format!("/agents.slice/{id}.service");
            assert_eq!(selectors(text, &id), [selector]);
        }
    }
}
