//! The mesh interface as a network link.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::local::InterfaceName;

/// The link as it should be, once the WireGuard device exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// Its name.
    pub name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Its addresses.
    pub addresses: BTreeSet<IpNet>,
}

/// The link as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLink {
    /// Interface index.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The kind that the kernel names (`IFLA_INFO_KIND`): "tun", "wireguard", "veth"; `None` for hardware.
    pub kind: Option<String>,
    /// The alias (`IFLA_IFALIAS`); ours is [`ALIAS`].
    pub alias: Option<String>,
    /// Its addresses, without the link-local ones that the kernel makes.
    pub addresses: BTreeSet<IpNet>,
}

/// The alias of links that are ours.
pub const ALIAS: &str = "sennit";

/// One change to the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkChange {
    /// Write our alias.
    SetAlias,
    /// Set the MTU, in bytes.
    SetMtu(u16),
    /// Add an address.
    AddAddress(IpNet),
    /// Remove an address.
    RemoveAddress(IpNet),
    /// Bring it up.
    SetUp,
}

impl LinkConfig {
    /// The changes from `observed` to this; bringing the link up is the last.
    pub fn diff(&self, observed: &ObservedLink) -> Vec<LinkChange> {
        let mut changes = Vec::new();
        if observed.alias.as_deref() != Some(ALIAS) {
            changes.push(LinkChange::SetAlias);
        }
        if observed.mtu != u32::from(self.mtu) {
            changes.push(LinkChange::SetMtu(self.mtu));
        }
        changes.extend(observed.addresses.difference(&self.addresses).map(|a| LinkChange::RemoveAddress(*a)));
        changes.extend(self.addresses.difference(&observed.addresses).map(|a| LinkChange::AddAddress(*a)));
        changes.extend((!observed.up).then_some(LinkChange::SetUp));
        changes
    }
}

/// The underlay as the kernel tells it: what the interface of the default route has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedUnderlay {
    /// Every global address of every interface but the mesh's.
    pub addresses: BTreeSet<IpAddr>,
    /// The global addresses of the interfaces that a default route leaves through, IPv4 first.
    pub default_route_addresses: Vec<IpAddr>,
    /// The names of those interfaces.
    pub default_route_interfaces: BTreeSet<InterfaceName>,
    /// The smallest MTU of those interfaces, in bytes.
    pub mtu: Option<u32>,
    /// Whether the kernel forwards packets, for IPv4 and IPv6; pods cannot reach the mesh without it.
    pub forwarding: (bool, bool),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_link_comes_up_last_and_a_right_one_is_left_alone() {
        let config = LinkConfig {
            name: "sennit0".parse().unwrap(),
            mtu: 1420,
            addresses: BTreeSet::from(["10.1.1.0/32".parse().unwrap()]),
        };
        let mut observed = ObservedLink {
            index: 5,
            up: false,
            mtu: 1500,
            kind: Some("tun".to_owned()),
            alias: None,
            addresses: BTreeSet::from(["10.9.9.9/32".parse().unwrap()]),
        };
        let changes = config.diff(&observed);
        assert_eq!(changes.len(), 5);
        assert_eq!(changes.last(), Some(&LinkChange::SetUp));
        observed = ObservedLink {
            up: true,
            mtu: 1420,
            alias: Some(ALIAS.to_owned()),
            addresses: config.addresses.clone(),
            ..observed
        };
        assert_eq!(config.diff(&observed), []);
    }
}
