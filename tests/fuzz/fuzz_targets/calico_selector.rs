//! Any text as one of Calico's selectors: none panics, an error lies inside of the text, and a negation selects the rest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_policy::calico::selector::parse;
use mesh_policy::model::Labels;

fuzz_target!(|text: &str| {
    let expression = match parse(text) {
        Ok(expression) => expression,
        Err(error) => {
            assert!(error.at >= 1 && error.at <= text.len().max(1) + 1);
            return;
        }
    };
    let word = text.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
    for labels in [
        Labels::new(),
        [("a".to_owned(), word.to_owned())].into(),
        [(word.to_owned(), "a".to_owned())].into(),
    ] {
        let selected = expression.selector.matches(&labels);
        if let Ok(negated) = parse(&format!("!({text})")) {
            assert!(text.trim().is_empty() || negated.selector.matches(&labels) != selected);
        }
        drop(expression.selector.to_string());
    }
});
