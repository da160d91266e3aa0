//! The service manager's watchdog: fed once a second, and only while every loop of the daemon comes
//! round. A daemon that hangs is then killed and started anew, and takes over what is in force.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{error, warn};

use super::{
    core::Core,
    posture::{STALE, compare_every},
};

/// How often the runtime's own tasks say that they get their turn.
const PULSE: Duration = Duration::from_secs(1);

/// Feeds the watchdog, where the service manager has one for this process.
pub(super) struct Watchdog {
    wanted: bool,
    began: Instant,
    /// Milliseconds after `began` at which a task of the runtime last had its turn.
    pulse: Arc<AtomicU64>,
    /// What was last complained of.
    told: Option<&'static str>,
}

/// A loop that has to come round: its name, how long ago it last did, and how long it may take.
type Beat = (&'static str, Option<Duration>, Duration);

impl Watchdog {
    /// From now on. Within the runtime.
    pub(super) fn start() -> Self {
        let watchdog = Self {
            wanted: sd_notify::watchdog_enabled().is_some(),
            began: Instant::now(),
            pulse: Arc::default(),
            told: None,
        };
        if watchdog.wanted {
            let (began, pulse) = (watchdog.began, Arc::clone(&watchdog.pulse));
            tokio::spawn(async move {
                loop {
                    pulse.store(millis(began.elapsed()), Ordering::Relaxed);
                    tokio::time::sleep(PULSE).await;
                }
            });
        }
        watchdog
    }

    /// Tells the service manager that all is well, if it is: `ended` are tasks that should run, with
    /// whether they have ended.
    pub(super) fn feed(&mut self, core: &Core, ended: &[(&'static str, bool)]) {
        if !self.wanted {
            return;
        }
        let pulse = Duration::from_millis(self.pulse.load(Ordering::Relaxed));
        let idle = self.began.elapsed().saturating_sub(pulse);
        let mut beats = core.turns();
        beats.push(("runtime", Some(idle), STALE));
        let stalled = ended
            .iter()
            .find_map(|(name, ended)| ended.then_some(*name))
            .or_else(|| first_late(&beats));
        if let Some(name) = stalled {
            if self.told != stalled {
                error!(
                    message = "A loop does not come round; the watchdog is not fed.",
                    name
                );
            }
            self.told = stalled;
            return;
        }
        self.told = None;
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
            warn!(message = "The service manager could not be told.", %error);
        }
    }
}

impl Core {
    /// The loops, each with its last turn.
    fn turns(&self) -> Vec<Beat> {
        let age = |at: Option<Instant>| at.map(|at| at.elapsed());
        let health = self.recorder.health();
        let every = compare_every(&self.settings);
        let comparing = every.saturating_mul(2) + STALE + self.drift_pause();
        let guard = self.names.is_serving().then_some(Duration::ZERO);
        vec![
            ("ring reader", age(health.drained), STALE),
            ("log writer", age(health.settled), STALE),
            ("reconcile", age(self.beats.compared), comparing),
            ("DNS guard", guard, STALE),
        ]
    }
}

/// The first that is late, or never came.
fn first_late(beats: &[Beat]) -> Option<&'static str> {
    beats
        .iter()
        .find(|(_, age, most)| age.is_none_or(|age| age > *most))
        .map(|(name, ..)| *name)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loop_that_is_late_or_never_came_is_enough() {
        let second = Duration::from_secs(1);
        let fine = ("a", Some(second), STALE);
        assert_eq!(first_late(&[fine, ("b", Some(STALE), STALE)]), None);
        let late = ("b", Some(STALE + second), STALE);
        assert_eq!(first_late(&[fine, late]), Some("b"));
        assert_eq!(first_late(&[fine, ("c", None, STALE)]), Some("c"));
    }
}
