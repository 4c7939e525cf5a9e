//! Addresses that nobody has to allocate.
//!
//! A node's mesh address is an IPv6 unique local address (RFC 4193) derived from the names of mesh, site and
//! node: it is known before the node is, and a node that joins renumbers nobody.

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;
use mesh_keyring::{MeshName, NodeName, SiteName};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

fn mesh_bytes(mesh: &MeshName) -> [u8; 16] {
    let mut bytes = [0u8; 16];
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&digest(&["sennit mesh", mesh.as_str()])[..5]);
    bytes
}

/// The `/48` that all mesh addresses of this mesh lie in.
pub fn mesh_prefix(mesh: &MeshName) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::from(mesh_bytes(mesh)), 48)
}

/// The mesh address of a node: the mesh's `/48`, 16 bits of the site, 64 bits of the node.
pub fn node_address(mesh: &MeshName, site: &SiteName, node: &NodeName) -> Ipv6Addr {
    let mut bytes = mesh_bytes(mesh);
    bytes[6..8].copy_from_slice(&digest(&["sennit site", mesh.as_str(), site.as_str()])[..2]);
    bytes[8..].copy_from_slice(&digest(&["sennit node", mesh.as_str(), site.as_str(), node.as_str()])[..8]);
    Ipv6Addr::from(bytes)
}

/// What a VXLAN device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carried {
    /// WireGuard's datagrams.
    Wireguard,
    /// Packets in clear, between nodes that the operator has exempted.
    Cleartext,
}

/// The `/63` that the addresses of nodes on their VXLAN devices lie in, of each kind its own; they are never those of pods.
pub fn carrier_prefix(mesh: &MeshName, carried: Carried) -> Ipv6Net {
    let seed = match carried {
        Carried::Wireguard => "sennit carrier",
        Carried::Cleartext => "sennit cleartext",
    };
    let mut bytes = [0u8; 16];
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&digest(&[seed, mesh.as_str()])[..5]);
    Ipv6Net::new_assert(Ipv6Addr::from(bytes), 63)
}

/// The address of a node on its VXLAN device, whose outer packets are IPv4 or IPv6 (`outer_v6`): a `/64` for each, 64 bits of the node.
pub fn carrier_address(
    mesh: &MeshName,
    site: &SiteName,
    node: &NodeName,
    carried: Carried,
    outer_v6: bool,
) -> Ipv6Addr {
    let mut bytes = carrier_prefix(mesh, carried).addr().octets();
    bytes[7] |= u8::from(outer_v6);
    bytes[8..]
        .copy_from_slice(&digest(&["sennit carrier node", mesh.as_str(), site.as_str(), node.as_str()])[..8]);
    Ipv6Addr::from(bytes)
}

/// The hardware address that goes with a carrier address: a locally administered one (IEEE 802, section 8.4).
pub fn carrier_mac(address: Ipv6Addr) -> [u8; 6] {
    let bytes = address.octets();
    let [.., a, b, c, d, e] = bytes;
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mesh: &str, site: &str, node: &str) -> Ipv6Addr {
        node_address(&mesh.parse().unwrap(), &site.parse().unwrap(), &node.parse().unwrap())
    }

    #[test]
    fn an_address_is_unique_local_stable_and_inside_its_mesh() {
        let address = of("prod", "aws", "aws-1");
        assert_eq!(address, of("prod", "aws", "aws-1"));
        assert!(address.is_unique_local());
        assert!(mesh_prefix(&"prod".parse().unwrap()).contains(&address));
        // Renumbering a running mesh would cut it: this value may never change.
        assert_eq!(address.to_string(), "fd8e:1c21:8943:3539:6810:672e:fb25:d95f");
    }

    #[test]
    fn carrier_addresses_lie_apart_from_the_mesh_and_by_the_family_outside() {
        let [mesh, site, node] = ["prod", "aws", "aws-1"];
        let (mesh, site, node) = (mesh.parse().unwrap(), site.parse().unwrap(), node.parse().unwrap());
        let prefixes = [Carried::Wireguard, Carried::Cleartext].map(|carried| carrier_prefix(&mesh, carried));
        assert!(!prefixes[0].contains(&prefixes[1]) && !prefixes[1].contains(&prefixes[0]));
        for carried in [Carried::Wireguard, Carried::Cleartext] {
            let [v4, v6] = [false, true].map(|outer| carrier_address(&mesh, &site, &node, carried, outer));
            assert_ne!(v4.octets()[..8], v6.octets()[..8]);
            assert_eq!(v4.octets()[8..], v6.octets()[8..]);
            for address in [v4, v6] {
                let inside = carrier_prefix(&mesh, carried).contains(&address);
                assert!(inside && !mesh_prefix(&mesh).contains(&address));
                assert_eq!(carrier_mac(address)[0], 2);
            }
        }
    }

    #[test]
    fn names_that_differ_give_addresses_that_differ() {
        let all =
            [of("a", "b", "c"), of("a", "c", "c"), of("a", "b", "d"), of("b", "b", "c"), of("ab", "b", "c")];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
