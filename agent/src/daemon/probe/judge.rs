//! What an attempt proves. Pure. PASS takes everything: the right error, the listener's word, the
//! counter and the line. FAIL takes something that speaks against the fence by itself. All else is
//! UNKNOWN: a timeout, an unreachable destination, somebody else's refusal.
//!
//! | wanted  | the helper got | heard | counted | line                    | verdict |
//! |---------|----------------|-------|---------|-------------------------|---------|
//! | refused | EPERM          | no    | yes     | of the hook and reason  | PASS    |
//! | refused | EPERM          | no    | yes     | of another              | FAIL    |
//! | refused | EPERM          | no    | yes     | none                    | FAIL; UNKNOWN if the agent floods |
//! | refused | EPERM          | no    | yes     | of the hook, and the ring makes no sense | FAIL |
//! | refused | EPERM          | no    | no      | none                    | UNKNOWN: refused by somebody else |
//! | refused | success, or it was heard                           ||| any| FAIL    |
//! | refused | another error, or nothing | no | any | of another hook     | FAIL    |
//! | refused | another error, or nothing | no | any | none                | UNKNOWN |
//! | through | success        | yes   | yes     | none                    | PASS    |
//! | through | EPERM, or nothing | no | any     | any                     | FAIL    |
//! | through | anything else  | any   | any     | none                    | UNKNOWN |

use agent_ebpf::abi::{Counters, Hook, Reason};

use super::order::Tried;
use crate::control::protocol::ProbeVerdict;

/// What must come of an attempt, by the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It arrives.
    Through,
    /// It is refused.
    Refused(Reason),
    /// It arrives because of monitor mode, and is reported.
    Monitored(Reason),
}

/// A line of the violation log about the attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `unmapped.hook`.
    pub hook: String,
    /// `unmapped.reason`.
    pub reason: String,
}

/// What was found out about an attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// What the helper said; none: nothing in time.
    pub tried: Option<Tried>,
    /// Whether the listener got what was sent.
    pub heard: bool,
    /// By how much the agent's counters moved.
    pub counted: Counted,
    /// The line that is marked as this probe's.
    pub line: Option<Line>,
    /// Why lines could not be written, since the attempt began.
    pub unwritten: Option<String>,
    /// What is wrong with the ring that lines come through.
    pub ring: Option<String>,
}

/// Differences of counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Let through.
    pub allowed: u64,
    /// Refused or monitored, for the reason that was wanted.
    pub wanted: u64,
    /// Refused or monitored, for any reason.
    pub any: u64,
}

/// So many refusals within an attempt are the agent's own: its lines may be folded or dropped.
const FLOOD: u64 = 50;

// === impl Counted ===

impl Counted {
    /// What moved between two readings.
    pub fn between(before: &Counters, after: &Counters, wanted: Wanted) -> Self {
        let moved = |before: &[u64], after: &[u64]| -> Vec<u64> {
            let pairs = after.iter().zip(before);
            pairs
                .map(|(after, before)| after.wrapping_sub(*before))
                .collect()
        };
        let denied = moved(&before.denied, &after.denied);
        let monitored = moved(&before.monitored, &after.monitored);
        let at = |counts: &[u64], reason: Reason| {
            counts.get(usize::from(reason as u8)).copied().unwrap_or(0)
        };
        Self {
            allowed: after.allowed.wrapping_sub(before.allowed),
            wanted: match wanted {
                Wanted::Through => 0,
                Wanted::Refused(reason) => at(&denied, reason),
                Wanted::Monitored(reason) => at(&monitored, reason),
            },
            any: denied.iter().chain(&monitored).sum(),
        }
    }
}

// === impl Evidence ===

impl Evidence {
    /// The verdict, and why.
    pub fn judge(&self, wanted: Wanted, hook: Hook) -> (ProbeVerdict, String) {
        match wanted {
            Wanted::Refused(reason) => self.refused(reason, hook),
            Wanted::Monitored(reason) => self.monitored(reason, hook),
            Wanted::Through => self.through(),
        }
    }

