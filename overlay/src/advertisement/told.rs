//! A node's statements beside its claim: its mesh, its agent, and the nodes it refuses.
//!
//! It is for people and for the node that is concerned. No peer is admitted, dialled or refused by it, and
//! what cannot be read of it is not there.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use mesh_keyring::{MeshName, NodeName};

/// The name of the node's mesh.
pub const MESH: &str = "sennit.dev/mesh";
/// Which agent has written this, see [`Instance`].
pub const INSTANCE: &str = "sennit.dev/instance";
/// Which nodes it refuses, and why: a line for each.
pub const REFUSES: &str = "sennit.dev/refuses";

/// The most nodes that are named as refused.
pub const REFUSES_MOST: usize = 16;
/// The longest reason, in characters.
pub const REASON_MOST: usize = 120;
/// The longest list of refusals, in bytes.
const LIST_MOST: usize = 4096;
const IN_PART: &str = "in part: ";

/// An agent, from its start to its end. Of two that speak for one node, the smaller one keeps the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance {
    /// True if its state was copied from another node or machine.
    pub copied: bool,
    /// The generation that its key was made with.
    pub made: u64,
    /// The number of agents that have started with this state.
    pub starts: u32,
    /// A random number.
    pub id: u64,
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.copied { "copy" } else { "home" };
        write!(f, "{kind}-{}-{}-{:016x}", self.made, self.starts, self.id)
    }
}

/// Not an instance as agents write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no instance of an agent")]
pub struct NoInstance;

impl FromStr for Instance {
    type Err = NoInstance;
    fn from_str(text: &str) -> Result<Self, NoInstance> {
        let parts: Vec<&str> = text.split('-').collect();
        let [kind, made, starts, id] = parts[..] else { return Err(NoInstance) };
        let copied = match kind {
            "home" => false,
            "copy" => true,
            _ => return Err(NoInstance),
        };
        let instance = Self {
            copied,
            made: made.parse().map_err(|_| NoInstance)?,
            starts: starts.parse().map_err(|_| NoInstance)?,
            id: u64::from_str_radix(id, 16).map_err(|_| NoInstance)?,
        };
        // There is one way to write it.
        if instance.to_string() == text { Ok(instance) } else { Err(NoInstance) }
    }
}

/// The reason for a refusal, as text that can be shown.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reason {
    /// True if the whole publication is refused, rather than a part of it.
    pub whole: bool,
    /// The sentence.
    pub text: String,
}

impl Reason {
    /// Cuts a sentence to what may be told.
    pub fn new(whole: bool, text: &str) -> Self {
        Self { whole, text: plain(text) }
    }
}

/// Printable ASCII on one line, cut.
fn plain(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).take(REASON_MOST).collect()
}

/// A node's statements beside its claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// The mesh's name.
    pub mesh: Option<MeshName>,
    /// The agent that speaks.
    pub instance: Option<Instance>,
    /// The nodes that it refuses, with the reasons.
    pub refuses: BTreeMap<NodeName, Reason>,
}

impl Told {
    /// Reads it. Everything that is not as agents write it is passed over.
    pub fn parse(annotations: &BTreeMap<String, String>) -> Self {
        let get = |key: &str| annotations.get(key).filter(|value| value.len() <= LIST_MOST);
        let refuses = get(REFUSES)
            .map_or(BTreeMap::new(), |list| list.lines().filter_map(line).take(REFUSES_MOST).collect());
        Self {
            mesh: get(MESH).and_then(|name| name.parse().ok()),
            instance: get(INSTANCE).and_then(|text| text.parse().ok()),
            refuses,
        }
    }

    /// Writes it. Of a long list the first nodes by name are told.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        all.extend(self.mesh.as_ref().map(|mesh| (MESH.to_owned(), mesh.to_string())));
        all.extend(self.instance.map(|instance| (INSTANCE.to_owned(), instance.to_string())));
        let mut list = String::new();
        for (node, reason) in self.refuses.iter().take(REFUSES_MOST) {
            let kind = if reason.whole { "" } else { IN_PART };
            let line = format!("{node}: {kind}{}\n", plain(&reason.text));
            if list.len() + line.len() > LIST_MOST {
                break;
            }
            list.push_str(&line);
        }
        if !list.is_empty() {
            all.insert(REFUSES.to_owned(), list.trim_end().to_owned());
        }
        all
    }
}

fn line(text: &str) -> Option<(NodeName, Reason)> {
    let (node, reason) = text.split_once(": ")?;
    let (whole, reason) = reason.strip_prefix(IN_PART).map_or((true, reason), |part| (false, part));
    Some((node.parse().ok()?, Reason::new(whole, reason)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn instance(copied: bool, made: u64, starts: u32) -> Instance {
        Instance { copied, made, starts, id: 0xab }
    }

    #[test]
    fn an_original_goes_before_its_copies() {
        let original = instance(false, 7, 90);
        assert!(original < instance(true, 5, 1), "a copy is one whatever its key");
        assert!(original < instance(false, 8, 1), "who held the name first");
        assert!(original < instance(false, 7, 91), "who started first");
        assert_eq!(original.to_string(), "home-7-90-00000000000000ab");
    }

    #[test]
    fn what_is_no_instance_is_none() {
        for text in [
            "",
            "home",
            "home-1-2",
            "away-1-2-3",
            "home-1-2-xyz",
            "home-01-2-00000000000000ab",
            "home-1-2-3-4",
        ] {
            assert_eq!(text.parse::<Instance>(), Err(NoInstance), "{text}");
        }
    }

    #[test]
    fn a_list_of_refusals_is_bounded_and_plain() {
        let reason = Reason::new(true, &"\u{202e}\n\tevil ".repeat(100));
        let refuses = (0..100).map(|n| (format!("n{n}").parse().unwrap(), reason.clone())).collect();
        let written = Told { refuses, ..Told::default() }.to_annotations();
        let list = &written[REFUSES];
        assert!(list.lines().count() == REFUSES_MOST && list.is_ascii(), "{list}");
        assert!(list.lines().all(|line| line.len() < 140), "{list}");
        let long = format!("n: {}", "x".repeat(10_000));
        assert_eq!(Told::parse(&[(REFUSES.to_owned(), long)].into()), Told::default());
    }

    proptest! {
        #[test]
        fn whatever_is_told_is_read_or_passed_over(values in prop::collection::vec("\\PC{0,80}", 3)) {
            let keys = [MESH, INSTANCE, REFUSES].map(str::to_owned);
            let told = Told::parse(&keys.into_iter().zip(values).collect());
            prop_assert_eq!(Told::parse(&told.to_annotations()), told);
        }

        #[test]
        fn an_instance_is_read_back(copied: bool, made: u64, starts: u32, id: u64) {
            let instance = Instance { copied, made, starts, id };
            prop_assert_eq!(instance.to_string().parse::<Instance>(), Ok(instance));
        }
    }
}
