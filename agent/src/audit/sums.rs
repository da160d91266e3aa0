//! What the log says was written: the sums that the next daemon's ledger starts from, for a daemon
//! that crashed could tell nobody. Also what anyone can check the log's promise with.

use std::{collections::BTreeMap, path::Path};

use agent_ebpf::abi::{Reason, Verdict};
use serde_json::Value;

use super::{
    ocsf::Code,
    tail::{Filter, Tail, TailError},
};
use crate::policy::tables::UnixMillis;

/// Attempts in lines, by `ai_agent.uid`, verdict and reason.
pub type Sums = BTreeMap<(String, Verdict, Reason), u64>;

/// Adds up the counts of the violations at `path` from `since` on, rotated files included. To
/// compare with the kernel's counters, `since` is when they were made.
pub fn written_since(path: &Path, since: UnixMillis) -> Result<Sums, TailError> {
    let filter = Filter {
        agent: None,
        since: Some(since),
    };
    let mut tail = Tail::open(path, filter)?;
    let mut sums = Sums::new();
    loop {
        let lines = tail.read()?;
        if lines.is_empty() {
            return Ok(sums);
        }
        for line in lines {
            if let Some((key, count)) = attempts(&line.event) {
                *sums.entry(key).or_default() += count;
            }
        }
    }
}

/// Whose attempts a line stands for, of which kind, and how many.
fn attempts(event: &Value) -> Option<((String, Verdict, Reason), u64)> {
    let code = event["metadata"]["event_code"].as_str()?;
    let counted = [Code::Denied, Code::Monitored, Code::Dropped];
    if !counted.iter().any(|counted| counted.name() == code) {
        return None;
    }
    let word = |key: &str| event["unmapped"][key].as_str();
    let verdict = word("verdict")?;
    let verdict = Verdict::ALL.iter().find(|known| known.name() == verdict)?;
    let reason = word("reason")?;
    let reason = Reason::ALL.iter().find(|known| known.name() == reason)?;
    let agent = event["ai_agent"]["uid"].as_str()?.to_owned();
    let count = match &event["count"] {
        Value::Null => 1,
        count => count.as_u64()?,
    };
    Some(((agent, *verdict, *reason), count))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::audit::{
        Decided, Decision, Dropped, Limits, Log, LogName, Lost, Violation,
        record::tests::{host, violation},
    };

    #[test]
    fn lines_of_all_files_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_size: 1,
            max_total: 1 << 40,
            retention: Duration::from_secs(1 << 30),
        };
        let mut log = Log::open(dir.path(), LogName::Violations, limits).unwrap();
        let base = violation();
        let start = base.time;
        let mut write = |violation: Violation| {
            log.append(|sequence| violation.to_ocsf(&host(), sequence))
                .unwrap();
        };
        write(Violation {
            time: start - 1,
            ..base.clone()
        });
        write(base.clone());
        write(Violation {
            count: 1,
            ..base.clone()
        });
        write(Violation {
            reason: Reason::Floor,
            count: 1,
            ..base.clone()
        });
        write(Violation {
            verdict: Verdict::Monitored,
            count: 5,
            ..base.clone()
        });
        let dropped = Dropped {
            time: start + 9,
            agent: base.agent.clone(),
            verdict: Verdict::Denied,
            reason: Reason::Floor,
            lost: Lost {
                kernel: 3,
                rate: 4,
                disk: 0,
            },
            cgroup: None,
            revision: 1,
        };
        log.append(|sequence| dropped.to_ocsf(&host(), sequence))
            .unwrap();
        let stopped = Decided {
            time: start,
            what: Decision::Stopped {
                pid: 1,
                reason: String::new(),
                revision: 1,
            },
        };
        log.append(|sequence| stopped.to_ocsf(&host(), sequence))
            .unwrap();
        let key = |verdict, reason| (base.agent.id.clone(), verdict, reason);
        let expected = Sums::from([
            (key(Verdict::Denied, Reason::OutOfScope), 38),
            (key(Verdict::Denied, Reason::Floor), 8),
            (key(Verdict::Monitored, Reason::OutOfScope), 5),
        ]);
        assert_eq!(written_since(log.path(), start).unwrap(), expected);
    }
}
