//! Kubernetes label selectors (`metav1.LabelSelector`), parsed into a form that cannot be wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;

/// Why a selector was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// An operator that does not exist.
    #[error("matchExpressions: key {key:?}: operator {operator:?}; use In, NotIn, Exists or DoesNotExist")]
    Operator {
        /// The label's key.
        key: String,
        /// What stands there.
        operator: String,
    },
    /// `In` and `NotIn` without values.
    #[error("matchExpressions: key {key:?}: {operator} needs at least one value")]
    NoValues {
        /// The label's key.
        key: String,
        /// The operator.
        operator: String,
    },
    /// `Exists` and `DoesNotExist` with values.
    #[error("matchExpressions: key {key:?}: {operator} takes no values")]
    Values {
        /// The label's key.
        key: String,
        /// The operator.
        operator: String,
    },
    /// No key.
    #[error("matchExpressions: an expression without a key")]
    NoKey,
    /// No label can have that key.
    #[error(
        "key {0:?}: a label's key is a name of 1 to 63 letters, digits, -, _ and ., perhaps with a DNS name and / before it"
    )]
    Key(String),
    /// No label can have that value.
    #[error(
        "key {key:?}: value {value:?}: a label's value is at most 63 letters, digits, -, _ and ., with a letter or digit at both ends"
    )]
    Value {
        /// The label's key.
        key: String,
        /// What stands there.
        value: String,
    },
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// What a label's value or the name of its key may be, where it is not empty.
fn is_name(text: &str) -> bool {
    let ends = [text.as_bytes().first(), text.as_bytes().last()];
    text.len() <= 63
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && ends.into_iter().flatten().all(u8::is_ascii_alphanumeric)
}

/// A DNS name (RFC 1123, in small letters), as it may stand before a key's name.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn checked(key: &str, values: &BTreeSet<String>) -> Result<(), SelectorError> {
    let (domain, name) = match key.split_once('/') {
        Some((domain, name)) => (Some(domain), name),
        None => (None, key),
    };
    if name.is_empty() || !is_name(name) || !domain.is_none_or(is_domain) {
        return Err(SelectorError::Key(shown(key)));
    }
    match values.iter().find(|value| !is_name(value)) {
        Some(value) => Err(SelectorError::Value { key: shown(key), value: shown(value) }),
        None => Ok(()),
    }
}

/// One condition on one label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Requirement {
    /// The label is there with one of these values.
    In(String, BTreeSet<String>),
    /// The label is absent or has none of these values.
    NotIn(String, BTreeSet<String>),
    /// The label is there.
    Exists(String),
    /// The label is absent.
    DoesNotExist(String),
    /// The label is there, and this is part of its value.
    Contains(String, String),
    /// The label is there, and its value begins so.
    StartsWith(String, String),
    /// The label is there, and its value ends so.
    EndsWith(String, String),
    /// One of these selects.
    AnyOf(BTreeSet<LabelSelector>),
    /// This does not select.
    Not(Box<LabelSelector>),
}

impl Requirement {
    /// Whether these labels meet the condition.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Self::Exists(key) => labels.contains_key(key),
            Self::DoesNotExist(key) => !labels.contains_key(key),
            Self::Contains(key, text) => labels.get(key).is_some_and(|value| value.contains(text)),
            Self::StartsWith(key, text) => labels.get(key).is_some_and(|value| value.starts_with(text)),
            Self::EndsWith(key, text) => labels.get(key).is_some_and(|value| value.ends_with(text)),
            Self::AnyOf(selectors) => selectors.iter().any(|selector| selector.matches(labels)),
            Self::Not(selector) => !selector.matches(labels),
        }
    }
}

/// A label selector: all of its requirements have to be met. Without any it selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "Written")]
pub struct LabelSelector {
    requirements: BTreeSet<Requirement>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    #[serde(default)]
    match_labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    match_expressions: Option<Vec<Expression>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expression {
    #[serde(default)]
    key: String,
    #[serde(default)]
    operator: String,
    #[serde(default)]
    values: Option<Vec<String>>,
}

impl TryFrom<Written> for LabelSelector {
    type Error = SelectorError;

