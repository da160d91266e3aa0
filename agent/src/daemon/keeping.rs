//! What survives this daemon: the registry in force, holds, and the clocks. Nothing here keeps
//! enforcement from going on; what could not be kept makes the posture degraded.

use std::{fs, time::UNIX_EPOCH};

use tracing::{error, warn};

use super::{
    core::Core,
    settings::Settings,
    time::{Before, Offset, wall_millis},
};
use crate::{
    audit::{
        Actor, Change, ClockAccepted, ClockBehind, ClockStepped, Damaged, Decision, Lifecycle,
        Subject,
    },
    control::Caller,
    policy::UnixMillis,
    state::{ClockMark, Copies, Damage, Hold, Holds, HoldsRead, StateError, boot_id},
};

/// The clocks are written down this often, in seconds, besides when something ends.
const CLOCK_EVERY: u32 = 60;

impl Core {
    /// Writes down what is in force, after a change of it.
    pub(super) fn keep(&mut self) {
        let saved = self.store.save_registry(
            self.force.revision,
            &self.force.unregistered,
            self.force.records(),
        );
        self.kept("state-registry", "the registry in force", saved.map(drop));
        for (id, hold) in self.force.settled.clone() {
            let kept = self.store.hold(&id, &hold);
            self.holds.by_id.insert(id.clone(), hold);
            self.kept_hold(&id, kept);
        }
        for id in self.force.lifted.clone() {
            let released = self.store.release(&id);
            let durable = released.is_ok();
            let warnings = released.as_ref().err().map(chain).into_iter().collect();
            let hold = self.holds.by_id.remove(&id);
            self.kept("state-holds", "the end of a revocation", released);
            self.lifted(&id, hold.as_ref(), durable, warnings);
        }
        self.keep_clock();
    }

    fn lifted(&mut self, id: &str, hold: Option<&Hold>, durable: bool, warnings: Vec<String>) {
        let Some(agent) = self.force.agents.get(id) else {
            return;
        };
        let reason = hold.map_or_else(
            || "approved again".to_owned(),
            |hold| {
                format!(
                    "its file changed and was approved again; it was revoked for: {}",
                    hold.reason
                )
            },
        );
        let lifecycle = Lifecycle {
            change: Change::Lift,
            agent: Subject::from(agent.tables.as_ref()),
            before: "revoked".to_owned(),
            after: agent.tables.state.name().to_owned(),
            reason,
            by: Actor::Daemon,
            closed: 0,
            killed: 0,
            frozen: 0,
            durable,
            warnings,
            refused: None,
            revision: self.force.revision,
        };
        self.decide(Decision::Lifecycle(Box::new(lifecycle)));
    }

    /// What became of writing something down; a failure is a problem until it goes well.
    pub(super) fn kept(&mut self, key: &'static str, what: &str, kept: Result<(), StateError>) {
        match kept {
            Ok(()) => drop(self.problems.remove(key)),
            Err(error) => {
                let why = format!("{what} is not on disk: {}", chain(&error));
                error!(message = "State could not be written.", why);
                self.problems.insert(key, why);
            }
        }
    }

    /// The same for a hold. Returns whether it is on disk, and what hindered a copy.
    pub(super) fn kept_hold(
        &mut self,
        id: &str,
        kept: Result<Copies, StateError>,
    ) -> (bool, Option<String>) {
        let what = format!("that `{id}` is held");
        match kept {
            Ok(Copies::Both) => {
                self.kept("state-holds", &what, Ok(()));
                (true, None)
            }
            Ok(Copies::One(error)) => {
                let why = format!("one of the two copies is not on disk: {}", chain(&error));
                warn!(message = "A hold has one copy only.", agent = id, why);
                self.problems
                    .insert("state-holds", format!("{what} has one copy only: {why}"));
                (true, Some(why))
            }
            Err(error) => {
                let why = chain(&error);
                self.kept("state-holds", &what, Err(error));
                (false, Some(why))
            }
        }
    }

    /// Holds that somebody put beside the registry, and copies that are missing.
    pub(super) fn read_holds(&mut self) {
        let HoldsRead {
            holds,
            damage,
            unwritten,
        } = self.store.load_holds(wall_millis());
        let Holds { by_id, blind } = holds;
        self.holds.blind = blind;
        // What is held in memory is on disk again after this, whoever removed it.
        let removed: Vec<(String, Hold)> = self
            .holds
            .by_id
            .iter()
            .filter(|(id, _)| !by_id.contains_key(*id))
            .map(|(id, hold)| (id.clone(), hold.clone()))
            .collect();
        for (id, hold) in removed {
            let kept = self.store.hold(&id, &hold);
            self.kept_hold(&id, kept);
        }
        for (id, hold) in by_id {
            let known = self.holds.by_id.get(&id);
            if known.is_none_or(|known| known.state < hold.state) {
                self.holds.by_id.insert(id, hold);
            }
        }
        self.damaged(&damage);
        for error in unwritten {
            self.kept("state-holds", "a copy of a hold", Err(error));
        }
    }

    /// Tells of state that could not be read.
    pub(super) fn damaged(&mut self, damage: &[Damage]) {
        let revision = self.force.revision;
        for each in damage {
            error!(message = "State is damaged.", path = %each.path.display(), why = each.why);
            self.problems.insert(
                "state-damage",
                format!("`{}` {}", each.path.display(), each.why),
            );
            self.decide(Decision::Damaged(Damaged {
                file: each.path.display().to_string(),
                why: each.why.clone(),
                agent: each.agent.clone(),
                consequence: match &each.agent {
                    Some(_) => "what it held is not known, so what it could grant is denied",
                    None => "what it held is not known and not used",
                }
                .to_owned(),
                moved_to: each.aside.as_ref().map(|path| path.display().to_string()),
                revision,
            }));
        }
    }

