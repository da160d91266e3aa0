//! What `/proc` says of a process at this moment, and of this host. Whether the process is still
//! in the cgroup that the record names is for the caller to compare: [`cgroup`].
//!
//! A process id can be given to another process between two reads. So the start time is read
//! before and after: if it differs, or anything is missing that a living process has, all that was
//! read is thrown away and the process is `gone`.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use super::{
    mask::Mask,
    ocsf::Host,
    record::{Parent, ProcessInfo},
    text::{COMMAND_BYTES, NAME_BYTES, PATH_BYTES, clean},
};

/// Bytes of one `/proc` file that are looked at; a command line can be megabytes.
const READ_BYTES: u64 = 8 << 10;
/// What the kernel appends to the path of an executable that was removed.
const DELETED: &[u8] = b" (deleted)";

/// Reads processes, and remembers the names of users.
#[derive(Debug)]
pub struct Processes {
    proc: PathBuf,
    passwd: PathBuf,
    mask: Mask,
    users: HashMap<u32, String>,
    /// When the users were read.
    stamp: Option<SystemTime>,
    /// What was seen of late, newest last.
    seen: VecDeque<(Instant, ProcessInfo)>,
    /// For how long what was read is taken for what would be read.
    fresh: Duration,
}

/// Ancestors that are looked at: an agent may nest as deep as it likes.
const ANCESTORS: usize = 8;
/// Processes remembered, so that one which was read alive keeps its name when it is gone.
const SEEN: usize = 256;
/// How long. No id comes round so soon: the kernel hands them out in order.
const SEEN_FOR: Duration = Duration::from_secs(5);
/// Reading a process takes a dozen files, a tenth of a millisecond: one that tries without pause is
/// not read anew for each line. Between an attempt and its line there may be as much.
const FRESH_FOR: Duration = Duration::from_millis(20);

impl Default for Processes {
    fn default() -> Self {
        Self::new(Path::new("/proc"), Path::new("/etc/passwd"))
    }
}

impl Processes {
    /// Reads below `proc`; users come from the file `passwd` alone, for a directory service would
    /// hold up the log while it answers.
    pub fn new(proc: &Path, passwd: &Path) -> Self {
        Self {
            proc: proc.to_owned(),
            passwd: passwd.to_owned(),
            mask: Mask::default(),
            users: HashMap::new(),
            stamp: None,
            seen: VecDeque::new(),
            fresh: FRESH_FOR,
        }
    }

    /// The same with another mask for secrets in command lines.
    #[must_use]
    pub fn with_mask(self, mask: Mask) -> Self {
        Self { mask, ..self }
    }

    /// Adds to `process`, which holds what the kernel's record said, what can be read of it now.
    pub fn enrich(&mut self, process: ProcessInfo) -> ProcessInfo {
        if process.pid == 0 {
            return process;
        }
        if let Some(known) = self.known(&process, self.fresh) {
            return known;
        }
        let user = process.uid.and_then(|uid| self.user(uid));
        let process = ProcessInfo { user, ..process };
        match self.look(&process) {
            Some(found) => {
                self.remember(found.clone());
                found
            }
            None => self.known(&process, SEEN_FOR).unwrap_or(ProcessInfo {
                gone: true,
                ..process
            }),
        }
    }

    fn remember(&mut self, process: ProcessInfo) {
        self.seen.retain(|(_, known)| known.pid != process.pid);
        self.seen.push_back((Instant::now(), process));
        if self.seen.len() > SEEN {
            self.seen.pop_front();
        }
    }

    /// The process as it was when it was last seen alive, if that is not longer ago. One that has
    /// executed something else since has another name, and is not taken for it, nor one of another
    /// user.
    fn known(&self, process: &ProcessInfo, within: Duration) -> Option<ProcessInfo> {
        let (_, known) = self.seen.iter().rev().find(|(at, known)| {
            known.pid == process.pid
                && at.elapsed() < within
                && (process.name.is_empty() || known.name == process.name)
                && (process.uid.is_none() || known.uid == process.uid)
        })?;
        Some(ProcessInfo {
            witness: process.witness,
            ..known.clone()
        })
    }

