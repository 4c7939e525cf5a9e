//! Conditions on a status document, decided without any I/O.

use serde_json::Value;

use crate::scenario::step::Condition;

/// Refuses a condition that could never mean anything.
///
/// # Errors
/// A sentence with the remedy.
pub fn check(condition: &Condition) -> Result<(), String> {
    let Condition { path, equals, not_equals, contains, not_contains, count, at_least, at_most, exists } =
        condition;
    if !path.is_empty() && !path.starts_with('/') {
        return Err(format!("status: path `{path}` has to start with a slash, as in /peers/*/state"));
    }
    let asked = [
        equals.is_some(),
        not_equals.is_some(),
        contains.is_some(),
        not_contains.is_some(),
        count.is_some(),
        at_least.is_some(),
        at_most.is_some(),
        exists.is_some(),
    ];
    if asked.contains(&true) {
        Ok(())
    } else {
        Err(format!(
            "status: the condition on `{path}` asks nothing; add equals, notEquals, contains, notContains, count, \
             atLeast, atMost or exists"
        ))
    }
}

/// Whether the condition holds on the document; otherwise a sentence saying what was found.
///
/// # Errors
/// The sentence.
pub fn holds(condition: &Condition, document: &Value) -> Result<(), String> {
    let path = &condition.path;
    let found: Vec<&Value> = resolve(document, path).into_iter().filter(|value| !value.is_null()).collect();
    if let Some(exists) = condition.exists
        && exists == found.is_empty()
    {
        return Err(if exists {
            format!("{path}: nothing is there")
        } else {
            format!("{path}: should not be there, but is {}", shortened(found[0]))
        });
    }
    let only_absence = condition.equals.is_none()
        && condition.contains.is_none()
        && condition.count.is_none()
        && condition.at_least.is_none()
        && condition.at_most.is_none();
    if found.is_empty() && !only_absence {
        return Err(format!("{path}: nothing is there"));
    }
    found.iter().try_for_each(|value| holds_for(condition, value))
}

fn holds_for(condition: &Condition, value: &Value) -> Result<(), String> {
    let path = &condition.path;
    let is = || shortened(value);
    if let Some(wanted) = &condition.equals
        && !same(value, wanted)
    {
        return Err(format!("{path}: should equal {wanted}, but is {}", is()));
    }
    if let Some(unwanted) = &condition.not_equals
        && same(value, unwanted)
    {
        return Err(format!("{path}: should differ from {unwanted}"));
    }
    if let Some(text) = &condition.contains
        && !mentions(value, text)
    {
        return Err(format!("{path}: should contain `{text}`, but is {}", is()));
    }
    if let Some(text) = &condition.not_contains
        && mentions(value, text)
    {
        return Err(format!("{path}: should not contain `{text}`, but is {}", is()));
    }
    if let Some(count) = condition.count
        && length(value) != Some(count)
    {
        return Err(format!("{path}: should have {count} elements, but is {}", is()));
    }
    let amount = value.as_f64().or_else(|| length(value).map(|n| n as f64));
    if let Some(least) = condition.at_least
        && amount.is_none_or(|amount| amount < least)
    {
        return Err(format!("{path}: should be at least {least}, but is {}", is()));
    }
    if let Some(most) = condition.at_most
        && amount.is_none_or(|amount| amount > most)
    {
        return Err(format!("{path}: should be at most {most}, but is {}", is()));
    }
    Ok(())
}

/// All the values that a path leads to.
fn resolve<'a>(document: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![document];
    for segment in path.split('/').skip(1) {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        found = found.into_iter().flat_map(|value| below(value, &segment)).collect();
    }
    found
}

fn below<'a>(value: &'a Value, segment: &str) -> Vec<&'a Value> {
    match value {
        Value::Object(map) if segment == "*" => map.values().collect(),
        Value::Object(map) => map.get(segment).into_iter().collect(),
        Value::Array(list) if segment == "*" => list.iter().collect(),
        Value::Array(list) => match segment.parse::<usize>() {
            Ok(index) => list.get(index).into_iter().collect(),
            Err(_) => {
                let named = |element: &&Value| {
                    ["name", "node"]
                        .iter()
                        .any(|key| element.get(key).and_then(Value::as_str) == Some(segment))
                };
                list.iter().filter(named).collect()
            }
        },
        _ => Vec::new(),
    }
}

/// Equality that does not tell `1` from `1.0`.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

fn mentions(value: &Value, text: &str) -> bool {
    match value {
        Value::String(found) => found.contains(text),
        Value::Array(list) => list.iter().any(|element| mentions(element, text)),
        Value::Object(map) => map.values().any(|element| mentions(element, text)),
        Value::Null => false,
        other => other.to_string().contains(text),
    }
}

fn length(value: &Value) -> Option<usize> {
    match value {
        Value::Array(list) => Some(list.len()),
        Value::Object(map) => Some(map.len()),
        _ => None,
    }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn condition(yaml: &str) -> Condition {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn status() -> Value {
        json!({
            "ready": true,
            "peers": [
                {"name": "gcp-1", "state": "established", "encrypted": true, "rxBytes": 7, "endpoint": null},
                {"name": "gcp-2", "state": "waiting", "encrypted": true, "rxBytes": 0},
            ],
            "refused": [{"node": "evil", "reason": "prefix 10.9.0.0/16 is not granted"}],
            "errors": [],
        })
    }

    #[test]
    fn conditions_that_hold() {
        for yaml in [
            "{path: /ready, equals: true}",
            "{path: /peers, count: 2}",
            "{path: '/peers/*/encrypted', equals: true}",
            "{path: /peers/gcp-1/state, equals: established}",
            "{path: /refused/evil/reason, contains: not granted}",
            "{path: /refused, contains: evil}",
            "{path: /errors, count: 0}",
            "{path: /errors, notContains: anything}",
            "{path: /peers/0/rxBytes, atLeast: 7, atMost: 7.0}",
            "{path: /peers/gcp-1/endpoint, exists: false}",
            "{path: /peers/gcp-9, exists: false}",
            "{path: '', contains: waiting}",
        ] {
            let condition = condition(yaml);
            check(&condition).unwrap();
            assert_eq!(holds(&condition, &status()), Ok(()), "{yaml}");
        }
    }

    #[test]
    fn conditions_that_fail_say_what_was_found() {
        for (yaml, expected) in [
            ("{path: /ready, equals: false}", "but is true"),
            ("{path: /peers, count: 3}", "should have 3"),
            ("{path: '/peers/*/state', equals: established}", "but is \"waiting\""),
            ("{path: /peers/gcp-7/state, equals: established}", "nothing is there"),
            ("{path: /nothing, contains: x}", "nothing is there"),
            ("{path: /refused, notContains: granted}", "should not contain"),
            ("{path: /peers/gcp-2/rxBytes, atLeast: 1}", "at least 1"),
            ("{path: /ready, exists: false}", "should not be there"),
        ] {
            let sentence = holds(&condition(yaml), &status()).unwrap_err();
            assert!(sentence.contains(expected), "{yaml}: {sentence}");
        }
    }

    #[test]
    fn a_condition_without_a_question_is_refused() {
        assert!(check(&condition("{path: /ready}")).unwrap_err().contains("asks nothing"));
        assert!(check(&condition("{path: ready, equals: true}")).unwrap_err().contains("slash"));
    }
}
