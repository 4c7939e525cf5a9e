//! Exemptions from encryption: the operator's word that a pair of nodes may speak in clear, and until when.
//!
//! An exemption counts only for a pair of which one cannot do WireGuard at all. It names nodes or sites, a reason and an end; without
//! any of these it is none.

use std::fmt;

use jiff::Timestamp;
use mesh_keyring::{NodeName, SiteName};
use serde::{Deserialize, Serialize};

/// The furthest end, in days from now: what shall last longer has to be said again.
pub const DAYS_MOST: i64 = 366;
/// The longest reason, in characters.
const REASON_MOST: usize = 256;

/// One end of the pairs that an exemption is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Side {
    /// This node.
    Node(NodeName),
    /// Every node of this site.
    Site(SiteName),
}

impl Side {
    fn holds(&self, (node, site): (&NodeName, &SiteName)) -> bool {
        match self {
            Self::Node(name) => name == node,
            Self::Site(name) => name == site,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Site(name) => write!(f, "site {name}"),
        }
    }
}

/// A valid exemption.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Document", into = "Document")]
pub struct Exemption {
    first: Side,
    second: Option<Side>,
    reason: String,
    expires: Timestamp,
}

/// As configuration and Mesh write it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    between: Vec<Side>,
    reason: String,
    expires: String,
}

/// What is wrong with an exemption.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExemptionError {
    /// No side, or more than two.
    #[error(
        "between: {0} entries; name one node or site for all pairs that it is in, or two for the pairs between them"
    )]
    Sides(usize),
    /// No reason.
    #[error(
        "reason: say in 1 to {REASON_MOST} characters, without line breaks, why encryption cannot be had"
    )]
    Reason,
    /// Not a time.
    #[error("expires: {0:?} is no time such as 2027-01-31T00:00:00Z")]
    Expires(String),
}

impl TryFrom<Document> for Exemption {
    type Error = ExemptionError;

    fn try_from(document: Document) -> Result<Self, ExemptionError> {
        let count = document.between.len();
        let mut sides = document.between.into_iter();
        let (Some(first), second, None) = (sides.next(), sides.next(), sides.next()) else {
            return Err(ExemptionError::Sides(count));
        };
        let reason = document.reason.trim();
        let fine =
            (1..=REASON_MOST).contains(&reason.chars().count()) && !reason.chars().any(char::is_control);
        if !fine {
            return Err(ExemptionError::Reason);
        }
        let shown = || ExemptionError::Expires(document.expires.chars().take(40).collect());
        let expires: Timestamp = document.expires.parse().map_err(|_| shown())?;
        // Whole seconds: the guard knows no less.
        let expires = Timestamp::from_second(expires.as_second()).map_err(|_| shown())?;
        if expires < Timestamp::UNIX_EPOCH {
            return Err(shown());
        }
        Ok(Self { first, second, reason: reason.to_owned(), expires })
    }
}

impl From<Exemption> for Document {
    fn from(exemption: Exemption) -> Self {
        Self {
            between: [Some(exemption.first), exemption.second].into_iter().flatten().collect(),
            reason: exemption.reason,
            expires: exemption.expires.to_string(),
        }
    }
}

/// Whether an exemption is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is.
    InForce,
    /// It has ended.
    Ended,
    /// Its end is too far away for an end.
    TooLong,
}

/// Those that are in force at `now`.
pub fn in_force<'a>(all: impl Iterator<Item = &'a Exemption>, now: Timestamp) -> Vec<Exemption> {
    all.filter(|one| one.standing(now) == Standing::InForce).cloned().collect()
}

impl Exemption {
    /// Whether it covers the pair of two nodes, in whatever order.
    pub fn covers(&self, one: (&NodeName, &SiteName), other: (&NodeName, &SiteName)) -> bool {
        match &self.second {
            None => self.first.holds(one) || self.first.holds(other),
            Some(second) => {
                self.first.holds(one) && second.holds(other) || self.first.holds(other) && second.holds(one)
            }
        }
    }

    /// Whether it is in force at `now`.
    pub fn standing(&self, now: Timestamp) -> Standing {
        if self.expires <= now {
            Standing::Ended
        } else if self.expires.duration_since(now).as_hours() > DAYS_MOST * 24 {
            Standing::TooLong
        } else {
            Standing::InForce
        }
    }

    /// Why it is needed.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// When it ends.
    pub fn expires(&self) -> Timestamp {
        self.expires
    }