    /// Path of the cgroup of `pid` below the v2 mount, now.
    pub fn cgroup(&self, pid: u32) -> Option<String> {
        let bytes = read(&self.proc.join(pid.to_string()).join("cgroup")).ok()?;
        let line = bytes
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(b"0::"))?;
        Some(clean(line, PATH_BYTES))
    }

    fn look(&mut self, process: &ProcessInfo) -> Option<ProcessInfo> {
        let dir = self.proc.join(process.pid.to_string());
        let before = Stat::read(&dir)?;
        let exe = fs::read_link(dir.join("exe")).ok();
        let command = read(&dir.join("cmdline")).ok()?;
        let uid = process
            .uid
            .or_else(|| uid(&read(&dir.join("status")).ok()?));
        let mut line = self.ancestors(before.parent).into_iter();
        let parent = line.next();
        let after = Stat::read(&dir)?;
        if after.started != before.started || before.is_zombie {
            return None;
        }
        let exe = exe.as_deref().map(|exe| exe.as_os_str().as_bytes());
        let kept = exe.map(|exe| exe.strip_suffix(DELETED).unwrap_or(exe));
        let exe_deleted = exe != kept && exe.is_some_and(|exe| !exists(exe));
        let exe = if exe_deleted { kept } else { exe };
        let name = match process.name.as_str() {
            // The record of a packet may know the process and not its name.
            "" => before.name,
            name => name.to_owned(),
        };
        Some(ProcessInfo {
            name,
            exe: exe.map(|exe| clean(exe, PATH_BYTES)),
            exe_deleted,
            cmd_line: Some(clean(
                self.mask.command_line(&command).as_bytes(),
                COMMAND_BYTES,
            )),
            uid,
            user: uid.and_then(|uid| self.user(uid)),
            parent,
            ancestors: line.collect(),
            started: Some(before.started),
            gone: false,
            ..process.clone()
        })
    }

    /// `pid` and those that started it, up to the first process or a bound. Each is read on its own:
    /// one that ends meanwhile ends the line.
    fn ancestors(&self, pid: u32) -> Vec<Parent> {
        let mut line = Vec::new();
        let mut pid = pid;
        while pid != 0 && line.len() < ANCESTORS {
            let stat = Stat::read(&self.proc.join(pid.to_string()));
            let next = stat.as_ref().map_or(0, |stat| stat.parent);
            let name = stat.map(|stat| stat.name);
            line.push(Parent { pid, name });
            pid = next;
        }
        line
    }

    /// The name of a user, by the passwd file as it is now.
    fn user(&mut self, uid: u32) -> Option<String> {
        let stamp = fs::metadata(&self.passwd)
            .and_then(|meta| meta.modified())
            .ok();
        if stamp != self.stamp || stamp.is_none() {
            self.users = fs::read(&self.passwd)
                .map(|bytes| users(&bytes))
                .unwrap_or_default();
            self.stamp = stamp;
        }
        self.users.get(&uid).cloned()
    }
}

/// What `/proc/PID/stat` says.
struct Stat {
    name: String,
    parent: u32,
    /// Clock ticks since boot.
    started: u64,
    is_zombie: bool,
}

impl Stat {
    fn read(dir: &Path) -> Option<Self> {
        Self::parse(&read(&dir.join("stat")).ok()?)
    }

    /// `PID (NAME) STATE PPID … STARTTIME …`, where the name may hold anything, `) R 1` too: the
    /// last parenthesis ends it (proc(5)).
    fn parse(bytes: &[u8]) -> Option<Self> {
        let open = bytes.iter().position(|&byte| byte == b'(')?;
        let close = bytes.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        // Field 22; the parent was field 4.
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self {
            name: clean(bytes.get(open + 1..close)?, NAME_BYTES),
            parent,
            started,
            is_zombie: matches!(state, "Z" | "X"),
        })
    }
}

