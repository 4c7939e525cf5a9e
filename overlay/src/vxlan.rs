//! The VXLAN devices that carry WireGuard's datagrams where direct UDP does not pass, and the single changes that get them there.
//!
//! No learning and no flooding: whom frames go to is in the forwarding table (`bridge fdb`), and which hardware address a carrier address
//! has in the neighbour table, both from the plan. The source port is the destination port, so that a stateful firewall or a NAT in
//! between takes both directions for one flow. Outer packets may not be fragmented, so that the path MTU that is probed is the true one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use mesh_keyring::{NodeName, SiteName};
use serde::Serialize;

use crate::address::{self, Carried};
use crate::link::ALIAS;
use crate::local::{Grants, InterfaceName, LocalNode};
use crate::peer::Peer;

/// Bytes that VXLAN adds: 14 Ethernet, 8 VXLAN, 8 UDP, and 20 or 40 IP (RFC 7348, section 5).
pub fn overhead(outer_v6: bool) -> u16 {
    if outer_v6 { 70 } else { 50 }
}

/// A hardware address.
pub type Mac = [u8; 6];

/// Where a peer is on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// Its hardware address.
    pub mac: Mac,
    /// Its underlay address.
    pub remote: IpAddr,
}

/// A device as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VxlanConfig {
    /// Its name.
    pub name: InterfaceName,
    /// Whether the outer packets are IPv6.
    pub outer_v6: bool,
    /// The network identifier.
    pub vni: u32,
    /// The UDP port, of both ends.
    pub port: u16,
    /// Bytes of IP that fit.
    pub mtu: u16,
    /// Our hardware address.
    pub mac: Mac,
    /// Our addresses: the one of this device, and at a node without a WireGuard device those of the mesh.
    pub addresses: BTreeSet<IpNet>,
    /// The peers by their addresses.
    pub neighbours: BTreeMap<Ipv6Addr, Neighbour>,
}

/// A device as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedVxlan {
    /// Interface index.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The kind that the kernel names.
    pub kind: Option<String>,
    /// The alias.
    pub alias: Option<String>,
    /// The network identifier.
    pub vni: u32,
    /// The destination port.
    pub port: u16,
    /// The source ports.
    pub sources: (u16, u16),
    /// Whether it learns from what arrives.
    pub learning: bool,
    /// Our hardware address.
    pub mac: Option<Mac>,
    /// Addresses, without link-local ones.
    pub addresses: BTreeSet<IpNet>,
    /// The neighbour table, permanent entries.
    pub neighbours: BTreeMap<Ipv6Addr, Mac>,
    /// The forwarding table.
    pub remotes: BTreeMap<Mac, BTreeSet<IpAddr>>,
}

/// One change to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VxlanChange {
    /// Make it.
    Create,
    /// Remove it: it is ours, and what cannot be changed is not as it should be.
    Remove,
    /// Write our alias.
    SetAlias,
    /// Set the MTU, in bytes.
    SetMtu(u16),
    /// Add our address.
    AddAddress(IpNet),
    /// Remove an address.
    RemoveAddress(IpNet),
    /// Send frames for this hardware address there.
    SetRemote(Mac, IpAddr),
    /// Send frames for this hardware address there no more.
    RemoveRemote(Mac, IpAddr),
    /// This address has this hardware address.
    SetNeighbour(Ipv6Addr, Mac),
    /// It has none any more.
    RemoveNeighbour(Ipv6Addr),
    /// Bring it up.
    SetUp,
}

/// An interface of that name is somebody else's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign(pub String);

