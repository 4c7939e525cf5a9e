//! What a node knows of itself and what its operator grants.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use mesh_keyring::{MeshName, NodeName, PublicKey, SiteName};

use crate::address::{self, Carried};
use crate::exemption::Exemption;

/// The operator's word on who may hold which addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grants {
    /// The mesh; it seeds the node addresses.
    pub mesh: MeshName,
    /// The prefixes that nodes of a site may hold. When no site is named at all, `spec.podCIDRs` alone decide.
    pub sites: BTreeMap<SiteName, Vec<IpNet>>,
    /// Addresses that no peer may ever hold: the API server's, DNS, metadata services.
    pub protected: BTreeSet<IpAddr>,
    /// The exemptions from encryption that are in force now.
    pub exemptions: Vec<Exemption>,
}

impl Grants {
    /// The prefix of all node addresses.
    pub fn mesh_prefix(&self) -> Ipv6Net {
        address::mesh_prefix(&self.mesh)
    }
}

/// The node that the plan is computed for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalNode {
    /// Its name.
    pub name: NodeName,
    /// Its site.
    pub site: SiteName,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// The pod prefixes it holds (`spec.podCIDRs` of its Node object).
    pub prefixes: Vec<IpNet>,
    /// The pod prefixes that it held before and that no other node holds now. Pods may run in them still.
    pub former: Vec<IpNet>,
    /// The addresses of its underlay interfaces.
    pub underlay_addresses: BTreeSet<IpAddr>,
    /// The kernel's indexes of the interfaces that lead away from this host. A name may change, and may be
    /// one that no ruleset can hold.
    pub underlay_links: BTreeSet<u32>,
    /// Kinds of interfaces that may lead to pods, as the kernel names them (`IFLA_INFO_KIND`).
    pub pod_kinds: BTreeSet<String>,
    /// Addresses on underlay interfaces that the operator has named: they are none of the mesh, although they
    /// lie in one of its prefixes.
    pub holes: BTreeSet<IpAddr>,
    /// The MTU of its underlay, in bytes.
    pub underlay_mtu: u16,
    /// Whether it can do WireGuard at all.
    pub encrypts: bool,
    /// Its WireGuard interface.
    pub interface: InterfaceName,
    /// The UDP port that it listens on.
    pub listen_port: u16,
    /// Seconds between keepalives to every peer; `None` sends none.
    pub keepalive: Option<u16>,
    /// The VXLAN devices that carry WireGuard where direct UDP does not pass; `None` makes none.
    pub vxlan: Option<Vxlan>,
    /// Which routing table, rule priority and protocol number are ours.
    pub routing: Routing,
}

/// How VXLAN is spoken; the same at all nodes of a mesh (RFC 7348).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// What the names of the devices begin with; 4 and 6 follow, for what is outside, and before those a `c` where packets travel
    /// in clear.
    pub interface: InterfaceName,
    /// The network identifier, 24 bits; the next one is taken too.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
}

impl Vxlan {
    /// What the devices are named where nobody says.
    pub const INTERFACE: &str = "sennitx";
    /// The network identifier where nobody says: none of those that flannel (1), Calico (4096) and Cilium (1, 2) use.
    pub const VNI: u32 = 5182;
    /// The port that IANA has assigned to VXLAN.
    pub const PORT: u16 = 4789;

    /// The device whose outer packets are of this family. `None` when the name gets too long.
    pub fn device(&self, carried: Carried, outer_v6: bool) -> Option<InterfaceName> {
        let kind = if carried == Carried::Cleartext { "c" } else { "" };
        format!("{}{kind}{}", self.interface, if outer_v6 { 6 } else { 4 }).parse().ok()
    }

    /// The network identifier of a device: what travels in clear has the next one, so that no packet of one kind is ever taken for
    /// one of the other.
    pub fn vni(&self, carried: Carried) -> u32 {
        self.vni + u32::from(carried == Carried::Cleartext)
    }
}

impl LocalNode {
    /// Its own mesh address.
    pub fn address(&self, mesh: &MeshName) -> Ipv6Addr {
        address::node_address(mesh, &self.site, &self.name)
    }
}

/// The numbers under which our routes live, so that they are ours alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// Routing table.
    pub table: u32,
    /// Priority of the rule that consults the table; before `main` (32766).
    pub priority: u32,
    /// Protocol number of the routes (`ip route ... proto N`).
    pub protocol: u8,
}

impl Default for Routing {
    fn default() -> Self {
        Self { table: 5182, priority: 5182, protocol: 82 }
    }
}

/// A network interface's name: 1 to 15 bytes that are safe in a path and in an nftables ruleset.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName {
    // Zeros fill it up.
    bytes: [u8; 15],
}

/// Why a text is not an interface name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("interface name {0:?}: use 1 to 15 letters, digits, '.', '-' or '_', starting with a letter")]
pub struct InterfaceNameError(String);

impl InterfaceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let length = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(self.bytes.len());
        // It is ASCII, or it would not have become one.
        std::str::from_utf8(&self.bytes[..length]).unwrap_or_default()
    }
}

impl std::fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = InterfaceNameError;
    fn try_from(text: String) -> Result<Self, InterfaceNameError> {
        let fine = (1..=15).contains(&text.len())
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || b".-_".contains(&c))
            && text.starts_with(|c: char| c.is_ascii_alphabetic());
        if !fine {
            return Err(InterfaceNameError(text.chars().take(40).collect()));
        }
        let mut bytes = [0; 15];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes })
    }
}

impl std::str::FromStr for InterfaceName {
    type Err = InterfaceNameError;
    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        text.to_owned().try_into()
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> String {
        name.as_str().to_owned()
    }
}

impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_that_could_break_a_path_or_a_ruleset_are_refused() {
        for name in ["", "a/b", "..", "a b", "a\"b", "sennit0123456789", "0wg", "wg;drop", "wg*"] {
            assert!(name.parse::<InterfaceName>().is_err(), "{name:?}");
        }
        assert_eq!("sennit0".parse::<InterfaceName>().unwrap().as_str(), "sennit0");
    }
}
