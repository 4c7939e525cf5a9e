//! Enforces policy beside the agent's loop.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_policy::compile::{Logging, Settings};

use crate::config::{Mode, Policy, Stance};

/// What a node's ruleset has to know of its surroundings.
#[derive(Debug, Clone)]
pub struct Around {
    /// The node.
    pub node: String,
    /// The interfaces that decrypted packets come from, and those of nodes that are exempt from encryption.
    pub tunnels: BTreeSet<String>,
    /// All prefixes of the mesh, this node's included.
    pub scope: BTreeSet<IpNet>,
    /// The prefixes of this node.
    pub own: BTreeSet<IpNet>,
    /// The node's own address in the mesh.
    pub address: Option<IpAddr>,
    /// Whether local addresses that no known pod has may speak, where nobody says.
    pub strangers: bool,
}

/// What the compiler is told.
pub fn settings(policy: &Policy, around: Around) -> Settings {
    Settings {
        node: around.node,
        tunnels: around.tunnels,
        scope: around.scope,
        own: around.own,
        address: around.address,
        strangers: policy.unknown.map_or(around.strangers, |stance| stance == Stance::Allow),
        audit: policy.mode == Mode::Audit,
        log: Logging { group: policy.log.group, denied: policy.log.denied, allowed: policy.log.allowed },
        mask: policy.ct_mark_mask,
    }
}