/// The real user id, from `/proc/PID/status`.
fn uid(status: &[u8]) -> Option<u32> {
    let line = status
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Uid:"))?;
    std::str::from_utf8(line)
        .ok()?
        .split_ascii_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Names by id; the first line of an id counts (passwd(5)).
fn users(passwd: &[u8]) -> HashMap<u32, String> {
    let mut users = HashMap::new();
    for line in passwd.split(|&byte| byte == b'\n') {
        let mut fields = line.split(|&byte| byte == b':');
        let (Some(name), Some(uid)) = (fields.next(), fields.nth(1)) else {
            continue;
        };
        let uid = std::str::from_utf8(uid)
            .ok()
            .and_then(|uid| uid.parse().ok());
        if let Some(uid) = uid.filter(|_| !name.is_empty()) {
            users.entry(uid).or_insert_with(|| clean(name, NAME_BYTES));
        }
    }
    users
}

fn exists(path: &[u8]) -> bool {
    fs::symlink_metadata(std::ffi::OsStr::from_bytes(path)).is_ok()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(READ_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Host {
    /// This machine. What cannot be read is left out: a log line must not fail for it.
    pub fn read() -> Self {
        let line = |path: &str| {
            let text = fs::read_to_string(path).ok()?;
            let text = text.trim();
            (!text.is_empty()).then(|| clean(text.as_bytes(), NAME_BYTES))
        };
        let release = fs::read_to_string("/etc/os-release")
            .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
            .unwrap_or_default();
        Self {
            hostname: line("/proc/sys/kernel/hostname").unwrap_or_default(),
            machine_id: line("/etc/machine-id"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            os_name: release_field(&release, "NAME").unwrap_or_else(|| "Linux".to_owned()),
            os_version: release_field(&release, "VERSION_ID"),
            kernel: line("/proc/sys/kernel/osrelease").unwrap_or_default(),
        }
    }
}

/// A field of os-release(5), without its quotes.
fn release_field(release: &str, key: &str) -> Option<String> {
    let value = release
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(clean(
        value.trim_matches(['"', '\'']).as_bytes(),
        NAME_BYTES,
    ))
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Witness;

    use super::*;

    fn record(pid: u32) -> ProcessInfo {
        ProcessInfo::from_record(pid, b"told\0", None, Witness::Current)
    }

    /// A /proc with one process, 7, child of 1.
    fn fake(stat: &str) -> (tempfile::TempDir, Processes) {
        let dir = tempfile::tempdir().unwrap();
        let process = dir.path().join("7");
        fs::create_dir(&process).unwrap();
        fs::write(process.join("stat"), stat).unwrap();
        fs::write(process.join("cmdline"), "curl\0-s\0x\x1b[2J\0").unwrap();
        fs::write(process.join("status"), "Name:\tx\nUid:\t1007\t0\t0\t0\n").unwrap();
        fs::write(
            process.join("cgroup"),
            "1:name=systemd:/x\n0::/agents.slice/a\n",
        )
        .unwrap();
        std::os::unix::fs::symlink("/usr/bin/gone (deleted)", process.join("exe")).unwrap();
        fs::create_dir(dir.path().join("1")).unwrap();
        fs::write(dir.path().join("1/stat"), stat_of("init", "S", 0, 5)).unwrap();
        fs::write(
            dir.path().join("passwd"),
            "root:x:0:0::/:\nbill:x:1007:7::/:\nx:x:1007:\n",
        )
        .unwrap();
        let mut processes = Processes::new(dir.path(), &dir.path().join("passwd"));
        processes.fresh = Duration::ZERO;
        (dir, processes)
    }

    fn stat_of(name: &str, state: &str, parent: u32, started: u64) -> String {
        format!(
            "7 ({name}) {state} {parent} {}{started} 0 0\n",
            "0 ".repeat(17)
        )
    }

    #[test]
    fn a_living_process_is_read_whole() {
        let (_dir, mut processes) = fake(&stat_of("x) R 9 (", "S", 1, 4_711));
        let info = processes.enrich(record(7));
        assert!(!info.gone);
        assert_eq!(info.name, "told", "the kernel's record names it, not /proc");
        assert_eq!(info.exe.as_deref(), Some("/usr/bin/gone"));
        assert!(info.exe_deleted);
        assert_eq!(info.cmd_line.as_deref(), Some("curl -s x\\x1b[2J"));
        assert_eq!((info.uid, info.user.as_deref()), (Some(1007), Some("bill")));
        assert_eq!(info.started, Some(4_711));
        let parent = info.parent.unwrap();
        assert_eq!((parent.pid, parent.name.as_deref()), (1, Some("init")));
        assert!(info.ancestors.is_empty(), "the first process has none");
        assert_eq!(processes.cgroup(7).as_deref(), Some("/agents.slice/a"));
    }

    #[test]
    fn ancestors_are_named_up_to_a_bound() {
        let (dir, mut processes) = fake(&stat_of("x", "S", 20, 4_711));
        for pid in 20..40 {
            let ancestor = dir.path().join(pid.to_string());
            fs::create_dir(&ancestor).unwrap();
            let stat = stat_of(&format!("p{pid}"), "S", pid + 1, 5);
            fs::write(ancestor.join("stat"), stat).unwrap();
        }
        let info = processes.enrich(record(7));
        assert_eq!(info.parent.unwrap().name.as_deref(), Some("p20"));
        let line: Vec<u32> = info.ancestors.iter().map(|parent| parent.pid).collect();
        assert_eq!(line, (21..28).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_just_read_is_not_read_anew() {
        let (dir, mut processes) = fake(&stat_of("x", "S", 1, 4_711));
        let first = processes.enrich(record(7));
        fs::write(dir.path().join("7/cmdline"), "wget\0").unwrap();
        processes.fresh = Duration::from_secs(3600);
        assert_eq!(processes.enrich(record(7)), first);
        let of_another = ProcessInfo {
            uid: Some(4),
            ..record(7)
        };
        let command = |info: ProcessInfo| info.cmd_line.unwrap();
        assert_eq!(command(processes.enrich(of_another)), "wget");
        processes.fresh = Duration::ZERO;
        assert_eq!(command(processes.enrich(record(7))), "wget");
    }

    #[test]
    fn secrets_in_arguments_are_masked() {
        let (dir, processes) = fake(&stat_of("x", "S", 1, 4_711));
        let command = dir.path().join("7/cmdline");
        fs::write(&command, "x\0--token\0abc def\0pin-1\0").unwrap();
        let mut processes = processes;
        let shown = |processes: &mut Processes| processes.enrich(record(7)).cmd_line.unwrap();
        assert_eq!(shown(&mut processes), "x --token *** pin-1");
        let mut other = processes.with_mask(Mask::new([r"pin-\d"]).unwrap());
        assert_eq!(shown(&mut other), "x --token abc def ***");
    }

    #[test]
    fn a_process_seen_alive_is_still_named_when_it_is_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let record = || ProcessInfo::from_record(child.id(), b"sleep", None, Witness::Current);
        let mut processes = Processes {
            fresh: Duration::ZERO,
            ..Processes::default()
        };
        // Until it has executed: a fork still has our own name.
        let alive = std::iter::repeat_with(|| processes.enrich(record()))
            .find(|found| {
                found
                    .exe
                    .as_deref()
                    .is_some_and(|exe| exe.ends_with("sleep"))
            })
            .unwrap();
        let (known, other) = (
            record(),
            ProcessInfo::from_record(child.id(), b"other", None, Witness::Current),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(processes.enrich(known), alive);
        assert!(
            processes.enrich(other).gone,
            "another name is another process"
        );
    }

    #[test]
    fn a_process_that_ended_is_gone() {
        let (_dir, mut processes) = fake(&stat_of("x", "Z", 1, 4_711));
        for pid in [7, 8] {
            let info = processes.enrich(record(pid));
            assert!(
                info.gone && info.exe.is_none() && info.parent.is_none(),
                "{pid}"
            );
        }
        let (_dir, mut processes) = fake("rubbish");
        assert!(processes.enrich(record(7)).gone);
        assert_eq!(processes.cgroup(8), None);
    }

    #[test]
    fn a_record_without_a_name_gets_one() {
        let (_dir, mut processes) = fake(&stat_of("x) R 9 (", "S", 1, 4_711));
        let nameless = ProcessInfo::from_record(7, b"", None, Witness::Owner);
        assert_eq!(processes.enrich(nameless).name, "x) R 9 (");
    }

    #[test]
    fn users_are_read_again_when_their_file_changes() {
        let (dir, mut processes) = fake(&stat_of("x", "S", 1, 1));
        assert_eq!(processes.user(0).as_deref(), Some("root"));
        let passwd = dir.path().join("passwd");
        fs::write(&passwd, "toor:x:0:0::/:\n").unwrap();
        let later = SystemTime::now() + Duration::from_secs(9);
        File::options()
            .append(true)
            .open(&passwd)
            .unwrap()
            .set_modified(later)
            .unwrap();
        assert_eq!(processes.user(0).as_deref(), Some("toor"));
        assert_eq!(processes.user(1007), None);
    }

    #[test]
    fn this_process_and_this_host_can_be_read() {
        let info = Processes::default().enrich(record(std::process::id()));
        assert!(!info.gone);
        assert_eq!(info.exe.map(PathBuf::from), std::env::current_exe().ok());
        let host = Host::read();
        assert!(!host.hostname.is_empty() && !host.kernel.is_empty());
        let release = "NAME=\"Debian GNU/Linux\"\nVERSION_ID='12'\n";
        assert_eq!(
            release_field(release, "NAME").as_deref(),
            Some("Debian GNU/Linux")
        );
        assert_eq!(release_field(release, "VERSION_ID").as_deref(), Some("12"));
        assert_eq!(release_field(release, "ID"), None);
    }
}