    fn try_from(written: Written) -> Result<Self, SelectorError> {
        let mut requirements = BTreeSet::new();
        for (key, value) in written.match_labels.unwrap_or_default() {
            let values = BTreeSet::from([value]);
            checked(&key, &values)?;
            requirements.insert(Requirement::In(key, values));
        }
        for expression in written.match_expressions.unwrap_or_default() {
            requirements.insert(expression.try_into()?);
        }
        Ok(Self { requirements })
    }
}

impl TryFrom<Expression> for Requirement {
    type Error = SelectorError;

    fn try_from(Expression { key, operator, values }: Expression) -> Result<Self, SelectorError> {
        if key.is_empty() {
            return Err(SelectorError::NoKey);
        }
        let values: BTreeSet<String> = values.unwrap_or_default().into_iter().collect();
        checked(&key, &values)?;
        match (operator.as_str(), values.is_empty()) {
            ("In", false) => Ok(Self::In(key, values)),
            ("NotIn", false) => Ok(Self::NotIn(key, values)),
            ("Exists", true) => Ok(Self::Exists(key)),
            ("DoesNotExist", true) => Ok(Self::DoesNotExist(key)),
            ("In" | "NotIn", true) => Err(SelectorError::NoValues { key, operator }),
            ("Exists" | "DoesNotExist", false) => Err(SelectorError::Values { key, operator }),
            _ => Err(SelectorError::Operator { key, operator }),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &BTreeSet<String>| values.iter().cloned().collect::<Vec<_>>().join(", ");
        match self {
            Self::In(key, values) if values.len() == 1 => write!(f, "{key}={}", list(values)),
            Self::In(key, values) => write!(f, "{key} in ({})", list(values)),
            Self::NotIn(key, values) => write!(f, "{key} notin ({})", list(values)),
            Self::Exists(key) => f.write_str(key),
            Self::DoesNotExist(key) => write!(f, "!{key}"),
            Self::Contains(key, text) => write!(f, "{key} contains {text:?}"),
            Self::StartsWith(key, text) => write!(f, "{key} starts with {text:?}"),
            Self::EndsWith(key, text) => write!(f, "{key} ends with {text:?}"),
            Self::AnyOf(selectors) => {
                let all: Vec<String> = selectors.iter().map(ToString::to_string).collect();
                write!(f, "({})", all.join(" or "))
            }
            Self::Not(selector) => write!(f, "not ({selector})"),
        }
    }
}

/// As kubectl writes selectors.
impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.requirements.is_empty() {
            return f.write_str("any labels");
        }
        for (index, requirement) in self.requirements.iter().enumerate() {
            write!(f, "{}{requirement}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl LabelSelector {
    /// All of these have to be met.
    pub fn of(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        Self { requirements: requirements.into_iter().collect() }
    }

    /// What has to be met.
    pub fn into_requirements(self) -> impl Iterator<Item = Requirement> {
        self.requirements.into_iter()
    }

    /// Whether these labels are selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(labels))
    }

    /// All keys that it speaks of.
    pub fn keys(&self) -> BTreeSet<&str> {
        fn of(requirement: &Requirement) -> BTreeSet<&str> {
            match requirement {
                Requirement::In(key, _)
                | Requirement::NotIn(key, _)
                | Requirement::Exists(key)
                | Requirement::DoesNotExist(key)
                | Requirement::Contains(key, _)
                | Requirement::StartsWith(key, _)
                | Requirement::EndsWith(key, _) => [key.as_str()].into(),
                Requirement::AnyOf(selectors) => selectors.iter().flat_map(LabelSelector::keys).collect(),
                Requirement::Not(selector) => selector.keys(),
            }
        }
        self.requirements.iter().flat_map(of).collect()
    }

    /// How many values and conditions have to be looked at, at most.
    pub fn values(&self) -> usize {
        fn of(requirement: &Requirement) -> usize {
            match requirement {
                Requirement::In(_, values) | Requirement::NotIn(_, values) => values.len(),
                Requirement::AnyOf(selectors) => selectors.iter().map(LabelSelector::values).sum(),
                Requirement::Not(selector) => selector.values(),
                _ => 1,
            }
        }
        self.requirements.iter().map(of).sum()
    }

    /// Keys that whatever is selected has, each with all values that it can have then.
    pub fn values_of_keys(&self) -> impl Iterator<Item = (&str, &BTreeSet<String>)> {
        self.requirements.iter().filter_map(|requirement| match requirement {
            Requirement::In(key, values) => Some((key.as_str(), values)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn matches(selector: Value, labels: Value) -> bool {
        let selector: LabelSelector = serde_json::from_value(selector).unwrap();
        selector.matches(&serde_json::from_value(labels).unwrap())
    }

    fn refusal(selector: Value) -> String {
        serde_json::from_value::<LabelSelector>(selector).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_selector_selects_everything() {
        assert!(matches(json!({}), json!({})));
        assert!(matches(json!({"matchLabels": null, "matchExpressions": null}), json!({"a": "b"})));
    }

    #[test]
    fn labels_and_expressions_all_have_to_match() {
        let selector = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a", "b"]}],
        });
        assert!(matches(selector.clone(), json!({"app": "web", "tier": "b", "more": "x"})));
        assert!(!matches(selector.clone(), json!({"app": "web", "tier": "c"})));
        assert!(!matches(selector, json!({"tier": "a"})));
    }

    #[test]
    fn an_absent_label_meets_not_in_and_does_not_exist_only() {
        let with = |operator: &str, values: Value| {
            matches(
                json!({"matchExpressions": [{"key": "k", "operator": operator, "values": values}]}),
                json!({}),
            )
        };
        assert!(with("NotIn", json!(["a"])) && with("DoesNotExist", json!([])));
        assert!(!with("In", json!(["a"])) && !with("Exists", json!(null)));
    }

    #[test]
    fn one_key_may_have_several_requirements() {
        let selector = json!({"matchExpressions": [
            {"key": "k", "operator": "In", "values": ["a", "b"]},
            {"key": "k", "operator": "NotIn", "values": ["b"]},
        ]});
        assert!(matches(selector.clone(), json!({"k": "a"})));
        assert!(!matches(selector, json!({"k": "b"})));
    }

    #[test]
    fn malformed_selectors_are_refused_by_the_name_of_their_key() {
        for (operator, values) in
            [("in", json!(["a"])), ("In", json!([])), ("Exists", json!(["a"])), ("", json!([]))]
        {
            let message = refusal(
                json!({"matchExpressions": [{"key": "colour", "operator": operator, "values": values}]}),
            );
            assert!(message.contains("colour"), "{message}");
        }
        assert!(refusal(json!({"matchExpressions": [{"operator": "Exists"}]})).contains("without a key"));
        assert!(refusal(json!({"matchLabel": {}})).contains("matchLabel"));
    }

    #[test]
    fn what_no_label_can_be_is_refused() {
        for value in ["web server", "-a", "a.", "\u{e4}", &"a".repeat(64)] {
            let message = refusal(json!({"matchLabels": {"app": value}}));
            assert!(message.contains("key \"app\": value"), "{message}");
        }
        for key in ["", "a b", "/a", "a/", "Example.com/a", "a/b/c", "-a", &"a".repeat(64)] {
            refusal(json!({"matchLabels": {key: "x"}}));
        }
        for key in ["a", "app.kubernetes.io/name", "A_b.c-d", "x.y/Z"] {
            assert!(matches(json!({"matchLabels": {key: ""}}), json!({key: ""})));
        }
    }
}
