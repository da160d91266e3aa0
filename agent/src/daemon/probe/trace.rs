//! The violation log, as it lies on the disk: whether a line arrived there is not taken from whoever
//! wrote it.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::judge::Line;

/// Reads the lines that come after it was made.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    /// None while there is no such file.
    file: Option<File>,
    rest: String,
    lines: Vec<Value>,
    /// How many of the lines are of attempts before the one under way.
    earlier: usize,
}

/// What tells the line of one attempt.
#[derive(Clone, Copy, Debug)]
pub struct Mark<'a> {
    /// `unmapped.probe`.
    pub run: &'a str,
    /// Destination; none where a socket is refused before it has one. Its port alone would not do:
    /// the kernel may choose the same for two listeners at different addresses.
    pub to: Option<SocketAddr>,
    /// IP protocol number.
    pub protocol: u8,
}

// === impl Trace ===

impl Trace {
    /// From the end of the log on. A log that is not there begins with its next line.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = match File::open(path) {
            Ok(mut file) => {
                file.seek(SeekFrom::End(0))?;
                Some(file)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            rest: String::new(),
            lines: Vec::new(),
            earlier: 0,
        })
    }

    /// An attempt begins: lines that have come until now are not its own.
    pub fn begin(&mut self) -> io::Result<()> {
        self.read()?;
        self.earlier = self.lines.len();
        Ok(())
    }

    /// Takes in what has come, also from the file that took this one's place.
    pub fn read(&mut self) -> io::Result<()> {
        self.take_in()?;
        let now = match fs::metadata(&self.path) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let open = self.file.as_ref().map(File::metadata).transpose()?;
        if open.is_none_or(|open| (now.dev(), now.ino()) != (open.dev(), open.ino())) {
            self.file = Some(File::open(&self.path)?);
            self.rest.clear();
            self.take_in()?;
        }
        Ok(())
    }

    fn take_in(&mut self) -> io::Result<()> {
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut bytes)?;
        }
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        while let Some((line, rest)) = self.rest.split_once('\n') {
            if let Ok(value) = serde_json::from_str::<Value>(line)
                && value.pointer("/unmapped/probe").is_some()
            {
                self.lines.push(value);
            }
            self.rest = rest.to_owned();
        }
        Ok(())
    }

    /// The line about an attempt. Of several the first that is the hook's own, if there is one.
    pub fn find(&self, mark: Mark<'_>, hook: &str) -> Option<Line> {
        let mut found = None;
        let lines = self.lines.iter().skip(self.earlier);
        for line in lines.filter(|line| fits(line, mark)) {
            let text = |at: &str| line.pointer(at).and_then(Value::as_str).unwrap_or_default();
            let line = Line {
                hook: text("/unmapped/hook").to_owned(),
                reason: text("/unmapped/reason").to_owned(),
            };
            if line.hook == hook {
                return Some(line);
            }
            found.get_or_insert(line);
        }
        found
    }

    /// Whether there is a line about a lookup of this name.
    pub fn has_lookup(&self, run: &str, name: &str) -> bool {
        let text = |line: &Value, at: &str, wanted: &str| {
            line.pointer(at).and_then(Value::as_str) == Some(wanted)
        };
        self.lines.iter().any(|line| {
            text(line, "/unmapped/probe", run)
                && text(line, "/query/hostname", name)
                && text(line, "/unmapped/verdict", "denied")
        })
    }
}

fn fits(line: &Value, mark: Mark<'_>) -> bool {
    let number = |at: &str| line.pointer(at).and_then(Value::as_u64);
    let ip = line.pointer("/dst_endpoint/ip").and_then(Value::as_str);
    let ip = ip.and_then(|ip| ip.parse::<IpAddr>().ok());
    line.pointer("/unmapped/probe").and_then(Value::as_str) == Some(mark.run)
        && ip.map(|ip| ip.to_canonical()) == mark.to.map(|to| to.ip().to_canonical())
        && number("/dst_endpoint/port") == mark.to.map(|to| to.port().into())
        && number("/connection_info/protocol_num") == Some(mark.protocol.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde_json::json;

    use super::*;

    fn line(run: &str, hook: &str, port: u16) -> String {
        let line = json!({
            "dst_endpoint": { "ip": "198.51.100.1", "port": port },
            "connection_info": { "protocol_num": 6 },
            "unmapped": { "probe": run, "hook": hook, "reason": "out_of_scope" },
        });
        format!("{line}\n")
    }

    #[test]
    fn only_marked_lines_of_the_attempt_count_also_over_a_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("violations.jsonl");
        fs::write(&path, line("r", "cgroup/connect4", 1)).unwrap();
        let mut trace = Trace::open(&path).unwrap();
        let mark = |port| Mark {
            run: "r",
            to: Some(SocketAddr::new(
                "::ffff:198.51.100.1".parse().unwrap(),
                port,
            )),
            protocol: 6,
        };
        trace.read().unwrap();
        assert_eq!(
            trace.find(mark(1), "cgroup/connect4"),
            None,
            "was there before"
        );

        let mut log = File::options().append(true).open(&path).unwrap();
        log.write_all(line("other", "cgroup/connect4", 2).as_bytes())
            .unwrap();
        log.write_all(b"{\"unmapped\":{}}\n{\"half").unwrap();
        trace.read().unwrap();
        assert_eq!(trace.find(mark(2), "cgroup/connect4"), None);

        fs::rename(&path, folder.path().join("violations.jsonl.1")).unwrap();
        let both = [
            line("r", "cgroup_skb/egress", 2),
            line("r", "cgroup/connect4", 2),
        ];
        fs::write(&path, both.concat()).unwrap();
        trace.read().unwrap();
        assert_eq!(
            trace.find(mark(2), "cgroup/connect4").unwrap().hook,
            "cgroup/connect4"
        );
        let egress = trace.find(mark(2), "cgroup/connect6").unwrap();
        assert_eq!(egress.hook, "cgroup_skb/egress");
    }

    #[test]
    fn another_attempt_with_the_same_port_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("violations.jsonl");
        let mut trace = Trace::open(&path).unwrap();
        fs::write(&path, line("r", "cgroup/connect4", 7)).unwrap();
        let mark = |to: &str| Mark {
            run: "r",
            to: Some(to.parse().unwrap()),
            protocol: 6,
        };
        trace.read().unwrap();
        assert!(
            trace
                .find(mark("198.51.100.1:7"), "cgroup/connect4")
                .is_some()
        );
        assert_eq!(trace.find(mark("127.0.0.1:7"), "cgroup/connect4"), None);
        trace.begin().unwrap();
        assert_eq!(trace.find(mark("198.51.100.1:7"), "cgroup/connect4"), None);
    }
}
