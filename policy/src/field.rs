//! Reads the fields of manifests; what is wrong names its field.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::{Map, Value};

use crate::model::Direction;
use crate::object::ObjectError;
use crate::selector::LabelSelector;

pub(crate) type Result<T> = std::result::Result<T, ObjectError>;

/// The most faults of an object that are told, beside the first.
const FAULTS_MOST: usize = 256;

/// The faults of an object, and hints about valid settings that may surprise.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) first: Option<ObjectError>,
    pub(crate) more: Vec<ObjectError>,
    pub(crate) hints: Vec<ObjectError>,
    seen: usize,
}

impl Faults {
    pub(crate) fn note(&mut self, error: ObjectError) {
        self.seen += 1;
        match &self.first {
            None => self.first = Some(error),
            Some(_) if self.more.len() < FAULTS_MOST => self.more.push(error),
            Some(_) => {}
        }
    }

    pub(crate) fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.note(error)).ok()
    }

    /// Returns the number of faults so far. If it stays the same, everything read since is valid.
    pub(crate) fn seen(&self) -> usize {
        self.seen
    }

    pub(crate) fn hint(&mut self, hint: ObjectError) {
        if self.hints.len() < FAULTS_MOST {
            self.hints.push(hint);
        }
    }

    /// Notes each field that is none of these.
    pub(crate) fn known(&mut self, at: &str, object: &Map<String, Value>, fields: &[&str]) {
        strange(at, object, fields).for_each(|fault| self.note(fault));
    }

    /// An object; fields that are none of these are noted.
    pub(crate) fn object<'a>(
        &mut self,
        at: &str,
        value: &'a Value,
        fields: &[&str],
    ) -> Option<&'a Map<String, Value>> {
        let object = value.as_object();
        match object {
            Some(object) => self.known(at, object, fields),
            None => self.note(ObjectError::new(at, "is no object")),
        }
        object
    }

    /// The entries of a list that can be read; what is wrong with the others is noted.
    pub(crate) fn each<'a, T>(
        &mut self,
        at: &str,
        value: Option<&'a Value>,
        mut read: impl FnMut(&mut Self, &str, &'a Value) -> Option<T>,
    ) -> Vec<T> {
        let entries = self.keep(list(at, value)).unwrap_or_default();
        let read = entries
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| read(self, &format!("{at}[{index}]"), entry));
        read.collect()
    }
}

pub(crate) fn shown(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.chars().take(64).collect()
}

/// Each field that is none of these, as a fault.
fn strange<'a>(
    at: &'a str,
    object: &'a Map<String, Value>,
    fields: &'a [&str],
) -> impl Iterator<Item = ObjectError> + 'a {
    let strange = object.keys().filter(|key| !fields.contains(&key.as_str()));
    strange.map(move |key| {
        let field: String = key.chars().take(64).collect();
        let reason = format!("no such field is known; those are {}", fields.join(", "));
        ObjectError::new(format!("{at}.{field}"), reason)
    })
}

pub(crate) fn known(at: &str, object: &Map<String, Value>, fields: &[&str]) -> Result<()> {
    strange(at, object, fields).next().map_or(Ok(()), Err)
}

pub(crate) fn object<'a>(at: &str, value: &'a Value, fields: &[&str]) -> Result<&'a Map<String, Value>> {
    let object = value.as_object().ok_or_else(|| ObjectError::new(at, "is no object"))?;
    known(at, object, fields)?;
    Ok(object)
}

/// A list; absent and null are an empty one. How long it may be, the API's limit for an object says.
pub(crate) fn list<'a>(at: &str, value: Option<&'a Value>) -> Result<&'a [Value]> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(ObjectError::new(at, "is no list")),
    }
}

/// Which ways a policy judges, as lists of types say it; the inner `None`: nothing is said. The outer: it cannot be read.
pub(crate) fn directions(
    at: &str,
    value: Option<&Value>,
    faults: &mut Faults,
) -> Option<Option<BTreeSet<Direction>>> {
    let before = faults.seen();
    let types = faults.each(at, value, |faults, at, entry| match entry.as_str() {
        Some("Ingress") => Some(Direction::Ingress),
        Some("Egress") => Some(Direction::Egress),
        _ => {
            faults.note(ObjectError::new(at, format!("{:?}; use Ingress or Egress", shown(entry))));
            None
        }
    });
    let types: BTreeSet<Direction> = types.into_iter().collect();
    (faults.seen() == before).then(|| Some(types).filter(|types| !types.is_empty()))
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