    /// Writes the clocks down.
    pub(super) fn keep_clock(&mut self) {
        self.clock_age = 0;
        let Some(boot_id) = boot_id() else {
            self.problems.insert(
                "state-clock",
                "the kernel does not tell its boot id, so the latest time is not kept".to_owned(),
            );
            return;
        };
        let mark = ClockMark {
            boot_id,
            origin_ms: self.offset.origin(),
            latest_ms: self.offset.latest(),
            high_water_ms: self.offset.high_water(),
        };
        let saved = self.store.save_clock(&mark);
        self.kept("state-clock", "the latest time seen", saved);
    }

    /// Once a second: what has ended meanwhile loses its connections, and the time of it is kept.
    pub(super) fn end_what_ends(&mut self) {
        let ended = self.endings.passed(self.offset.high_water());
        self.clock_age += 1;
        if !ended.is_empty() {
            let indices: Vec<u32> = ended
                .iter()
                .filter_map(|id| self.enforcer.index_of(id))
                .collect();
            self.close_unreachable(Some(&indices));
        }
        if !ended.is_empty() || self.clock_age >= CLOCK_EVERY {
            self.keep_clock();
        }
    }

    /// Tells of a wall clock that is behind the latest time known, as long as it is.
    pub(super) fn watch_lead(&mut self, tell: bool) {
        let Some(lead) = self.offset.lead() else {
            self.problems.remove("clock-behind");
            return;
        };
        let seconds = lead / 1000;
        self.problems.insert(
            "clock-behind",
            format!(
                "the wall clock is {seconds} s behind the latest time seen, by which expiries are \
                 counted; if it is right now, say so with `remit reload --accept-clock`"
            ),
        );
        if tell {
            warn!(
                message = "The wall clock is behind the latest time seen.",
                seconds
            );
            self.decide(Decision::ClockBehind(ClockBehind {
                wall: wall_millis(),
                mark: self.offset.high_water(),
                revision: self.force.revision,
            }));
        }
    }

    /// Follows a step of the wall clock.
    pub(super) fn clock_stepped(&mut self, stepped: Offset) {
        let by_ms = stepped.origin() - self.offset.origin();
        tracing::info!(
            message = "The wall clock stepped; deadlines are computed anew.",
            by_ms
        );
        let failed = self.count_by(stepped).is_err();
        self.decide(Decision::ClockStepped(ClockStepped {
            by_ms,
            wall: wall_millis(),
            failed,
            revision: self.force.revision,
        }));
        self.watch_lead(by_ms < 0);
        self.keep_clock();
        // A step ahead may have ended something.
        self.close_unreachable(None);
    }

    /// Takes the wall clock at its word, because somebody says it is right.
    pub(super) fn accept_clock(&mut self, caller: &Caller) -> Result<(), String> {
        let mark = self.offset.high_water();
        self.count_by(self.offset.accepted())?;
        self.decide(Decision::ClockAccepted(ClockAccepted {
            by: actor(caller),
            wall: wall_millis(),
            mark,
            revision: self.force.revision,
        }));
        self.watch_lead(false);
        self.keep_clock();
        Ok(())
    }

    /// Puts what is in force into the kernel with deadlines by another offset.
    fn count_by(&mut self, offset: Offset) -> Result<(), String> {
        self.offset = offset;
        self.recorder.set_offset(offset);
        self.names.set_offset(offset);
        let images = self.images(&self.force);
        let applied = self.put_all(&images);
        match applied {
            Ok(_) => {
                self.problems.remove("clock");
                self.recorder.learn(
                    &self.enforcer,
                    self.force.revision,
                    super::core::all(&self.force),
                );
                self.expect_endings();
                Ok(())
            }
            Err(why) => {
                error!(message = "Deadlines could not be computed anew.", why);
                self.problems
                    .insert("clock", format!("deadlines are of the old clock: {why}"));
                Err(why)
            }
        }
    }

    /// Learns anew when what is in force ends.
    pub(super) fn expect_endings(&mut self) {
        self.endings = super::endings::Endings::after(self.offset.high_water(), &self.force);
    }
}

/// Who asks, for the audit log.
pub(super) fn actor(caller: &Caller) -> Actor {
    Actor::Caller {
        uid: caller.uid,
        pid: caller.pid,
    }
}

/// What is known of the clocks from before. The log files were written by them too, so a state
/// directory that is lost does not take all of it away.
pub(super) fn clocks_before(mark: Option<&ClockMark>, settings: &Settings) -> Before {
    let written = ["audit.jsonl", "violations.jsonl"]
        .iter()
        .filter_map(|name| {
            fs::metadata(settings.paths.log.join(name))
                .ok()?
                .modified()
                .ok()
        })
        .filter_map(|at| at.duration_since(UNIX_EPOCH).ok())
        .filter_map(|since| UnixMillis::try_from(since.as_millis()).ok())
        .max();
    let this_boot = boot_id();
    let known = mark.filter(|mark| this_boot.as_deref() == Some(mark.boot_id.as_str()));
    Before {
        same_boot: known.map(|mark| Offset::new(mark.origin_ms, mark.latest_ms)),
        high_water: mark
            .map(|mark| mark.high_water_ms)
            .into_iter()
            .chain(written)
            .max()
            .unwrap_or(UnixMillis::MIN),
    }
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &StateError) -> String {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
