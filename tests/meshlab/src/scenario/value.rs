//! Small value types of the scenario format: durations, rates, percentages, one-or-many lists.

use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A span of time written as `500ms`, `30s`, `2m` or a plain number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Reads `500ms`, `1.5s`, `2m`, `1h` or a bare number of seconds.
    ///
    /// # Errors
    /// A sentence saying what was expected when the text is no such span, is negative or exceeds one day.
    pub fn parse(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let unit_at = trimmed.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(unit_at);
        let factor = match unit {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(format!("`{text}` is not a duration: write 500ms, 30s, 2m or 1h")),
        };
        let value: f64 = number
            .trim()
            .parse()
            .map_err(|_| format!("`{text}` is not a duration: write 500ms, 30s, 2m or 1h"))?;
        Self::from_seconds(value * factor)
    }

    fn from_seconds(seconds: f64) -> Result<Self, String> {
        if !(0.0..=86_400.0).contains(&seconds) {
            return Err(format!("a duration of {seconds} s is out of range: 0 to 24h"));
        }
        // Rounded to whole microseconds so that `500ms` prints back as written.
        Ok(Self(Duration::from_micros((seconds * 1e6).round() as u64)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        if millis.is_multiple_of(1000) { write!(f, "{}s", millis / 1000) } else { write!(f, "{millis}ms") }
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Accepts a string or a number and hands the number over as `f64`.
struct TextOrNumber<T> {
    expected: &'static str,
    text: fn(&str) -> Result<T, String>,
    number: fn(f64) -> Result<T, String>,
}

impl<T> Visitor<'_> for TextOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.text)(text).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.number)(number as f64).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        (self.number)(number as f64).map_err(E::custom)
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        (self.number)(number).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber {
            expected: "a duration such as 500ms, 30s or 2m",
            text: Span::parse,
            number: Span::from_seconds,
        })
    }
}

impl JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A duration: 500ms, 30s, 2m, 1h, or a number of seconds.",
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(ms|s|m|h)?$"},
                {"type": "number", "minimum": 0, "maximum": 86400},
            ],
        })
    }
}

/// A share of packets, written `1.5%` or as a number of percent.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Percent(pub f64);

impl Percent {
    fn parse(text: &str) -> Result<Self, String> {
        let number = text.trim().trim_end_matches('%').trim();
        let value = number.parse().map_err(|_| format!("`{text}` is not a percentage: write 1.5%"))?;
        Self::from_number(value)
    }

    fn from_number(value: f64) -> Result<Self, String> {
        if (0.0..=100.0).contains(&value) {
            Ok(Self(value))
        } else {
            Err(format!("{value} is not a percentage between 0 and 100"))
        }
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}%", self.0))
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber {
            expected: "a percentage such as 1.5%",
            text: Percent::parse,
            number: Percent::from_number,
        })
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Percent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A share of packets: 1.5% or a number of percent.",
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?%?$"},
                {"type": "number", "minimum": 0, "maximum": 100},
            ],
        })
    }
}

/// A link rate in bits per second, written `10mbit`, `1gbit` or as a number of bits per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

impl Rate {
    fn parse(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let unit_at = lower.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(lower.len());
        let (number, unit) = lower.split_at(unit_at);
        let factor = match unit {
            "" | "bit" => 1.0,
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            _ => return Err(format!("`{text}` is not a rate: write 500kbit, 10mbit or 1gbit")),
        };
        let value: f64 = number
            .trim()
            .parse()
            .map_err(|_| format!("`{text}` is not a rate: write 500kbit, 10mbit or 1gbit"))?;
        Self::from_number(value * factor)
    }

    fn from_number(bits: f64) -> Result<Self, String> {
        if (8_000.0..=1e12).contains(&bits) {
            Ok(Self(bits as u64))
        } else {
            Err(format!("a rate of {bits} bit/s is out of range: 8kbit to 1000gbit"))
        }
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber {
            expected: "a rate such as 10mbit",
            text: Rate::parse,
            number: Rate::from_number,
        })
    }
}

impl JsonSchema for Rate {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Rate".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A link rate: 500kbit, 10mbit, 1gbit, or a number of bits per second.",
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?([kmgKMG]?bit)?$"},
                {"type": "integer", "minimum": 8000},
            ],
        })
    }
}

/// One name or a list of names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(untagged)]
#[serde(untagged)]
pub enum OneOrMany {
    /// A single name.
    One(String),
    /// Several names.
    Many(Vec<String>),
}

impl OneOrMany {
    /// The names in the order written.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many.as_slice(),
        }
        .iter()
        .map(String::as_str)
    }

    /// True for an empty list.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Many(many) if many.is_empty())
    }
}

impl fmt::Display for OneOrMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().collect::<Vec<_>>().join(", "))
    }
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or a list of names")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<OneOrMany, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(OneOrMany::Many(names))
            }
        }
        deserializer.deserialize_any(Names)
    }
}

/// An MTU in bytes; what no link can have is refused with the range.
pub(super) fn mtu<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let number = i64::deserialize(deserializer)?;
    u16::try_from(number).map_err(|_| {
        de::Error::custom(format!(
            "mtu {number} is out of range; write 576 to 9000, with agents 1360 to 9000"
        ))
    })
}

/// The nodes of a site: how many, or their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(untagged)]
#[serde(untagged)]
pub enum NodeList {
    /// `<site>-1` to `<site>-<n>`.
    Count(u16),
    /// These names.
    Names(Vec<String>),
}

impl<'de> Deserialize<'de> for NodeList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Nodes;
        impl<'de> Visitor<'de> for Nodes {
            type Value = NodeList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of nodes or a list of node names")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<NodeList, E> {
                u16::try_from(count).map(NodeList::Count).map_err(|_| E::custom("too many nodes"))
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<NodeList, E> {
                u16::try_from(count)
                    .map(NodeList::Count)
                    .map_err(|_| E::custom(format!("{count} is not a number of nodes")))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<NodeList, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(NodeList::Names(names))
            }
        }
        deserializer.deserialize_any(Nodes)
    }
}

/// A command: a string for `sh -c`, or a list of arguments run as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "OneOrMany")]
#[schemars(with = "OneOrMany")]
pub struct CommandLine(pub Vec<String>);

impl From<OneOrMany> for CommandLine {
    fn from(written: OneOrMany) -> Self {
        match written {
            OneOrMany::One(shell) => Self(vec!["sh".into(), "-c".into(), shell]),
            OneOrMany::Many(arguments) => Self(arguments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_with_and_without_unit() {
        for (text, millis) in [("500ms", 500), ("30s", 30_000), ("1.5s", 1500), ("2m", 120_000), ("7", 7000)]
        {
            assert_eq!(Span::parse(text).unwrap().0, Duration::from_millis(millis), "{text}");
        }
        for wrong in ["", "abc", "5 parsecs", "-3s", "25h", "NaN"] {
            assert!(Span::parse(wrong).is_err(), "{wrong} must be refused");
        }
    }

    #[test]
    fn rates_and_percentages_refuse_nonsense() {
        assert_eq!(Rate::parse("10mbit").unwrap(), Rate(10_000_000));
        assert!(Rate::parse("10 furlongs").is_err());
        assert!(Rate::parse("1").is_err());
        assert_eq!(Percent::parse("1.5%").unwrap(), Percent(1.5));
        assert!(Percent::parse("101%").is_err());
    }
}
