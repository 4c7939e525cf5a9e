//! Arbitrary bytes as a registry's file: no panic, and no time without end.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::manifest;
use mesh_agent::registry::merge::{Source, merge};

fuzz_target!(|bytes: &[u8]| {
    let Ok(parsed) = manifest::parse(bytes) else { return };
    let source = |published_by: Option<String>| Source {
        path: "file.yaml".to_owned(),
        published_by,
        objects: parsed.objects.clone(),
        problems: parsed.problems.clone(),
    };
    let merged = merge(&[source(None), source(Some("a".to_owned()))]);
    assert!(merged.nodes.len() <= parsed.objects.len());
});
