//! What stands before a logged packet: which rule it met, and what that means.

use std::fmt;

/// Version of the format, so that rules of another release are not misread.
const VERSION: &str = "v1";
/// Longest id in bytes. The whole is then far below the 127 bytes that the kernel keeps of a prefix.
const LONGEST_ID: usize = 64;

/// What was decided about a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// It was dropped.
    Denied,
    /// It passed only because its policy is in audit.
    WouldBeDenied,
    /// It passed.
    Allowed,
}

impl Decision {
    fn letter(self) -> &'static str {
        match self {
            Self::Denied => "D",
            Self::WouldBeDenied => "U",
            Self::Allowed => "A",
        }
    }

    fn of(letter: &str) -> Option<Self> {
        [Self::Denied, Self::WouldBeDenied, Self::Allowed].into_iter().find(|one| one.letter() == letter)
    }
}

/// Where a packet was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// On its way to the destination that the policy is about.
    Ingress,
    /// On its way from the source that the policy is about.
    Egress,
    /// As it came out of the tunnel, before any policy.
    Tunnel,
}

impl Direction {
    fn letter(self) -> &'static str {
        match self {
            Self::Ingress => "I",
            Self::Egress => "E",
            Self::Tunnel => "T",
        }
    }

    fn of(letter: &str) -> Option<Self> {
        [Self::Ingress, Self::Egress, Self::Tunnel].into_iter().find(|one| one.letter() == letter)
    }
}

/// A log prefix of ours: `v1|<decision>|<direction>|<id>`, such as `v1|D|I|abc`. Its [`fmt::Display`] is what a rule
/// has to carry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    decision: Decision,
    direction: Direction,
    id: String,
}

impl Label {
    /// A label of a rule. `None` when the id is not of 1 to 64 characters of `0-9`, `a-z`, `_` and `-`.
    pub fn new(decision: Decision, direction: Direction, id: &str) -> Option<Self> {
        let good = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'_' | b'-');
        let fits = (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(good);
        fits.then(|| Self { decision, direction, id: id.to_owned() })
    }

    /// Reads a prefix; `None` when it is not one of ours.
    pub fn parse(prefix: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(prefix).ok()?.splitn(4, '|');
        if parts.next()? != VERSION {
            return None;
        }
        let decision = Decision::of(parts.next()?)?;
        let direction = Direction::of(parts.next()?)?;
        Self::new(decision, direction, parts.next()?)
    }

    /// What was decided.
    pub fn decision(&self) -> Decision {
        self.decision
    }

    /// Where.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// By which rule; what it means is known to whoever made the rules.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VERSION}|{}|{}|{}", self.decision.letter(), self.direction.letter(), self.id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_prefix_of_ours_tells_decision_direction_and_id() {
        let label = Label::parse(b"v1|U|E|net_4-default").unwrap();
        assert_eq!(label.decision(), Decision::WouldBeDenied);
        assert_eq!(label.direction(), Direction::Egress);
        assert_eq!(label.id(), "net_4-default");
    }

    #[test]
    fn other_prefixes_are_not_ours() {
        let long = format!("v1|D|I|{}", "a".repeat(65));
        let foreign = [
            "",
            "v1",
            "v1|D|I",
            "v1|D|I|",
            "v2|D|I|abc",
            "v1|X|I|abc",
            "v1|D|X|abc",
            "v1|D|I|ABC",
            "v1|D|I|a|b",
            "v1||I|a",
            " v1|D|I|abc",
            "v1|D|I|abc ",
            "DROP: ",
            &long,
        ];
        for prefix in foreign {
            assert_eq!(Label::parse(prefix.as_bytes()), None, "{prefix}");
        }
        assert_eq!(Label::parse(b"v1|D|I|\xff"), None);
    }

    proptest! {
        #[test]
        fn what_a_rule_carries_is_what_is_read(
            decision in prop::sample::select(vec!["D", "U", "A"]),
            direction in prop::sample::select(vec!["I", "E", "T"]),
            id in "[0-9a-z_-]{1,64}",
        ) {
            let prefix = format!("v1|{decision}|{direction}|{id}");
            prop_assert_eq!(Label::parse(prefix.as_bytes()).unwrap().to_string(), prefix);
        }

        #[test]
        fn any_bytes_are_a_label_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(label) = Label::parse(&bytes) {
                prop_assert_eq!(label.to_string().into_bytes(), bytes);
            }
        }
    }
}
