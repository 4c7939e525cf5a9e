//! The examples and the format's description hold what they promise.

use std::path::{Path, PathBuf};

use meshlab::Scenario;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn every_example_is_a_valid_scenario() {
    let folder = root().join("deploy/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        // Examples of other things, such as an agent's configuration, have no steps.
        let is_scenario = std::fs::read_to_string(&path).is_ok_and(|text| text.contains("\nsteps:\n"));
        if is_scenario {
            let (scenario, _) = Scenario::load(&path).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(Some(scenario.name.as_str()), path.file_stem().and_then(|stem| stem.to_str()));
            assert!(!scenario.steps.is_empty());
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen} examples in {}", folder.display());
}

#[test]
fn every_scenario_in_the_description_is_valid() {
    let text = std::fs::read_to_string(root().join("docs/meshlab.md")).unwrap();
    let blocks: Vec<&str> =
        text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 6);
    for block in blocks {
        Scenario::parse(block, "docs/meshlab.md").unwrap_or_else(|error| panic!("{error}\n{block}"));
    }
}

#[test]
fn every_field_of_the_schema_is_described() {
    let text = std::fs::read_to_string(root().join("docs/meshlab.md")).unwrap();
    let schema: serde_json::Value = serde_json::from_str(&meshlab::scenario::json_schema_text()).unwrap();
    let mut fields = Vec::new();
    collect(&schema, &mut fields);
    assert!(fields.len() > 40);
    for field in fields {
        let written = [format!("`{field}`"), format!("`{field}:"), format!("{field}:")];
        assert!(
            written.iter().any(|form| text.contains(form)),
            "docs/meshlab.md says nothing about `{field}`"
        );
    }
}

fn collect(value: &serde_json::Value, fields: &mut Vec<String>) {
    if let Some(properties) = value.get("properties").and_then(|p| p.as_object()) {
        fields.extend(properties.keys().cloned());
    }
    match value {
        serde_json::Value::Object(map) => map.values().for_each(|inner| collect(inner, fields)),
        serde_json::Value::Array(list) => list.iter().for_each(|inner| collect(inner, fields)),
        _ => {}
    }
}
