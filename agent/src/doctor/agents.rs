//! Processes outside every root that look like AI agents, by the names of what they execute.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    audit::Mask,
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
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// What it executes; none where that could not be read.
    pub exe: Option<String>,
    /// Its command line, secrets masked.
    pub command: String,
    /// Its cgroup below the v2 mount.
    pub cgroup: String,
    /// The entry that would register it, as a draft.
    pub toml: String,
}

/// The list that comes with Remit.
const BUILT_IN: &str = include_str!("agents.toml");
/// Longest command line that is looked at, in bytes.
const COMMAND: usize = 8 << 10;

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

/// All of them, by pid.
pub fn discover(hierarchy: &Hierarchy, roots: &[CgroupPath], known: &Known) -> Vec<Stray> {
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
        let Some(name) = known.name_of(exe.as_deref(), &arguments) else {
            continue;
        };
        let uid = std::os::unix::fs::MetadataExt::uid(&match fs::metadata(&proc) {
            Ok(meta) => meta,
            Err(_) => continue,
        });
        all.push(Stray {
            looks_like: name.to_owned(),
            pid,
            uid,
            exe: exe.map(|exe| exe.display().to_string()),
            command: mask.command_line(&command),
            toml: entry(name, &cgroup, roots.first()),
            cgroup: cgroup.to_string(),
        });
    }
    all
}

/// A draft of an entry: it lets nothing through until somebody has filled it in and another has
/// approved it.
fn entry(name: &str, cgroup: &CgroupPath, root: Option<&CgroupPath>) -> String {
    let mut id: String = name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    id.truncate(60);
    let root = root.map_or_else(|| "/agents.slice".to_owned(), ToString::to_string);
    let leaf = cgroup
        .names()
        .last()
        .map(|leaf| leaf.to_string_lossy().into_owned());
    let unit = match leaf {
        Some(leaf) if leaf.ends_with(".service") => leaf,
        _ => format!("{id}.service"),
    };
    // A unit's name goes into a TOML string.
    let unit: String = unit
        .chars()
        .filter(|c| !matches!(c, '"' | '\\') && !c.is_control())
        .collect();
    let slice = root.trim_start_matches('/');
    format!(
        "# Runs in {place} now. Have it start below {root}: `Slice={slice}` in its unit, or\n\
         # `remit run --agent {id} -- COMMAND`.\n\
         schema = 1\n\n[agent]\nid = \"{id}\"\nname = \"{name}\"\nowner = \"WHO@ANSWERS.FOR.IT\"\n\n\
         [lifecycle]\nstate = \"draft\"\n\n[selector]\ncgroup = [\"{root}/{unit}\"]\n\n\
         # [[scope.allow]]\n# to = \"api.example.com\"\n# ports = [443]\n",
        place = cgroup.to_string().escape_debug(),
    )
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
        let text = entry("Claude Code", &cgroup, Some(&root));
        let source = Source {
            path: "claude-code.toml".into(),
            text,
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], 0);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        let agent = compilation.agent("claude-code").unwrap();
        assert_eq!(agent.state, agent_ebpf::abi::State::Draft);
        assert_eq!(agent.selectors, ["/agents.slice/claude-code.service"]);
    }
}
