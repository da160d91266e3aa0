//! What the kernel noted of traffic to model APIs, and whose it is: a process that runs, one that
//! has ended, or none that matters.

use std::{collections::BTreeMap, fs, net::IpAddr, os::unix::fs::MetadataExt as _};

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use crate::cgroup::CgroupPath;

/// A note of the kernel's. Times are boot time in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Process id at the time.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// What the process called itself.
    pub comm: String,
    /// Its cgroup's id.
    pub cgroup_id: u64,
    /// Where that was; none where nobody knows.
    pub cgroup: Option<CgroupPath>,
    /// What was reached.
    pub reached: Reached,
    /// The first time.
    pub first: u64,
    /// The last time.
    pub last: u64,
}

/// A destination that was reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// Names that lead there; others may as well.
    pub names: Vec<String>,
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol: 6 or 17.
    pub protocol: u8,
    /// Connections, and datagrams that were sent without one.
    pub count: u64,
    /// Wall-clock time of the first, in milliseconds.
    pub first_ms: i64,
    /// Wall-clock time of the last, in milliseconds.
    pub last_ms: i64,
}

/// Processes of one kind that have ended: of one program, user and cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The last one's id.
    pub pid: u32,
    /// How many there were.
    pub processes: usize,
    pub uid: u32,
    pub comm: String,
    pub cgroup: Option<CgroupPath>,
    pub reached: Vec<Reached>,
}

// === impl Reached ===

impl Reached {
    /// What it is called: the first name, else the address.
    pub fn name(&self) -> String {
        self.names
            .first()
            .cloned()
            .unwrap_or_else(|| self.addr.to_string())
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.addr, self.port, self.protocol) == (other.addr, other.port, other.protocol)
    }
}

/// The notes of the process `pid`, which started at `started`: those that were added to since. What
/// was noted before is an earlier process's, whose id it has.
pub(super) fn of_process(notes: &[Note], pid: u32, started: u64) -> Vec<Reached> {
    let own = notes.iter().filter(|note| is_of(note, pid, started));
    summed(own.map(|note| note.reached.clone()))
}

/// The processes that have ended, by the notes that are no running process's and outside `roots`.
/// `started` says when a running process started.
pub(super) fn ended(
    notes: &[Note],
    roots: &[CgroupPath],
    started: impl Fn(u32) -> Option<u64>,
) -> Vec<Ended> {
    let is_inside = |note: &Note| {
        let cgroup = note.cgroup.as_ref();
        cgroup.is_some_and(|cgroup| roots.iter().any(|root| cgroup.is_within(root)))
    };
    let mut kinds: BTreeMap<(u64, &str, u32), Vec<&Note>> = BTreeMap::new();
    for note in notes {
        let runs = started(note.pid).is_some_and(|since| is_of(note, note.pid, since));
        if !runs && !is_inside(note) {
            let kind = (note.cgroup_id, note.comm.as_str(), note.uid);
            kinds.entry(kind).or_default().push(note);
        }
    }
    let of_kind = |mut notes: Vec<&Note>| {
        notes.sort_by_key(|note| note.last);
        let last = *notes.last()?;
        let mut pids: Vec<u32> = notes.iter().map(|note| note.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        Some(Ended {
            pid: last.pid,
            processes: pids.len(),
            uid: last.uid,
            comm: last.comm.clone(),
            cgroup: notes.iter().find_map(|note| note.cgroup.clone()),
            reached: summed(notes.iter().map(|note| note.reached.clone())),
        })
    };
    let mut all: Vec<Ended> = kinds.into_values().filter_map(of_kind).collect();
    all.sort_by_key(|ended| ended.pid);
    all
}

fn is_of(note: &Note, pid: u32, started: u64) -> bool {
    note.pid == pid && note.last >= started
}

/// One for each destination, the one reached last first.
fn summed(all: impl Iterator<Item = Reached>) -> Vec<Reached> {
    let mut sums: Vec<Reached> = Vec::new();
    for one in all {
        match sums.iter_mut().find(|sum| sum.is_same(&one)) {
            Some(sum) => {
                sum.count = sum.count.saturating_add(one.count);
                sum.first_ms = sum.first_ms.min(one.first_ms);
                sum.last_ms = sum.last_ms.max(one.last_ms);
            }
            None => sums.push(one),
        }
    }
    sums.sort_by_key(|sum| (std::cmp::Reverse(sum.last_ms), sum.addr));
    sums
}

/// When a running process started, in boot time; none for one that has ended.
pub(super) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // Of one that died and is not reaped nothing can be read any more.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let ticks: u64 = fields.nth(18)?.parse().ok()?;
    let a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten()?;
    let tick = 1_000_000_000 / u64::try_from(a_second).ok().filter(|tick| *tick > 0)?;
    // Cut to a whole tick, so never later than it was.
    Some(ticks.saturating_mul(tick))
}