impl VxlanConfig {
    /// The changes from `observed` to this, the device first and coming up last.
    ///
    /// # Errors
    /// [`Foreign`]: it is not touched.
    pub fn diff(&self, observed: Option<&ObservedVxlan>, prune: bool) -> Result<Vec<VxlanChange>, Foreign> {
        let mut changes = Vec::new();
        let new = ObservedVxlan::default();
        let found = match observed {
            None => {
                changes.push(VxlanChange::Create);
                &new
            }
            Some(found) => {
                let kind = found.kind.as_deref().unwrap_or("a hardware link");
                let ours = kind == "vxlan" && (found.alias.as_deref() == Some(ALIAS) || self.is(found));
                if !ours {
                    return Err(Foreign(format!("its kind is {kind}")));
                }
                if self.is(found) {
                    found
                } else {
                    changes.extend([VxlanChange::Remove, VxlanChange::Create]);
                    &new
                }
            }
        };
        if found.alias.as_deref() != Some(ALIAS) {
            changes.push(VxlanChange::SetAlias);
        }
        if found.mtu != u32::from(self.mtu) {
            changes.push(VxlanChange::SetMtu(self.mtu));
        }
        changes
            .extend(found.addresses.difference(&self.addresses).map(|net| VxlanChange::RemoveAddress(*net)));
        changes.extend(self.addresses.difference(&found.addresses).map(|net| VxlanChange::AddAddress(*net)));
        self.diff_tables(found, prune, &mut changes);
        changes.extend((!found.up).then_some(VxlanChange::SetUp));
        Ok(changes)
    }

    /// Whether all that cannot be changed is as it should be.
    fn is(&self, found: &ObservedVxlan) -> bool {
        // The kernel keeps the end of the range as the first port that is not used.
        let sources = found.sources.0 == self.port && found.sources.1 == self.port.saturating_add(1);
        found.vni == self.vni
            && found.port == self.port
            && sources
            && !found.learning
            && found.mac == Some(self.mac)
    }

    fn diff_tables(&self, found: &ObservedVxlan, prune: bool, changes: &mut Vec<VxlanChange>) {
        let wanted: BTreeMap<Mac, IpAddr> =
            self.neighbours.values().map(|one| (one.mac, one.remote)).collect();
        for (mac, remotes) in &found.remotes {
            for remote in remotes {
                let gone = !wanted.contains_key(mac);
                // A second remote would get every frame too.
                if wanted.get(mac) != Some(remote) && (prune || !gone) {
                    changes.push(VxlanChange::RemoveRemote(*mac, *remote));
                }
            }
        }
        for (mac, remote) in &wanted {
            if !found.remotes.get(mac).is_some_and(|remotes| remotes.contains(remote)) {
                changes.push(VxlanChange::SetRemote(*mac, *remote));
            }
        }
        for (address, mac) in &found.neighbours {
            if prune && !self.neighbours.contains_key(address) {
                changes.push(VxlanChange::RemoveNeighbour(*address));
            } else if self.neighbours.get(address).is_some_and(|wanted| wanted.mac != *mac) {
                changes.push(VxlanChange::SetNeighbour(*address, self.neighbours[address].mac));
            }
        }
        for (address, neighbour) in &self.neighbours {
            if !found.neighbours.contains_key(address) {
                changes.push(VxlanChange::SetNeighbour(*address, neighbour.mac));
            }
        }
    }
}

