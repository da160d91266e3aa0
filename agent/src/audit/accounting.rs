//! The promise that nothing is lost, checked: what the kernel counted beside what the lines of the
//! log add up to. Pure.

use std::collections::BTreeMap;

use agent_ebpf::abi::Verdict;
use serde::Serialize;

use super::sums::Sums;

/// What the kernel counted of one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Its id, as in lines.
    pub agent: String,
    /// Attempts refused.
    pub denied: u64,
    /// Attempts that only monitor mode let through.
    pub monitored: u64,
    /// Both, by reason.
    pub by_reason: BTreeMap<String, u64>,
}

/// What the comparison came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Accounting {
    /// Agents compared.
    pub agents: u64,
    /// Attempts that the kernel counted.
    pub counted: u64,
    /// Attempts that lines stand for.
    pub logged: u64,
    /// Where the two differ.
    pub differences: Vec<Difference>,
    /// Why nothing can be said, if so.
    pub not_compared: Option<String>,
}

/// Where kernel and log differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Whose attempts.
    pub agent: String,
    /// `denied`, `monitored`, or a reason.
    pub what: String,
    /// By the kernel.
    pub counted: u64,
    /// By the log.
    pub logged: u64,
}

/// Compares counters with the sums of the lines since they were made. Agents may be refused meanwhile:
/// the log must have what was counted `before` it was read, and not more than what was `after`. `cut`
/// says that the log begins later than the counters, for files were removed: then it may have less.
pub fn compare(before: &[Counters], after: &[Counters], sums: &Sums, cut: bool) -> Accounting {
    let mut accounting = Accounting::default();
    for after in after {
        let none = Counters {
            agent: after.agent.clone(),
            denied: 0,
            monitored: 0,
            by_reason: BTreeMap::new(),
        };
        let before = before.iter().find(|before| before.agent == after.agent);
        let before = before.unwrap_or(&none);
        let logged = |pick: &dyn Fn(Verdict, &str) -> bool| -> u64 {
            sums.iter()
                .filter(|((agent, verdict, reason), _)| {
                    *agent == after.agent && pick(*verdict, reason.name())
                })
                .map(|(_, count)| count)
                .sum()
        };
        let mut rows = vec![
            (
                "denied".to_owned(),
                before.denied,
                after.denied,
                logged(&|verdict, _| verdict == Verdict::Denied),
            ),
            (
                "monitored".to_owned(),
                before.monitored,
                after.monitored,
                logged(&|verdict, _| verdict == Verdict::Monitored),
            ),
        ];
        accounting.agents += 1;
        accounting.counted += after.denied + after.monitored;
        accounting.logged += rows.iter().map(|(_, _, _, logged)| logged).sum::<u64>();
        for (reason, count) in &after.by_reason {
            rows.push((
                format!("reason {reason}"),
                before.by_reason.get(reason).copied().unwrap_or_default(),
                *count,
                logged(&|_, name| name == reason),
            ));
        }
        for (what, least, most, logged) in rows {
            let counted = if logged < least { least } else { most };
            let is_within = (least..=most).contains(&logged);
            let is_excused = cut && logged < least;
            if !is_within && !is_excused {
                accounting.differences.push(Difference {
                    agent: after.agent.clone(),
                    what,
                    counted,
                    logged,
                });
            }
        }
    }
    if cut && accounting.differences.is_empty() && accounting.logged < accounting.counted {
        accounting.not_compared =
            Some("files of the violation log were removed since the kernel counts".to_owned());
    }
    accounting
}

// === impl Accounting ===

impl Accounting {
    /// Nothing can be said.
    pub fn not_compared(why: &str) -> Self {
        Self {
            not_compared: Some(why.to_owned()),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Reason;

    use super::*;

    fn counters(denied: u64) -> Vec<Counters> {
        vec![Counters {
            agent: "a".to_owned(),
            denied,
            monitored: 2,
            by_reason: BTreeMap::from([
                ("floor".to_owned(), denied - 1),
                ("out_of_scope".to_owned(), 3),
            ]),
        }]
    }

    fn sums() -> Sums {
        let key = |verdict, reason| ("a".to_owned(), verdict, reason);
        Sums::from([
            (key(Verdict::Denied, Reason::Floor), 9),
            (key(Verdict::Denied, Reason::OutOfScope), 1),
            (key(Verdict::Monitored, Reason::OutOfScope), 2),
            (("gone".to_owned(), Verdict::Denied, Reason::Floor), 5),
        ])
    }

    #[test]
    fn what_adds_up_is_no_difference() {
        let accounting = compare(&counters(10), &counters(10), &sums(), false);
        assert!(accounting.differences.is_empty(), "{accounting:?}");
        assert_eq!(
            (accounting.agents, accounting.counted, accounting.logged),
            (1, 12, 12)
        );
    }

    #[test]
    fn a_line_too_few_or_too_many_is_one() {
        for denied in [9, 11] {
            let accounting = compare(&counters(denied), &counters(denied), &sums(), false);
            let what: Vec<_> = accounting.differences.iter().map(|d| &d.what).collect();
            assert_eq!(what, ["denied", "reason floor"]);
        }
    }

    #[test]
    fn what_is_counted_while_the_log_is_read_may_be_in_it() {
        for (before, after, fits) in [(9, 12, true), (7, 10, true), (11, 12, false), (6, 9, false)]
        {
            let accounting = compare(&counters(before), &counters(after), &sums(), false);
            assert_eq!(accounting.differences.is_empty(), fits, "{before} {after}");
        }
        let accounting = compare(&[], &counters(10), &sums(), false);
        assert!(accounting.differences.is_empty(), "an agent that is new");
    }

    #[test]
    fn a_log_that_lost_files_may_have_less_but_not_more() {
        let less = compare(&counters(11), &counters(11), &sums(), true);
        assert!(less.differences.is_empty() && less.not_compared.is_some());
        let more = compare(&counters(9), &counters(9), &sums(), true);
        assert!(!more.differences.is_empty());
    }
}
