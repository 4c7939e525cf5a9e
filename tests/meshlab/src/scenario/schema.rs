//! The JSON schema of scenario files.

use schemars::generate::SchemaSettings;

use super::Scenario;

/// The schema as indented JSON with a final newline.
pub fn json_schema_text() -> String {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Scenario>();
    schema.insert("title".into(), "meshlab scenario".into());
    // A JSON value always prints; the fallback only spares a panic path.
    let mut text = serde_json::to_string_pretty(schema.as_value()).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_schema_is_the_one_that_the_program_prints() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/scenario.schema.json");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == json_schema_text(),
            "the committed schema is out of date; write it anew: meshlab schema > tests/meshlab/schema/scenario.schema.json"
        );
    }
}