/// The devices of a node for what they carry: one for each family that its underlay speaks. `remotes` are the peers' underlay addresses.
pub fn plan<'a>(
    local: &LocalNode,
    grants: &Grants,
    carried: Carried,
    peers: impl Iterator<Item = (&'a Peer, Vec<IpAddr>)> + Clone,
) -> Vec<VxlanConfig> {
    let Some(vxlan) = &local.vxlan else { return Vec::new() };
    let own = &local.underlay_addresses;
    let address_of = |site: &SiteName, node: &NodeName, outer_v6: bool| {
        address::carrier_address(&grants.mesh, site, node, carried, outer_v6)
    };
    let device = |outer_v6: bool| {
        if !own.is_empty() && own.iter().all(|ip| ip.is_ipv6() != outer_v6) {
            return None;
        }
        let address = address_of(&local.site, &local.name, outer_v6);
        let neighbours = peers.clone().filter_map(|(peer, remotes)| {
            let remote = remotes.into_iter().find(|ip| ip.is_ipv6() == outer_v6 && !own.contains(ip))?;
            let address = address_of(&peer.claim.site, &peer.name, outer_v6);
            Some((address, Neighbour { mac: address::carrier_mac(address), remote }))
        });
        Some(VxlanConfig {
            name: vxlan.device(carried, outer_v6)?,
            outer_v6,
            vni: vxlan.vni(carried),
            port: vxlan.port,
            mtu: local.underlay_mtu.saturating_sub(overhead(outer_v6)).max(1280),
            mac: address::carrier_mac(address),
            addresses: BTreeSet::from([IpNet::V6(Ipv6Net::new_assert(address, 64))]),
            neighbours: neighbours.collect(),
        })
    };
    [false, true].into_iter().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VxlanConfig {
        let neighbour = |n: u8| {
            let address: Ipv6Addr = format!("fd00::{n}").parse().unwrap();
            (address, Neighbour { mac: [2, 0, 0, 0, 0, n], remote: IpAddr::from([192, 0, 2, n]) })
        };
        VxlanConfig {
            name: "sennitx4".parse().unwrap(),
            outer_v6: false,
            vni: 5182,
            port: 4789,
            mtu: 1450,
            mac: [2, 0, 0, 0, 0, 1],
            addresses: BTreeSet::from(["fd00::1/64".parse().unwrap()]),
            neighbours: [2, 3].map(neighbour).into(),
        }
    }

    fn standing(config: &VxlanConfig) -> ObservedVxlan {
        ObservedVxlan {
            index: 3,
            up: true,
            mtu: u32::from(config.mtu),
            kind: Some("vxlan".to_owned()),
            alias: Some(ALIAS.to_owned()),
            vni: config.vni,
            port: config.port,
            sources: (config.port, config.port + 1),
            learning: false,
            mac: Some(config.mac),
            addresses: config.addresses.clone(),
            neighbours: config.neighbours.iter().map(|(ip, one)| (*ip, one.mac)).collect(),
            remotes: config.neighbours.values().map(|one| (one.mac, BTreeSet::from([one.remote]))).collect(),
        }
    }

    #[test]
    fn a_device_as_it_should_be_is_left_alone_and_a_new_one_comes_up_last() {
        let config = config();
        assert_eq!(config.diff(Some(&standing(&config)), true), Ok(Vec::new()));
        let changes = config.diff(None, true).unwrap();
        assert_eq!(changes.first(), Some(&VxlanChange::Create));
        assert_eq!(changes.last(), Some(&VxlanChange::SetUp));
        assert_eq!(changes.len(), 9, "{changes:?}");
    }

    #[test]
    fn a_peer_that_moves_or_leaves_changes_its_own_entries_only() {
        let mut config = config();
        let before = standing(&config);
        let [two, three] = [2, 3].map(|n: u16| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n));
        let moved = IpAddr::from([192, 0, 2, 99]);
        config.neighbours.get_mut(&two).unwrap().remote = moved;
        let gone = config.neighbours.remove(&three).unwrap();
        let mac = config.neighbours[&two].mac;
        let expected = [
            VxlanChange::RemoveRemote(mac, IpAddr::from([192, 0, 2, 2])),
            VxlanChange::RemoveRemote(gone.mac, gone.remote),
            VxlanChange::SetRemote(mac, moved),
            VxlanChange::RemoveNeighbour(three),
        ];
        assert_eq!(config.diff(Some(&before), true).unwrap(), expected);
        assert_eq!(
            config.diff(Some(&before), false).unwrap(),
            [expected[0], expected[2]],
            "nothing is pruned yet"
        );
    }

    #[test]
    fn what_cannot_be_changed_is_made_anew_and_what_is_not_ours_is_left_alone() {
        let config = config();
        let mut other = standing(&config);
        other.vni = 7;
        let changes = config.diff(Some(&other), true).unwrap();
        assert_eq!(changes[..2], [VxlanChange::Remove, VxlanChange::Create]);
        other.alias = None;
        assert!(config.diff(Some(&other), true).is_err());
        let bridge = ObservedVxlan { kind: Some("bridge".to_owned()), ..standing(&config) };
        assert!(config.diff(Some(&bridge), true).is_err());
    }
}
