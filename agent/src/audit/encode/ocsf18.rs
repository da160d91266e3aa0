//! OCSF 1.8.0: it has no AI agent, no record integrity and no entity after a change, so those stand
//! under `unmapped` there. Pure.

use serde_json::{Map, Value, json};

/// Attributes that 1.8.0 does not have, by the name that they get under `unmapped`.
const MOVED: [&str; 3] = ["ai_agent", "attestation_list", "updated_entity"];
/// Profiles that 1.8.0 does not have.
const PROFILES: [&str; 2] = ["ai_operation", "record_integrity"];

/// The event in its 1.8.0 form.
pub fn encode(event: &Value) -> Value {
    let Value::Object(event) = event else {
        return event.clone();
    };
    let mut event = event.clone();
    let mut moved = Map::new();
    for name in MOVED {
        if let Some(value) = event.remove(name) {
            moved.insert(name.to_owned(), value);
        }
    }
    if let Some(Value::Object(metadata)) = event.get_mut("metadata") {
        metadata.insert("version".to_owned(), json!("1.8.0"));
        if let Some(Value::Array(profiles)) = metadata.get_mut("profiles") {
            profiles.retain(|profile| !PROFILES.iter().any(|gone| profile == gone));
        }
    }
    // What an entity became, as 1.8.0 says it.
    if let Some(updated) = moved.get("updated_entity") {
        event.insert("entity_result".to_owned(), updated.clone());
        moved.remove("updated_entity");
    }
    if let Some(Value::Array(evidences)) = event.get_mut("evidences") {
        for evidence in evidences {
            if let Value::Object(evidence) = evidence {
                evidence.remove("ai_agent");
            }
        }
    }
    if !moved.is_empty() {
        let unmapped = event.entry("unmapped").or_insert_with(|| json!({}));
        if let Value::Object(unmapped) = unmapped {
            unmapped.extend(moved);
        }
    }
    Value::Object(event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::record::tests::{host, violation};

    #[test]
    fn the_agent_moves_and_nothing_else_is_lost() {
        let event = violation().to_ocsf(&host(), 1);
        let old = encode(&event);
        assert_eq!(old["metadata"]["version"], "1.8.0");
        assert_eq!(
            old["metadata"]["profiles"],
            json!(["host", "security_control"])
        );
        assert_eq!(old["unmapped"]["ai_agent"], event["ai_agent"]);
        assert!(old["ai_agent"].is_null());
        for (key, value) in event.as_object().unwrap() {
            if !matches!(key.as_str(), "ai_agent" | "metadata" | "unmapped") {
                assert_eq!(old[key], *value, "{key}");
            }
        }
    }
}
