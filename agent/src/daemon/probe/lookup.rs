//! The DNS guard on trial, where the agent uses names: whether it answers the daemon, and whether a
//! lookup out of scope, made from inside the fence, is turned to it, refused, and told in the log.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use super::{
    helper::PATIENCE,
    order::{Family, Task, Tried},
    places::{has_loopback, localhost},
    steps::Step,
    trial::{TOLD_WITHIN, Trial},
    worker::{Unclear, ask},
};
use crate::{
    control::protocol::{ProbeAttempt, ProbeVerdict},
    daemon::self_asked,
    policy::{self, Resolution},
};

/// How often the guard is asked before it counts as silent.
const TRIES: usize = 3;
/// Where lookups go.
const PORT: u16 = 53;
/// The guard's answer to what is out of scope.
const REFUSED: u8 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// What came of a lookup that must be refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Came {
    /// What the helper got; none when it gave no answer.
    tried: Option<Tried>,
    /// Whether the log has its line.
    told: bool,
    /// Why a line could not be written.
    unwritten: Option<String>,
}

impl Trial<'_> {
    /// All of it. Nothing where the agent uses no names.
    pub(super) fn names(&mut self) -> Result<(), Unclear> {
        let guard = self.ground.guard.clone();
        let Some(first) = guard.first() else {
            return Ok(());
        };
        self.answers(*first, guard)?;
        let name = format!("remit-probe-{}.invalid", self.ground.run);
        let said = policy::resolve(&self.ground.tables, &name, &self.ground.clock);
        // Monitor mode would have it asked upstream, and so would a grant.
        if !matches!(said, Resolution::Refused { .. }) {
            return Ok(());
        }
        for family in [Family::V4, Family::V6] {
            if has_loopback(family) {
                self.refused(family, &name)?;
            }
        }
        Ok(())
    }

    /// Whether the guard answers the daemon itself.
    fn answers(&mut self, first: SocketAddr, guard: Vec<SocketAddr>) -> Result<(), Unclear> {
        let before = ask(self.steps, Step::Look)?.busy;
        let mut missing = guard;
        for _ in 0..TRIES {
            missing = self_asked::silent(&missing, PATIENCE)
                .map_err(|error| format!("the DNS guard cannot be asked: {error}"))?;
            if missing.is_empty() {
                break;
            }
        }
        let is_busy = ask(self.steps, Step::Look)?.busy != before;
        let (verdict, evidence) = match (missing.first(), is_busy) {
            (None, _) => (ProbeVerdict::Pass, "it answers".to_owned()),
            (Some(at), true) => (
                ProbeVerdict::Unknown,
                format!("no answer at {at}, for too many questions are open there"),
            ),
            (Some(at), false) => (
                ProbeVerdict::Fail,
                format!("no answer at {at} to {TRIES} questions: no name resolves"),
            ),
        };
        self.attempts.push(ProbeAttempt {
            name: "DNS guard".to_owned(),
            hook: "dns".to_owned(),
            to: Some(first.to_string()),
            wanted: "must answer a question of the daemon's own".to_owned(),
            verdict,
            evidence,
        });
        Ok(())
    }

    /// A name that the scope does not have.
    fn refused(&mut self, family: Family, name: &str) -> Result<(), Unclear> {
        let via = SocketAddr::new(localhost(family), PORT);
        // Another name for each family, so that neither line is folded into the other.
        let name = match via.ip() {
            IpAddr::V4(_) => format!("v4.{name}"),
            IpAddr::V6(_) => format!("v6.{name}"),
        };
        let message = question(&name);
        let tried = self.tell(&Task::Lookup { via, message })?;
        let until = Instant::now() + TOLD_WITHIN;
        let came = loop {
            let sight = ask(self.steps, Step::Look)?;
            let read = self.trace.read();
            let came = Came {
                tried: tried.clone(),
                told: self.trace.has_lookup(&self.ground.run, &name),
                unwritten: sight.unwritten.or_else(|| Some(read.err()?.to_string())),
            };
            let due = tried.as_ref().is_some_and(|tried| tried.code.is_some());
            let over = came.told || came.unwritten.is_some() || Instant::now() >= until;
            if over || !due {
                break came;
            }
            thread::sleep(PAUSE);
        };
        let (verdict, evidence) = judge(&came);
        self.attempts.push(ProbeAttempt {
            name: format!("{} lookup", family.name()),
            hook: "dns".to_owned(),
            to: Some(format!("{name} by {via}")),
            wanted: "must be refused as name_not_in_scope".to_owned(),
            verdict,
            evidence,
        });
        Ok(())
    }
}

/// What it proves. Pure.
fn judge(came: &Came) -> (ProbeVerdict, String) {
    let Some(tried) = &came.tried else {
        let why = "the helper gave no answer".to_owned();
        return (ProbeVerdict::Unknown, why);
    };
    match (tried.code, came.told, &came.unwritten) {
        (Some(REFUSED), true, _) => (
            ProbeVerdict::Pass,
            "it was turned to the guard and refused there; the log has its line".to_owned(),
        ),
        (Some(REFUSED), false, Some(why)) => (
            ProbeVerdict::Fail,
            format!("it was refused, and its line could not be written: {why}"),
        ),
        (Some(REFUSED), false, None) => (
            ProbeVerdict::Unknown,
            "it was refused, and no line of it came".to_owned(),
        ),
        (Some(code), _, _) => (
            ProbeVerdict::Fail,
            format!("it was answered with code {code}: somebody else did, or the guard is wrong"),
        ),
        (None, _, _) if tried.errno == libc::EPERM || tried.errno == libc::ECONNREFUSED => (
            ProbeVerdict::Fail,
            format!(
                "{} failed with errno {}: it was not turned to a guard that is there",
                tried.step, tried.errno
            ),
        ),
        (None, _, _) => (
            ProbeVerdict::Unknown,
            format!("{} failed with errno {}", tried.step, tried.errno),
        ),
    }
}

/// A question for the IPv4 address of a name.
fn question(name: &str) -> Vec<u8> {
    const A_IN: [u8; 4] = [0, 1, 0, 1];
    let mut bytes = vec![0x52, 0x50, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend_from_slice(&A_IN);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_passes_only_with_all_of_its_evidence() {
        let came = |code, errno, told, unwritten: Option<&str>| Came {
            tried: Some(Tried {
                step: "receive".to_owned(),
                code,
                errno,
                ..Tried::default()
            }),
            told,
            unwritten: unwritten.map(str::to_owned),
        };
        let refused = Some(REFUSED);
        for (came, wanted) in [
            (came(refused, 0, true, None), ProbeVerdict::Pass),
            (came(refused, 0, false, None), ProbeVerdict::Unknown),
            (came(refused, 0, false, Some("full")), ProbeVerdict::Fail),
            (came(Some(0), 0, true, None), ProbeVerdict::Fail),
            (came(Some(3), 0, false, None), ProbeVerdict::Fail),
            (came(None, libc::EPERM, false, None), ProbeVerdict::Fail),
            (came(None, libc::EAGAIN, false, None), ProbeVerdict::Unknown),
            (Came::default(), ProbeVerdict::Unknown),
        ] {
            assert_eq!(judge(&came).0, wanted, "{came:?}");
        }
    }

    #[test]
    fn the_question_is_one() {
        let asked = crate::dns::message::read(&question("v4.remit-probe-1a.invalid"));
        assert!(asked.is_ok(), "{asked:?}");
    }
}
