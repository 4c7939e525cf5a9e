//! Reads the fields of manifests; what is wrong names its field.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::{Map, Value};

use crate::model::Direction;
use crate::object::ObjectError;
use crate::selector::LabelSelector;

/// As many rules, peers or ports in one list as anybody has ever needed.
const LIST_MOST: usize = 10_000;

pub(crate) type Result<T> = std::result::Result<T, ObjectError>;

/// The most faults of an object that are told, beside the first.
const FAULTS_MOST: usize = 256;

/// What is wrong with an object.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) first: Option<ObjectError>,
    pub(crate) more: Vec<ObjectError>,
}

impl Faults {
    pub(crate) fn note(&mut self, error: ObjectError) {
        match &self.first {
            None => self.first = Some(error),
            Some(_) if self.more.len() < FAULTS_MOST => self.more.push(error),
            Some(_) => {}
        }
    }

    pub(crate) fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.note(error)).ok()
    }
}

pub(crate) fn shown(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.chars().take(64).collect()
}

pub(crate) fn known(at: &str, object: &Map<String, Value>, fields: &[&str]) -> Result<()> {
    match object.keys().find(|key| !fields.contains(&key.as_str())) {
        Some(strange) => {
            let field: String = strange.chars().take(64).collect();
            let reason = format!("no such field is known; those are {}", fields.join(", "));
            Err(ObjectError::new(format!("{at}.{field}"), reason))
        }
        None => Ok(()),
    }
}

pub(crate) fn object<'a>(at: &str, value: &'a Value, fields: &[&str]) -> Result<&'a Map<String, Value>> {
    let object = value.as_object().ok_or_else(|| ObjectError::new(at, "is no object"))?;
    known(at, object, fields)?;
    Ok(object)
}

/// A list; absent and null are an empty one.
pub(crate) fn list<'a>(at: &str, value: Option<&'a Value>) -> Result<&'a [Value]> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) if list.len() <= LIST_MOST => Ok(list),
        Some(Value::Array(_)) => Err(ObjectError::new(at, format!("has more than {LIST_MOST} entries"))),
        Some(_) => Err(ObjectError::new(at, "is no list")),
    }
}

/// Which ways a policy judges, as lists of types say it; `None`: nothing is said.
pub(crate) fn directions(at: &str, value: Option<&Value>) -> Result<Option<BTreeSet<Direction>>> {
    let types = list(at, value)?.iter().enumerate().map(|(index, entry)| match entry.as_str() {
        Some("Ingress") => Ok(Direction::Ingress),
        Some("Egress") => Ok(Direction::Egress),
        _ => {
            let reason = format!("{:?}; use Ingress or Egress", shown(entry));
            Err(ObjectError::new(format!("{at}[{index}]"), reason))
        }
    });
    let types: BTreeSet<Direction> = types.collect::<Result<_>>()?;
    Ok(Some(types).filter(|types| !types.is_empty()))
}

pub(crate) fn selector(at: &str, value: Option<&Value>) -> Result<Option<LabelSelector>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            serde_json::from_value(value.clone()).map(Some).map_err(|e| ObjectError::new(at, e.to_string()))
        }
    }
}

/// A selector that has to be there.
pub(crate) fn required_selector(at: &str, value: Option<&Value>) -> Result<LabelSelector> {
    selector(at, value)?.ok_or_else(|| ObjectError::new(at, "is missing; {} selects everything"))
}

/// The only field of an object that has exactly one of these.
pub(crate) fn one_of<'a>(
    at: &str,
    value: Option<&'a Value>,
    fields: &[&str],
) -> Result<(&'a str, &'a Value)> {
    let object = object(at, value.unwrap_or(&Value::Null), fields)?;
    let mut set = object.iter().filter(|(_, value)| !value.is_null());
    match (set.next(), set.next()) {
        (Some((field, value)), None) => Ok((field, value)),
        _ => Err(ObjectError::new(at, format!("needs exactly one of {}", fields.join(", ")))),
    }
}

pub(crate) fn net(at: &str, value: &Value) -> Result<IpNet> {
    let net: Option<IpNet> = value.as_str().and_then(|text| text.parse().ok());
    // An IPv4 address in IPv6 form would be matched by no packet.
    let net = net.filter(|net| !matches!(net, IpNet::V6(net) if net.addr().to_ipv4_mapped().is_some()));
    net.map(|net| net.trunc()).ok_or_else(|| {
        ObjectError::new(at, format!("{:?} is no prefix such as 10.0.0.0/8 or fd00::/8", shown(value)))
    })
}

pub(crate) fn number(at: &str, value: &Value) -> Result<u16> {
    let number = value.as_u64().and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    number.ok_or_else(|| ObjectError::new(at, format!("{:?}; use a number from 1 to 65535", shown(value))))
}

/// `IANA_SVC_NAME` (RFC 6335): at most 15 small letters, digits and hyphens, one letter among them.
pub(crate) fn port_name(at: &str, name: &str) -> Result<String> {
    let fits = (1..=15).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--");
    if fits {
        Ok(name.to_owned())
    } else {
        let shown: String = name.chars().take(64).collect();
        Err(ObjectError::new(
            at,
            format!(
                "{shown:?} is no name of a port: 1 to 15 of a-z, 0-9 and single hyphens inside, one letter at least"
            ),
        ))
    }
}
