//! Cases of label selectors: what they match, what is none, and what means the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use mesh_policy::LabelSelector;
use mesh_policy::calico::selector::parse;
use mesh_policy::model::Labels;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct File {
    grammar: String,
    #[serde(rename = "match")]
    matches: Vec<Row>,
    invalid: Vec<Wrong>,
    #[serde(default)]
    canonical: Vec<Pair>,
}

#[derive(Deserialize)]
struct Row {
    selector: Value,
    labels: Labels,
    #[serde(rename = "match")]
    matches: bool,
}

#[derive(Deserialize)]
struct Wrong {
    selector: Value,
}

#[derive(Deserialize)]
struct Pair {
    selector: Value,
    canonical: Value,
}

/// What a selector is in a grammar; `Ok(None)`: one that is not there, and matches nothing.
fn read(grammar: &str, selector: &Value) -> Result<Option<LabelSelector>, String> {
    match (grammar, selector) {
        (_, Value::Null) => Ok(None),
        ("calico", Value::String(text)) => {
            parse(text).map(|expression| Some(expression.selector)).map_err(|e| e.to_string())
        }
        ("kubernetes", value) => serde_json::from_value(value.clone()).map(Some).map_err(|e| e.to_string()),
        _ => Err(format!("grammar {grammar:?} is not known")),
    }
}

/// Each case of a folder: what it is, and whether we agree.
///
/// # Errors
/// A folder or a file that cannot be read.
pub fn cases(folder: &Path) -> anyhow::Result<Vec<(String, bool)>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let file: File = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let of = |selector: &Value| read(&file.grammar, selector);
        for Row { selector, labels, matches } in &file.matches {
            let found =
                of(selector).map(|selector| selector.is_some_and(|selector| selector.matches(labels)));
            cases.push((format!("{selector} on {labels:?}: {found:?}"), found == Ok(*matches)));
        }
        for Wrong { selector } in &file.invalid {
            let found = of(selector);
            cases.push((format!("{selector} is none: {found:?}"), found.is_err()));
        }
        let all: BTreeSet<&Labels> = file.matches.iter().map(|row| &row.labels).collect();
        for Pair { selector, canonical } in &file.canonical {
            let same = match (of(selector), of(canonical)) {
                (Ok(Some(one)), Ok(Some(other))) => {
                    all.iter().all(|labels| one.matches(labels) == other.matches(labels))
                }
                _ => false,
            };
            cases.push((format!("{selector} means {canonical}"), same));
        }
    }
    Ok(cases)
}
