//! Lines that say the same again, for people: the first is shown at once, its repeats as one line
//! every few seconds. Pure: whoever shows them says what time it is.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::policy::tables::UnixMillis;

/// How long repeats are kept back, in milliseconds.
const HOLD: i64 = 5_000;
/// Kinds remembered; beyond them nothing is folded.
const KINDS: usize = 1024;

/// What was shown lately, and what repeats it.
#[derive(Debug, Default)]
pub struct Repeats {
    kinds: HashMap<String, Kind>,
}

/// One sort of line.
#[derive(Debug)]
struct Kind {
    /// When one was shown last.
    shown: UnixMillis,
    /// The last repeat, and the attempts of all.
    held: Option<(Value, u64)>,
}

// === impl Repeats ===

impl Repeats {
    /// Takes an event in; returns those to show now, in the order of their times but for what was
    /// held. Of a repeat that is shown `count` is the attempts of all that it stands for.
    pub fn put(&mut self, event: Value) -> Vec<Value> {
        let time = event["time"].as_i64().unwrap_or_default();
        let mut shown = self.due(time);
        let Some(kind) = kind(&event) else {
            shown.push(event);
            return shown;
        };
        match self.kinds.get_mut(&kind) {
            Some(known) => {
                let before = known.held.take().map_or(0, |(_, attempts)| attempts);
                let attempts = before.saturating_add(attempts(&event));
                known.held = Some((event, attempts));
            }
            None => {
                if self.kinds.len() < KINDS {
                    let first = Kind {
                        shown: time,
                        held: None,
                    };
                    self.kinds.insert(kind, first);
                }
                shown.push(event);
            }
        }
        shown
    }

    /// What has been held for long enough by then.
    pub fn due(&mut self, now: UnixMillis) -> Vec<Value> {
        let mut shown = Vec::new();
        self.kinds.retain(|_, kind| {
            // A clock that was put back must not hold lines for as long as that took.
            if (0..HOLD).contains(&now.saturating_sub(kind.shown)) {
                return true;
            }
            let Some(held) = kind.held.take() else {
                return false;
            };
            kind.shown = now;
            shown.push(folded(held));
            true
        });
        by_time(shown)
    }

    /// All that is held.
    pub fn rest(&mut self) -> Vec<Value> {
        let held = self.kinds.drain().filter_map(|(_, kind)| kind.held);
        by_time(held.map(folded).collect())
    }
}

fn by_time(mut events: Vec<Value>) -> Vec<Value> {
    events.sort_by_key(|event| event["time"].as_i64());
    events
}

fn folded((mut event, attempts): (Value, u64)) -> Value {
    if attempts > 1
        && let Some(event) = event.as_object_mut()
    {
        event.insert("count".to_owned(), json!(attempts));
    }
    event
}

fn attempts(event: &Value) -> u64 {
    event["count"].as_u64().unwrap_or(1)
}

/// What two lines have in common that say the same; none for those that are never folded.
fn kind(event: &Value) -> Option<String> {
    if event["class_uid"] != 4001 || !event["unmapped"]["lost"].is_null() {
        return None;
    }
    let parts = [
        &event["ai_agent"]["uid"],
        &event["unmapped"]["verdict"],
        &event["unmapped"]["reason"],
        &event["unmapped"]["hook"],
        &event["unmapped"]["socket_type"],
        &event["firewall_rule"]["uid"],
        &event["connection_info"]["protocol_name"],
        &event["dst_endpoint"]["ip"],
        &event["dst_endpoint"]["port"],
        &event["actor"]["process"]["name"],
    ];
    Some(Value::from_iter(parts.into_iter().cloned()).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time: i64, agent: &str, port: u16, count: Option<u64>) -> Value {
        let mut event = json!({
            "class_uid": 4001,
            "time": time,
            "ai_agent": { "uid": agent },
            "dst_endpoint": { "ip": "192.0.2.1", "port": port },
        });
        if let Some(count) = count {
            event["count"] = json!(count);
        }
        event
    }

    /// Time and attempts.
    fn told(events: &[Value]) -> Vec<(i64, u64)> {
        let told = |event: &Value| (event["time"].as_i64().unwrap(), attempts(event));
        events.iter().map(told).collect()
    }

    #[test]
    fn the_first_is_shown_at_once_and_repeats_together() {
        let mut repeats = Repeats::default();
        assert_eq!(told(&repeats.put(event(0, "a", 1, None))), [(0, 1)]);
        for time in 1..5 {
            assert!(repeats.put(event(time * 1000, "a", 1, Some(10))).is_empty());
        }
        // Others are not held up, whatever floods.
        assert_eq!(told(&repeats.put(event(4_500, "b", 1, None))), [(4_500, 1)]);
        assert_eq!(told(&repeats.put(event(4_600, "a", 2, None))), [(4_600, 1)]);
        assert!(repeats.due(4_999).is_empty());
        assert_eq!(told(&repeats.due(5_000)), [(4_000, 40)]);
        assert!(repeats.put(event(6_000, "a", 1, None)).is_empty());
        assert_eq!(told(&repeats.rest()), [(6_000, 1)]);
        assert!(repeats.rest().is_empty());
    }

    #[test]
    fn attempts_shown_are_those_put_in() {
        let mut repeats = Repeats::default();
        let mut shown = 0;
        for step in 0..5_000_i64 {
            let event = event(step * 37, "a", u16::try_from(step % 7).unwrap(), Some(3));
            shown += told(&repeats.put(event))
                .iter()
                .map(|(_, n)| n)
                .sum::<u64>();
        }
        shown += told(&repeats.rest()).iter().map(|(_, n)| n).sum::<u64>();
        assert_eq!(shown, 15_000);
    }

    #[test]
    fn what_is_quiet_for_long_is_forgotten_and_other_events_pass() {
        let mut repeats = Repeats::default();
        repeats.put(event(0, "a", 1, None));
        assert_eq!(told(&repeats.put(event(5_000, "a", 1, None))), [(5_000, 1)]);
        let other = json!({ "class_uid": 3004, "time": 5_001 });
        for _ in 0..2 {
            assert_eq!(repeats.put(other.clone()), std::slice::from_ref(&other));
        }
        let lost = json!({ "class_uid": 4001, "time": 1, "unmapped": { "lost": { "rate": 2 } } });
        for _ in 0..2 {
            assert_eq!(repeats.put(lost.clone()), std::slice::from_ref(&lost));
        }
    }

    #[test]
    fn a_clock_that_goes_back_holds_nothing_for_long() {
        let mut repeats = Repeats::default();
        repeats.put(event(1_000_000, "a", 1, None));
        repeats.put(event(1_000_001, "a", 1, None));
        assert_eq!(told(&repeats.due(5)), [(1_000_001, 1)]);
    }

    #[test]
    fn more_kinds_than_are_remembered_are_shown_each() {
        let mut repeats = Repeats::default();
        for port in 0..2_000 {
            assert_eq!(repeats.put(event(1, "a", port, None)).len(), 1);
        }
        assert!(repeats.put(event(2, "a", 5, None)).is_empty());
        assert_eq!(repeats.put(event(2, "a", 1_999, None)).len(), 1);
    }
}