    fn refused(&self, reason: Reason, hook: Hook) -> (ProbeVerdict, String) {
        use ProbeVerdict::{Fail, Pass, Unknown};
        let wanted = reason.name();
        if self.heard {
            return (Fail, "it arrived, and must be refused".to_owned());
        }
        let other = self.line.as_ref().filter(|line| line.hook != hook.name());
        if let Some(line) = other {
            let why = format!(
                "{} did not refuse it: {} did ({})",
                hook.name(),
                line.hook,
                line.reason
            );
            return (Fail, why);
        }
        let Some(tried) = &self.tried else {
            return (Unknown, "the helper gave no answer in time".to_owned());
        };
        if tried.errno == 0 {
            let why = format!("{} succeeded, and must be refused", tried.step);
            return (Fail, why);
        }
        if tried.errno != libc::EPERM {
            let why = format!(
                "{} ended with {}, which is not the fence's answer",
                tried.step,
                named(tried.errno)
            );
            return (Unknown, why);
        }
        if let Some(line) = self.line.as_ref().filter(|line| line.reason != wanted) {
            let why = format!("refused as {}, and the registry says {wanted}", line.reason);
            return (Fail, why);
        }
        if self.counted.wanted == 0 {
            if self.counted.any > 0 {
                let why = format!("refused, but not counted as {wanted}");
                return (Fail, why);
            }
            let why = "refused by somebody else, before the fence was asked: nothing was counted";
            return (Unknown, why.to_owned());
        }
        match (&self.line, &self.ring) {
            // A line that came without the ring came late, out of the folds.
            (Some(_), Some(why)) => (Fail, format!("refused, but its record was lost: {why}")),
            (Some(_), None) => (
                Pass,
                format!("refused at once as {wanted}, counted and told; nothing arrived"),
            ),
            (None, _) => self.untold(),
        }
    }

    /// A refusal that was counted and that no line tells of.
    fn untold(&self) -> (ProbeVerdict, String) {
        use ProbeVerdict::{Fail, Unknown};
        if let Some(why) = &self.unwritten {
            return (Fail, format!("refused, but the log is broken: {why}"));
        }
        if let Some(why) = &self.ring {
            return (Fail, format!("refused, but its record was lost: {why}"));
        }
        if self.counted.any > FLOOD {
            let why = "refused, but the agent is refused so often that its lines are folded";
            return (Unknown, why.to_owned());
        }
        let why = "refused and counted, but no line of the log tells of it";
        (Fail, why.to_owned())
    }

    fn monitored(&self, reason: Reason, hook: Hook) -> (ProbeVerdict, String) {
        use ProbeVerdict::{Fail, Pass, Unknown};
        let Some(tried) = &self.tried else {
            return (Unknown, "the helper gave no answer in time".to_owned());
        };
        if tried.errno == libc::EPERM && self.counted.any > 0 {
            return (
                Fail,
                "refused, although the agent is in monitor mode".to_owned(),
            );
        }
        if tried.errno != 0 {
            let why = format!("{} ended with {}", tried.step, named(tried.errno));
            return (Unknown, why);
        }
        let told = self
            .line
            .as_ref()
            .is_some_and(|line| line.reason == reason.name() && line.hook == hook.name());
        match (self.heard, self.counted.wanted > 0, told) {
            (true, true, true) => (
                Pass,
                format!(
                    "let through by monitor mode, counted and told as {}",
                    reason.name()
                ),
            ),
            (true, true, false) => self.untold(),
            (_, false, _) => (
                Fail,
                format!("let through, and not counted as {}", reason.name()),
            ),
            (false, true, _) => (Unknown, "it did not arrive".to_owned()),
        }
    }

    fn through(&self) -> (ProbeVerdict, String) {
        use ProbeVerdict::{Fail, Pass, Unknown};
        if let Some(line) = &self.line {
            let why = format!(
                "{} refused it ({}), and it is granted",
                line.hook, line.reason
            );
            return (Fail, why);
        }
        let Some(tried) = &self.tried else {
            return (Unknown, "the helper gave no answer in time".to_owned());
        };
        if tried.errno != 0 {
            let why = format!("{} ended with {}", tried.step, named(tried.errno));
            let fenced = tried.errno == libc::EPERM && self.counted.any > 0;
            return (if fenced { Fail } else { Unknown }, why);
        }
        match (self.heard, self.counted.allowed > 0) {
            (true, true) => (Pass, "let through, counted, and it arrived".to_owned()),
            (true, false) => (
                Fail,
                "it arrived, and the fence did not count it".to_owned(),
            ),
            (false, _) => (Unknown, "sent, and it did not arrive".to_owned()),
        }
    }
}

/// An error number, as people know it.
fn named(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}

#[cfg(test)]
mod tests {
    use ProbeVerdict::{Fail, Pass, Unknown};

    use super::*;

    const OUT: Wanted = Wanted::Refused(Reason::OutOfScope);

    fn tried(errno: i32) -> Option<Tried> {
        Some(Tried {
            step: "connect".to_owned(),
            errno,
            ..Tried::default()
        })
    }

    fn line(hook: Hook, reason: Reason) -> Option<Line> {
        Some(Line {
            hook: hook.name().to_owned(),
            reason: reason.name().to_owned(),
        })
    }

