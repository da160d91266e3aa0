//! The OCSF schemas that events are held against: 1.9.0 out of a folder, 1.8.0 out of PyPI's
//! `ocsf-json-schema`. Where they are missing that is an error and not passed over: `cargo xtask
//! test` leaves out the tests that need them, and counts them as not tested.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses what it needs, and a schema that cannot be read has failed it"
)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use jsonschema::Validator;
use serde_json::Value;

/// Validators by class.
pub struct Schemas(Vec<(u64, Validator)>);

/// The classes used, by the names that the package has for them.
const PACKAGED: &str = r#"
import json
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema
schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version="1.8.0"))
names = {
    2003: "compliance_finding",
    2004: "detection_finding",
    3004: "entity_management",
    4001: "network_activity",
    4003: "dns_activity",
    5019: "device_config_state_change",
    6002: "application_lifecycle",
}
print(json.dumps({uid: schema.get_class_schema(name, ["host", "security_control"])
                  for uid, name in names.items()}))
"#;

impl Schemas {
    /// OCSF 1.9.0: `REMIT_OCSF_SCHEMAS`, or beside the checkout.
    pub fn of_1_9() -> Self {
        let dir = env::var_os("REMIT_OCSF_SCHEMAS").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/ocsf"),
            PathBuf::from,
        );
        let listing = fs::read_dir(&dir).unwrap_or_else(|error| {
            panic!(
                "no OCSF schemas at {}: {error}; set REMIT_OCSF_SCHEMAS",
                dir.display()
            )
        });
        let mut validators = Vec::new();
        for file in listing {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let Some(stem) = name.strip_suffix(".schema.json") else {
                continue;
            };
            let class: u64 = stem.rsplit('.').next().unwrap().parse().unwrap();
            let schema = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            validators.push((class, jsonschema::validator_for(&schema).unwrap()));
        }
        Self(validators)
    }

    /// OCSF 1.8.0, by `REMIT_PYTHON` or `python3`.
    pub fn of_1_8() -> Self {
        let python = env::var_os("REMIT_PYTHON").unwrap_or_else(|| "python3".into());
        let printed = Command::new(&python).args(["-c", PACKAGED]).output();
        let printed = printed.unwrap_or_else(|error| panic!("no {}: {error}", python.display()));
        assert!(
            printed.status.success(),
            "{} has no package `ocsf-json-schema`; set REMIT_PYTHON: {}",
            python.display(),
            String::from_utf8_lossy(&printed.stderr)
        );
        let schemas: Value = serde_json::from_slice(&printed.stdout).unwrap();
        let validators = schemas.as_object().unwrap().iter().map(|(uid, schema)| {
            let validator = jsonschema::validator_for(schema).unwrap();
            (uid.parse().unwrap(), validator)
        });
        Self(validators.collect())
    }

    /// Whether it is of its class; panics where there is no schema of that.
    pub fn is_valid(&self, event: &Value) -> bool {
        self.of(event).is_valid(event)
    }

    /// Panics, with all that is wrong, unless it is.
    pub fn check(&self, event: &Value) {
        let errors: Vec<String> = self
            .of(event)
            .iter_errors(event)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}\n{event:#}");
    }

    fn of(&self, event: &Value) -> &Validator {
        let class = event["class_uid"].as_u64().unwrap();
        let found = self.0.iter().find(|(known, _)| *known == class);
        let (_, validator) = found.unwrap_or_else(|| panic!("no schema of class {class}"));
        validator
    }
}
