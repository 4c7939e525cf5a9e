//! A node that was admitted: its claim, bounded by what it was granted.

use std::net::Ipv6Addr;

use ipnet::IpNet;
use mesh_keyring::NodeName;
use serde::{Deserialize, Serialize};

use crate::advertisement::Advertisement;

/// An admitted node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Its name.
    pub name: NodeName,
    /// What it claims, less the endpoints that were refused.
    pub claim: Advertisement,
    /// Its mesh address, derived from its name.
    pub address: Ipv6Addr,
    /// The prefixes that it was granted, sorted; never its own word.
    pub prefixes: Vec<IpNet>,
    /// Prefixes that it held once and that the cluster still grants it, but not the operator's sites: they are nobody's, and
    /// nothing goes there in clear.
    #[serde(default)]
    pub withheld: Vec<IpNet>,
}