    fn good() -> Evidence {
        Evidence {
            tried: tried(libc::EPERM),
            counted: Counted {
                allowed: 0,
                wanted: 1,
                any: 1,
            },
            line: line(Hook::Connect4, Reason::OutOfScope),
            ..Evidence::default()
        }
    }

    fn verdict(evidence: &Evidence, wanted: Wanted) -> ProbeVerdict {
        evidence.judge(wanted, Hook::Connect4).0
    }

    #[test]
    fn a_refusal_passes_with_all_of_its_evidence_and_not_without() {
        assert_eq!(verdict(&good(), OUT), Pass);
        let without: [(&str, Evidence, ProbeVerdict); 10] = [
            (
                "heard",
                Evidence {
                    heard: true,
                    ..good()
                },
                Fail,
            ),
            (
                "no line",
                Evidence {
                    line: None,
                    ..good()
                },
                Fail,
            ),
            (
                "another hook",
                Evidence {
                    line: line(Hook::Egress, Reason::OutOfScope),
                    ..good()
                },
                Fail,
            ),
            (
                "a ring that cannot be read",
                Evidence {
                    ring: Some("read to 9 of 7".to_owned()),
                    ..good()
                },
                Fail,
            ),
            (
                "another reason",
                Evidence {
                    line: line(Hook::Connect4, Reason::Expired),
                    ..good()
                },
                Fail,
            ),
            (
                "nothing counted",
                Evidence {
                    line: None,
                    counted: Counted::default(),
                    ..good()
                },
                Unknown,
            ),
            (
                "success",
                Evidence {
                    tried: tried(0),
                    ..good()
                },
                Fail,
            ),
            (
                "no answer",
                Evidence {
                    tried: None,
                    ..good()
                },
                Unknown,
            ),
            (
                "timeout",
                Evidence {
                    tried: tried(libc::ETIMEDOUT),
                    line: None,
                    ..good()
                },
                Unknown,
            ),
            (
                "a flood",
                Evidence {
                    line: None,
                    counted: Counted {
                        any: 1_000,
                        ..good().counted
                    },
                    ..good()
                },
                Unknown,
            ),
        ];
        for (what, evidence, expected) in without {
            assert_eq!(verdict(&evidence, OUT), expected, "{what}");
        }
    }

    #[test]
    fn a_destination_that_is_merely_unreachable_proves_nothing() {
        for errno in [
            libc::ENETUNREACH,
            libc::EHOSTUNREACH,
            libc::ECONNREFUSED,
            libc::ETIMEDOUT,
            libc::EADDRNOTAVAIL,
        ] {
            let evidence = Evidence {
                tried: tried(errno),
                ..Evidence::default()
            };
            assert_eq!(verdict(&evidence, OUT), Unknown, "{errno}");
            assert_eq!(verdict(&evidence, Wanted::Through), Unknown, "{errno}");
        }
        assert_eq!(verdict(&Evidence::default(), OUT), Unknown);
        assert_eq!(verdict(&Evidence::default(), Wanted::Through), Unknown);
    }

    #[test]
    fn a_broken_log_fails_with_its_reason() {
        let evidence = Evidence {
            line: None,
            unwritten: Some("no space left on device".to_owned()),
            ..good()
        };
        assert_eq!(
            evidence.judge(OUT, Hook::Connect4),
            (
                Fail,
                "refused, but the log is broken: no space left on device".to_owned()
            )
        );
    }

    #[test]
    fn what_is_granted_passes_when_it_arrives_and_is_counted() {
        let arrived = Evidence {
            tried: tried(0),
            heard: true,
            counted: Counted {
                allowed: 1,
                ..Counted::default()
            },
            ..Evidence::default()
        };
        assert_eq!(verdict(&arrived, Wanted::Through), Pass);
        let around = Evidence {
            counted: Counted::default(),
            ..arrived.clone()
        };
        assert_eq!(verdict(&around, Wanted::Through), Fail);
        let lost = Evidence {
            heard: false,
            ..arrived
        };
        assert_eq!(verdict(&lost, Wanted::Through), Unknown);
        assert_eq!(verdict(&good(), Wanted::Through), Fail);
    }

    #[test]
    fn monitor_mode_lets_through_and_tells() {
        let wanted = Wanted::Monitored(Reason::OutOfScope);
        let told = Evidence {
            tried: tried(0),
            heard: true,
            ..good()
        };
        assert_eq!(verdict(&told, wanted), Pass);
        assert_eq!(verdict(&good(), wanted), Fail);
        let silent = Evidence { line: None, ..told };
        assert_eq!(verdict(&silent, wanted), Fail);
    }
}
