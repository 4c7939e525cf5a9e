//! Arbitrary bytes as a registry's file, the operator's and a node's own: no panic, no time without end, and nobody is made up.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::manifest;
use mesh_agent::registry::merge::{Source, operator, publication};

fuzz_target!(|bytes: &[u8]| {
    let Ok(parsed) = manifest::parse(bytes) else { return };
    let parsed = std::sync::Arc::new(parsed);
    let source = Source {
        path: "file.yaml".to_owned(),
        problems: parsed.problems.clone(),
        parsed: parsed.clone(),
        unknown: false,
    };
    let mut snapshot = operator(std::slice::from_ref(&source));
    assert!(snapshot.nodes.len() <= parsed.objects.len());
    for record in &mut snapshot.nodes {
        let (name, granted) = (record.name.clone(), record.pod_cidrs.clone());
        publication(record, &source, &mut snapshot.problems);
        assert_eq!(
            (&record.name, &record.pod_cidrs),
            (&name, &granted),
            "a node's own word changed what it holds"
        );
    }
});
