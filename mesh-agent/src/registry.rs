//! Where nodes are published: what a registry yields, and the one that is a directory of manifests.

pub mod file;
pub mod merge;

use std::collections::BTreeSet;

use mesh_keyring::NodeName;
use mesh_overlay::NodeRecord;

/// Everything that a registry holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The nodes that the operator knows, by name, each with its own publication merged in.
    pub nodes: Vec<NodeRecord>,
    /// What could not be read, each with the object and the remedy. Nothing of it counts.
    pub problems: Vec<Problem>,
    /// A file of the operator could not be read, and what it held before is not known: nodes may be missing.
    pub incomplete: bool,
    /// Nodes whose publication could not be read, and what it held before is not known.
    pub unreadable: BTreeSet<NodeName>,
}

/// Something in the registry that was refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The node that it concerns, where that is known.
    pub node: Option<NodeName>,
    /// Object and reason.
    pub text: String,
}

/// Why the registry as a whole could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The directory is away. What was known stays in force.
    #[error("registry directory {path}: {source}; the last good state stays in force")]
    Away {
        /// The directory.
        path: String,
        /// The answer of the system.
        source: std::io::Error,
    },
    /// This node's own publication could not be written.
    #[error("publishing {path}: {source}; the previous publication stays in force")]
    Publish {
        /// The file.
        path: String,
        /// The answer of the system.
        source: std::io::Error,
    },
}
