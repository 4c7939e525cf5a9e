//! Any JSON is a label selector or is refused, and one that is accepted means what its parts say.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use mesh_policy::LabelSelector;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let Ok(selector) = serde_json::from_value::<LabelSelector>(value.clone()) else { return };
    let text = selector.to_string();
    assert!(!text.is_empty());
    let wanted: BTreeMap<String, String> = match value.get("matchLabels") {
        Some(Value::Object(labels)) => {
            labels.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
        }
        _ => BTreeMap::new(),
    };
    let alone = value.get("matchExpressions").and_then(Value::as_array).is_none_or(Vec::is_empty);
    if alone {
        assert!(selector.matches(&wanted), "what it asks for is what it selects");
    }
    // A label less, and it is not selected any more.
    if let Some(key) = wanted.keys().next() {
        let mut less = wanted.clone();
        less.remove(key);
        assert!(!selector.matches(&less));
    }
    // What has an additional label that nobody asks for stays selected.
    let mut more = wanted;
    let before = selector.matches(&more);
    if !data.windows(9).any(|part| part == b"sennit.zz") {
        more.insert("sennit.zz".to_owned(), String::new());
        assert_eq!(selector.matches(&more), before);
    }
});