/// The user whose a process is.
pub(super) fn user(pid: u32) -> Option<u32> {
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(pid: u32, addr: &str, last: u64) -> Note {
        Note {
            pid,
            uid: 1000,
            comm: "node".to_owned(),
            cgroup_id: 7,
            cgroup: Some(CgroupPath::new("/user.slice/a.scope").unwrap()),
            reached: Reached {
                names: vec!["api.test".to_owned()],
                addr: addr.parse().unwrap(),
                port: 443,
                protocol: 6,
                count: 2,
                first_ms: 1,
                last_ms: i64::try_from(last).unwrap(),
            },
            first: 1,
            last,
        }
    }

    #[test]
    fn an_earlier_process_with_the_same_id_is_another() {
        let notes = [note(5, "192.0.2.1", 100), note(5, "192.0.2.2", 300)];
        let own = of_process(&notes, 5, 200);
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].addr, "192.0.2.2".parse::<IpAddr>().unwrap());
        let gone = ended(&notes, &[], |pid| (pid == 5).then_some(200));
        assert_eq!(gone.len(), 1);
        assert_eq!(
            gone[0].reached[0].addr,
            "192.0.2.1".parse::<IpAddr>().unwrap()
        );
        // When it has ended too, all of it is one that has ended.
        let gone = ended(&notes, &[], |_| None);
        assert_eq!((gone.len(), gone[0].reached.len()), (1, 2));
    }

    #[test]
    fn many_short_processes_of_one_kind_are_one() {
        let mut notes: Vec<Note> = (1..=50)
            .map(|pid| note(pid, "192.0.2.1", u64::from(pid)))
            .collect();
        notes.push(Note {
            comm: "python3".to_owned(),
            ..note(60, "192.0.2.1", 9)
        });
        let gone = ended(&notes, &[], |_| None);
        let told: Vec<_> = gone
            .iter()
            .map(|ended| (ended.comm.as_str(), ended.pid, ended.processes))
            .collect();
        assert_eq!(told, [("node", 50, 50), ("python3", 60, 1)]);
        assert_eq!(gone[0].reached.len(), 1);
        assert_eq!(gone[0].reached[0].count, 100);
        assert_eq!(
            (gone[0].reached[0].first_ms, gone[0].reached[0].last_ms),
            (1, 50)
        );
    }

    #[test]
    fn what_was_inside_a_root_is_left_out() {
        let roots = [CgroupPath::new("/agents.slice").unwrap()];
        let inside = |path: &str| Note {
            cgroup: Some(CgroupPath::new(path).unwrap()),
            ..note(5, "192.0.2.1", 1)
        };
        assert!(ended(&[inside("/agents.slice/a.service")], &roots, |_| None).is_empty());
        assert!(ended(&[inside("/agents.slice")], &roots, |_| None).is_empty());
        assert_eq!(
            ended(&[inside("/agents.slices/a")], &roots, |_| None).len(),
            1
        );
        let nowhere = Note {
            cgroup: None,
            ..note(5, "192.0.2.1", 1)
        };
        assert_eq!(ended(&[nowhere], &roots, |_| None).len(), 1);
    }

    #[test]
    fn this_process_runs_since_some_time_ago() {
        let since = started(std::process::id()).unwrap();
        assert!(since > 0 && since <= crate::kernel::boot_nanos());
        assert_eq!(started(u32::MAX), None);
        assert_eq!(
            user(std::process::id()),
            Some(nix::unistd::getuid().as_raw())
        );
    }
}
