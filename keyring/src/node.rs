//! Names of meshes, sites and nodes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty or longer than the kind of name allows.
    #[error("{kind} name {name:?} has {length} characters; 1 to {most} are allowed")]
    Length {
        /// "node" or "site".
        kind: &'static str,
        /// The offending text, cut to 64 characters.
        name: String,
        /// Its length in bytes.
        length: usize,
        /// The longest allowed length in bytes.
        most: usize,
    },
    /// A character outside of RFC 1123's set.
    #[error(
        "{kind} name {name:?}: use lower-case letters, digits, '-'{dots}, starting and ending with a letter or digit"
    )]
    Charset {
        /// "node" or "site".
        kind: &'static str,
        /// The offending text, cut to 64 characters.
        name: String,
        /// The extra separator, where one is allowed.
        dots: &'static str,
    },
}

fn check(kind: &'static str, text: &str, most: usize, dots: bool) -> Result<(), NameError> {
    let shown = || text.chars().take(64).collect::<String>();
    if text.is_empty() || text.len() > most {
        return Err(NameError::Length { kind, name: shown(), length: text.len(), most });
    }
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let label_ok = |label: &str| {
        let bytes = label.as_bytes();
        !bytes.is_empty()
            && bytes.iter().all(|&c| alnum(c) || c == b'-')
            && alnum(bytes[0])
            && alnum(bytes[bytes.len() - 1])
    };
    let fine = if dots { text.split('.').all(label_ok) } else { label_ok(text) };
    if fine {
        Ok(())
    } else {
        Err(NameError::Charset { kind, name: shown(), dots: if dots { ", '.'" } else { "" } })
    }
}

macro_rules! name_type {
    ($type:ident, $kind:literal, $most:literal, $dots:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check($kind, text, $most, $dots)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                check($kind, &text, $most, $dots)?;
                Ok(Self(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    NodeName,
    "node",
    253,
    true,
    "A node's name: a DNS subdomain (RFC 1123), as Kubernetes demands of Node objects."
);
name_type!(SiteName, "site", 63, false, "A site's name: a DNS label (RFC 1123).");
name_type!(
    MeshName,
    "mesh",
    63,
    false,
    "A mesh's name: a DNS label (RFC 1123). It seeds the mesh's addresses."
);
name_type!(
    ClusterName,
    "cluster",
    63,
    false,
    "A cluster's name in a mesh of several: a DNS label (RFC 1123)."
);

impl NodeName {
    /// The name in the mesh of a node that its cluster knows by this one: NODE.CLUSTER.
    ///
    /// # Errors
    /// When the two together are too long.
    pub fn of_cluster(&self, cluster: &ClusterName) -> Result<Self, NameError> {
        format!("{self}.{cluster}").parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_node_names_are_accepted() {
        for name in ["aws-1", "ip-10-0-0-1.eu-central-1.compute.internal", "1", "a"] {
            assert_eq!(name.parse::<NodeName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_could_escape_a_path_or_a_ruleset_are_refused() {
        for name in ["", "..", "a/b", "../a", "A", "a b", "-a", "a-", "a..b", "a\n", "a;b", "ä", "a_b"] {
            assert!(name.parse::<NodeName>().is_err(), "{name:?}");
            assert!(name.parse::<SiteName>().is_err(), "{name:?}");
        }
        assert!("a".repeat(254).parse::<NodeName>().is_err());
        assert!("a.b".parse::<SiteName>().is_err());
    }

    #[test]
    fn an_oversized_name_is_cut_in_its_error() {
        let text = "x".repeat(100_000).parse::<NodeName>().unwrap_err().to_string();
        assert!(text.len() < 300, "{}", text.len());
    }

    #[test]
    fn a_node_bears_its_clusters_name() {
        let (node, cluster): (NodeName, ClusterName) = ("a.b".parse().unwrap(), "west".parse().unwrap());
        assert_eq!(node.of_cluster(&cluster).unwrap().as_str(), "a.b.west");
        assert!("a".repeat(253).parse::<NodeName>().unwrap().of_cluster(&cluster).is_err());
    }
}