    /// Whom it is for, for people.
    pub fn between(&self) -> String {
        match &self.second {
            None => self.first.to_string(),
            Some(second) => format!("{} and {second}", self.first),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(between: Value, reason: &str, expires: &str) -> Result<Exemption, String> {
        serde_json::from_value(json!({"between": between, "reason": reason, "expires": expires}))
            .map_err(|e| e.to_string())
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn an_exemption_names_a_pair_or_a_site_a_reason_and_an_end() {
        let exemption =
            read(json!([{"node": "plc"}, {"site": "aws"}]), "no TUN", "2027-01-31T00:00:00Z").unwrap();
        let text = serde_json::to_string(&exemption).unwrap();
        assert_eq!(serde_json::from_str::<Exemption>(&text).unwrap(), exemption, "it is remembered");
        assert_eq!(exemption.between(), "node plc and site aws");
        for (between, reason, expires, wanted) in [
            (json!([]), "why", "2027-01-31T00:00:00Z", "between: 0 entries"),
            (
                json!([{"node": "a"}, {"node": "b"}, {"node": "c"}]),
                "why",
                "2027-01-31T00:00:00Z",
                "between: 3 entries",
            ),
            (json!([{"node": "A b"}]), "why", "2027-01-31T00:00:00Z", "A b"),
            (json!([{"zone": "a"}]), "why", "2027-01-31T00:00:00Z", "zone"),
            (json!([{"node": "a"}]), "  ", "2027-01-31T00:00:00Z", "reason"),
            (json!([{"node": "a"}]), "two\nlines", "2027-01-31T00:00:00Z", "reason"),
            (json!([{"node": "a"}]), "why", "tomorrow", "expires: \"tomorrow\""),
            (json!([{"node": "a"}]), "why", "", "expires"),
            (json!([{"node": "a"}]), "why", "2027-01-31", "expires"),
            (json!([{"node": "a"}]), "why", "1960-01-31T00:00:00Z", "expires"),
        ] {
            let why = read(between.clone(), reason, expires).unwrap_err();
            assert!(why.contains(wanted), "{between} {reason:?} {expires}: {why}");
        }
        let unnamed =
            serde_json::from_value::<Exemption>(json!({"between": [{"node": "a"}], "reason": "why"}));
        assert!(unnamed.unwrap_err().to_string().contains("expires"));
    }

    #[test]
    fn it_covers_the_pairs_that_it_names_and_no_other() {
        let node = |name: &str| name.parse::<NodeName>().unwrap();
        let site = |name: &str| name.parse::<SiteName>().unwrap();
        let covers = |between: Value, one: (&str, &str), other: (&str, &str)| {
            let exemption = read(between, "why", "2027-01-31T00:00:00Z").unwrap();
            let (one, other) = ((node(one.0), site(one.1)), (node(other.0), site(other.1)));
            let answer = exemption.covers((&one.0, &one.1), (&other.0, &other.1));
            assert_eq!(answer, exemption.covers((&other.0, &other.1), (&one.0, &one.1)), "both ways");
            answer
        };
        let (plc, web, db) = (("plc", "plant"), ("web", "aws"), ("db", "gcp"));
        assert!(covers(json!([{"node": "plc"}]), plc, web) && covers(json!([{"node": "plc"}]), db, plc));
        assert!(!covers(json!([{"node": "plc"}]), web, db));
        let pair = || json!([{"node": "plc"}, {"node": "web"}]);
        assert!(covers(pair(), plc, web) && !covers(pair(), plc, db) && !covers(pair(), web, db));
        let sites = || json!([{"site": "plant"}, {"site": "aws"}]);
        assert!(covers(sites(), plc, web) && !covers(sites(), plc, db));
        // Two nodes of one site are no pair of that site and another.
        assert!(!covers(sites(), plc, ("other", "plant")));
    }

    #[test]
    fn it_ends_to_the_second_and_never_lasts_for_good() {
        let exemption = read(json!([{"node": "a"}]), "why", "2027-01-31T00:00:00+00:00").unwrap();
        assert_eq!(exemption.standing(at("2027-01-30T23:59:59Z")), Standing::InForce);
        assert_eq!(exemption.standing(at("2027-01-31T00:00:00Z")), Standing::Ended);
        assert_eq!(exemption.standing(at("2025-01-31T00:00:00Z")), Standing::TooLong);
    }
}
